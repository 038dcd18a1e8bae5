"""The trainer: data order, schedule, log, evaluation, checkpoints; the arithmetic is the backend's.

    result = Trainer(TrainConfig.from_yaml("demo")).run()

A run is a pure function of its configuration and data: samples are keyed by their global index, evaluation
and written samples leave no trace in the random state, and all that a step needs is in a checkpoint. So a run
that was killed and resumed gives the same numbers as one that was not (fp32, one process, one machine).
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spikelm.errors import CheckpointError, TrainingError
from spikelm.meter import Meter
from spikelm.provenance import versions
from spikelm.recurrence import Context
from spikelm.train.backend import Backend, TorchBackend, choose_device
from spikelm.train.batches import MicroBatch, describe, micro_batches
from spikelm.train.checkpoints import CheckpointStore
from spikelm.train.evaluation import Evaluation, bits_per_byte, evaluate
from spikelm.train.log import RunLog
from spikelm.train.optim import StepReport
from spikelm.train.reporting import Bar, ProgressFactory, printable, silent_progress
from spikelm.train.result import TrainResult
from spikelm.train.schedule import learning_rate
from spikelm.train.setup import build_model, load_text
from spikelm.train.spikes import SpikeWarnings, brief, spike_rate
from spikelm.train.stop import StopSignals
from spikelm.train.training_state import Identity, Progress, Record

if TYPE_CHECKING:
    from spikelm.train.config import TrainConfig


class Trainer:
    """One run.

    Args:
        config: what to do.
        progress: opens the progress bar (see :mod:`spikelm.train.reporting`); nothing is shown without one.
        title: what the bar calls the run.

    Attributes:
        model: the core model; after :meth:`run` it has the trained weights.
        tokenizer: the run's tokenizer.
        log: the run's log, readable at any time.

    Raises:
        SpikeLMError: configuration, data or folder cannot be used.
    """

    def __init__(
        self, config: TrainConfig, *, progress: ProgressFactory = silent_progress, title: str = "train"
    ) -> None:
        """Load the text and build the model; the run's folder is not touched yet."""
        self.config = config
        device = choose_device(config.device)
        self._text = load_text(config.data, progress)
        self.tokenizer = self._text.tokenizer
        self._backend: Backend = TorchBackend(build_model(config, self.tokenizer), config, device)
        self.model = self._backend.model
        self.out = Path(config.out)
        self.log = RunLog(self.out / "log.jsonl")
        self.store = CheckpointStore(self.out, config.keep)
        self._identity = Identity(
            config=config.model_dump(mode="json"),
            model=self.model.config.to_dict(),
            data=self._text.fingerprint(),
        )
        self._state = Progress()
        self._open_bar = progress
        self._title = title
        self._warnings = SpikeWarnings()
        self._spikes: dict[str, Any] | None = None
        self._interval_seconds, self._interval_tokens = 0.0, 0

    def run(self) -> TrainResult:
        """Train from the newest checkpoint of the run's folder, or from the start, to the last step.

        SIGINT and SIGTERM end the run after the current step with a checkpoint. After an error, calling it
        again goes on from the newest checkpoint, or without one from the last step that was taken.

        Raises:
            TrainingError: the loss or a gradient is not finite (nothing was updated), or the folder is busy
                or cannot be written.
            CheckpointError: the folder holds another run, or no checkpoint that can be used.
        """
        config = self.config
        tokens = config.batch_size * config.data.block_length
        # What a refused step of an earlier call left behind.
        self._backend.clear_gradients()
        self._interval_seconds, self._interval_tokens = 0.0, 0
        self.store.open()
        with self.store.locked():
            messages: list[str] = []
            resumed = self._resume(messages.append)
            state = self._state
            self._header()
            with (
                StopSignals() as stop,
                self._open_bar(self._title, config.steps * tokens, "tokens", state.step * tokens) as bar,
            ):
                for message in messages:
                    self._warn(bar, message)
                self.model.train()
                if state.step > 0:
                    bar.say(f"continuing at step {state.step} of {config.steps} in {self.out}")
                    self._make_up(bar, stop)
                while state.step < config.steps and stop.received is None:
                    self._train_step(bar)
                    bar.advance(tokens)
                    self._evaluate_if_due(bar, stop)
                    self._sample_if_due(bar, stop)
                    self._save_if_due(stop)
                if stop.received is not None:
                    bar.say(f"{stop.received}: stopped after step {state.step}; the same command continues")
                    self.log.write("interrupted", {"step": state.step, "signal": stop.received})
                interrupted = stop.received
            self.model.eval()
        return self._result(resumed, interrupted)

    # --- one step -------------------------------------------------------------------------------------------

    def _train_step(self, bar: Bar) -> None:
        """Forward, backward and update of one step; log line when due."""
        config, state, backend = self.config, self._state, self._backend
        started = time.perf_counter()
        logged = (state.step + 1) % config.log_every == 0 or state.step + 1 == config.steps
        meter = Meter() if logged else None
        batches = micro_batches(
            self._text.train, config.seed, state.samples, config.batch_size, config.accumulation
        )
        total = sum(batch.count for batch in batches)
        nats, aux = 0.0, 0.0
        if total == 0:
            raise TrainingError(f"step {state.step + 1}: no token to predict in {describe(batches)}")
        for index, on_host in enumerate(batches):
            batch = on_host.to(backend.device)
            ctx = Context(
                reset=batch.reset,
                random=batch.random(config.seed),
                meter=meter if index == 0 else None,
                losses=[],
                step=state.step,
            )
            output = backend.loss(batch.inputs, batch.targets, None, ctx)
            value = float(output.loss.detach())
            if not backend.agree(math.isfinite(value)):
                raise self._not_finite(f"the loss is {value}", batches[index : index + 1], index)
            # Weighted by counted tokens, the pieces add up to the gradient of the whole batch.
            backend.backward(output.loss * (batch.count / total), last=index == len(batches) - 1)
            nats += float(output.nats)
            aux += float(output.aux) * batch.count
        lr = self._learning_rate()
        report = backend.step(lr / config.optim.lr)
        if not report.applied:
            names = ", ".join(report.bad_parameters[:3]) or "the norm overflows"
            raise self._not_finite(f"the gradient is not finite ({names})", batches, None)

        # Only a step that was taken counts.
        state.nats += nats
        state.aux += aux
        state.count += total
        state.nbytes += sum(batch.nbytes for batch in batches)
        seconds = time.perf_counter() - started
        tokens = config.batch_size * config.data.block_length
        state.step += 1
        state.samples += config.batch_size
        state.tokens += tokens
        state.seconds += seconds
        self._interval_seconds += seconds
        self._interval_tokens += tokens
        if logged:
            self._log_step(bar, lr, report, meter)
        else:
            self._note(bar, lr)

    def _learning_rate(self) -> float:
        config = self.config
        return learning_rate(
            self._state.step,
            name=config.schedule.name,
            steps=config.steps,
            lr=config.optim.lr,
            min_lr=config.optim.min_lr,
            warmup=config.schedule.warmup,
            decay=config.schedule.decay,
        )

    def _not_finite(self, what: str, batches: list[MicroBatch], index: int | None) -> TrainingError:
        """The error for a step that must not be taken; it is logged too."""
        step = self._state.step + 1
        place = "" if index is None else f", micro-batch {index + 1} of {self.config.accumulation}"
        kept = self.store.steps()
        rest = f"{self.store.path(kept[-1])} is intact" if kept else "no checkpoint was written yet"
        message = (
            f"{what} in step {step}{place}, {describe(batches)}: stopped before the update; {rest}; "
            "lower optim.lr or look at these samples"
        )
        self.log.write("stopped", {"step": step, "reason": message})
        return TrainingError(message)

    # --- what happens between steps -------------------------------------------------------------------------

    def _log_step(self, bar: Bar, lr: float, report: StepReport, meter: Meter | None) -> None:
        state = self._state
        spikes: dict[str, Any] = {}
        if meter is not None:
            summary = meter.summary()
            spikes = brief(summary)
            self._spikes = spikes
            for text in self._warnings.check(summary):
                self._warn(bar, text)
        state.train_loss = state.nats / max(state.count, 1)
        rate = self._interval_tokens / max(self._interval_seconds, 1e-9)
        self._note(bar, lr)
        self.log.write(
            "step",
            {
                "step": state.step,
                "tokens": state.tokens,
                "loss": state.train_loss,
                "aux_loss": state.aux / max(state.count, 1),
                "bits_per_byte": bits_per_byte(state.nats, state.nbytes),
                "lr": lr,
                "grad_norm": report.grad_norm,
                "tokens_per_second": round(rate, 1),
                "seconds": round(state.seconds, 3),
                **spikes,
            },
        )
        state.nats, state.aux, state.count, state.nbytes = 0.0, 0.0, 0, 0
        self._interval_seconds, self._interval_tokens = 0.0, 0

    def _note(self, bar: Bar, lr: float) -> None:
        """Loss, bits per byte, learning rate and spike rate beside the bar."""
        state = self._state
        if state.count == 0:
            return
        text = f"loss {state.nats / state.count:.4f}, {bits_per_byte(state.nats, state.nbytes):.3f} bits/byte"
        if self._spikes is not None and self._spikes["spike_rate"] is not None:
            text += f", spikes {self._spikes['spike_rate']:.1%}"
        text += f", lr {lr:.2e}, step {state.step}"
        bar.note(text)

    def _evaluate_if_due(self, bar: Bar, stop: StopSignals) -> None:
        config, state = self.config, self._state
        blocks = self._text.valid
        every = config.eval_every
        due = state.step == config.steps or (every > 0 and state.step > 0 and state.step % every == 0)
        if blocks is None or not due or state.evaluated == state.step or stop.received is not None:
            return
        found = evaluate(
            self._backend,
            blocks,
            step=state.step,
            samples=config.batch_size * config.eval_batches,
            rows=max(1, config.batch_size // config.accumulation),
            stopped=lambda: stop.received is not None,
        )
        if found is None:
            return
        evaluation, summary = found
        for text in self._warnings.check(summary):
            self._warn(bar, text)
        state.evaluated, state.evaluation = state.step, evaluation.to_dict()
        self.log.write("evaluation", state.evaluation)
        rate = spike_rate(summary)
        spikes = "" if rate is None else f", spike rate {rate:.1%}"
        bar.say(
            f"step {state.step}: held out {evaluation.bits_per_byte:.4f} bits/byte, "
            f"loss {evaluation.loss:.4f} over {evaluation.tokens} tokens{spikes}"
        )

    def _sample_if_due(self, bar: Bar, stop: StopSignals) -> None:
        config, state = self.config, self._state
        every = config.sample_every
        due = every > 0 and (state.step % every == 0 or state.step == config.steps)
        if not due or state.sampled == state.step or stop.received is not None:
            return
        from spikelm.generation import generate
        from spikelm.sampling import Sampler

        self.model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            sampler = Sampler(temperature=0.8, top_p=0.95, seed=config.seed)
            text = ""
            for piece in generate(
                self.model, self.tokenizer, config.sample_prompt, config.sample_tokens, sampler
            ):
                text += piece.text
                if stop.received is not None:
                    break
        self.model.train()
        if stop.received is not None:
            return
        state.sampled = state.step
        self.log.write("sample", {"step": state.step, "prompt": config.sample_prompt, "text": text})
        bar.say(f"step {state.step} writes: {printable(config.sample_prompt + text)}")

    def _make_up(self, bar: Bar, stop: StopSignals) -> None:
        """Evaluation and sample that a stop signal prevented, and a checkpoint that knows of them."""
        state = self._state
        before = state.evaluated, state.sampled
        self._evaluate_if_due(bar, stop)
        self._sample_if_due(bar, stop)
        if (state.evaluated, state.sampled) != before:
            self._save()

    def _save_if_due(self, stop: StopSignals) -> None:
        """Checkpoint every N steps, at the end, and when asked to stop."""
        config, step = self.config, self._state.step
        every = config.checkpoint_every
        if step == config.steps or stop.received is not None or (every > 0 and step % every == 0):
            self._save()

    def _save(self) -> Path:
        def write(folder: Path) -> None:
            self._backend.save(folder, self.tokenizer)

        return self.store.save(Record(progress=self._state, identity=self._identity), write)

    # --- start and end --------------------------------------------------------------------------------------

    def _resume(self, warn: Any) -> int | None:
        """Restore the newest usable checkpoint; the step it was made at, or None for a new run.

        Raises:
            CheckpointError: the folder holds a run and ``resume`` is false, or it is another run.
        """
        found = self.store.newest(warn)
        if found is None:
            return None
        folder, record = found
        if not self.config.resume:
            raise CheckpointError(
                f"{self.out} holds a run already (step {record.progress.step}); resume=true continues it, "
                "another out folder starts anew"
            )
        differences = self._identity.differences(record.identity)
        if differences:
            more = f" (and {len(differences) - 1} more keys differ)" if len(differences) > 1 else ""
            raise CheckpointError(
                f"{self.out} holds another run: {differences[0]}{more}; "
                "choose another out folder, or go back to that configuration"
            )
        before = record.identity.config.get("steps")
        if before != self.config.steps:
            warn(f"steps changed from {before} to {self.config.steps}; the schedule follows from here on")
        step = record.progress.step
        if step > self.config.steps:
            raise CheckpointError(
                f"{self.out} has done {step} steps, more than steps={self.config.steps}; raise steps"
            )
        self._backend.load(folder)
        # Only a run that is certainly this one may move or remove checkpoints.
        self.store.adopt(step, warn)
        self._state = replace(record.progress)
        return step

    def _header(self) -> None:
        """First line of the log, or the line that says where the run went on."""
        step = self._state.step
        if step == 0:
            self.log.start()
        else:
            self.log.rewind(step)
        text = self._text
        self.log.write(
            "run" if step == 0 else "resume",
            {
                "step": step,
                "config": self._identity.config,
                "model": self._identity.model,
                "parameters": self.model.num_parameters(),
                "data": {
                    "train_tokens": text.train.num_tokens,
                    "train_bytes": text.train.num_bytes,
                    "valid_tokens": None if text.valid is None else text.valid.num_tokens,
                    **self._identity.data,
                },
                "backend": self._backend.name,
                "device": str(self._backend.device),
                "threads": torch.get_num_threads(),
                "versions": versions(),
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        )

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
            parameters=self.model.num_parameters(),
            train_loss=state.train_loss,
            evaluation=None if state.evaluation is None else Evaluation(**state.evaluation),
            resumed_from=resumed,
            interrupted=interrupted,
        )
