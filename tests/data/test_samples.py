"""What all kinds of samples share: their order, who may compute them, and that documents never meet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikelm.data import TokenBlocks
from spikelm.data.lanes import Lanes
from spikelm.data.mixture import Mixture
from spikelm.data.samples import Batch, Samples
from spikelm.data.source import Source
from spikelm.data.stream import Stream
from spikelm.errors import DataError
from spikelm.tokenizer import Tokenizer
from spikelm.train.batches import micro_batches

BYTES = Tokenizer.bytes()
BPE = Tokenizer.train_bpe(["abc abc bca cab é日 " * 30], 280)
FIELDS = ("inputs", "targets", "reset", "samples", "target_bytes")


@pytest.fixture(autouse=True, scope="module")
def _small_chunks() -> Iterator[None]:
    """A stream of a few blocks passes through many chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spikelm.data.packing.CHUNK", 4)
        patch.setattr("spikelm.data.stream.CHUNK", 4)
        yield


class Texts(Source):
    """Documents in memory."""

    def __init__(self, *texts: str, name: str = "texts") -> None:
        super().__init__(name)
        self.texts = texts

    def _documents(self):
        yield from self.texts

    def fingerprint(self) -> str:
        return repr(self.texts)


def letters(marks: str, sizes: range | list[int]) -> list[str]:
    """Documents of one letter each, so that a token says which document it is of."""
    return [marks[i % len(marks)] * size for i, size in enumerate(sizes)]


LOWER = letters("abcdefghijklmnopqrstuvwxyz", [5, 1, 40, 3, 17, 2, 90, 8, 8, 8, 31, 1, 1, 64, 12, 77, 4])
UPPER = letters("ABCDEFGHIJKLMNOPQRSTUVWXYZ", [60, 2, 9, 33, 1, 50, 7, 14, 21])


def blocks(texts: list[str], length: int = 7, tokenizer: Tokenizer = BYTES) -> TokenBlocks:
    return TokenBlocks.from_documents(texts, tokenizer, length)


def mixture() -> Mixture:
    return Mixture({"lower": blocks(LOWER), "upper": blocks(UPPER)}, [0.7, 0.3])


def stream(buffer: int = 0, length: int = 7, tokenizer: Tokenizer = BYTES) -> Stream:
    return Stream(Texts(*LOWER), tokenizer, length, buffer)


def stream_mixture() -> Mixture:
    upper = Stream(Texts(*UPPER, name="upper"), BYTES, 7, 5)
    return Mixture({"lower": stream(3), "upper": upper}, [1, 2])


def lanes(count: int = 6) -> Lanes:
    return Lanes(blocks(LOWER).store, BYTES, 7, count)


KINDS: dict[str, Callable[[], Samples]] = {
    "blocks": lambda: blocks(LOWER),
    "mixture": mixture,
    "stream": stream,
    "shuffled stream": lambda: stream(5),
    "mixture of streams": stream_mixture,
    "lanes": lanes,
}


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def joined(parts: list[Batch]) -> Batch:
    return Batch(**{name: torch.cat([getattr(part, name) for part in parts]) for name in FIELDS})


@pytest.mark.parametrize("kind", KINDS)
def test_samples_do_not_depend_on_batch_size_ranks_or_accumulation(kind: str) -> None:
    """Over several epochs, each way of computing with samples of its own that have seen nothing before."""
    count = 240
    one = KINDS[kind]()
    whole = one.batch(3, 0, count)
    assert whole.samples.tolist() == list(range(count))
    for size in (1, 6, 24, 120):
        made = KINDS[kind]()
        assert same(joined([made.batch(3, first, size) for first in range(0, count, size)]), whole)
        made.close()
    for size, parts, ranks in ((12, 1, 2), (12, 3, 1), (12, 2, 3), (40, 7, 3), (24, 1, 1)):
        views = [KINDS[kind]() for _ in range(ranks)]
        rows: list[Any] = []
        for first in range(0, count, size):
            for rank, view in enumerate(views):
                rows += micro_batches(view, 3, first, size, parts, rank, ranks)
        assert [row.first for row in rows] == list(np.cumsum([0, *(len(r.inputs) for r in rows)])[:-1])
        for name in ("inputs", "targets", "reset"):
            assert torch.equal(torch.cat([getattr(r, name) for r in rows]), getattr(whole, name))
        assert sum(row.nbytes for row in rows) == int(whole.target_bytes.sum())
        for view in views:
            view.close()
    one.close()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_in_any_order(kind: str) -> None:
    made, chance = KINDS[kind](), np.random.default_rng(0)
    whole = made.batch(1, 0, 150)
    for _ in range(5):
        wanted = chance.permutation(150)[:40]
        found = made.gather(1, wanted)
        for name in FIELDS:
            assert torch.equal(getattr(found, name), getattr(whole, name)[torch.from_numpy(wanted)])
    assert not torch.equal(KINDS[kind]().batch(2, 0, 150).inputs, whole.inputs) or kind == "stream"
    with pytest.raises(DataError, match="at least 1 sample from 0 on"):
        made.batch(1, -1, 3)
    made.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_state_gives_the_same_samples(kind: str) -> None:
    """At every point of three epochs; the state is JSON, and that of a run that was never restored."""
    one = KINDS[kind]()
    whole = one.batch(9, 0, 200)
    other = KINDS[kind]()
    for first in range(0, 196, 7):
        state = json.loads(json.dumps(one.state(9, first)))
        other.close()
        other = KINDS[kind]()
        other.restore(state)
        assert other.state(9, first) == state
        assert torch.equal(other.batch(9, first, 4).inputs, whole.inputs[first : first + 4])
    one.close()
    other.close()


@pytest.mark.parametrize("kind", KINDS)
def test_description_and_fingerprint_are_json(kind: str) -> None:
    made = KINDS[kind]()
    assert json.loads(json.dumps([made.fingerprint(), made.describe()]))[0] == KINDS[kind]().fingerprint()
    made.batch(0, 0, 100)
    epochs = made.epochs(0, 100)
    assert epochs and all(value > 0 for value in epochs.values())
    assert made.block_length == 7 and made.carried == (kind == "lanes")
    made.close()


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_another_document(kind: str) -> None:
    """Every document is of one letter: between two resets, and in every target that counts, is only that."""
    made = KINDS[kind]()
    batch = made.batch(4, 0, 180)
    seen = 0
    for tokens, targets, reset in zip(
        batch.inputs.tolist(), batch.targets.tolist(), batch.reset.tolist(), strict=True
    ):
        for at, (token, target) in enumerate(zip(tokens, targets, strict=True)):
            if at and not reset[at]:
                assert token == tokens[at - 1]
            if target != -100:
                assert target == token
            seen += reset[at]
    assert seen > 50
    made.close()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(alphabet="abc é日", max_size=40), min_size=1, max_size=12),
    st.integers(1, 9),
    st.integers(0, 4),
    st.booleans(),
)
def test_streams_and_lanes_are_made_of_the_same_text(
    texts: list[str], length: int, number: int, separated: bool
) -> None:
    """A stream in order is the store in order; a single lane is the store of the documents in its order."""
    tokenizer = BPE if separated else BYTES
    try:
        stored = blocks(texts, length, tokenizer)
    except DataError:
        return
    count = len(stored)
    flow = Stream(Texts(*texts), tokenizer, length)
    in_order = stored.blocks(np.arange(count))
    assert same(flow.batch(0, 0, count), in_order)
    assert torch.equal(
        flow.batch(0, number, count).inputs[: max(0, count - number)], in_order.inputs[number:]
    )
    flow.close()

    one = Lanes(stored.store, tokenizer, length, 1)
    order, _ = one._order(number, 0)
    moved = blocks([tokenizer.decode(stored.document(i)) for i in order], length, tokenizer)
    assert same(one.batch(number, 0, count), moved.blocks(np.arange(count)))
