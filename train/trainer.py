"""The trainer: data order, schedule, log, evaluation, checkpoints; the arithmetic is the backend's.

    result = Trainer(TrainConfig.from_yaml("demo")).run()

A run is a pure function of its configuration and data: samples are keyed by their global index, evaluation
and written samples leave no trace in the random state, and all that a step needs is in a checkpoint. So a run
that was killed and resumed gives the same numbers as one that was not (fp32, one process, one machine).

On several ranks every rank runs this same loop; rank 0 prints, logs and renames. What one of them decides
from its own view (a signal, a loss that is not finite) is agreed on first, so that no rank waits for another.
"""

from __future__ import annotations

import contextlib
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from spikelm.errors import CheckpointError, TrainingError
from spikelm.provenance import versions
from spikelm.train.backend import Backend, build_backend, choose_device
from spikelm.train.bad_steps import BadSteps
from spikelm.train.checkpoints import CheckpointStore
from spikelm.train.evaluation import Evaluation
from spikelm.train.log import RunLog
from spikelm.train.loss_spikes import LossSpikes
from spikelm.train.metrics import Metrics
from spikelm.train.periodic import Periodic
from spikelm.train.preflight import Preflight, preflight
from spikelm.train.ranks import Ranks, join
from spikelm.train.reporting import Bar, ProgressFactory, silent_progress
from spikelm.train.result import TrainResult
from spikelm.train.saving import Saving
from spikelm.train.setup import build_model, load_text
from spikelm.train.spikes import SpikeWarnings
from spikelm.train.step import BadStep, StepRunner
from spikelm.train.stop import SIGNALS, StopSignals
from spikelm.train.trackers import Trackers
from spikelm.train.training_state import Identity, Progress
from spikelm.train.watchdog import DAY, LONG

if TYPE_CHECKING:
    from spikelm.train.config import TrainConfig


class Trainer:
    """One run.

    Args:
        config: what to do.
        progress: opens the progress bar (see :mod:`spikelm.train.reporting`); nothing is shown without one.
        title: what the bar calls the run.
        ranks: this process among those of the run; None takes the place that a launcher's variables give.

    Attributes:
        model: the core model; after :meth:`run` it has the trained weights (this rank's part of them under
            ZeRO stage 3).
        tokenizer: the run's tokenizer.
        log: the run's log, readable at any time.
        ranks: this process among those of the run.

    Raises:
        SpikeLMError: configuration, data or folder cannot be used.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        progress: ProgressFactory = silent_progress,
        title: str = "train",
        ranks: Ranks | None = None,
    ) -> None:
        """Load the text and build the model; the run's folder is not touched yet."""
        self.config = config
        local_rank = Ranks.from_environment().local_rank if ranks is None else ranks.local_rank
        device = choose_device(config.device, local_rank)
        self.ranks = join(config.timeout, device) if ranks is None else ranks
        if self.ranks.world_size * config.accumulation > config.batch_size:
            raise TrainingError(
                f"batch_size is {config.batch_size} for {self.ranks.world_size} ranks with accumulation "
                f"{config.accumulation}; each micro-batch needs a sample: raise batch_size or use fewer ranks"
            )
        self._open_bar = progress if self.ranks.main else silent_progress
        watch = self._watch = self.ranks.watchdog
        if config.init_from is not None and not Path(config.init_from).is_dir():
            raise CheckpointError(
                f"init_from is {config.init_from!r}, and there is no such folder; give a checkpoint's folder"
            )
        with watch.phase("reading the text", allowance=DAY):
            self._text = load_text(config.data, self._open_bar, config.batch_size)
        self.tokenizer = self._text.tokenizer
        with watch.phase("building the model", allowance=LONG):
            model = build_model(config, self.tokenizer)
            self._parameters = model.num_parameters()  # before ZeRO splits them
        self.out = Path(config.out)
        self._identity = Identity(
            config=config.model_dump(mode="json"),
            model=model.config.to_dict(),
            data=self._text.fingerprint(),
        )
        # Before anything is built together: ranks that differ are told so.
        with watch.phase("preflight"):
            self.preflight = preflight(
                self.ranks,
                config=self._identity.config,
                data=self._identity.data,
                out=self.out,
                keep=config.keep,
                parameters=self._parameters,
                device=device,
            )
        with watch.phase("building the backend", allowance=LONG):
            self._backend: Backend = build_backend(model, config, device, self.ranks)
        self.model = self._backend.model
        self._messages: list[str] = []
        self._trackers = Trackers(config, self.ranks.main, self._messages.append)
        self.log = RunLog(self.out / "log.jsonl", silent=not self.ranks.main, follower=self._trackers)
        self.store = CheckpointStore(self.out, config.keep, config.milestone_every, config.keep_best)
        self._state = Progress()
        self._interrupted: str | None = None
        """Name of the signal that ends the run on all ranks."""
        self._title = title
        self._warnings = SpikeWarnings()
        self._runner = StepRunner(config, self._backend, self._text.train)
        self._metrics = Metrics(config, self._backend, self.log, self._warnings, self._warn)
        self._loss_spikes = LossSpikes(config.loss_spike, config.schedule.warmup)
        self._periodic = Periodic(
            config, self._backend, self._text.valid, self.tokenizer, self.log, self._warnings, self._warn
        )
        self._saving = Saving(
            config,
            self.store,
            self._backend,
            self._runner,
            self.tokenizer,
            self._identity,
            self.log,
            self._warn,
            self._parameters,
        )
        self._bad = BadSteps(
            config, self.ranks, self.store, self._saving, self.log, self._finish_saving, self._warn
        )

    def check(self) -> Preflight:
        """Look whether the run could begin, or go on, without touching its folder.

        Raises:
            CheckpointError: the folder holds another run, or no checkpoint that can be used.
        """
        warnings: list[str] = []
        with self._watch.phase("resuming", allowance=LONG):
            self._saving.examine(warnings.append)
        return replace(self.preflight, warnings=(*self.preflight.warnings, *warnings))

    def run(self) -> TrainResult:
        """Train from the newest checkpoint of the run's folder, or from the start, to the last step.

        SIGINT, SIGTERM and SIGUSR1 end the run after the current step with a checkpoint. After an error,
        calling it again goes on from the newest checkpoint, or without one from the last step that was taken.

        Raises:
            TrainingError: the loss or a gradient is not finite (nothing was updated), or the folder is busy
                or cannot be written.
            CheckpointError: the folder holds another run, or no checkpoint that can be used.
        """
        config = self.config
        tokens = config.batch_size * config.data.block_length
        # What a refused step of an earlier call left behind.
        self._backend.clear_gradients()
        self._metrics.restart()
        self._bad.restart()
        with self.store.held(self.ranks), contextlib.closing(self._trackers), self._saving:
            with self._watch.phase("resuming", allowance=LONG):
                resumed = self._resume(self._messages)
            self._header()
            state = self._state
            self._metrics.measure(state)
            with (
                StopSignals() as stop,
                closing(self._runner),
                self._open_bar(self._title, config.steps * tokens, "tokens", state.step * tokens) as bar,
            ):
                self._stop, self._interrupted = stop, None
                if self.ranks.world_size > 1:
                    bar.say(self.preflight.line())
                for text in self.preflight.warnings:
                    self._warn(bar, text)
                if self._trackers.information is not None:
                    bar.say(self._trackers.information)
                self._pass_on(bar)
                self.model.train()
                if state.step > 0:
                    bar.say(f"continuing at step {state.step} of {config.steps} in {self.out}")
                    self._watch.beat(state.step)
                    if self._work(bar):
                        self._save(bar)
                saved = _place(state)
                while self._state.step < config.steps and not self._stopped():
                    before = self._state.step
                    self._train_step(bar)
                    self._watch.beat(self._state.step)
                    self._saving.check(bar)
                    self._pass_on(bar)
                    if self._state.step <= before:
                        continue
                    bar.advance(tokens)
                    self._work(bar)
                    if self._saving.due(self._state, self._stopped()):
                        self._save(bar)
                        saved = _place(self._state)
                used = self._text.train.epochs(config.seed, self._state.samples)
                self.log.write("data", {"step": self._state.step, "epochs": used})
                interrupted, step = self._interrupted, self._state.step
                if interrupted is not None and saved != _place(self._state):
                    # The signal came after it was asked whether to save, or after a step that does not count.
                    self._save(bar)
                self._finish_saving(bar)
                if interrupted is not None:
                    bar.say(f"{interrupted}: stopped after step {step}; the same command continues")
                    self.log.write("interrupted", {"step": step, "signal": interrupted})
                self._trackers.close()
                self._pass_on(bar)
            self.model.eval()
        return self._result(resumed, interrupted)

    def _work(self, bar: Bar) -> bool:
        with self._watch.phase("evaluation or sample"):
            return self._periodic.work(self._state, bar, self._stopped)

    def _finish_saving(self, bar: Bar) -> None:
        with self._watch.phase("checkpoint", allowance=LONG):
            self._saving.finish(bar)

    def _save(self, bar: Bar) -> None:
        with self._watch.phase("checkpoint", allowance=LONG):
            self._saving.save(self._state, bar)

    # --- one step -------------------------------------------------------------------------------------------

    def _train_step(self, bar: Bar) -> None:
        """One step, and what the configuration says about one that must not be taken."""
        state = self._state
        if state.samples in state.avoid:
            state.samples += self.config.batch_size
            self._runner.pass_over()
            return
        meter = self._metrics.meter(state.step)
        outcome = self._runner.take(state.samples, state.step, meter)
        if outcome.bad is not None:
            self._refuse(outcome.bad, bar, self.config.on_bad_step)
            return
        self._bad.good()
        norm = None if outcome.report is None else outcome.report.grad_norm
        loss = outcome.nats / outcome.count
        spike = self._loss_spikes.see(state, self.config.batch_size, loss, norm)
        spike = self._loss_spikes.agreed(spike, self.ranks)
        action = self.config.loss_spike.action
        if spike is not None and action == "rollback" and self._bad.newest(bar) >= 0:
            self._refuse(spike.bad_step(), bar, "rollback", updated=True)
            return
        lr = self._runner.learning_rate(state.step)
        self._metrics.count(state, outcome, lr, meter, bar)
        if spike is not None:
            self._bad.tell(spike, state, bar, stop=action != "warn")

    def _refuse(self, bad: BadStep, bar: Bar, policy: str, updated: bool = False) -> None:
        """Do what the policy says about a step that must not count; the run may go on at another place."""
        before = self._state
        self._state = self._bad.refuse(bad, before, bar, policy, updated)
        if self._state is not before:
            self._metrics.restart()

    # --- stopping -------------------------------------------------------------------------------------------

    def _stopped(self) -> bool:
        """Whether some rank was told to stop; asked by all of them together, answered alike."""
        self._watch.beat()
        if self._interrupted is None:
            got = self.ranks.totals(*[float(self._stop.received == name) for name in SIGNALS])
            told = (name for name, count in zip(SIGNALS, got, strict=True) if count)
            self._interrupted = next(told, None)
        return self._interrupted is not None

    # --- start and end --------------------------------------------------------------------------------------

    def _resume(self, messages: list[str]) -> int | None:
        """Go on from the newest checkpoint where there is one; its step, or None for a new run."""
        found = self._saving.resume(messages.append)
        if found is None:
            return None
        self._text.train.restore(found.data)
        self._state = found
        return found.step

    def _header(self) -> None:
        """First line of the log, or the line that says where the run went on."""
        step = self._state.step
        if step == 0:
            self.log.start()
        else:
            self.log.rewind(step)
        self.log.write(
            "run" if step == 0 else "resume",
            {
                "step": step,
                "config": self._identity.config,
                "model": self._identity.model,
                "parameters": self._parameters,
                "data": {**self._text.describe(), **self._identity.data},
                "backend": self._backend.name,
                "device": str(self._backend.device),
                "threads": torch.get_num_threads(),
                "versions": versions(),
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        )
        self.log.write("preflight", {"step": step, **self.preflight.to_dict()})

    def _pass_on(self, bar: Bar) -> None:
        """Warn of what was found where there was no bar."""
        while self._messages:
            self._warn(bar, self._messages.pop(0))

    def _warn(self, bar: Bar, text: str) -> None:
        bar.say(f"warning: {text}")
        self.log.write("warning", {"step": self._state.step, "text": text})

    def _result(self, resumed: int | None, interrupted: str | None) -> TrainResult:
        state = self._state
        steps = self.store.steps()
        return TrainResult(
            out=self.out,
            checkpoint=self.store.path(steps[-1]) if steps else self.out,
            step=state.step,
            steps=self.config.steps,
            tokens=state.tokens,
            seconds=state.seconds,
            tokens_per_second=state.tokens / max(state.seconds, 1e-9),
            parameters=self._parameters,
            train_loss=state.train_loss,
            evaluation=None if state.evaluation is None else Evaluation(**state.evaluation),
            resumed_from=resumed,
            interrupted=interrupted,
        )


def _place(state: Progress) -> tuple[int, int, int]:
    """What must differ for a checkpoint to say something new: also a step that was passed over."""
    return state.step, state.samples, len(state.avoid)
