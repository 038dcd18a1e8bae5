"""``mlp``: two projections, the channel of Spikformer and of the Spike-driven Transformer.

y = W_down activation(norm(W_up x)), a neuron before each projection (``placement: before``): the neuron
before ``down`` is the nonlinearity of the papers (arXiv 2209.15425: linear, BatchNorm, neuron, twice; arXiv
2307.01694: neuron, linear, BatchNorm, twice). State: the input neurons' states under "up" and "down".
Deviations: the norm is per token and stands behind ``up`` only, and ``relu`` before the neuron, so that
counting neurons and the continuous twin have a nonlinearity too; ``activation: none`` leaves it out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from spikelm.activations import squared_relu
from spikelm.build import Build
from spikelm.errors import ConfigError, nearest
from spikelm.norms import behind_spikes
from spikelm.recurrence import Context, Part
from spikelm.registry import channels
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register

ACTIVATIONS = ("relu", "relu2", "none")


@channels.register("mlp")
class MLP(Part):
    """Two-layer perceptron.

    Args:
        build: place in the model.
        expand: width of the hidden layer in units of D.
        norm: whether a norm stands behind ``up``.
        activation: ``relu``, ``relu2`` (its square) or ``none``.

    Raises:
        ConfigError: no hidden feature is left, or another activation.
    """

    def __init__(
        self, build: Build, *, expand: float = 4.0, norm: bool = True, activation: str = "relu"
    ) -> None:
        """Parameters are set by ``spikelm.initialisation``."""
        super().__init__()
        D, hidden = build.hidden_size, int(build.hidden_size * expand)
        if hidden < 1:
            raise ConfigError(
                f"channel mlp: expand {expand} of {D} features leaves none; choose a larger one"
            )
        if activation not in ACTIVATIONS:
            raise ConfigError(nearest("activation of channel mlp", activation, ACTIVATIONS))
        self.activation = activation
        # The norm looks at all hidden features, so that only an mlp without it can be split.
        self.up = build.projection("up", D, hidden, shard=None if norm else "column")
        self.up_norm = behind_spikes(build.norm(hidden)) if norm else nn.Identity()
        self.down = build.projection("down", hidden, D, shard=None if norm else "row")

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        """States of the two input neurons."""
        return {
            name: cast(Part, getattr(self, name)).init_state(batch, device, dtype, max_len)
            for name in ("up", "down")
        }

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One token."""
        return self._mix(x, state, ctx)

    def sequence(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """T tokens: the step on all of them (what remembers anything is inside the projections)."""
        return self._mix(x, state, ctx)

    def _mix(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        new: State = {}
        h, new["up"] = self.up(x, state["up"], ctx)
        h = self.up_norm(h)
        if self.activation != "none":
            h = torch.relu(h) if self.activation == "relu" else squared_relu(h)
        y, new["down"] = self.down(h, state["down"], ctx)
        return y, new

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """One token."""
        h = plan.child(self.up, x, state["up"])
        if not isinstance(self.up_norm, nn.Identity):
            h = plan.norm(self.up_norm, h)
        if self.activation == "relu2":
            h = plan.relu_squared(h)
        elif self.activation == "relu":
            h = plan.relu(h)
        return plan.child(self.down, h, state["down"])
