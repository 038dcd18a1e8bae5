"""``rwkv``: the channel mix of RWKV-4 (arXiv 2305.13048, equations 19 to 21), SpikeGPT's spiking RFFN.

Token shift, then sigmoid(W_r x_r) * W_v relu(W_k x_k)^2.
State: {"shift": [B, D], and the input neurons' states under "key", "value", "receptance"}. Deviations: none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from spikelm.activations import lerp, sigmoid, squared_relu
from spikelm.build import Build
from spikelm.errors import ConfigError
from spikelm.recurrence import Context, Part, memory_dtype, token_shift
from spikelm.registry import channels
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register


@channels.register("rwkv")
class RWKVChannel(Part):
    """RWKV-4 channel mix.

    Args:
        build: place in the model.
        expand: width of the hidden layer in units of D.
    """

    def __init__(self, build: Build, *, expand: float = 4.0) -> None:
        """Parameters are set by ``spikelm.initialisation``."""
        super().__init__()
        D = build.hidden_size
        hidden = int(D * expand)
        if hidden < 1:
            raise ConfigError(
                f"channel rwkv: expand {expand} of {D} features leaves none; choose a larger one"
            )
        self.hidden_size = D
        self.depth_left = 1.0 - build.layer / build.num_layers
        self.mix_k = nn.Parameter(torch.ones(D))
        self.mix_r = nn.Parameter(torch.ones(D))
        self.key = build.projection("key", D, hidden, shard="column")
        self.value = build.projection("value", hidden, D, shard="row")
        self.receptance = build.projection("receptance", D, D)

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        """No previous token."""
        dtype = dtype or torch.float32
        state: State = {"shift": torch.zeros(batch, self.hidden_size, device=device, dtype=dtype)}
        for name in ("key", "value", "receptance"):
            child = cast(Part, getattr(self, name))
            state[name] = child.init_state(batch, device, dtype, max_len)
        return state

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One token."""
        out, new = self._mix(x, cast(Tensor, state["shift"]).to(x.dtype), state, ctx)
        new["shift"] = x.to(memory_dtype(x))
        return out, new

    def sequence(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """T tokens: the step on all of them, once the previous tokens are known."""
        previous, shift = token_shift(x, cast(Tensor, state["shift"]), ctx)
        out, new = self._mix(x, previous, state, ctx)
        new["shift"] = shift
        return out, new

    def _mix(self, x: Tensor, previous: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        new: State = {}
        k, new["key"] = self.key(lerp(previous, x, self.mix_k), state["key"], ctx)
        v, new["value"] = self.value(squared_relu(k), state["value"], ctx)
        r, new["receptance"] = self.receptance(lerp(previous, x, self.mix_r), state["receptance"], ctx)
        return sigmoid(r) * v, new

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """One token."""
        to_key, to_receptance = plan.shift(x, state["shift"], [self.mix_k, self.mix_r])
        key = plan.relu_squared(plan.child(self.key, to_key, state["key"]))
        value = plan.child(self.value, key, state["value"])
        return plan.gate(plan.child(self.receptance, to_receptance, state["receptance"]), value)
