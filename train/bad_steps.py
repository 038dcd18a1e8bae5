"""What becomes of a step that must not count: the run stops, passes over its batch, or goes back first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from spikelm.errors import TrainingError
from spikelm.train.checkpoints import CheckpointStore
from spikelm.train.log import RunLog
from spikelm.train.loss_spikes import LossSpike
from spikelm.train.ranks import Ranks
from spikelm.train.reporting import Bar
from spikelm.train.saving import Saving
from spikelm.train.step import BadStep, in_words
from spikelm.train.training_state import Progress
from spikelm.train.watchdog import LONG

if TYPE_CHECKING:
    from spikelm.train.config import TrainConfig


class BadSteps:
    """Decides, on all ranks together, about steps whose loss or gradient is not finite, and loss spikes.

    Args:
        config: the policies and their limit.
        ranks: this process among those of the run.
        store, saving: the checkpoints to go back to.
        log: told what happened.
        finish_saving: waits for a checkpoint that is being written.
        warn: shows and logs a warning.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        store: CheckpointStore,
        saving: Saving,
        log: RunLog,
        finish_saving: Callable[[Bar], None],
        warn: Callable[[Bar, str], None],
    ) -> None:
        self._config, self._ranks = config, ranks
        self._store, self._saving, self._log = store, saving, log
        self._finish_saving, self._warn = finish_saving, warn
        self.restart()

    def restart(self) -> None:
        """A run begins, or goes on in another process."""
        self._in_a_row = 0
        self._returns, self._returned_to = 0, -1

    def good(self) -> None:
        """A step was taken."""
        self._in_a_row = 0

    def newest(self, bar: Bar) -> int:
        """Step of the newest checkpoint as rank 0 sees it, or -1; one being written is waited for."""
        self._finish_saving(bar)
        return int(self._ranks.broadcast((self._store.steps() or [-1])[-1]))

    def tell(self, spike: LossSpike, state: Progress, bar: Bar, stop: bool) -> None:
        """Log a loss spike whose step was counted, and stop where the configuration says so.

        Raises:
            TrainingError: the action is ``stop``, or ``rollback`` and there is no checkpoint yet.
        """
        place = f"step {spike.step}, samples {spike.first} to {spike.last}"
        self._log.write("loss_spike", {"step": state.step, **spike.to_dict()})
        if not stop:
            bar.say(f"warning: {spike.words()} in {place}")
            return
        self._finish_saving(bar)
        kept = self._store.steps()
        rest = (
            f"{self._store.path(kept[-1])} is from before" if kept else "there is no checkpoint to go back to"
        )
        message = (
            f"{spike.words()} in {place}: stopped after the update; {rest}; lower optim.lr, look at these "
            "samples, or use loss_spike.action=warn to go on, rollback to pass over them"
        )
        self._log.write("stopped", {"step": state.step, "at": spike.step, "reason": message})
        raise TrainingError(message, rank=0)

    def refuse(self, bad: BadStep, state: Progress, bar: Bar, policy: str, updated: bool = False) -> Progress:
        """A step that must not count: stop, pass over its samples, or go back first.

        Args:
            bad: what is wrong with it.
            state: where the run is.
            bar: shows what is done.
            policy: ``stop``, ``skip`` or ``rollback``.
            updated: whether the weights were changed by it (then only going back helps).

        Returns:
            where the run goes on: ``state``, or what the checkpoint says.

        Raises:
            TrainingError: the policy is ``stop``, too many steps in a row were bad, the run went back to one
                checkpoint too often, or there is nothing to go back to.
        """
        config = self._config
        at = state.step + 1
        words = in_words(bad, at, config.accumulation, self._ranks.world_size)
        self._in_a_row += 1
        # What is said below about checkpoints, and what is rolled back to, should not be half written.
        newest = self.newest(bar)
        if policy == "rollback":
            self._returns = self._returns + 1 if newest == self._returned_to else 1
            self._returned_to = newest
        times = max(self._in_a_row, self._returns)
        event = {
            "at": at,
            "reason": words,
            "policy": policy,
            "rank": bad.rank,
            "micro_batch": bad.micro_batch,
            "samples": [bad.first, bad.last],
            "batch": [state.samples, state.samples + config.batch_size - 1],
            "parameters": list(bad.parameters),
        }
        if policy == "stop" or times > config.bad_step_limit:
            rest = f"{self._store.path(newest)} is intact" if newest >= 0 else "no checkpoint was written yet"
            again = "in a row" if self._in_a_row == times else f"since step {self._returned_to}"
            many = f" ({times} times {again})" if policy != "stop" else ""
            when = "after" if updated else "before"
            message = (
                f"{words}{many}: stopped {when} the update; {rest}; lower optim.lr or look at these samples"
            )
            self._log.write("stopped", {"step": at, **event, "reason": message})
            raise TrainingError(message, rank=bad.rank if bad.rank >= 0 else 0)
        if policy == "skip":
            state.avoid = [*state.avoid, state.samples]
            self._log.write("bad_step", {"step": state.step, **event})
            bar.say(f"warning: {words}: not updated, its batch is passed over")
            return state
        return self._go_back(words, event, state, bar)

    def _go_back(self, words: str, event: dict[str, object], state: Progress, bar: Bar) -> Progress:
        messages: list[str] = []
        with self._ranks.watchdog.phase("rolling back", allowance=LONG):
            before = self._saving.roll_back(bar, messages.append)
        if before is None:
            raise TrainingError(
                f"{words}: stopped before the update, because there is no checkpoint to roll back to yet; "
                "use on_bad_step=skip, or a smaller checkpoint_every",
                rank=0,
            )
        before.avoid = sorted({*before.avoid, *state.avoid, state.samples})
        self._log.rewind(before.step)
        self._log.write("bad_step", {"step": before.step, **event})
        for message in messages:
            self._warn(bar, message)
        bar.say(f"warning: {words}: back to step {before.step}, its batch will be passed over")
        return before
