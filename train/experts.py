"""Mixtures of experts in training: the loads of all ranks, what they move, and how they look in the log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from spikelm.channels.moe import MoE
from spikelm.train.ranks import Ranks


def balance(model: nn.Module, loads: Mapping[str, Tensor], ranks: Ranks) -> dict[str, list[int]]:
    """Sum the loads of a step that was taken over the ranks, and let every mixture move its bias by them.

    Args:
        model: the core model.
        loads: path of a mixture -> int64 [experts], tokens that this rank's micro-batches sent to each.
        ranks: called by all of them together; each has run every layer.

    Returns:
        path -> tokens of the whole step for each expert.
    """
    if not loads:
        return {}
    paths = sorted(loads)
    together = ranks.total(torch.cat([loads[path] for path in paths])).cpu()
    pieces = together.split([len(loads[path]) for path in paths])
    for path, load in zip(paths, pieces, strict=True):
        cast(MoE, model.get_submodule(path)).balance(load)
    return {path: load.tolist() for path, load in zip(paths, pieces, strict=True)}


def add_loads(total: dict[str, list[int]], more: Mapping[str, Sequence[int]]) -> None:
    """Add the loads of one step to those of the steps before."""
    for path, load in more.items():
        before = total.get(path, [0] * len(load))
        total[path] = [a + b for a, b in zip(before, load, strict=True)]


def shares(loads: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
    """How evenly each mixture used its experts.

    Returns:
        path -> {``max_share``, ``min_share`` (of the routed tokens, by the busiest and the idlest expert;
        1 / experts for both would be even), ``entropy`` (of the shares, in units of its maximum: 1 is even,
        0 is one expert for all), ``shares`` (of every expert)}.
    """
    found: dict[str, dict[str, Any]] = {}
    for path, load in loads.items():
        total = sum(load)
        each = [count / total if total else 0.0 for count in load]
        entropy = -sum(share * math.log(share) for share in each if share)
        found[path] = {
            "max_share": round(max(each), 6),
            "min_share": round(min(each), 6),
            "entropy": round(entropy / math.log(len(each)), 6) if len(each) > 1 else 1.0,
            "shares": [round(share, 6) for share in each],
        }
    return found
