"""Writing continuations of many prompts side by side, each with its own sampler and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spikelm import state as states
from spikelm.evaluation.scoring import LanguageModel
from spikelm.evaluation.tasks.reader import Ended, Reader
from spikelm.generation import StopStrings
from spikelm.recurrence import EMPTY
from spikelm.sampling import History, Sampler, sample
from spikelm.state import State
from spikelm.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue.

    Args:
        tokens: the prompt, at least one token.
        sampler: how tokens are chosen; temperature 0 for the likeliest.
        max_tokens: at most so many, at least 1.
        stop: strings that end the text; neither they nor what follows is returned.
        stream: number that tells requests with the same seed apart.
    """

    tokens: Sequence[int]
    sampler: Sampler
    max_tokens: int
    stop: tuple[str, ...] = ()
    stream: int = 0


class _Text:
    """What a request has so far."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.history = History(request.tokens)
        self.text, self.done = "", False
        self._stream, self._tail = tokenizer.decode_stream(), StopStrings(request.stop)
        self._left, self._end = request.max_tokens, tokenizer.eos_id

    def push(self, token: int) -> None:
        self.history.append(token)
        self._left -= 1
        ended = token == self._end
        piece = "" if ended else self._stream.push(token)
        last = ended or self._left == 0
        if last:
            piece += self._stream.finish()
        piece, stopped = self._tail.push(piece, last=last)
        self.text += piece
        self.done = last or stopped


def write(reader: Reader, tokenizer: Tokenizer, requests: Sequence[Request]) -> list[str]:
    """The continuation of every request, in their order.

    Prompts are read with their shared prefixes once; as soon as a batch of them has ended it is continued, so
    that memory does not depend on the number of requests.

    Args:
        reader: reads the prompts; its batch size is that of writing, too.
        tokenizer: the model's; ids above its vocabulary are never chosen.
        requests: what to continue.
    """
    texts = [_Text(request, tokenizer) for request in requests]
    room = max((request.max_tokens for request in requests), default=0)
    for group in _groups(reader.ends([request.tokens for request in requests], room), reader.batch_size):
        mine = [texts[index] for ended in group for index in ended.sequences]
        with torch.inference_mode():
            logits = torch.cat([ended.logits for ended in group])
            state = states.tree_map(lambda *values: torch.cat(values), *(ended.state for ended in group))
            _continue(reader.model, tokenizer.vocab_size, mine, logits, state, reader.counted)
    return [text.text for text in texts]


def _groups(ended: Iterator[Ended], size: int) -> Iterator[list[Ended]]:
    group: list[Ended] = []
    for item in ended:
        group.append(item)
        if sum(len(one.sequences) for one in group) >= size:
            yield group
            group = []
    if group:
        yield group


def _continue(
    model: LanguageModel,
    vocab_size: int,
    texts: list[_Text],
    logits: Tensor,
    state: State,
    counted: Callable[[int], None],
) -> None:
    """Write until every text is done; rows that are done are left out."""
    while True:
        chosen = sample(
            logits[:, :vocab_size],
            [text.request.sampler for text in texts],
            [text.history for text in texts],
            streams=[text.request.stream for text in texts],
        )
        for text, token in zip(texts, chosen.tolist(), strict=True):
            text.push(token)
        stay = [row for row, text in enumerate(texts) if not text.done]
        if not stay:
            return
        if len(stay) < len(texts):
            rows = torch.tensor(stay, device=logits.device)
            chosen, state = chosen[rows], states.select_rows(state, rows)
            texts = [texts[row] for row in stay]
        # A sequence of one token, so that its kernels are those of the prompt: see docs/int8.md.
        both, state = model(chosen[:, None], state, EMPTY)
        logits = both[:, -1]
        counted(len(texts))
