"""Measured time and, where the machine has a counter, measured energy of decoding. No estimate is in here.

A model decodes a stretch of the text, one token after another at batch 1, as it does when it generates (the
tokens are those of the text, so that what fires is what the ledger counted). Int8 weights are laid out twice,
by the silent shares and all dense; both take turns.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikelm.decoding import DecodePlan
from spikelm.energy import counters
from spikelm.errors import PlanError
from spikelm.evaluation.corpus import Corpus
from spikelm.model import SpikeLM
from spikelm.projection import Projection
from spikelm.weights import Int8Linear, choose_layout, pack_model

LEAST_SECONDS = 0.25
"""A timed run lasts at least this long."""


@dataclass
class _Run:
    """One way to decode: ``step`` takes a token [1]; ``begin`` forgets the text. The plan uses the model.

    Seconds and joules are per token, one figure for every timed run.
    """

    model: SpikeLM
    begin: Callable[[], None]
    step: Callable[[Tensor], object]
    plan: DecodePlan | None
    seconds: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Figures of the JSON."""
        each = statistics.median(self.seconds)
        found: dict[str, Any] = {
            "seconds_per_token": each,
            "tokens_per_second": 1.0 / each,
            "all": list(self.seconds),
            "weight_bytes_per_token": None,
        }
        if self.plan is not None:
            read = sum(entry["bytes"] for entry in self.plan.statistics().values())
            calls = self.plan.statistics()["head"]["calls"]
            found["weight_bytes_per_token"] = read / calls
        return found


def measure(
    model: SpikeLM,
    corpus: Corpus,
    firing: Mapping[str, float],
    *,
    tokens: int = 128,
    repeats: int = 3,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The entry ``measured`` of the JSON.

    Args:
        model: in evaluation mode.
        corpus: the text that is decoded.
        firing: silent share of every projection with spikes, by which int8 weights are laid out.
        tokens: of one timed run.
        repeats: timed runs of each layout.
        device: where the model is.
    """
    target = torch.device(device)
    stream = _stream(corpus, tokens)
    runs, why = _runs(model, firing, tokens, target)
    counter, name = counters.find(target)
    with torch.no_grad():
        for run in runs.values():
            _time(run, stream[: min(8, tokens)], target, None)
            run.seconds.clear()
            if run.plan is not None:
                run.plan.clear_statistics()
        for _ in range(repeats):
            for run in runs.values():
                _time(run, stream, target, counter)
    best = runs.get("event_driven") or runs["dense"]
    found = {key: run.to_dict() for key, run in runs.items()}
    own = found.get("event_driven") or found["dense"]
    joules = statistics.median(best.joules) if best.joules else None
    return {
        "seconds_per_token": own["seconds_per_token"],
        "tokens_per_second": own["tokens_per_second"],
        "batch": 1,
        "threads": torch.get_num_threads() if best.plan is None else best.plan.threads,
        "tokens": tokens,
        "repeats": repeats,
        "how": "decode plan" if best.plan is not None else "the model's own step",
        "event_driven": found.get("event_driven"),
        "dense": found["dense"],
        "joules_per_token": joules,
        "counter": name,
        "why": why,
    }


def nothing(why: str) -> dict[str, Any]:
    """The entry ``measured`` where nothing was timed."""
    names = ("seconds_per_token", "tokens_per_second", "batch", "threads", "tokens", "repeats", "how")
    return {
        **dict.fromkeys(names),
        "event_driven": None,
        "dense": None,
        "joules_per_token": None,
        "counter": "no energy was measured",
        "why": why,
    }


def _runs(
    model: SpikeLM, firing: Mapping[str, float], tokens: int, device: torch.device
) -> tuple[dict[str, _Run], str | None]:
    """Ways to decode, event-driven only where some matrix is laid out so; and a sentence for the rest."""
    counted = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Projection) and isinstance(module.linear, Int8Linear) and module.neuron.spiking
    }
    events = [path for path in counted if choose_layout(firing.get(path)) == "in_out"]
    try:
        if device.type != "cpu":
            raise PlanError("decode plans run on CPUs")
        if not events:
            why = (
                "no matrix is silent enough for the event-driven layout"
                if counted
                else "float weights have no event-driven layout"
            )
            return {"dense": _planned(model, {}, bool(counted), tokens)}, why
        return {
            "event_driven": _planned(model, {path: firing[path] for path in events}, True, tokens),
            "dense": _planned(model, {}, True, tokens),
        }, None
    except PlanError as error:
        return {"dense": _stepped(model, tokens)}, f"no decode plan: {error}"


def _planned(model: SpikeLM, firing: Mapping[str, float], packed: bool, tokens: int) -> _Run:
    # A plan moves and packs the weights of its model: the caller's stay as they are.
    own = copy.deepcopy(model)
    if packed:
        pack_model(own, firing)
    plan = DecodePlan(own, slots=1, max_len=tokens + 1)
    return _Run(model=own, begin=lambda: plan.reset(0), step=plan.step, plan=plan)


def _stepped(model: SpikeLM, tokens: int) -> _Run:
    state = model.init_state(1, max_len=tokens + 1)

    def begin() -> None:
        nonlocal state
        state = model.init_state(1, max_len=tokens + 1)

    def step(token: Tensor) -> object:
        nonlocal state
        logits, state = model(token, state)
        return logits

    return _Run(model=model, begin=begin, step=step, plan=None)


def _stream(corpus: Corpus, tokens: int) -> Tensor:
    """The first tokens of the text, from the beginning again where it is too short, int64 [tokens, 1]."""
    text = np.concatenate(corpus.tokens)
    return torch.from_numpy(np.resize(text, tokens).astype(np.int64))[:, None]


def _time(run: _Run, stream: Tensor, device: torch.device, counter: counters.Counter | None) -> None:
    """One timed run: the stretch again and again until the clock has something to read."""
    columns = list(stream.to(device).unbind(0))
    passes = 0
    _wait(device)
    before = None if counter is None else counter.read()
    started = time.perf_counter()
    while passes == 0 or time.perf_counter() - started < LEAST_SECONDS:
        run.begin()
        for token in columns:
            run.step(token)
        _wait(device)
        passes += 1
    tokens = passes * len(columns)
    run.seconds.append((time.perf_counter() - started) / tokens)
    if counter is not None and before is not None:
        run.joules.append(counter.between(before, counter.read()) / tokens)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
