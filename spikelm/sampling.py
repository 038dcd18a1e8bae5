"""The one sampler: from logits to the next token, for the command line, the trainer and the server.

Order of operations (that of transformers): logit bias; repetition, presence and frequency penalties;
temperature; top-k; top-p; min-p; draw. Arithmetic is float64 and every row is treated on its own. The random
number of a draw is a function of (seed, stream, position), so a request gives the same text alone, in any
batch, and after a restart. A :class:`History` makes penalties cost the same at every length of the text.
"""

from __future__ import annotations

import hashlib
import math
import numbers
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spikelm.errors import ConfigError, ShapeError, StateError

_LIKELY = 1024  # candidates looked at before the whole vocabulary is sorted for top-p
_LARGEST = torch.finfo(torch.float64).max


class _Counts:
    """How often each token occurred: ids int64 [n] and times float64 [n] of n different tokens."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self._ids = np.empty(16, dtype=np.int64)
        self._times = np.empty(16, dtype=np.float64)
        self.lowest = self.highest = 0  # of no meaning while there is no token

    def __len__(self) -> int:
        return len(self._place)

    def add(self, token: int) -> None:
        place = self._place.get(token)
        if place is not None:
            self._times[place] += 1
            return
        place = len(self._place)
        if place == len(self._ids):
            self._ids, self._times = np.resize(self._ids, 2 * place), np.resize(self._times, 2 * place)
        self.lowest = min(self.lowest, token) if place else token
        self.highest = max(self.highest, token) if place else token
        self._place[token], self._ids[place], self._times[place] = place, token, 1

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        return self._ids[: len(self._place)]

    @property
    def times(self) -> npt.NDArray[np.float64]:
        return self._times[: len(self._place)]


class History:
    """The tokens of one request so far, as far as sampling needs them: how many, and how often each occurred.

    Kept up by :meth:`append`, so that no step looks at all tokens again; its size is bounded by the
    vocabulary.

    Args:
        prompt: tokens of the prompt, which presence and frequency penalties leave out.
    """

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        self._length = 0
        self.seen, self.generated = _Counts(), _Counts()
        for token in prompt:
            self._length += 1
            self.seen.add(int(token))

    def append(self, token: int) -> None:
        """Note a generated token."""
        self._length += 1
        self.seen.add(int(token))
        self.generated.add(int(token))

    def __len__(self) -> int:
        return self._length


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How one request chooses its tokens.

    Args:
        temperature: divides the logits; 0 takes the most likely token (the lowest id among equals).
        top_p: keep the most likely tokens whose probabilities reach this sum, in (0, 1].
        top_k: keep this many most likely tokens; 0 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of every token in the history
            (CTRL, arXiv:1909.05858); 1 does nothing.
        presence_penalty: subtracted from the logits of tokens generated before.
        frequency_penalty: subtracted once per time a token was generated before.
        logit_bias: token id to a number added to its logit.
        seed: any integer; None draws one, which can be read afterwards.

    Tokens as likely as the last one kept by top-k or top-p are kept too, so that the choice among equals
    does not depend on how a machine sorts.

    Raises:
        ConfigError: a value is not a number, not finite or out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, "a number of at least 0", lambda x: x >= 0)
        _number("top_p", self.top_p, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
        _integer("top_k", self.top_k, "an integer of at least 0 (0 keeps all)", lambda x: x >= 0)
        _number("min_p", self.min_p, "a number from 0 to 1", lambda x: 0 <= x <= 1)
        _number("repetition_penalty", self.repetition_penalty, "a number above 0", lambda x: x > 0)
        _number("presence_penalty", self.presence_penalty, "a finite number", lambda x: True)
        _number("frequency_penalty", self.frequency_penalty, "a finite number", lambda x: True)
        if not isinstance(self.logit_bias, Mapping):
            raise ConfigError(f"logit_bias is {self.logit_bias!r}; expected a mapping of token id to number")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, "token ids of at least 0", lambda x: x >= 0)
            _number(f"logit_bias[{token}]", bias, "a finite number", lambda x: True)
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbits(63))
        _integer("seed", self.seed, "an integer", lambda x: True)

    def __call__(
        self,
        logits: Tensor,
        history: Sequence[Sequence[int] | History],
        *,
        prompt_lengths: Sequence[int] | None = None,
        streams: Sequence[int] | None = None,
    ) -> Tensor:
        """Next token of every row.

        Args:
            logits: [B, V], any floating dtype; minus infinity forbids a token.
            history: the tokens of every row so far, prompt included; their number is the draw's position. A
                :class:`History` costs the same at any length, with a plain sequence penalties read all of it.
            prompt_lengths: how many of them are the prompt, which presence and frequency leave out; 0
                unless given. A :class:`History` knows its own.
            streams: numbers that tell rows with the same seed apart; 0, 1, ... unless given.

        Returns:
            int64 [B] on the logits' device.

        Raises:
            ShapeError: logits are not [B, V], V at least 1, or do not fit the history.
            StateError: logits are NaN or plus infinity, or forbid every token.
        """
        streams = range(len(history)) if streams is None else streams
        return sample(logits, [self] * len(history), history, prompt_lengths=prompt_lengths, streams=streams)

    def probabilities(
        self,
        logits: Tensor,
        history: Sequence[Sequence[int] | History],
        *,
        prompt_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """What :meth:`__call__` draws from: float64 [B, V], rows sum to 1; same arguments and errors."""
        samplers = [self] * len(history)
        return _distribution(_adjusted(logits, samplers, history, prompt_lengths), samplers)

    def uniform(self, stream: int, position: int) -> float:
        """The random number in [0, 1) of one draw, 53 bits."""
        key = f"{self.seed}/{stream}/{position}".encode("ascii")
        return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 11) / float(1 << 53)


def sample(
    logits: Tensor,
    samplers: Sequence[Sampler],
    history: Sequence[Sequence[int] | History],
    *,
    prompt_lengths: Sequence[int] | None = None,
    streams: Sequence[int] | None = None,
) -> Tensor:
    """Next token of every row when rows are different requests; see :meth:`Sampler.__call__`.

    Args:
        logits: [B, V].
        samplers: one per row.
        history: tokens of every row so far.
        prompt_lengths: how many of them are the prompt (of plain sequences).
        streams: numbers that tell rows with the same seed apart; all 0 unless given.
    """
    values = _adjusted(logits, samplers, history, prompt_lengths)
    chosen = values.argmax(-1)
    random = [row for row, sampler in enumerate(samplers) if sampler.temperature > 0]
    if not random:
        return chosen
    rows = torch.tensor(random, device=values.device)
    drawing = [samplers[row] for row in random]
    cumulative = _distribution(values[rows], drawing).cumsum(-1)
    draws = [
        samplers[row].uniform(0 if streams is None else streams[row], len(history[row])) for row in random
    ]
    target = torch.tensor(draws, dtype=torch.float64, device=values.device)[:, None] * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, target, right=True)
    # Rounding may put the target at the very end: then the last token that has any probability is meant.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    chosen[rows] = torch.minimum(picked, last).squeeze(-1)
    return chosen


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability the model itself gave to ``tokens`` [B] under ``logits`` [B, V]: float64 [B]."""
    return logits.double().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def _adjusted(
    logits: Tensor,
    samplers: Sequence[Sampler],
    history: Sequence[Sequence[int] | History],
    prompt_lengths: Sequence[int] | None,
) -> Tensor:
    """Float64 logits [B, V] after bias and penalties."""
    if logits.dim() != 2 or logits.shape[0] != len(history) or logits.shape[0] != len(samplers):
        raise ShapeError(
            f"logits are {tuple(logits.shape)} for {len(samplers)} samplers and {len(history)} histories; "
            "expected [B, V] with one of each per row"
        )
    if logits.shape[1] == 0:
        raise ShapeError(f"logits are {tuple(logits.shape)}; expected a vocabulary of at least one token")
    values = logits.to(torch.float64, copy=True)
    # One look at the device: NaN and +inf survive the maximum, a row of -inf is its own maximum.
    usable = values.amax(-1).isfinite()
    if not bool(usable.all()):
        row = int((~usable).nonzero()[0])
        raise StateError(
            f"the logits of row {row} are NaN or infinite; the model's weights or state are damaged"
        )
    for row, sampler in enumerate(samplers):
        first = 0 if prompt_lengths is None else prompt_lengths[row]
        _adjust(values[row], sampler, history[row], first)
    return values


def _adjust(values: Tensor, sampler: Sampler, tokens: Sequence[int] | History, first: int) -> None:
    """Apply bias and penalties to one row [V] in place; tokens from ``first`` on were generated."""
    size, device = values.shape[0], values.device
    repeats = sampler.repetition_penalty != 1
    counts = bool(sampler.presence_penalty or sampler.frequency_penalty)
    if isinstance(tokens, History):
        past = tokens
    else:
        past = _history(tokens, first) if repeats or counts else History()
    seen = past.seen if repeats else past.generated
    if (repeats or counts) and len(seen) and not 0 <= seen.lowest <= seen.highest < size:
        raise ShapeError(
            f"the history holds tokens {seen.lowest} to {seen.highest} and the logits only {size} columns"
        )
    if sampler.logit_bias:
        ids = [int(token) for token in sampler.logit_bias]
        if max(ids) >= size:
            raise ConfigError(f"logit_bias names token {max(ids)}; expected ids below {size}")
        bias = torch.tensor(list(sampler.logit_bias.values()), dtype=torch.float64, device=device)
        _change(values, torch.tensor(ids, device=device), lambda old: old + bias)
    if repeats and len(past.seen):
        penalty = float(sampler.repetition_penalty)
        where = torch.from_numpy(past.seen.ids).to(device)
        _change(values, where, lambda old: torch.where(old > 0, old / penalty, old * penalty))
    if counts and len(past.generated):
        times = torch.from_numpy(past.generated.times).to(device)
        change = sampler.presence_penalty + sampler.frequency_penalty * times
        _change(values, torch.from_numpy(past.generated.ids).to(device), lambda old: old - change)


def _change(values: Tensor, where: Tensor, new: Callable[[Tensor], Tensor]) -> None:
    """Replace logits [V] at ``where``; what leaves the range of float64 is held at its end.

    Only a token the model itself forbids (minus infinity) stays impossible, so that no penalty, however
    large, leaves nothing to choose.
    """
    old = values[where]
    values[where] = torch.where(old.isinf(), old, new(old).clamp(-_LARGEST, _LARGEST))


def _history(tokens: Sequence[int], prompt_length: int) -> History:
    past = History(tokens[:prompt_length])
    for token in tokens[prompt_length:]:
        past.append(token)
    return past


def _distribution(values: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Probabilities [B, V] of adjusted logits after temperature, top-k, top-p and min-p."""

    def column(numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=values.device)[:, None]

    greedy = [row for row, sampler in enumerate(samplers) if sampler.temperature == 0]
    # The maximum goes first, so that a tiny temperature overflows towards minus infinity only.
    scaled = (values - values.amax(-1, keepdim=True)) / column([s.temperature or 1.0 for s in samplers])
    _keep_top_k(scaled, samplers)
    _keep_top_p(scaled, samplers)
    if any(sampler.min_p > 0 for sampler in samplers):
        least = column([math.log(s.min_p) if s.min_p > 0 else -math.inf for s in samplers])
        scaled.masked_fill_(scaled < least, -math.inf)
    probabilities = scaled.softmax(-1)
    if greedy:
        rows = torch.tensor(greedy, device=values.device)
        probabilities[rows] = 0.0
        probabilities[rows, values[rows].argmax(-1)] = 1.0
    return probabilities


def _keep_top_k(scaled: Tensor, samplers: Sequence[Sampler]) -> None:
    size = scaled.shape[-1]
    for row, sampler in enumerate(samplers):
        if 0 < sampler.top_k < size:
            least = scaled[row].topk(sampler.top_k).values[-1]
            scaled[row].masked_fill_(scaled[row] < least, -math.inf)


def _keep_top_p(scaled: Tensor, samplers: Sequence[Sampler]) -> None:
    size = scaled.shape[-1]
    for row, sampler in enumerate(samplers):
        if sampler.top_p >= 1:
            continue
        probabilities = scaled[row].softmax(-1)
        for candidates in (min(_LIKELY, size), size):
            likely = probabilities.topk(candidates).values
            reached = likely.cumsum(-1) >= sampler.top_p
            if bool(reached[-1]) or candidates == size:
                break
        # Rounding may leave the sum of everything just short of top_p: then everything is kept.
        if bool(reached[-1]):
            least = likely[int(reached.to(torch.int8).argmax())]
            scaled[row].masked_fill_(probabilities < least, -math.inf)


def _number(name: str, value: Any, expected: str, fits: Any) -> None:
    valid = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not valid or not math.isfinite(value) or not fits(value):
        raise ConfigError(f"{name} is {value!r}; expected {expected}")


def _integer(name: str, value: Any, expected: str, fits: Any) -> None:
    valid = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not valid or not fits(value):
        raise ConfigError(f"{name} is {value!r}; expected {expected}")
