"""``swiglu``: the gated channel of LLaMA-like models (SwiGLU of arXiv 2002.05202, equation 6).

y = W_down (silu(W_gate x) * W_up x).
State: the input neurons' states under "gate", "up", "down". Deviations: none.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from spikelm.activations import silu
from spikelm.build import Build
from spikelm.errors import ConfigError
from spikelm.recurrence import Context, Part
from spikelm.registry import channels
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register

PROJECTIONS = ("gate", "up", "down")


@channels.register("swiglu")
class SwiGLU(Part):
    """Gated linear unit with silu.

    Args:
        build: place in the model.
        hidden: width of the hidden layer; None: ``expand`` times D.
        expand: width of the hidden layer in units of D, rounded up to a multiple of ``multiple_of``.
        multiple_of: see ``expand``; a given ``hidden`` is not rounded.
    """

    def __init__(
        self, build: Build, *, hidden: int | None = None, expand: float = 8 / 3, multiple_of: int = 64
    ) -> None:
        """Parameters are set by ``spikelm.initialisation``."""
        super().__init__()
        D = build.hidden_size
        self.hidden = hidden_width("channel swiglu", D, hidden, expand, multiple_of)
        self.gate = build.projection("gate", D, self.hidden, shard="column")
        self.up = build.projection("up", D, self.hidden, shard="column")
        self.down = build.projection("down", self.hidden, D, shard="row")

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        """States of the three input neurons."""
        return {
            name: cast(Part, getattr(self, name)).init_state(batch, device, dtype, max_len)
            for name in PROJECTIONS
        }

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One token."""
        return self._mix(x, state, ctx)

    def sequence(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """T tokens: the step on all of them (what remembers anything is inside the projections)."""
        return self._mix(x, state, ctx)

    def _mix(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        new: State = {}
        gate, new["gate"] = self.gate(x, state["gate"], ctx)
        up, new["up"] = self.up(x, state["up"], ctx)
        y, new["down"] = self.down(silu(gate) * up, state["down"], ctx)
        return y, new

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """One token."""
        gate = plan.child(self.gate, x, state["gate"])
        up = plan.child(self.up, x, state["up"])
        return plan.child(self.down, plan.swish(gate, up), state["down"])


def hidden_width(what: str, features: int, hidden: int | None, expand: float, multiple_of: int) -> int:
    """Width of a hidden layer: ``hidden``, or ``expand * features`` rounded up to a multiple.

    Args:
        what: the part, for errors.
        features: D.
        hidden: the width itself, or None.
        expand: width in units of D.
        multiple_of: the width is the next multiple of it.

    Raises:
        ConfigError: nothing would be left, or a number is not positive.
    """
    if hidden is not None:
        if hidden < 1:
            raise ConfigError(f"{what}: hidden is {hidden}; expected a positive number of features, or null")
        return hidden
    if multiple_of < 1:
        raise ConfigError(f"{what}: multiple_of is {multiple_of}; expected a positive whole number")
    if expand <= 0:
        raise ConfigError(f"{what}: expand is {expand}; expected a positive number")
    # Rounded first: 8 / 3 * 768 is 2048 and not the float above it.
    return multiple_of * max(1, math.ceil(round(expand * features / multiple_of, 6)))
