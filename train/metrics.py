"""What the log and the progress bar say about steps: sums between two log lines, rates, spikes, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spikelm.meter import Meter
from spikelm.train.backend import Backend
from spikelm.train.evaluation import bits_per_byte, combine
from spikelm.train.experts import add_loads, shares
from spikelm.train.log import RunLog
from spikelm.train.memory import largest, memory
from spikelm.train.reporting import Bar
from spikelm.train.spikes import SpikeWarnings, brief
from spikelm.train.step import StepOutcome
from spikelm.train.throughput import gemm_peak, model_flops
from spikelm.train.training_state import Progress

if TYPE_CHECKING:
    from spikelm.train.config import TrainConfig


class Metrics:
    """Counts steps that were taken and writes a line when one is due; every method on all ranks together.

    Args:
        config: how often, and the size of a step.
        backend: the model, its device and the ranks.
        log: where lines go.
        warnings: looks for neurons that do nothing.
        warn: shows and logs a warning.
    """

    def __init__(
        self,
        config: TrainConfig,
        backend: Backend,
        log: RunLog,
        warnings: SpikeWarnings,
        warn: Callable[[Bar, str], None],
    ) -> None:
        self._config, self._backend, self._log = config, backend, log
        self._warnings, self._warn = warnings, warn
        self._spikes: dict[str, Any] | None = None
        self._flops = model_flops(backend.model)
        self._peak: float | None = None
        self.restart()

    def restart(self) -> None:
        """Begin a new interval: the next rate is over steps from here on."""
        self._seconds, self._waited, self._tokens, self._steps = 0.0, 0.0, 0, 0

    def measure(self, state: Progress) -> None:
        """Measure what these ranks can do at most, at the same time: some may share a processor."""
        if not self._config.measure_mfu or self._peak is not None:
            return
        ranks = self._backend.ranks
        ranks.barrier()
        peak = gemm_peak(self._backend.device, self._config.precision)
        (self._peak,) = ranks.totals(peak.flops)
        self._log.write(
            "peak",
            {
                "step": state.step,
                "flops": self._peak,
                "ranks": ranks.world_size,
                "size": peak.size,
                "dtype": peak.dtype,
                "threads": peak.threads,
                "model_flops_per_token": self._flops,
            },
        )

    def meter(self, step: int) -> Meter | None:
        """The meter of the step after ``step``, which is measured when it ends with a log line."""
        return Meter() if self._logged(step + 1) else None

    def count(self, state: Progress, outcome: StepOutcome, lr: float, meter: Meter | None, bar: Bar) -> None:
        """Account for a step that was taken: ``state`` moves on by one step."""
        config, norm = self._config, _norm(outcome)
        tokens = config.batch_size * config.data.block_length
        state.nats += outcome.nats
        state.aux += outcome.aux
        state.count += outcome.count
        add_loads(state.loads, outcome.loads)
        state.nbytes += outcome.nbytes
        state.interval += 1
        state.clipped += norm is not None and norm > config.optim.clip > 0.0
        state.step += 1
        state.samples += config.batch_size
        state.tokens += tokens
        state.seconds += outcome.seconds
        self._seconds += outcome.seconds
        self._waited += outcome.data_seconds
        self._tokens += tokens
        self._steps += 1
        if self._logged(state.step):
            self._line(state, outcome, lr, meter, bar)
        else:
            self._note(state, lr, bar)

    def _logged(self, step: int) -> bool:
        return step % self._config.log_every == 0 or step == self._config.steps

    def _line(self, state: Progress, outcome: StepOutcome, lr: float, meter: Meter | None, bar: Bar) -> None:
        spikes: dict[str, Any] = {}
        if meter is not None:
            combine(meter, self._backend.ranks)
            summary = meter.summary()
            spikes = brief(summary)
            self._spikes = spikes
            for text in self._warnings.check(summary):
                self._warn(bar, text)
        state.train_loss = state.nats / max(state.count, 1)
        self._note(state, lr, bar)
        rate = self._tokens / max(self._seconds, 1e-9)
        waited, used = self._of_all_ranks()
        self._log.write(
            "step",
            {
                "step": state.step,
                "tokens": state.tokens,
                "loss": state.train_loss,
                "aux_loss": state.aux / max(state.count, 1),
                "bits_per_byte": bits_per_byte(state.nats, state.nbytes),
                "lr": lr,
                "grad_norm": _norm(outcome),
                "clipped": state.clipped / max(state.interval, 1) if self._config.optim.clip else None,
                "tokens_per_second": round(rate, 1),
                "step_seconds": round(self._seconds / self._steps, 6),
                "data_seconds": round(waited / self._steps, 6),
                "mfu": None if self._peak is None else round(self._flops * rate / self._peak, 5),
                "seconds": round(state.seconds, 3),
                "memory": used,
                **spikes,
                **({"experts": shares(state.loads)} if state.loads else {}),
            },
        )
        state.loads = {}
        state.nats, state.aux, state.count, state.nbytes = 0.0, 0.0, 0, 0
        state.interval, state.clipped = 0, 0
        self.restart()

    def _of_all_ranks(self) -> tuple[float, dict[str, int]]:
        """The longest wait for samples, and the largest use of memory."""
        told = self._backend.ranks.gather([self._waited, memory(self._backend.device)])
        return max(waited for waited, _ in told), largest(used for _, used in told)

    def _note(self, state: Progress, lr: float, bar: Bar) -> None:
        """Loss, bits per byte, learning rate and spike rate beside the bar."""
        if state.count == 0:
            return
        text = f"loss {state.nats / state.count:.4f}, {bits_per_byte(state.nats, state.nbytes):.3f} bits/byte"
        if self._spikes is not None and self._spikes["spike_rate"] is not None:
            text += f", spikes {self._spikes['spike_rate']:.1%}"
        text += f", lr {lr:.2e}, step {state.step}"
        bar.note(text)


def _norm(outcome: StepOutcome) -> float | None:
    return None if outcome.report is None else outcome.report.grad_norm
