"""Writing text: the prompt in parallel chunks, then one step of constant cost per token.

The state is the model's whole memory, so a token costs the same at position ten and at position a million.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikelm.errors import ConfigError, DataError
from spikelm.plan_cache import plan_of, wanted
from spikelm.recurrence import EMPTY, Context
from spikelm.sampling import History, Sampler, token_logprobs
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.decoding import DecodePlan
    from spikelm.model import SpikeLM
    from spikelm.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One generated token.

    Attributes:
        text: text that is complete with it; may be empty (part of a character, or of a stop string).
        token: its id.
        logprob: natural logarithm of the probability the model gave it, before the sampler's changes.
        finish_reason: on the last piece ``"length"``, ``"eos"`` or ``"stop"``; None before.
    """

    text: str
    token: int
    logprob: float
    finish_reason: str | None = None


def generate(
    model: SpikeLM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_tokens: int,
    sampler: Sampler,
    *,
    chunk: int = 512,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    ctx: Context = EMPTY,
    on_prefill: Callable[[int], None] | None = None,
    planned: bool = True,
) -> Generator[Piece, None, None]:
    """Continue ``prompt``; one piece per token, as soon as it is known.

    The model works in evaluation mode meanwhile and returns to its mode when the iterator ends or is closed.

    Args:
        model: the model.
        tokenizer: the model's tokenizer.
        prompt: text (special tokens are recognised) or token ids. An empty one starts from the tokenizer's
            bos, else eos, else a line break.
        max_tokens: how many tokens at most.
        sampler: how they are chosen.
        chunk: prompt tokens processed in parallel; changes speed and memory only.
        stop: strings that end the text; neither they nor what follows is returned.
        ignore_eos: go on after an end-of-document token.
        ctx: a meter, if spikes are to be counted; it is complete when the iterator has ended or is closed.
        on_prefill: called with the number of prompt tokens done after each chunk.
        planned: whether a decode plan may be used, for which the model's parameters move in memory (they stay
            the same objects); false between steps of training.

    Raises:
        ConfigError: max_tokens, chunk or stop has an impossible value.
        DataError: the prompt holds a token outside the vocabulary, or the tokenizer does not fit the model.
    """
    # Checked here and not at the first piece: this function is no generator itself.
    for name, value, least in (("max_tokens", max_tokens, 0), ("chunk", chunk, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} is {value!r}; expected an integer of at least {least}")
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise ConfigError(f"stop is {stop!r}; expected strings that are not empty")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model only {model.config.vocab_size}; "
            "use the tokenizer the model was trained with"
        )
    tokens = prompt_tokens(tokenizer, prompt)
    return _pieces(
        model,
        tokenizer,
        tokens,
        max_tokens,
        sampler,
        chunk,
        tuple(stop),
        ignore_eos,
        ctx,
        on_prefill,
        planned,
    )


def prompt_tokens(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt, never none; raises :class:`DataError` for ids outside the vocabulary."""
    if isinstance(prompt, str):
        tokens = tokenizer.encode(prompt)
    else:
        tokens = list(prompt)
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < tokenizer.vocab_size:
                raise DataError(
                    f"the prompt holds token {token!r}; expected ids from 0 to {tokenizer.vocab_size - 1}"
                )
    if tokens:
        return tokens
    for start in (tokenizer.bos_id, tokenizer.eos_id):
        if start is not None:
            return [start]
    return tokenizer.encode("\n") or [0]


def prefill(
    model: SpikeLM,
    tokens: Tensor,
    state: State,
    ctx: Context = EMPTY,
    chunk: int = 512,
    on_chunk: Callable[[int], None] | None = None,
) -> tuple[Tensor, State]:
    """Feed ``tokens`` int64 [B, T], T >= 1, in chunks: logits [B, V] after the last one, and the state."""
    logits = None
    for start in range(0, tokens.shape[1], chunk):
        logits, state = model(tokens[:, start : start + chunk], state, ctx, last_only=True)
        if on_chunk is not None:
            on_chunk(min(start + chunk, tokens.shape[1]))
    if logits is None:
        raise DataError("the prompt holds no token; give at least one")
    return logits[:, -1], state


def _pieces(
    model: SpikeLM,
    tokenizer: Tokenizer,
    tokens: list[int],
    max_tokens: int,
    sampler: Sampler,
    chunk: int,
    stop: tuple[str, ...],
    ignore_eos: bool,
    ctx: Context,
    on_prefill: Callable[[int], None] | None,
    planned: bool,
) -> Generator[Piece, None, None]:
    if max_tokens == 0:
        return
    device = next(model.parameters()).device
    planned = planned and wanted(model, ctx)
    history = History(tokens)
    stream, tail = tokenizer.decode_stream(), StopStrings(stop)
    training = model.training
    model.eval()
    with ExitStack() as leaving:
        leaving.callback(model.train, training)
        plan: DecodePlan | None = None
        with torch.inference_mode():  # never across a yield: it would reach into the caller
            state = model.init_state(1, device=device, max_len=len(tokens) + max_tokens)
            prompt = torch.tensor([tokens], dtype=torch.int64, device=device)
            logits, state = prefill(model, prompt, state, ctx, chunk, on_prefill)
        for number in range(1, max_tokens + 1):
            with torch.inference_mode():
                known = logits[:, : tokenizer.vocab_size]  # a padded vocabulary has ids without text
                chosen = sampler(known, [history])
                logprob = float(token_logprobs(known, chosen))
            token = int(chosen)
            history.append(token)
            text, reason = stream.push(token), None
            if token == tokenizer.eos_id and not ignore_eos:
                text, reason = stream.finish(), "eos"
            elif number == max_tokens:
                text, reason = text + stream.finish(), "length"
            text, stopped = tail.push(text, last=reason is not None)
            reason = "stop" if stopped else reason
            yield Piece(text=text, token=token, logprob=logprob, finish_reason=reason)
            if reason is not None:
                return
            if planned and number == 1:  # not before the first token, which need not wait for it
                plan = leaving.enter_context(plan_of(model, len(tokens) + max_tokens))
                if plan is not None:
                    leaving.enter_context(plan.metered(ctx.meter))
                    plan.write(0, state if plan.max_len is None else model.reserve(state, plan.max_len))
            with torch.inference_mode():
                if plan is not None:
                    logits = plan.step(chosen)
                else:
                    # A sequence of one token, so that its kernels are those of the prompt: see docs/int8.md.
                    logits, state = prefill(model, chosen[:, None], state, ctx)


class StopStrings:
    """Ends a text at the first of some strings, also where one spans pieces.

    Args:
        stop: the strings; none of them is empty.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str, *, last: bool = False) -> tuple[str, bool]:
        """Text that surely stands before any stop string, and whether one was found.

        What may be the beginning of a stop string is held back until more is known or ``last`` is true.
        """
        text = self._held + text
        self._held = ""
        found = [at for at in (text.find(string) for string in self._stop) if at >= 0]
        if found:
            return text[: min(found)], True
        if not last:
            longest = max((len(string) for string in self._stop), default=1) - 1
            for length in range(min(longest, len(text)), 0, -1):
                if any(string.startswith(text[-length:]) for string in self._stop):
                    self._held = text[-length:]
                    return text[:-length], False
        return text, False
