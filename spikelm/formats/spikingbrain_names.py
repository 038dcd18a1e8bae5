"""The names SpikingBrain-7B publishes its weights under, and ours.

Two layouts share them. The float release holds the gates in two matrices, ``gk_proj.0.weight``,
``gk_proj.1.weight`` and ``gk_proj.1.bias``. W8ASpike holds one, ``gk_proj.weight`` and ``gk_proj.bias``, and
beside every projection ``weight_quantizer.scales`` [outputs, inputs / group, 1], with the weights still
floats: their integers are round(weight / scale), groups being runs of neighbouring inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from spikelm.formats.spikingbrain_config import Published

SCALES = "weight_quantizer.scales"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One published tensor.

    Attributes:
        published: its name.
        ours: the parameter of our model, without the prefix of a checkpoint.
        shape: what it must have.
        quantiser: name of the scales that go with it, or None.
    """

    published: str
    ours: str
    shape: tuple[int, ...]
    quantiser: str | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which of the variants a folder holds.

    Attributes:
        quantised: whether projections have scales (W8ASpike).
        merged_gate: whether a gate is one matrix.
    """

    quantised: bool
    merged_gate: bool

    @classmethod
    def of(cls, names: Collection[str]) -> Layout:
        """The layout that the names of the tensors tell."""
        return cls(
            quantised=any(name.endswith(f".{SCALES}") for name in names),
            merged_gate=any(name.endswith(".attn.gk_proj.weight") for name in names),
        )


def entries(published: Published, layout: Layout) -> Iterator[Entry]:
    """Every tensor a folder must hold, scales beside their weights, in the order of the model."""
    D, V = published.hidden, published.vocab
    yield Entry(published="model.embeddings.weight", ours="embedding.weight", shape=(V, D))
    for layer in range(published.layers):
        yield from _block(published, layout, layer)
    yield Entry(published="model.norm.weight", ours="norm.weight", shape=(D,))
    if not published.tied:
        yield Entry(published="lm_head.weight", ours="head.linear.weight", shape=(V, D))


def _block(published: Published, layout: Layout, layer: int) -> Iterator[Entry]:
    there, here = f"model.layers.{layer}.", f"blocks.{layer}."
    D, F, narrow = published.hidden, published.channel, published.kv_heads * published.head_dim

    def vector(theirs: str, ours: str, size: int) -> Entry:
        return Entry(published=there + theirs, ours=here + ours, shape=(size,))

    def matrix(theirs: str, ours: str, shape: tuple[int, int]) -> Entry:
        scales = f"{there}{theirs}.{SCALES}" if layout.quantised else None
        return Entry(
            published=f"{there}{theirs}.weight",
            ours=f"{here}{ours}.linear.weight",
            shape=shape,
            quantiser=scales,
        )

    yield vector("attn_norm.weight", "mixer_norm.weight", D)
    for theirs, ours, width in (("q", "query", D), ("k", "key", narrow), ("v", "value", narrow)):
        yield matrix(f"attn.{theirs}_proj", f"mixer.{ours}", (width, D))
        yield vector(f"attn.{theirs}_proj.bias", f"mixer.{ours}.bias", width)
    if layer not in published.attention:
        if layout.merged_gate:
            yield matrix("attn.gk_proj", "mixer.gate_high", (narrow, D))
            yield vector("attn.gk_proj.bias", "mixer.gate_high.bias", narrow)
        else:
            yield matrix("attn.gk_proj.0", "mixer.gate_low", (published.gate_rank, D))
            yield matrix("attn.gk_proj.1", "mixer.gate_high", (narrow, published.gate_rank))
            yield vector("attn.gk_proj.1.bias", "mixer.gate_high.bias", narrow)
        yield vector("attn.g_norm.weight", "mixer.output_norm.weight", published.head_dim)
    yield matrix("attn.o_proj", "mixer.output", (D, D))
    yield vector("mlp_norm.weight", "channel_norm.weight", D)
    yield matrix("mlp.gate_proj", "channel.gate", (F, D))
    yield matrix("mlp.up_proj", "channel.up", (F, D))
    yield matrix("mlp.down_proj", "channel.down", (D, F))
