"""``parallel``: several mixers on one input, their outputs normalised and summed with learned weights.

SpikingBrain-76B (arXiv 2509.05276, section 3.1) runs linear attention beside softmax attention::

    y = sum_i w_i RMSNorm_i(mixer_i(x))

with a learned scalar w_i per branch, 1 / number of branches at the start, and a learned gain per feature in
each norm. State: {"branch0": ..., "branch1": ...}, those of the mixers. The report gives neither the kind of
norm nor the shape of the weights: RMSNorm and scalars are our reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from spikelm.build import Build
from spikelm.errors import ConfigError
from spikelm.recurrence import Context, Part, zero_invalid
from spikelm.registry import mixers
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register


@mixers.register("parallel")
class Parallel(Part):
    """Mixers side by side.

    Args:
        build: place in the model.
        branches: specifications of the mixers, for example [{"name": "gla_tied"}, {"name": "swa"}].

    Raises:
        ConfigError: fewer than two branches, or what a branch refuses.
    """

    def __init__(self, build: Build, *, branches: Sequence[Mapping[str, Any]] = ()) -> None:
        """Build the branches."""
        super().__init__()
        if not isinstance(branches, (list, tuple)) or len(branches) < 2:
            raise ConfigError(
                f"parallel branches is {branches!r}; expected a list of two mixers or more, "
                "such as [{name: gla}, {name: swa}]"
            )
        self.names = [f"branch{index}" for index in range(len(branches))]
        for index, (name, spec) in enumerate(zip(self.names, branches, strict=True)):
            self.add_module(name, build.child("mixer", name, spec))
            self.add_module(f"norm{index}", build.rms_norm(build.hidden_size))
        self.weight = nn.Parameter(torch.full((len(branches),), 1.0 / len(branches)))

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        """Those of the branches."""
        return {
            name: cast(Part, self.get_submodule(name)).init_state(batch, device, dtype, max_len)
            for name in self.names
        }

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One token, as the equation above says it."""
        return self._sum(x, state, ctx)

    def sequence(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """T tokens: every branch's own fast path."""
        y, new = self._sum(x, state, ctx)
        return zero_invalid(y, ctx), new

    def _sum(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        new: State = {}
        total: Tensor | None = None
        for index, name in enumerate(self.names):
            y, new[name] = self.get_submodule(name)(x, state[name], ctx)
            norm = cast(nn.RMSNorm, self.get_submodule(f"norm{index}"))
            y = norm(y.to(norm.weight.dtype)).to(y.dtype) * self.weight[index].to(y.dtype)
            total = y if total is None else total + y
        return cast(Tensor, total), new

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """One token."""
        total: Register | None = None
        for index, name in enumerate(self.names):
            y = plan.child(self.get_submodule(name), x, state[name])
            y = plan.norm(self.get_submodule(f"norm{index}"), y)
            y = plan.scale(y, float(self.weight[index]))
            total = y if total is None else plan.add(total, y)
        return cast("Register", total)
