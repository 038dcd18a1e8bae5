"""Text to hide things in, and models that solve the tasks by reading instead of by weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spikelm.data.source import open_source
from spikelm.evaluation.longcontext.prompt import Haystack
from spikelm.recurrence import Context
from spikelm.state import State

PROSE = " ".join(
    f"In chapter {n} the travellers crossed river number {n * 7}, rested, and counted {n * 13} stars above."
    for n in range(60)
)


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("hay") / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def haystack(prose: str) -> Haystack:
    return Haystack(open_source(prose))


class Remembering:
    """A language model over bytes whose state is the text itself: what it says next is computed from it.

    Args:
        answer: text so far -> what stands next, at least one character.
    """

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer = answer

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        assert max_len is not None
        return {
            "text": torch.zeros(batch, max_len, dtype=torch.uint8),
            "length": torch.zeros(batch, dtype=torch.int64),
        }

    def __call__(self, tokens: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        text, length = state["text"].clone(), state["length"].clone()
        logits = torch.zeros(*tokens.shape, 256)
        for row in range(len(tokens)):
            own = tokens[row] if ctx.valid is None else tokens[row][ctx.valid[row]]
            end = int(length[row]) + len(own)
            text[row, int(length[row]) : end] = own.to(torch.uint8)
            length[row] = end
            next_text = self.answer(bytes(text[row, :end].tolist()).decode())
            logits[row, len(own) - 1, next_text.encode()[0]] = 9.0
        return logits, {"text": text, "length": length}
