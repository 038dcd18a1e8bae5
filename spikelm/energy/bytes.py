"""Bytes that a token moves, from DRAM and inside the chip, for a batch of N sequences decoded together.

The residency rule. A step is one token of each of N sequences.

- Activations of a step are always on the chip.
- ``all``: weights and the states of all sequences fit into the on-chip memory together. Nothing comes from
  DRAM once they are there.
- ``state``: the states fit, with the weights they do not. Every weight that a step needs comes from DRAM
  once per step, for all N rows together: the sweep over the weights is longer than the memory, so none is
  still there when it is needed again. No part of them is pinned.
- ``nothing``: the states do not fit either; each is read from DRAM, and what changed is written back, for
  every token.

Weights are skipped only where a kernel of this package skips them: int8 weights behind a spiking neuron that
are laid out event-driven (``in_out``). A batch needs the union of the rows that its tokens fired. Everything
else (float weights, dense int8, scales, biases, norms) is read whole. An expert is read by a step in which
any token chose it.

Inside the chip every row of the batch reads the weights that it uses itself, from a memory as large as
asked for: no reuse in registers or smaller memories is assumed. What comes from DRAM is also written there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

from torch import nn

from spikelm import state as states
from spikelm.energy.activity import Activity
from spikelm.energy.census import Census, calls
from spikelm.energy.reading import Reading
from spikelm.energy.synapses import Synapses
from spikelm.mixers.softmax import SoftmaxMixer
from spikelm.mixers.spiking_attention import SpikingAttention
from spikelm.model import SpikeLM
from spikelm.projection import Projection
from spikelm.recurrence import Part

RULE = (
    "activations stay on the chip; states stay if those of the whole batch fit; weights stay only if they "
    "fit beside the states, otherwise each one needed comes from DRAM once per step for the whole batch"
)
VALUE = 4
"""Bytes of an activation and of a float32 number of the state."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of a state that one token reads and writes."""

    read: float = 0.0
    written: float = 0.0

    @property
    def both(self) -> float:
        """Read and written."""
        return self.read + self.written


@singledispatch
def traffic(part: nn.Module, activity: Activity) -> Traffic:
    """Bytes of a part's own state that a token moves, without those of the parts inside it.

    The default: all of it is read and written once.
    """
    size = own_state(part, 1)
    return Traffic(read=size, written=size)


@traffic.register
def _(part: SoftmaxMixer, activity: Activity) -> Traffic:
    """Keys and values of all tokens that are seen and of the sinks are read, one of each is written."""
    window = getattr(part, "window", None)
    each = 2 * part.key.out_features * VALUE
    seen = activity.keys(window) - 1 + part.sinks  # the token's own key is at hand
    return Traffic(read=seen * each + 8, written=each + 8)


@traffic.register
def _(part: SpikingAttention, activity: Activity) -> Traffic:
    """Without a decay only the rows of channels that fired are touched (kernels/plan/steps_spiking.h)."""
    pairs = activity.pairs.get(part.path)
    size = own_state(part, 1)
    if part.decay is not None or pairs is None or part._key_dim() == 1:
        return Traffic(read=size, written=size)
    row = part.head_dim * VALUE
    rest = size - part.num_heads * part._key_dim() * row
    return Traffic(read=(pairs.written + pairs.read) * row + rest, written=pairs.written * row + rest)


def own_state(part: nn.Module, max_len: int) -> int:
    """Bytes of a part's own state of one sequence."""
    if not isinstance(part, Part):
        return 0
    state = part.init_state(1, "meta", max_len=max_len)
    own = (value for value in state.values() if not isinstance(value, dict))
    return sum(value.numel() * value.element_size() for value in own)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What of a model does not depend on the batch.

    Attributes:
        held: bytes of one sequence's state, with room for the longest text that was read.
        traffic: of the whole state, one token.
        vectors: bytes of parameters that are no matrices of projections and no embedding.
        embedding: bytes of one row of the embedding.
        resident: bytes of all parameters.
        activations: bytes of activations that a token moves inside the chip.
    """

    held: int
    traffic: Traffic
    vectors: int
    embedding: int
    resident: int
    activations: float


def sizes(model: SpikeLM, reading: Reading, found: Census) -> Sizes:
    """Measure a model's parameters and state; ``found`` tells its activations."""
    longest = int(reading.activity.contexts.max())
    shares = calls(model, reading)
    moved = Traffic()
    for path, module in model.named_modules():
        if isinstance(module, Part):
            own = traffic(module, reading.activity)
            share = shares[path]
            moved = Traffic(read=moved.read + share * own.read, written=moved.written + share * own.written)
    matrices = set()
    for module in model.modules():
        if isinstance(module, Projection) and isinstance(module.linear, nn.Linear):
            matrices.add(id(module.linear.weight))
    vectors = sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if id(parameter) not in matrices and name != "embedding.weight" and not name.startswith("sinks.")
    )
    table = model.embedding.weight
    tied = model.config.tie_word_embeddings
    return Sizes(
        held=states.state_bytes(model.empty_state(1, "meta", max_len=longest)),
        traffic=moved,
        vectors=vectors,
        embedding=table.shape[1] * table.element_size(),
        resident=vectors
        + (0 if tied else table.numel() * table.element_size())
        + sum(entry.weight_bytes + entry.scale_bytes for entry in reading.synapses),
        activations=VALUE * found.total().values,
    )


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes of matrices that one token moves: as the kernels do it, and if every weight is read."""

    dram: float
    dense_dram: float
    on_chip: float
    dense_on_chip: float


def weights(entries: Sequence[Synapses], batch: int) -> Weights:
    """Of all projections, one token of a batch of N, if nothing stays on the chip.

    Args:
        entries: every projection, their unions measured for the same N.
        batch: 1 or that N.
    """
    dram = dense_dram = on_chip = dense_on_chip = 0.0
    for entry in entries:
        each = entry.weight_bytes / entry.inputs
        if batch == 1:
            reached, needed = entry.calls, entry.spikes
        else:
            reached, needed = entry.union_calls, entry.union_inputs
        whole = reached * entry.weight_bytes
        scales = reached * entry.scale_bytes
        dense_dram += (whole + scales) / batch
        dram += ((needed * each if entry.event_driven else whole) + scales) / batch
        own = entry.calls * entry.weight_bytes
        dense_on_chip += own + entry.calls * entry.scale_bytes
        on_chip += (entry.spikes * each if entry.event_driven else own) + entry.calls * entry.scale_bytes
    return Weights(dram=dram, dense_dram=dense_dram, on_chip=on_chip, dense_on_chip=dense_on_chip)


def moved(model_sizes: Sizes, entries: Sequence[Synapses], batch: int, on_chip_bytes: int) -> dict[str, Any]:
    """One entry of ``bytes`` in the JSON.

    Args:
        model_sizes: of the model.
        entries: every projection.
        batch: 1, or the N that the unions were measured for.
        on_chip_bytes: size of the on-chip memory.
    """
    s, w = model_sizes, weights(entries, batch)
    residency = "nothing"
    if batch * s.held <= on_chip_bytes:
        residency = "all" if s.resident + batch * s.held <= on_chip_bytes else "state"
    away = residency != "all"
    state_dram = s.traffic.both if residency == "nothing" else 0.0
    vectors_dram = s.vectors / batch if away else 0.0
    row_dram = float(s.embedding) if away else 0.0
    parts = {
        "weights": {
            "dram_per_token": w.dram if away else 0.0,
            "dense_dram_per_token": w.dense_dram if away else 0.0,
            "on_chip_per_token": w.on_chip,
            "dense_on_chip_per_token": w.dense_on_chip,
            "skipped": 1.0 - w.dram / w.dense_dram if w.dense_dram else 0.0,
        },
        "state": {"dram_per_token": state_dram, "on_chip_per_token": s.traffic.both, "held": batch * s.held},
        "vectors": {"dram_per_token": vectors_dram, "on_chip_per_token": float(s.vectors)},
        "embedding": {"dram_per_token": row_dram, "on_chip_per_token": float(s.embedding)},
        "activations": {"on_chip_per_token": s.activations},
    }
    dram = sum(part.get("dram_per_token", 0.0) for part in parts.values())
    dense_dram = dram + parts["weights"]["dense_dram_per_token"] - parts["weights"]["dram_per_token"]
    used = sum(part["on_chip_per_token"] for part in parts.values())
    # State that goes back to DRAM is read once more; what comes from there is written once.
    dense_used = used + w.dense_on_chip - w.on_chip
    return {
        "batch": batch,
        "residency": residency,
        "dram_per_token": dram,
        "dense_dram_per_token": dense_dram,
        "on_chip_per_token": used + dram,
        "dense_on_chip_per_token": dense_used + dense_dram,
        **parts,
    }
