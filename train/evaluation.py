"""Evaluation during training: the same held-out blocks every time, in independent windows.

``spikelm eval`` measures a checkpoint properly; this is the quick figure of the log.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from spikelm.meter import Meter
from spikelm.recurrence import Context
from spikelm.train.batches import micro_batches
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
        backend: executes the model.
        blocks: held-out text.
        step: optimiser steps done.
        samples: blocks to use; 0 uses all of them once.
        rows: blocks of one pass; they bound the memory and do not change the result.
        stopped: asked between batches whether to give up.

    Returns:
        the evaluation and the meter's whole summary, or None when it was given up.
    """
    total = len(blocks) if samples == 0 else min(len(blocks), samples)
    meter = Meter()
    nats, count, nbytes = 0.0, 0, 0
    model = backend.model
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for first in range(0, total, rows):
                if stopped():
                    return None
                (piece,) = micro_batches(blocks, EVALUATION_SEED, first, min(rows, total - first), 1)
                piece = piece.to(backend.device)
                output = backend.loss(
                    piece.inputs, piece.targets, None, Context(reset=piece.reset, meter=meter)
                )
                nats += float(output.nats)
                count += piece.count
                nbytes += piece.nbytes
    finally:
        model.train()
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
