"""Multiply-accumulates and accumulates of projections, from the counts that really entered the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from spikelm.codings.base import Coding, build_coding
from spikelm.codings.statistics import CountHistogram
from spikelm.energy.counts import Operations
from spikelm.energy.formulas.structure import projection_kind
from spikelm.energy.meter import EnergyMeter
from spikelm.neurons.adaptive import Adaptive
from spikelm.projection import Projection
from spikelm.registry import codings, neurons
from spikelm.weights import Int8Linear, choose_layout


@dataclass(frozen=True, kw_only=True)
class Synapses:
    """One projection on a text. Figures are means per token of the text, or shares.

    Attributes:
        path: dotted name.
        kind: ``projection`` or ``head``.
        calls: share of the tokens that reach it.
        inputs: D.
        outputs: O.
        weights: dtype of the weights: ``int8``, ``float32``, ...
        weight_bytes: of the whole matrix, scales not among them.
        scale_bytes: of the scales of int8 weights.
        neuron: registered name or class of the input neuron.
        spiking: whether the inputs are spikes.
        stateless_counts: whether they are the counts of ``adaptive``, whose encoding is a quantiser.
        spikes: inputs that are not zero.
        spike_sum: sum of |count|; 0 without spikes.
        silent: share of zeros among the inputs.
        silent_channels: channels that never fired.
        histogram: of the counts, None without spikes.
        layout: how int8 weights are laid out for decoding, None for others.
        union_inputs: inputs of which a batch of N needs the weights, mean over batches.
        union_calls: share of the batches that reach the projection.
    """

    path: str
    kind: str
    calls: float
    inputs: int
    outputs: int
    weights: str
    weight_bytes: int
    scale_bytes: int
    neuron: str
    spiking: bool
    stateless_counts: bool
    spikes: float
    spike_sum: float
    silent: float
    silent_channels: int
    histogram: CountHistogram | None
    layout: str | None
    union_inputs: float
    union_calls: float

    @property
    def dense_macs(self) -> float:
        """D O for every call."""
        return self.calls * self.inputs * self.outputs

    @property
    def largest(self) -> int:
        """Largest |count| that occurred, at least 1; 0 without spikes."""
        return 0 if self.histogram is None else self.histogram.needed

    @property
    def event_driven(self) -> bool:
        """Whether a kernel here reads the weights of inputs that fired and no others."""
        return self.layout == "in_out"

    @property
    def arithmetic(self) -> str:
        """Type of number of the products: int8 weights before floating inputs are multiplied as float32."""
        return "float32" if self.weights == "int8" and not self.spiking else self.weights

    @property
    def weight_bits(self) -> int:
        """Bits of a weight."""
        return 8 * self.weight_bytes // (self.inputs * self.outputs)

    @property
    def activation_bits(self) -> int:
        """Bits of the quantised activation for its counts: ceil(log2(T + 1)), and a sign if there are any.

        T is the largest |count|, the time steps of a unary code (Yan et al., arXiv 2409.08290).
        """
        signed = self.histogram is not None and self.histogram.negative
        return self.largest.bit_length() + signed

    def operations(self) -> Operations:
        """Multiply-accumulates of the product, and the accumulates that stand for them (unary)."""
        effective = self.spikes * self.outputs
        return Operations(
            dense_macs=self.dense_macs,
            effective_macs=effective,
            macs_without_spikes=0.0 if self.spiking else effective,
            accumulates=self.spike_sum * self.outputs,
        )

    def coding(self, coding: Coding) -> dict[str, Any]:
        """What a coding sends, in the window of the largest count, and what adding it up costs.

        accumulates: one addition per event and output. plane_additions: with weighted micro-steps the sums
        of S planes are shifted and added, S - 1 additions per output and call (shifts are free).
        """
        assert self.histogram is not None
        found = self.histogram.statistics(coding)
        if found is None:
            return {"not_applicable": f"{coding.name} has no code for negative counts"}
        weighted = any(coding.weight(step, found.limit) != 1 for step in range(found.steps))
        planes = self.calls * self.outputs * (found.steps - 1) if weighted else 0.0
        return {
            "micro_steps": found.steps,
            "events_per_input": found.events_per_channel,
            "sparsity": found.sparsity,
            "accumulates": found.events_per_channel * self.inputs * self.calls * self.outputs,
            "plane_additions": planes,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        counted = {name: self.coding(build_coding(name)) for name in codings.names()} if self.spiking else {}
        own = self.operations()
        return {
            "kind": self.kind,
            "calls": self.calls,
            "in_features": self.inputs,
            "out_features": self.outputs,
            "weights": self.weights,
            "neuron": self.neuron,
            "spiking": self.spiking,
            "dense_macs": own.dense_macs,
            "effective_macs": own.effective_macs,
            "macs_without_spikes": own.macs_without_spikes,
            "accumulates": own.accumulates,
            "spikes": self.spikes,
            "spike_sum": self.spike_sum,
            "silent": self.silent,
            "silent_channels": self.silent_channels,
            "largest_count": self.largest,
            "quantised_bits": self.activation_bits if self.spiking else None,
            "layout": self.layout,
            "codings": counted,
        }


def synapses(part: Projection, meter: EnergyMeter, silent: float | None) -> Synapses:
    """A projection as the meter saw it.

    Args:
        part: the projection.
        meter: after the text was read.
        silent: share of silent counts by which int8 weights are laid out; None if it is not known.
    """
    linear, neuron = part.linear, part.neuron
    entry = meter.counts.get(part.path)
    read = max(meter.tokens, 1)
    own = 0.0 if entry is None else float(entry.tokens)
    nonzero = 0.0 if entry is None else float(entry.nonzero)
    magnitude = 0.0 if entry is None or not neuron.spiking else float(entry.magnitude)
    fired = 0 if entry is None else int(entry.fired.count_nonzero())
    union = meter.unions.get(part.path)
    batches = 0.0 if union is None else union.groups
    weight = cast(Tensor, linear.weight)
    counts_int8 = isinstance(linear, Int8Linear) and neuron.spiking
    return Synapses(
        path=part.path,
        kind=projection_kind(part),
        calls=own / read,
        inputs=part.in_features,
        outputs=part.out_features,
        weights=str(weight.dtype).removeprefix("torch."),
        weight_bytes=weight.numel() * weight.element_size(),
        scale_bytes=4 * linear.scales.numel() if isinstance(linear, Int8Linear) else 0,
        neuron=_neuron_name(part),
        spiking=neuron.spiking,
        stateless_counts=isinstance(neuron, Adaptive),
        spikes=nonzero / read,
        spike_sum=magnitude / read,
        silent=1.0 - nonzero / (own * part.in_features) if own else 1.0,
        silent_channels=part.in_features - fired,
        histogram=meter.histograms.get(part.path, CountHistogram()) if neuron.spiking else None,
        layout=choose_layout(silent) if counts_int8 else None,
        union_inputs=union.active / batches if union is not None and batches else 0.0,
        union_calls=union.touched / batches if union is not None and batches else 0.0,
    )


def _neuron_name(part: Projection) -> str:
    kind = type(part.neuron)
    return next((name for name in neurons.names() if neurons.get(name) is kind), kind.__name__)
