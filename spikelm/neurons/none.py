"""``none``: no neuron. What a model's continuous twin has in place of every neuron."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from spikelm.neurons.base import Neuron
from spikelm.recurrence import Context, zero_invalid
from spikelm.registry import neurons
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register


@neurons.register("none")
class Identity(Neuron):
    """y = x."""

    spiking: ClassVar[bool] = False

    def __init__(self, features: int) -> None:
        """No options: there is no firing rate to aim at."""
        super().__init__(features)

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """The input as it is, [B, D]."""
        return x, state

    def fast(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """The input [B, T, D], zero where invalid."""
        return zero_invalid(x, ctx), state

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """The input's own register."""
        return x
