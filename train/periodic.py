"""What happens between steps: evaluations and written samples, without a trace in the training numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from spikelm.train.evaluation import evaluate
from spikelm.train.log import RunLog
from spikelm.train.reporting import Bar, printable
from spikelm.train.spikes import SpikeWarnings, spike_rate
from spikelm.train.training_state import Progress

if TYPE_CHECKING:
    from spikelm.data.blocks import TokenBlocks
    from spikelm.tokenizer import Tokenizer
    from spikelm.train.backend import Backend
    from spikelm.train.config import TrainConfig

Stopped = Callable[[], bool]
"""Asked on all ranks together, with the same answer, whether work between steps is to be given up."""


class Periodic:
    """Evaluates and lets the model write when it is time.

    Args:
        config: how often.
        backend: executes the model.
        valid: held-out text, or None.
        tokenizer: of the run.
        log: told the results.
        warnings: looks at the spikes of evaluations too.
        warn: shows and logs a warning.
    """

    def __init__(
        self,
        config: TrainConfig,
        backend: Backend,
        valid: TokenBlocks | None,
        tokenizer: Tokenizer,
        log: RunLog,
        warnings: SpikeWarnings,
        warn: Callable[[Bar, str], None],
    ) -> None:
        self._config, self._backend, self._valid = config, backend, valid
        self._tokenizer, self._log = tokenizer, log
        self._warnings, self._warn = warnings, warn

    def work(self, state: Progress, bar: Bar, stopped: Stopped) -> bool:
        """Whatever is due after ``state.step`` and was not done yet; whether anything was done."""
        before = state.evaluated, state.sampled
        self._evaluate(state, bar, stopped)
        self._sample(state, bar, stopped)
        return (state.evaluated, state.sampled) != before

    def _evaluate(self, state: Progress, bar: Bar, stopped: Stopped) -> None:
        config, every = self._config, self._config.eval_every
        due = state.step == config.steps or (every > 0 and state.step > 0 and state.step % every == 0)
        if self._valid is None or not due or state.evaluated == state.step or stopped():
            return
        ranks = self._backend.ranks
        found = evaluate(
            self._backend,
            self._valid,
            step=state.step,
            samples=config.batch_size * config.eval_batches,
            rows=max(1, config.batch_size // (config.accumulation * ranks.world_size)),
            stopped=stopped,
        )
        if found is None:
            return
        evaluation, summary = found
        for text in self._warnings.check(summary):
            self._warn(bar, text)
        state.evaluated, state.evaluation = state.step, evaluation.to_dict()
        bits = evaluation.bits_per_byte
        if math.isfinite(bits) and (state.best is None or bits < state.best):
            state.best, state.best_step = bits, state.step
        self._log.write("evaluation", state.evaluation)
        rate = spike_rate(summary)
        spikes = "" if rate is None else f", spike rate {rate:.1%}"
        bar.say(
            f"step {state.step}: held out {evaluation.bits_per_byte:.4f} bits/byte, "
            f"loss {evaluation.loss:.4f} over {evaluation.tokens} tokens{spikes}"
        )

    def _sample(self, state: Progress, bar: Bar, stopped: Stopped) -> None:
        config, every = self._config, self._config.sample_every
        due = every > 0 and (state.step % every == 0 or state.step == config.steps)
        if not due or state.sampled == state.step or stopped():
            return
        text = self._write(stopped)
        if stopped():
            return
        state.sampled = state.step
        self._log.write("sample", {"step": state.step, "prompt": config.sample_prompt, "text": text})
        bar.say(f"step {state.step} writes: {printable(config.sample_prompt + text)}")

    def _write(self, stopped: Stopped) -> str:
        """What the model writes; rank 0 alone does it while the others wait."""
        from spikelm.generation import generate
        from spikelm.sampling import Sampler

        config = self._config
        alone = self._backend.ranks.world_size == 1
        model = self._backend.inference_model()
        text = ""
        if model is not None:
            training = model.training
            model.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                sampler = Sampler(temperature=0.8, top_p=0.95, seed=config.seed)
                prompt, length = config.sample_prompt, config.sample_tokens
                # No plan: it would move parameters that an optimiser may hold in flat buffers.
                for piece in generate(model, self._tokenizer, prompt, length, sampler, planned=False):
                    text += piece.text
                    self._backend.ranks.watchdog.beat()
                    if alone and stopped():
                        break
            model.train(training)
        self._backend.ranks.barrier()
        return text
