"""What flows into the projections of a trained model, and how much the loss cares about what comes out.

One pass forward and backward over the calibration windows, on the model as it was trained (float weights, its
own neurons): the inputs of a projection are not those that earlier converted layers would give it. For every
projection a uniform sample of its input rows is kept (bounded memory), and the mean square of the loss
gradient at every output: the diagonal of the empirical Fisher information, by which errors of different
projections can be compared and added.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spikelm.errors import DataError
from spikelm.evaluation.segments import Segment
from spikelm.model import SpikeLM
from spikelm.projection import Projection
from spikelm.quantisation.text import batches
from spikelm.recurrence import EMPTY, Context

ROWS = 512
"""Input rows kept of a projection."""
MEMORY = 1 << 30
"""Bytes of all kept rows together; with more or wider projections fewer rows are kept of each."""
FEWEST = 64
"""Rows kept of a projection in any case."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What calibration found at one projection.

    Args:
        rows: inputs float32 [R, D] of R tokens, a uniform sample.
        fisher: float32 [O], mean square of d loss / d output over tokens (loss in nats, summed over tokens).
        tokens: tokens seen.
    """

    rows: Tensor
    fisher: Tensor
    tokens: int


class _Reservoir:
    """A uniform sample of rows: those with the smallest random keys."""

    def __init__(self, path: str, size: int) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
        self.size, self.tokens = size, 0
        self.rows: Tensor | None = None
        self.keys = torch.zeros(0)
        self.squares: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        keys = torch.rand(rows.shape[0], generator=self.generator)
        self.tokens += rows.shape[0]
        if self.rows is not None:
            # Only rows that may stay are joined.
            if len(self.keys) == self.size:
                stay = keys < self.keys.max()
                rows, keys = rows[stay], keys[stay]
            rows, keys = torch.cat([self.rows, rows]), torch.cat([self.keys, keys])
        keep = torch.topk(keys, min(self.size, len(keys)), largest=False, sorted=False).indices
        self.rows, self.keys = rows[keep].clone(), keys[keep]

    def add_squares(self, squares: Tensor) -> None:
        self.squares = squares if self.squares is None else self.squares + squares


def calibrate(
    model: SpikeLM,
    projections: Mapping[str, Projection],
    windows: Sequence[Segment],
    *,
    batch_size: int = 4,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Sample]:
    """Run the windows through the model and keep what the search needs.

    Args:
        model: in evaluation mode, float32; its parameters are frozen by this call.
        projections: path -> projection to look at.
        windows: what to read.
        batch_size: windows side by side.
        advance: called with tokens done.

    Returns:
        Path -> sample; projections that saw no token (an expert that got none) are left out.

    Raises:
        DataError: the loss is not finite.
    """
    width = sum(projection.in_features for projection in projections.values())
    size = max(FEWEST, min(ROWS, MEMORY // max(4 * width, 1)))
    found = {path: _Reservoir(path, size) for path in projections}
    model.requires_grad_(False)
    handles = [model.embedding.register_forward_hook(_differentiable)]
    for path, projection in projections.items():
        handles.append(projection.register_forward_hook(_observe(found[path]), with_kwargs=True))
    try:
        for inputs, targets, valid in batches(windows, batch_size):
            device = model.embedding.weight.device
            inputs, targets, valid = inputs.to(device), targets.to(device), valid.to(device)
            ctx = Context(valid=None if bool(valid.all()) else valid)
            logits, _ = model(inputs, None, ctx)
            nats = torch.nn.functional.cross_entropy(logits[valid].float(), targets[valid], reduction="sum")
            if not bool(torch.isfinite(nats)):
                raise DataError(
                    "the loss on the calibration text is not finite; the checkpoint cannot be calibrated"
                )
            nats.backward()
            if advance is not None:
                advance(int(valid.sum()))
    finally:
        for handle in handles:
            handle.remove()
    samples = {}
    for path, reservoir in found.items():
        if reservoir.rows is None or reservoir.tokens == 0:
            continue
        squares = reservoir.squares
        fisher = torch.zeros(projections[path].out_features) if squares is None else squares.cpu()
        samples[path] = Sample(rows=reservoir.rows, fisher=fisher / reservoir.tokens, tokens=reservoir.tokens)
    return samples


def _differentiable(_: Any, __: Any, output: Tensor) -> Tensor:
    """Let gradients begin at the embedding, so that none is computed for weights."""
    return output.requires_grad_(True)


def _observe(reservoir: _Reservoir) -> Callable[..., None]:
    def hook(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: tuple[Tensor, Any]) -> None:
        x, y = args[0], output[0]
        ctx: Context = args[2] if len(args) > 2 else kwargs.get("ctx", EMPTY)
        valid = ctx.valid if x.dim() == 3 else None
        rows = _valid(x.detach(), valid).float().cpu()
        if rows.shape[0]:
            reservoir.add(rows)
        if y.requires_grad:
            y.register_hook(lambda g: reservoir.add_squares(_valid(g, valid).float().square().sum(0)))

    return hook


def _valid(x: Tensor, valid: Tensor | None) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if valid is None else x[valid]
