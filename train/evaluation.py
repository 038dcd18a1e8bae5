"""Evaluation during training: the same held-out blocks every time, in independent windows.

``spikelm eval`` measures a checkpoint properly; this is the quick figure of the log.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from spikelm.meter import Meter, ProjectionCount
from spikelm.recurrence import Context
from spikelm.train.batches import micro_batches, pieces
from spikelm.train.ranks import Ranks
from spikelm.train.spikes import brief

if TYPE_CHECKING:
    from spikelm.data.blocks import TokenBlocks
    from spikelm.train.backend import Backend

# Held-out blocks are drawn with a seed of their own: every run sees the same ones.
EVALUATION_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of one evaluation.

    Attributes:
        step: optimiser steps done.
        loss: mean nats per token.
        bits_per_byte: bits per UTF-8 byte of the predicted text.
        perplexity: per token.
        tokens: tokens predicted.
        spike_rate: firing rate of spiking projections weighted by multiply-accumulates, None for a twin.
        spikes: totals and figures per projection (see :func:`spikelm.train.spikes.brief`).
    """

    step: int
    loss: float
    bits_per_byte: float
    perplexity: float
    tokens: int
    spike_rate: float | None
    spikes: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def bits_per_byte(nats: float, nbytes: int) -> float:
    """Summed nats over summed bytes, in bits; NaN where there are no bytes."""
    return nats / math.log(2.0) / nbytes if nbytes else math.nan


def evaluate(
    backend: Backend,
    blocks: TokenBlocks,
    *,
    step: int,
    samples: int,
    rows: int,
    stopped: Callable[[], bool],
) -> tuple[Evaluation, dict[str, Any]] | None:
    """Loss on held-out blocks, without a trace in the training run's random state.

    Args:
        backend: executes the model; every rank takes its share of the blocks.
        blocks: held-out text.
        step: optimiser steps done.
        samples: blocks to use; 0 uses all of them once.
        rows: blocks of one pass on one rank; they bound the memory and do not change the result.
        stopped: asked on all ranks between passes whether to give up.

    Returns:
        the evaluation and the meter's whole summary, or None when it was given up.
    """
    ranks = backend.ranks
    total = len(blocks) if samples == 0 else min(len(blocks), samples)
    meter = Meter()
    nats, count, nbytes = 0.0, 0, 0
    model = backend.model
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for first in range(0, total, rows * ranks.world_size):
                if stopped():
                    return None
                together = min(rows * ranks.world_size, total - first)
                ((start, mine),) = pieces(first, together, 1, ranks.rank, ranks.world_size)
                # Where weights are split, a rank without a block must still do its part of the pass.
                (piece,) = micro_batches(blocks, EVALUATION_SEED, start if mine else first, max(mine, 1), 1)
                piece = piece.to(backend.device)
                ctx = Context(reset=piece.reset, meter=meter if mine else None)
                output = backend.loss(piece.inputs, piece.targets, None, ctx)
                if mine:
                    nats += float(output.nats)
                    count += piece.count
                    nbytes += piece.nbytes
    finally:
        model.train()
    nats, *counts = ranks.totals(nats, count, nbytes)
    count, nbytes = (int(value) for value in counts)
    combine(meter, ranks)
    summary = meter.summary()
    spikes = brief(summary)
    mean = nats / max(count, 1)
    return (
        Evaluation(
            step=step,
            loss=mean,
            bits_per_byte=bits_per_byte(nats, nbytes),
            perplexity=math.exp(min(mean, 700.0)),
            tokens=count,
            spike_rate=spikes["spike_rate"],
            spikes=spikes,
        ),
        summary,
    )


def combine(meter: Meter, ranks: Ranks) -> None:
    """Make the sums of a meter those of all ranks (a rank may have seen nothing), and bring them to the CPU.

    One transfer and one sum for everything: a model has hundreds of projections.
    """
    mine = {
        path: [entry.spiking, entry.in_features, entry.out_features, path in meter.outside]
        for path, entry in meter.counts.items()
    }
    seen: dict[str, list[Any]] = {}
    for told in ranks.gather(mine):
        seen.update(told)
    if not seen:
        return
    parts = []
    for path in sorted(seen):
        entry = meter.counts.get(path)
        if entry is None:
            parts.append(torch.zeros(5 + seen[path][1], dtype=torch.float64, device=meter_device(meter)))
        else:
            sums = torch.stack([entry.tokens, entry.nonzero, entry.magnitude, entry.at_cap, entry.clipped])
            parts.append(torch.cat([sums, entry.fired.to(torch.float64)]))
    totals = ranks.total(torch.cat(parts).cpu())
    for path, sums in zip(sorted(seen), totals.split([len(part) for part in parts]), strict=True):
        spiking, inputs, outputs, outside = seen[path]
        meter.counts[path] = ProjectionCount(
            spiking=spiking,
            in_features=inputs,
            out_features=outputs,
            tokens=sums[0],
            nonzero=sums[1],
            magnitude=sums[2],
            at_cap=sums[3],
            clipped=sums[4],
            fired=sums[5:] > 0,
        )
        if outside:
            meter.outside.add(path)


def meter_device(meter: Meter) -> torch.device:
    """Where the sums of a meter are; the CPU for one that has seen nothing."""
    return next((entry.tokens.device for entry in meter.counts.values()), torch.device("cpu"))
