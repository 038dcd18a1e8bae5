"""What the log and the progress bar say about steps: sums between two log lines, rates, spikes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spikelm.meter import Meter
from spikelm.train.evaluation import bits_per_byte
from spikelm.train.log import RunLog
from spikelm.train.reporting import Bar
from spikelm.train.spikes import SpikeWarnings, brief
from spikelm.train.step import StepOutcome
from spikelm.train.training_state import Progress

if TYPE_CHECKING:
    from spikelm.train.config import TrainConfig


class Metrics:
    """Counts steps that were taken and writes a line when one is due.

    Args:
        config: how often, and the size of a step.
        log: where lines go.
        warnings: looks for neurons that do nothing.
        warn: shows and logs a warning.
    """

    def __init__(
        self,
        config: TrainConfig,
        log: RunLog,
        warnings: SpikeWarnings,
        warn: Callable[[Bar, str], None],
    ) -> None:
        self._config, self._log = config, log
        self._warnings, self._warn = warnings, warn
        self._spikes: dict[str, Any] | None = None
        self._seconds, self._tokens = 0.0, 0

    def restart(self) -> None:
        """Begin a new interval: the next rate is over steps from here on."""
        self._seconds, self._tokens = 0.0, 0

    def meter(self, step: int) -> Meter | None:
        """The meter of the step after ``step``, which is measured when it ends with a log line."""
        return Meter() if self._logged(step + 1) else None

    def count(self, state: Progress, outcome: StepOutcome, lr: float, meter: Meter | None, bar: Bar) -> None:
        """Account for a step that was taken: ``state`` moves on by one step."""
        tokens = self._config.batch_size * self._config.data.block_length
        state.nats += outcome.nats
        state.aux += outcome.aux
        state.count += outcome.count
        state.nbytes += outcome.nbytes
        state.step += 1
        state.samples += self._config.batch_size
        state.tokens += tokens
        state.seconds += outcome.seconds
        self._seconds += outcome.seconds
        self._tokens += tokens
        if self._logged(state.step):
            self._line(state, outcome, lr, meter, bar)
        else:
            self._note(state, lr, bar)

    def _logged(self, step: int) -> bool:
        return step % self._config.log_every == 0 or step == self._config.steps

    def _line(self, state: Progress, outcome: StepOutcome, lr: float, meter: Meter | None, bar: Bar) -> None:
        spikes: dict[str, Any] = {}
        if meter is not None:
            summary = meter.summary()
            spikes = brief(summary)
            self._spikes = spikes
            for text in self._warnings.check(summary):
                self._warn(bar, text)
        state.train_loss = state.nats / max(state.count, 1)
        self._note(state, lr, bar)
        self._log.write(
            "step",
            {
                "step": state.step,
                "tokens": state.tokens,
                "loss": state.train_loss,
                "aux_loss": state.aux / max(state.count, 1),
                "bits_per_byte": bits_per_byte(state.nats, state.nbytes),
                "lr": lr,
                "grad_norm": None if outcome.report is None else outcome.report.grad_norm,
                "tokens_per_second": round(self._tokens / max(self._seconds, 1e-9), 1),
                "seconds": round(state.seconds, 3),
                **spikes,
            },
        )
        state.nats, state.aux, state.count, state.nbytes = 0.0, 0.0, 0, 0
        self.restart()

    def _note(self, state: Progress, lr: float, bar: Bar) -> None:
        """Loss, bits per byte, learning rate and spike rate beside the bar."""
        if state.count == 0:
            return
        text = f"loss {state.nats / state.count:.4f}, {bits_per_byte(state.nats, state.nbytes):.3f} bits/byte"
        if self._spikes is not None and self._spikes["spike_rate"] is not None:
            text += f", spikes {self._spikes['spike_rate']:.1%}"
        text += f", lr {lr:.2e}, step {state.step}"
        bar.note(text)
