"""``ssa``: the spiking self-attention of Spikformer (arXiv 2209.15425, equations 4 to 6), over a text.

Query, key and value are spikes, there is no softmax, and what was read passes a neuron::

    Q, K, V = neuron(norm(x W))                       in {0, 1}
    S_t = a S_{t-1} + k_t^T v_t                       per head, [K, V]: how often key i fired with value j
    y_t = W_o neuron(scale * q_t S_t / n_t)

The last neuron is ``attention_neuron`` or, without one, the input neuron of the projection ``output``. With
a = 1 everything between the projections is additions: S_t counts, and q_t picks the rows to be added.

State and options: see :mod:`spikelm.mixers.spiking_attention`. Deviations: the sum reaches over the tokens
so far instead of the patches of an image (``causal: false`` gives the paper's form), its mean is taken
(``mean: false, scale: 0.125`` as published), the norm is per token, and the neurons run along the tokens,
where the paper repeats an image over four time steps. SDSA-3 and SDSA-4 of Spike-driven Transformer V2 (arXiv
2404.03663) are this mixer with an ``attention_neuron`` of fixed and of learned threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from spikelm.block import fire
from spikelm.mixers.spiking_attention import SpikingAttention
from spikelm.recurrence import Context
from spikelm.registry import mixers
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Register


@mixers.register("ssa")
class SSA(SpikingAttention):
    """Spikformer attention; options as in :class:`spikelm.mixers.spiking_attention.SpikingAttention`.

    ``attention_neuron`` None: none, the input neuron of ``output`` has this place.
    """

    def _operands(self, spikes: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = spikes
        return q, k, v

    def _finish(
        self, o: Tensor, spikes: tuple[Tensor, ...], state: State, ctx: Context
    ) -> tuple[Tensor, State]:
        return fire(self.attention_neuron, o.flatten(-2), state, ctx)

    def _lowered_operands(
        self, plan: Builder, spikes: Sequence[Register]
    ) -> tuple[Register | None, Register | None, Register]:
        q, k, v = spikes
        return q, k, v
