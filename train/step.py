"""One optimiser step on all ranks: forward, agreement, backward, update. Knows neither log nor policy."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spikelm import state as states
from spikelm.errors import GateError, TrainingError
from spikelm.meter import Meter
from spikelm.recurrence import Context
from spikelm.state import State
from spikelm.train.backend import Backend
from spikelm.train.batches import MicroBatch, pieces
from spikelm.train.experts import balance
from spikelm.train.optim import StepReport
from spikelm.train.prefetch import Prefetch
from spikelm.train.schedule import learning_rate
from spikelm.train.watchdog import LONG

if TYPE_CHECKING:
    from spikelm.data.samples import Samples
    from spikelm.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class BadStep:
    """Why a step was not taken, the same on every rank.

    Attributes:
        what: the loss or the gradient, in words.
        rank: the first rank where it happened, or -1 when no single one is to blame.
        micro_batch: index of its micro-batch on that rank, or -1.
        first, last: global numbers of the samples at fault (of the whole step where no rank is to blame).
        parameters: parameters whose gradient is not finite.
    """

    what: str
    rank: int
    micro_batch: int
    first: int
    last: int
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step gave, summed over the ranks.

    Attributes:
        nats: cross-entropy summed over the counted tokens.
        aux: auxiliary losses, each times the counted tokens of its micro-batch.
        count: targets that count.
        nbytes: UTF-8 bytes that they stand for.
        seconds: time of this rank.
        report: of the optimiser; None when the loss was not finite.
        bad: why no update was made, or None.
        loads: path of each mixture of experts -> tokens of the whole step that went to each expert (of a
            step that was taken).
        data_seconds: part of ``seconds`` in which this rank waited for its samples.
    """

    nats: float
    aux: float
    count: int
    nbytes: int
    seconds: float
    report: StepReport | None
    bad: BadStep | None
    data_seconds: float = 0.0
    loads: Mapping[str, list[int]] = field(default_factory=dict)


class StepRunner:
    """Takes steps.

    Args:
        config: batch size, accumulation, block length and seed.
        backend: executes passes and updates.
        blocks: the training samples.

    A carried run (``blocks.carried``) keeps the state of every lane of this rank between steps; row r of a
    step is always lane r.
    """

    def __init__(self, config: TrainConfig, backend: Backend, blocks: Samples) -> None:
        self._config, self._backend, self._blocks = config, backend, blocks
        self._prefetch = Prefetch(blocks, config, backend.ranks)
        self._carried = blocks.carried
        self._fresh = True
        self._lanes: dict[int, State] = {}
        """State of the lanes of each micro-batch, by its first lane."""

    def take(self, first: int, step: int, meter: Meter | None) -> StepOutcome:
        """Do the step whose samples begin at global number ``first``.

        Args:
            first: global number of the step's first sample.
            step: optimiser steps done, for schedules inside the model.
            meter: sees this rank's first micro-batch; None for no measurement.

        Returns:
            what it gave. When ``bad`` is set nothing was updated and every rank knows it.

        Raises:
            TrainingError: there is not one token to predict.
        """
        config, backend = self._config, self._backend
        ranks = backend.ranks
        watch, first_of_all = ranks.watchdog, LONG if self._fresh else 0.0  # kernels are compiled
        started = time.perf_counter()
        with watch.phase("data"):
            batches = self._prefetch.take(first)
        waited = time.perf_counter() - started
        mine = sum(batch.count for batch in batches)
        total, nbytes = (int(v) for v in ranks.totals(mine, sum(batch.nbytes for batch in batches)))
        if total == 0:
            last = first + config.batch_size - 1
            raise TrainingError(f"step {step + 1}: no token to predict in samples {first} to {last}")
        nats = torch.zeros((), dtype=torch.float64, device=backend.device)
        aux = torch.zeros((), dtype=torch.float64, device=backend.device)
        lanes: dict[int, State] = {}
        loads: dict[str, Tensor] = {}
        for index, on_host in enumerate(batches):
            batch = on_host.to(backend.device)
            last_one = index == len(batches) - 1
            ctx = Context(
                reset=batch.reset,
                random=batch.random(config.seed),
                meter=meter if index == 0 else None,
                losses=[],
                step=step,
                loads=loads,
            )
            lane = batch.first - first
            state = self._lanes.get(lane) if self._carried else None
            with watch.phase("forward", allowance=first_of_all):
                try:
                    output = backend.loss(batch.inputs, batch.targets, state, ctx, last=last_one)
                    value = float(output.loss.detach())
                except GateError:
                    # Kernels on CPUs refuse what would have made the loss NaN; this is the same bad step.
                    if not backend.forward_alone:
                        raise
                    value = math.nan
            if not ranks.agree(math.isfinite(value)):
                backend.clear_gradients()
                return StepOutcome(
                    nats=0.0,
                    aux=0.0,
                    count=total,
                    nbytes=nbytes,
                    seconds=time.perf_counter() - started,
                    report=None,
                    bad=self._bad_loss(value, on_host, index),
                )
            # Weighted by counted tokens, the pieces of all ranks add up to the gradient of the whole batch.
            with watch.phase("backward", allowance=first_of_all):
                backend.backward(output.loss * (batch.count / total), last=last_one)
            nats += output.nats
            aux += output.aux * batch.count
            if self._carried:
                lanes[lane] = states.detach(output.state)
        with watch.phase("update", allowance=first_of_all):
            report = backend.step(self._factor(step))
        self._fresh = False
        summed = ranks.totals(float(nats), float(aux))
        bad = None if report.applied else self._bad_gradient(report, batches, first)
        routed: dict[str, list[int]] = {}
        if bad is None:
            self._lanes = lanes
            routed = balance(backend.model, loads, ranks)
        return StepOutcome(
            nats=summed[0],
            aux=summed[1],
            count=total,
            nbytes=nbytes,
            seconds=time.perf_counter() - started,
            report=report,
            bad=bad,
            data_seconds=waited,
            loads=routed,
        )

    def pass_over(self) -> None:
        """Samples are left out: carried lanes begin anew, because their text goes on elsewhere."""
        self._lanes = {}

    def position(self, first: int) -> dict[str, Any]:
        """Where the samples from ``first`` on are found again (see :meth:`Samples.state`)."""
        return self._blocks.state(self._config.seed, first)

    def close(self) -> None:
        """End the threads that make samples ahead; :meth:`take` starts them again."""
        self._prefetch.close()

    def learning_rate(self, step: int) -> float:
        """Learning rate of 0-based step ``step``."""
        config = self._config
        return learning_rate(
            step,
            name=config.schedule.name,
            steps=config.steps,
            lr=config.optim.lr,
            min_lr=config.optim.min_lr,
            warmup=config.schedule.warmup,
            decay=config.schedule.decay,
        )

    def _factor(self, step: int) -> float:
        return self.learning_rate(step) / self._config.optim.lr

    # --- who was it -----------------------------------------------------------------------------------------

    def _bad_loss(self, value: float, batch: MicroBatch, index: int) -> BadStep:
        """All ranks tell what they saw; the first bad one is named."""
        told = self._backend.ranks.gather(
            {"loss": str(value), "good": math.isfinite(value), "first": batch.first, "last": batch.last}
        )
        rank = next(rank for rank, seen in enumerate(told) if not seen["good"])
        return BadStep(
            what=f"the loss is {told[rank]['loss']}",
            rank=rank,
            micro_batch=index,
            first=told[rank]["first"],
            last=told[rank]["last"],
        )

    def _bad_gradient(self, report: StepReport, batches: list[MicroBatch], first: int) -> BadStep:
        found = report.bad[0] if report.bad else None
        mine: dict[str, Any] = {"known": found is not None and found.micro_batch >= 0, "parameters": []}
        if found is not None:
            batch = batches[found.micro_batch]
            mine |= {"micro_batch": found.micro_batch, "first": batch.first, "last": batch.last}
            mine["parameters"] = list(found.parameters[:8])
        told = self._backend.ranks.gather(mine)
        rank = next((rank for rank, seen in enumerate(told) if seen["known"]), -1)
        # Where nobody saw it come in, it arose when the gradients were summed.
        whole = {"micro_batch": -1, "first": first, "last": first + self._config.batch_size - 1}
        seen = told[rank] if rank >= 0 else {**whole, "parameters": told[0]["parameters"]}
        names = ", ".join(seen["parameters"][:3]) or "its norm overflows"
        return BadStep(
            what=f"the gradient is not finite ({names})",
            rank=rank,
            micro_batch=seen["micro_batch"],
            first=seen["first"],
            last=seen["last"],
            parameters=tuple(seen["parameters"]),
        )

    # --- lanes ----------------------------------------------------------------------------------------------

    def lane_tensors(self) -> dict[str, Tensor]:
        """States of this rank's lanes as ``lanes/FIRST/NAME`` -> [lanes, ...]; none without carried state."""
        return {
            f"lanes/{lane:08d}/{name}": value
            for lane, state in self._lanes.items()
            for name, value in states.flatten(state).items()
        }

    def restore_lanes(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`lane_tensors`, given those of all ranks, however the lanes were split then.

        Raises:
            StateError: they do not fit the model.
        """
        self._lanes = {}
        if not self._carried or not tensors:
            return
        by_name: dict[str, list[tuple[int, Tensor]]] = {}
        for key, value in tensors.items():
            _, lane, name = key.split("/", 2)
            by_name.setdefault(name, []).append((int(lane), value))
        whole = {
            name: torch.cat([value for _, value in sorted(parts, key=lambda part: part[0])])
            for name, parts in by_name.items()
        }
        config, ranks = self._config, self._backend.ranks
        for start, rows in pieces(0, config.batch_size, config.accumulation, ranks.rank, ranks.world_size):
            like = self._backend.model.empty_state(rows, self._backend.device)
            mine = {
                name: value[start : start + rows].to(self._backend.device) for name, value in whole.items()
            }
            self._lanes[start] = states.unflatten(mine, like)


def in_words(bad: BadStep, step: int, micro_batches: int, ranks: int) -> str:
    """A bad step as the beginning of a sentence."""
    where = f" on rank {bad.rank}" if ranks > 1 and bad.rank >= 0 else ""
    place = f", micro-batch {bad.micro_batch + 1} of {micro_batches}" if bad.micro_batch >= 0 else ""
    return f"{bad.what} in step {step}{where}{place}, samples {bad.first} to {bad.last}"
