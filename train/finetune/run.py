"""One fine-tuning run: one seed, epochs until the dev figure no longer rises, the best weights kept.

A run is a pure function of its configuration, data and seed, and continues after the last whole epoch: an
interrupted run gives the same numbers as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from spikelm.classifier import Classifier, load_classifier, save_classifier
from spikelm.errors import CheckpointError, TrainingError
from spikelm.meter import Meter
from spikelm.recurrence import Context
from spikelm.train.files import why
from spikelm.train.finetune.batches import Batch, Encoded, ordered_batches, training_batches
from spikelm.train.finetune.metrics import Metrics, measure
from spikelm.train.finetune.state import Epochs, read_state, read_tensors, write_state
from spikelm.train.log import RunLog
from spikelm.train.optim import (
    build_optimizers,
    load_optimizer_tensors,
    optimizer_step,
    optimizer_tensors,
    set_learning_rate,
)
from spikelm.train.reporting import Bar
from spikelm.train.schedule import learning_rate
from spikelm.train.spikes import SpikeWarnings, brief
from spikelm.train.stop import StopSignals

if TYPE_CHECKING:
    from spikelm.tokenizer import Tokenizer
    from spikelm.train.finetune.config import FinetuneConfig

BEST = "best"
FREE_KEYS = frozenset({"out", "resume", "device", "seed", "seeds", "patience", "gradient_checkpointing"})
"""Configuration keys that may differ on resume (``seed`` is compared as the run's own)."""


@dataclass(frozen=True, kw_only=True)
class Sets:
    """The encoded sets of a task."""

    train: Encoded
    dev: Encoded
    test: Encoded


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What one seed gave.

    Attributes:
        seed: its seed.
        folder: the classifier with the best dev figure (None when no epoch was finished).
        epochs: epochs done.
        best_epoch: the one that was kept.
        dev, test: figures of the kept weights; test is None without a test set or after an interruption.
        spikes: what the meter saw on the test set (else dev): totals and figures per projection.
        seconds: training time.
        interrupted: name of the signal that ended the run early, or None.
    """

    seed: int
    folder: Path | None
    epochs: int
    best_epoch: int
    dev: dict[str, Any] | None
    test: dict[str, Any] | None
    spikes: dict[str, Any] | None
    history: list[dict[str, Any]]
    seconds: float
    interrupted: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = dataclasses.asdict(self)
        return {**values, "folder": None if self.folder is None else str(self.folder)}


class Run:
    """One seed.

    Args:
        config: what to do.
        model: the classifier with its initial weights.
        tokenizer: saved beside it.
        sets: the texts.
        seed: of order and dropout.
        out: folder of this run.
        device: where to compute.
        identity: what the numbers depend on besides configuration and seed.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        model: Classifier,
        tokenizer: Tokenizer,
        sets: Sets,
        *,
        seed: int,
        out: Path,
        device: torch.device,
        identity: Mapping[str, Any],
    ) -> None:
        self.config, self.tokenizer, self.sets, self.seed, self.out = config, tokenizer, sets, seed, out
        self.device = device
        self.model = model.to(device)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self.log = RunLog(out / "log.jsonl")
        self.state = Epochs()
        self._optimizers = build_optimizers(self.model, config.optim)
        self._parameters = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        settings = {
            key: value for key, value in config.model_dump(mode="json").items() if key not in FREE_KEYS
        }
        self._identity = {"config": settings, "seed": seed, **identity}
        self._warnings = SpikeWarnings()
        self._steps_per_epoch = -(-len(sets.train) // config.batch_size)

    @property
    def done(self) -> int:
        """Texts that epochs before this process have used."""
        return self.state.epoch * len(self.sets.train)

    def open(self) -> bool:
        """Make the folder and take up what an earlier process left; whether there was something.

        Raises:
            CheckpointError: another run lies here, ``resume`` is false, or its files are damaged.
            TrainingError: the folder cannot be written.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                f"the folder {self.out} cannot be made ({why(error)}); choose another: out=FOLDER"
            ) from error
        found = read_state(self.out)
        if found is None:
            self.log.start()
            return False
        epochs, identity = found
        if not self.config.resume:
            raise CheckpointError(
                f"{self.out} holds a run already (epoch {epochs.epoch}); resume=true continues it, another "
                "out folder starts anew"
            )
        differing = sorted(_differences(self._identity, identity))
        if differing:
            raise CheckpointError(
                f"{self.out} holds another run ({', '.join(differing[:3])} differ); choose another out "
                "folder, or go back to that configuration"
            )
        tensors = read_tensors(self.out, epochs)
        weights = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
        self.model.load_state_dict(weights)
        load_optimizer_tensors(
            self._optimizers,
            {n.removeprefix("optimizer/"): t for n, t in tensors.items() if n.startswith("optimizer/")},
        )
        self.state = epochs
        self.log.rewind(epochs.steps)
        return True

    def fit(self, bar: Bar, stop: StopSignals) -> RunResult:
        """Train to the end, or until a signal comes; then measure the kept weights.

        Raises:
            TrainingError: a loss or gradient is not finite.
            CheckpointError: the disk refuses.
        """
        config, state = self.config, self.state
        while not state.finished and stop.received is None:
            if state.epoch >= config.epochs or self._patience_ended():
                state.finished = True
                break
            self._epoch(bar, stop)
        if stop.received is not None:
            self.log.write(
                "interrupted", {"step": state.steps, "epoch": state.epoch, "signal": stop.received}
            )
            return self._result(None, None, stop.received)
        best = load_classifier(self.out / BEST, self.device)
        self.model.load_state_dict(best.state_dict())
        which = "test" if len(self.sets.test) else "dev"
        metrics, spikes = self.evaluate(getattr(self.sets, which))
        self.log.write(which if which == "test" else "final", {"step": state.steps, **metrics.to_dict()})
        return self._result(metrics.to_dict() if which == "test" else None, spikes, None)

    def evaluate(self, data: Encoded) -> tuple[Metrics, dict[str, Any]]:
        """Figures of the present weights on a set, and what the neurons did."""
        meter = Meter()
        answers = [0] * len(data)
        nats = 0.0
        self.model.eval()
        with torch.no_grad(), self._autocast():
            for batch in ordered_batches(data, self.config.batch_size):
                on = batch.to(self.device)
                scores = self.model.classify(on.tokens, Context(valid=on.valid, meter=meter))
                nats += float(F.cross_entropy(scores.float(), on.labels, reduction="sum"))
                for index, answer in zip(batch.index.tolist(), scores.argmax(1).tolist(), strict=True):
                    answers[index] = answer
        summary = meter.summary()
        self._summary = summary
        return measure(data.labels, answers, len(self.model.labels), nats), brief(summary)

    # --- inside ---------------------------------------------------------------------------------------------

    def _epoch(self, bar: Bar, stop: StopSignals) -> None:
        """One pass, dev figures, best weights, state; a signal leaves the epoch before as it was."""
        config, state = self.config, self.state
        started = time.perf_counter()
        self.model.train()
        nats, seen, right, norm, steps = 0.0, 0, 0, 0.0, state.steps
        lr = config.optim.lr
        for batch in training_batches(self.sets.train, config.batch_size, self.seed, state.epoch):
            if stop.received is not None:
                return
            lr = self._learning_rate(steps)
            loss, correct, norm = self._step(batch, steps, lr)
            steps += 1
            rows = len(batch.labels)
            nats, seen, right = nats + loss * rows, seen + rows, right + correct
            bar.advance(rows)
            bar.note(
                f"epoch {state.epoch + 1}, loss {nats / seen:.4f}, accuracy {right / seen:.1%}, lr {lr:.1e}"
            )
        dev, spikes = self.evaluate(self.sets.dev)
        figure = float(getattr(dev, config.metric))
        state.epoch, state.steps = state.epoch + 1, steps
        state.seconds += time.perf_counter() - started
        entry = {
            "step": steps,
            "epoch": state.epoch,
            "train_loss": nats / seen,
            "train_accuracy": right / seen,
            "dev": dev.to_dict(),
            "lr": lr,
            "grad_norm": norm,
            "seconds": round(state.seconds, 3),
        }
        better = figure > state.best
        if better:
            state.best, state.best_epoch = figure, state.epoch
            save_classifier(self.out / BEST, self.model, self.tokenizer)
        state.history.append(entry)
        state.finished = state.epoch >= config.epochs or self._patience_ended()
        write_state(self.out, state, self._identity, self._tensors())
        self.log.write("epoch", {**entry, **spikes})
        for text in self._warnings.check(self._summary):
            bar.say(f"warning: {text}")
            self.log.write("warning", {"step": steps, "text": text})
        bar.say(
            f"epoch {state.epoch}: dev {config.metric.replace('_', ' ')} {figure:.4f}, loss {dev.loss:.4f}"
            f"{', the best so far' if better else ''}"
        )

    def _step(self, batch: Batch, step: int, lr: float) -> tuple[float, int, float]:
        """Forward, backward, update: mean loss, right answers and gradient norm."""
        on = batch.to(self.device)
        ctx = Context(
            valid=on.valid,
            random=on.random(self.seed, self.done),
            losses=[],
            step=step,
        )
        with self._autocast():
            scores = self.model.classify(on.tokens, ctx)
        loss = F.cross_entropy(scores.float(), on.labels)
        value = float(loss.detach())
        total = loss if not ctx.losses else loss + torch.stack(ctx.losses).sum().float()
        if not math.isfinite(float(total.detach())):
            raise self._not_finite(f"the loss is {float(total.detach())}", step)
        torch.autograd.backward(total)
        set_learning_rate(self._optimizers, lr / self.config.optim.lr)
        report = optimizer_step(self._parameters, self._optimizers, clip=self.config.optim.clip)
        if not report.applied:
            bad = [name for found in report.bad for name in found.parameters]
            names = ", ".join(bad[:3]) or "its norm overflows"
            raise self._not_finite(f"the gradient is not finite ({names})", step)
        return value, int((scores.detach().argmax(1) == on.labels).sum()), report.grad_norm

    def _not_finite(self, what: str, step: int) -> TrainingError:
        message = (
            f"{what} in step {step + 1} (epoch {self.state.epoch + 1}, seed {self.seed}): stopped before the "
            "update; the epochs before are kept; lower optim.lr"
        )
        self.log.write("stopped", {"step": step + 1, "reason": message})
        return TrainingError(message)

    def _learning_rate(self, step: int) -> float:
        config = self.config
        return learning_rate(
            step,
            name=config.schedule.name,
            steps=self._steps_per_epoch * config.epochs,
            lr=config.optim.lr,
            min_lr=config.optim.min_lr,
            warmup=config.schedule.warmup,
            decay=config.schedule.decay,
        )

    def _patience_ended(self) -> bool:
        patience = self.config.patience
        return 0 < patience <= self.state.epoch - self.state.best_epoch and self.state.best_epoch > 0

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def _tensors(self) -> dict[str, torch.Tensor]:
        model = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        memory = {f"optimizer/{n}": value for n, value in optimizer_tensors(self._optimizers).items()}
        return {**model, **memory}

    def _result(
        self, test: dict[str, Any] | None, spikes: dict[str, Any] | None, interrupted: str | None
    ) -> RunResult:
        state = self.state
        return RunResult(
            seed=self.seed,
            folder=self.out / BEST if state.best_epoch else None,
            epochs=state.epoch,
            best_epoch=state.best_epoch,
            dev=state.history[state.best_epoch - 1]["dev"] if state.best_epoch else None,
            test=test,
            spikes=spikes,
            history=state.history,
            seconds=state.seconds,
            interrupted=interrupted,
        )


def _differences(mine: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    found: list[str] = []
    for key in mine.keys() | other.keys():
        a, b = mine.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, f"{prefix}{key}.")
        elif _jsoned(a) != _jsoned(b):
            found.append(prefix.removeprefix("config.") + key)
    return found


def _jsoned(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    return [_jsoned(item) for item in value] if isinstance(value, (list, tuple)) else value
