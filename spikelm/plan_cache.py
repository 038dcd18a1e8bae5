"""Decode plans that are kept with their model, so that a second text does not build one again.

A plan serves one text at a time: it is taken for as long as a text is written and given back afterwards.
Texts that are written in turns have a plan each; they share the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

import torch

from spikelm.decoding import DecodePlan
from spikelm.errors import PlanError
from spikelm.kernels.dispatch import AUTO, backend
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.recurrence import Context

logger = logging.getLogger(__name__)
_idle: WeakKeyDictionary[SpikeLM, list[DecodePlan]] = WeakKeyDictionary()
_lock = Lock()
_refused: WeakKeyDictionary[SpikeLM, str] = WeakKeyDictionary()


def wanted(model: SpikeLM, ctx: Context) -> bool:
    """Whether decoding is a plan's business: C on a CPU, no training, nobody who looks at single values.

    A plan counts for a plain meter; rasters and histograms are made of the counts of every token.

    A model in training mode is left alone: its parameters belong to an optimiser, perhaps in flat buffers.
    """
    if type(model) is not SpikeLM:
        return False
    counted = ctx.meter is None or (type(ctx.meter) is Meter and not ctx.meter.raster)
    plain = counted and ctx.coding is None and ctx.random is None
    weight = model.embedding.weight
    return (
        plain
        and not model.training
        and backend() in (AUTO, "c")
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


@contextmanager
def plan_of(model: SpikeLM, max_len: int) -> Iterator[DecodePlan | None]:
    """A plan with one slot for the time of the block; None where the model cannot be lowered (logged once).

    Args:
        model: float32 or int8 model on the CPU.
        max_len: tokens to make room for where memory grows.
    """
    with _lock:
        plan = _take(model, max_len)
    try:
        yield plan
    finally:
        if plan is not None:
            with _lock:
                _idle.setdefault(model, []).append(plan)


def _take(model: SpikeLM, max_len: int) -> DecodePlan | None:
    """An idle plan that still fits, or a new one; those that do not fit any more are dropped."""
    threads = torch.get_num_threads()
    idle = [plan for plan in _idle.get(model, []) if plan.threads == threads and not plan.stale(model)]
    _idle[model] = idle
    for plan in idle:
        if plan.max_len is None or plan.max_len >= max_len:
            idle.remove(plan)
            return plan
    try:
        return DecodePlan(model, slots=1, max_len=max_len)
    except PlanError as error:
        if _refused.get(model) != str(error):
            _refused[model] = str(error)
            logger.info("decoding step by step in Python: %s", error)
        return None
