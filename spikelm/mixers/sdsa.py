"""``sdsa``: the mask-and-add attention of the Spike-driven Transformer, over a text.

No product of matrices: spikes mask spikes, a running sum per channel passes a neuron, and its spikes mask
again (* is the product of zeros and ones, an AND)::

    version 1   y_t = W_o (q_t * neuron(sum_j k_j * v_j))      arXiv 2307.01694, equation 10: SDSA-1
    version 2   y_t = W_o (v_t * neuron(sum_j q_j))            arXiv 2404.03663: SDSA-2, without keys

The sum runs over the tokens so far, per channel, with the mean, decay and scale of
:mod:`spikelm.mixers.spiking_attention`. SDSA-3 and SDSA-4 of the second paper have Spikformer's matrix
between the spikes: mixer ``ssa`` with an ``attention_neuron`` of fixed and of learned threshold.

State and options: see that module; the memory is [B, H, 1, head_dim], one sum per channel. Deviations: as of
``ssa``; heads only matter for the decay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spikelm.block import fire
from spikelm.build import Build
from spikelm.errors import ConfigError
from spikelm.mixers.spiking_attention import NEURON, SpikingAttention
from spikelm.recurrence import Context
from spikelm.registry import mixers
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register

GAINS = {1: 16.0, 2: 4.0}
"""Initial gain of the neuron on the sum where the configuration names none.

At the start key and value fire together in 3% of the cases and a query in 17%: the gain lifts the mean of
that to the threshold. It is learned, a threshold per channel.
"""


@mixers.register("sdsa")
class SDSA(SpikingAttention):
    """Spike-driven self-attention.

    Args:
        build: place in the model.
        version: 1 or 2, see the module.
        options: as in :class:`spikelm.mixers.spiking_attention.SpikingAttention`; ``attention_neuron`` None:
            ``plif`` with a learned gain where the inputs of the projections are spikes, else none.

    Raises:
        ConfigError: another version.
    """

    def __init__(self, build: Build, *, version: int = 1, **options: Any) -> None:
        """Build what the version needs."""
        if version not in (1, 2):
            raise ConfigError(
                f"version of sdsa is {version}; expected 1 or 2 (SDSA-3 and SDSA-4 are the mixer ssa with an "
                "attention_neuron)"
            )
        self.version = version
        super().__init__(build, **options)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Keys are what version 2 leaves out."""
        return ("query", "key", "value") if self.version == 1 else ("query", "value")

    def _usual(self, spiking: bool) -> Mapping[str, Any] | None:
        return {**NEURON, "gain": GAINS[self.version]} if spiking else None

    def _key_dim(self) -> int:
        return 1

    def _operands(self, spikes: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        one = spikes[0].new_ones(*spikes[0].shape[:-1], 1)
        return one, one, spikes[1] * spikes[2] if self.version == 1 else spikes[0]

    def _finish(
        self, o: Tensor, spikes: tuple[Tensor, ...], state: State, ctx: Context
    ) -> tuple[Tensor, State]:
        mask, state = fire(self.attention_neuron, o.flatten(-2), state, ctx)
        return mask * spikes[0 if self.version == 1 else 1].flatten(-2), state

    def _lowered_operands(
        self, plan: Builder, spikes: Sequence[Register]
    ) -> tuple[Register | None, Register | None, Register]:
        return None, None, plan.multiply(spikes[1], spikes[2]) if self.version == 1 else spikes[0]

    def _lowered_finish(
        self, plan: Builder, o: Register, spikes: Sequence[Register], state: Fields
    ) -> Register:
        mask = super()._lowered_finish(plan, o, spikes, state)
        return plan.multiply(mask, spikes[0 if self.version == 1 else 1])
