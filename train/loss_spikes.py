"""Finds steps whose loss or gradient norm is far above what the steps before led one to expect.

Both are compared as logarithms, so that "far" means a factor whatever the scale. What is expected is the
median of the last ``window`` steps, and the measure of ordinary noise their median absolute deviation, times
1.4826 to be a standard deviation for normal noise: neither is moved by the spikes themselves. A step is a
spike where it lies more than ``threshold`` such deviations above the median.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from spikelm.train.ranks import Ranks
from spikelm.train.step import BadStep

if TYPE_CHECKING:
    from spikelm.train.config import LossSpikeConfig
    from spikelm.train.training_state import Progress

FLOOR = {"loss": 0.01, "grad_norm": 0.75}
"""Least deviation of a logarithm: a quiet curve makes no spike of a change by a few per cent. Gradient norms
of spiking models have a heavy tail (small batches jump by a factor of ten and more, and clipping takes care
of it), so with the usual threshold only a factor of about a hundred is called a spike."""
WORDS = {"loss": "the loss", "grad_norm": "the gradient norm"}
QUIET = 10
"""Steps without a spike that end an episode; within one, nothing is said again."""
_NORMAL = 1.4826
_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class LossSpike:
    """A step that stands out.

    Attributes:
        figure: ``loss`` or ``grad_norm``.
        step: number of the step, from 1.
        first, last: global numbers of its samples.
        value: what was seen.
        expected: median of the steps before.
        limit: the largest value that would have been ordinary.
    """

    figure: str
    step: int
    first: int
    last: int
    value: float
    expected: float
    limit: float

    def words(self) -> str:
        """What happened, as the beginning of a sentence."""
        return (
            f"{WORDS[self.figure]} jumped to {self.value:.4g} "
            f"(expected about {self.expected:.4g}, at most {self.limit:.4g})"
        )

    def bad_step(self) -> BadStep:
        """The same for the policy of bad steps; no single rank is to blame."""
        return BadStep(what=self.words(), rank=-1, micro_batch=-1, first=self.first, last=self.last)

    def to_dict(self) -> dict[str, Any]:
        """JSON values for the log."""
        return {
            "at": self.step,
            "figure": self.figure,
            "value": self.value,
            "expected": self.expected,
            "limit": self.limit,
            "samples": [self.first, self.last],
        }


@dataclass(frozen=True, kw_only=True)
class Recent:
    """What is remembered of the steps before, in JSON values: a resumed run finds the same spikes.

    Attributes:
        loss, grad_norm: logarithms of the last steps, the newest last.
        quiet: steps since the last spike (-1: there was none).
    """

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    quiet: int = -1


class LossSpikes:
    """Looks at every step that was taken.

    Args:
        config: window, threshold and action.
        warmup: steps of the learning rate's warm-up, in which nothing is called a spike.
    """

    def __init__(self, config: LossSpikeConfig, warmup: int) -> None:
        self._config, self._warmup = config, warmup

    def see(self, state: Progress, batch: int, loss: float, grad_norm: float | None) -> LossSpike | None:
        """Remember a step in ``state.recent`` and tell whether it is a new spike.

        Args:
            state: before the step.
            batch: samples of the step.
            loss: nats per token of the step, summed over the ranks.
            grad_norm: of the whole gradient before clipping.

        Returns:
            the spike, or None: an ordinary step, or one of an episode that was told already.
        """
        if self._config.action == "off":
            return None
        before = Recent(**state.recent)
        now = {"loss": loss, "grad_norm": loss if grad_norm is None else grad_norm}
        logs = {name: math.log(max(value, _TINY)) for name, value in now.items()}
        found = None
        for name in ("loss", "grad_norm"):
            if state.step + 1 <= self._warmup or (name == "grad_norm" and grad_norm is None):
                continue
            expected, limit = self._ordinary(getattr(before, name), FLOOR[name])
            if found is None and logs[name] > limit:
                found = LossSpike(
                    figure=name,
                    step=state.step + 1,
                    first=state.samples,
                    last=state.samples + batch - 1,
                    value=now[name],
                    expected=math.exp(expected),
                    limit=math.exp(limit),
                )
        quiet = 0 if found else min(before.quiet + 1, QUIET) if before.quiet >= 0 else -1
        window = self._config.window
        # New lists: a checkpoint that is being written may still hold the old ones.
        state.recent = {
            "loss": [*before.loss, logs["loss"]][-window:],
            "grad_norm": before.grad_norm
            if grad_norm is None
            else [*before.grad_norm, logs["grad_norm"]][-window:],
            "quiet": quiet,
        }
        return found if found and not 0 <= before.quiet < QUIET else None

    def agreed(self, found: LossSpike | None, ranks: Ranks) -> LossSpike | None:
        """The same answer on every rank where a spike changes what the run does (the lowest rank's)."""
        if ranks.world_size == 1 or self._config.action in ("off", "warn"):
            return found
        if not ranks.any(found is not None):
            return None
        told = ranks.gather(None if found is None else asdict(found))
        return LossSpike(**next(seen for seen in told if seen is not None))

    def _ordinary(self, before: Sequence[float], floor: float) -> tuple[float, float]:
        """Expected logarithm and the largest ordinary one; no limit while too few steps are known."""
        if len(before) < self._config.window // 2:
            return 0.0, math.inf
        middle = statistics.median(before)
        spread = _NORMAL * statistics.median(abs(value - middle) for value in before)
        return middle, middle + self._config.threshold * max(spread, floor)
