"""Streams: shuffled windows, where reading goes on, threads, and sources that are not what they were."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from spikelm.data import TokenBlocks, encoding
from spikelm.data.packing import CHUNK, Place, Reader, chunks
from spikelm.data.source import Source
from spikelm.data.stream import Stream
from spikelm.errors import DataError
from spikelm.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
BPE = Tokenizer.train_bpe(["abc abc bca cab é日 " * 30], 280)


class Texts(Source):
    """Documents in memory; says which were taken, and can fail or change."""

    def __init__(self, *texts: str, fail_at: int = -1) -> None:
        super().__init__("texts")
        self.texts, self.fail_at, self.taken = list(texts), fail_at, 0

    def _documents(self) -> Iterator[str]:
        for number, text in enumerate(self.texts):
            if number == self.fail_at:
                raise DataError(f"texts line {number} is damaged")
            self.taken += 1
            yield text

    def fingerprint(self) -> str:
        return repr(self.texts)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    deadline = time.monotonic() + 5.0
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def documents(count: int, size: int = 50) -> list[str]:
    return [
        "".join(chr(33 + (i * 31 + 7 * j * j) % 90) for j in range(1 + (i * size) % 97)) for i in range(count)
    ]


# --- which samples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize("length", [3, 16])
def test_many_chunks_are_the_store(tokenizer: Tokenizer, length: int) -> None:
    texts = [*documents(300), "", "é日" * 2000, *documents(40)]
    stored = TokenBlocks.from_documents(texts, tokenizer, length)
    assert len(stored) > 3 * CHUNK
    flow = Stream(Texts(*texts), tokenizer, length)
    in_order = stored.blocks(np.arange(len(stored)))
    for epoch in range(2):
        found = flow.batch(0, epoch * len(stored), len(stored))
        for name in ("inputs", "targets", "reset", "target_bytes"):
            assert torch.equal(getattr(found, name), getattr(in_order, name))
    assert flow.num_blocks == len(stored) and flow.epochs(0, len(stored)) == {"texts": 1.0}
    flow.close()


@pytest.mark.parametrize("start", [0, 5, 12, 60])
def test_reading_goes_on_at_every_place(start: int) -> None:
    """Also inside a document, at its first token and at the end-of-document token."""
    texts = [*documents(100), "ab" * 900, *documents(60)]
    whole = list(chunks(Texts(*texts), BPE, 3, Place()))
    number = start % (len(whole) - 1)
    place = whole[number].next
    assert place is not None
    rest = list(chunks(Texts(*texts), BPE, 3, place))
    assert len(rest) == len(whole) - number - 1
    for one, other in zip(rest, whole[number + 1 :], strict=True):
        assert np.array_equal(one.window, other.window) and np.array_equal(one.begins, other.begins)
        assert one.next == other.next


@pytest.mark.parametrize("buffer", [1, 7, 64, 100, 5000])
def test_windows_are_permuted(buffer: int) -> None:
    text = "".join(chr(33 + i % 90) for i in range(331 * 2 + 1))
    flow = Stream(Texts(text), BYTES, 2, buffer)
    in_order = Stream(Texts(text), BYTES, 2)
    plain = in_order.batch(0, 0, 331).inputs.tolist()
    orders = set()
    for epoch in range(3):
        found = flow.batch(5, epoch * 331, 331).inputs.tolist()
        orders.add(str(found))
        for first in range(0, 331, buffer):
            assert sorted(found[first : first + buffer]) == sorted(plain[first : first + buffer])
    assert len(orders) == (1 if buffer == 1 else 3)
    flow.close()
    in_order.close()


def test_windows_differ_from_one_another() -> None:
    """The order inside a window is not that of the window before."""
    text = "".join(chr(33 + i % 90) for i in range(640 * 1 + 1))
    flow = Stream(Texts(text), BYTES, 1, 90)
    found = flow.batch(0, 0, 540).inputs.flatten().tolist()
    windows = {tuple(found[first : first + 90]) for first in range(0, 540, 90)}
    assert len(windows) == 6
    flow.close()


# --- going on ---------------------------------------------------------------------------------------------


def test_a_resumed_stream_does_not_tokenise_what_lies_before(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, encoded = documents(4000), [0]
    original = encoding.encode_parts

    def counted(tokenizer: Tokenizer, parts: Any) -> Any:
        encoded[0] += len(parts)
        return original(tokenizer, parts)

    monkeypatch.setattr(encoding, "encode_parts", counted)
    flow = Stream(Texts(*texts), BYTES, 16)
    whole = flow.batch(0, 0, 9000)
    state = flow.state(0, 9000)
    expected = flow.batch(0, 9000, 8)
    flow.close()
    assert state["document"] > 2500
    assert encoded == [4000]
    resumed = Stream(Texts(*texts), BYTES, 16)
    resumed.restore(state)
    assert torch.equal(resumed.batch(0, 9000, 8).inputs, expected.inputs)
    resumed.close()
    assert encoded == [4000 + 4000 - state["document"]]
    # Without a state, the same samples by reading from the start.
    again = Stream(Texts(*texts), BYTES, 16)
    again.restore({})
    assert torch.equal(again.batch(0, 9000, 8).inputs, expected.inputs)
    assert torch.equal(again.batch(0, 100, 8).inputs, whole.inputs[100:108])  # and back
    again.close()


def test_the_state_does_not_depend_on_how_far_was_read_ahead() -> None:
    texts = documents(600)
    one, other = (Stream(Texts(*texts), BYTES, 4, 30) for _ in range(2))
    one.batch(0, 0, 4000)
    other.batch(0, 0, 901)
    for first in (0, 17, 600, 901):
        assert one.state(0, first) == other.state(0, first)
    one.close()
    other.close()


@pytest.mark.parametrize(
    "state",
    [
        {"blocks": 0, "chunk": 0, "document": 0, "offset": 0},
        {"blocks": None, "chunk": -1, "document": 0, "offset": 0},
        {"blocks": None, "chunk": 1, "document": "2", "offset": 0},
        {"chunk": 1},
    ],
)
def test_a_damaged_state_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="the saved position in texts is"):
        Stream(Texts("abc"), BYTES, 1).restore(state)


# --- threads ----------------------------------------------------------------------------------------------


def test_reading_is_ahead_but_not_without_bound() -> None:
    source = Texts(*["x" * 64] * 100_000)
    reader = Reader(source, BYTES, 16, Place())
    reader.next()
    time.sleep(0.3)
    ahead = source.taken
    time.sleep(0.2)
    assert CHUNK * 16 / 64 < ahead == source.taken < 20_000
    reader.close()


def test_worker_processes_make_the_same_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And end when the stream is closed in the middle of a pass."""
    monkeypatch.setattr(encoding, "IN_PROCESS_BYTES", 0)
    monkeypatch.setattr(encoding, "_BATCH_BYTES", 2000)
    pools: list[Any] = []
    original = encoding.WorkerPool
    monkeypatch.setattr(encoding, "WorkerPool", lambda *args: pools.append(original(*args)) or pools[-1])
    texts = [*documents(400), "ab c\n" * 900, *documents(60)]
    flow = Stream(Texts(*texts), BPE, 16, workers=2)
    stored = TokenBlocks.from_documents(texts, BPE, 16)
    found = flow.batch(0, 0, len(stored)).inputs
    assert torch.equal(found, stored.blocks(np.arange(len(stored))).inputs)
    flow.batch(0, len(stored), 3)
    pids = [pid for pool in pools for pid in pool.pids]
    flow.close()
    assert len(pools) == 2 and len(pids) == 4
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_stream_that_is_forgotten_ends_its_thread() -> None:
    flow = Stream(Texts(*["x" * 64] * 10_000), BYTES, 16)
    flow.batch(0, 0, 1)
    assert any(thread.name == "read texts" for thread in threading.enumerate())
    del flow  # and the fixture looks


# --- what is refused --------------------------------------------------------------------------------------


def test_errors_of_the_source_arrive_when_due_and_again() -> None:
    texts = documents(400)
    flow = Stream(Texts(*texts, fail_at=399), BYTES, 4)
    assert flow.batch(0, 0, 100).inputs.shape == (100, 4)
    for _ in range(2):
        with pytest.raises(DataError, match="texts line 399 is damaged"):
            flow.batch(0, 0, 100_000)
    assert flow.state(0, 100)["document"] > 0
    assert flow.batch(0, 3, 4).inputs.shape == (4, 4)
    flow.close()


@pytest.mark.parametrize("texts", [(), ("",), ("", "")])
def test_empty_sources(texts: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="texts holds no text"):
        Stream(Texts(*texts), BYTES, 4).batch(0, 0, 1)


def test_less_than_a_block() -> None:
    with pytest.raises(DataError, match="texts holds fewer tokens than one block of 4"):
        Stream(Texts("abcd"), BYTES, 4).batch(0, 0, 1)
    assert Stream(Texts("abcde"), BYTES, 4).batch(0, 0, 3).inputs.tolist() == [list(b"abcd")] * 3


def test_a_source_that_changes_is_told() -> None:
    source = Texts(*documents(50))
    flow = Stream(source, BYTES, 4)
    flow.batch(0, 0, 5000)
    assert flow.num_blocks is not None
    source.texts = source.texts[:-1]
    with pytest.raises(DataError, match="texts ended after .* when it was read before"):
        flow.batch(0, 5000, 5000)
    flow.close()


def test_a_source_that_ends_before_the_saved_position() -> None:
    for state in ((70, 0), (49, 500)):
        flow = Stream(Texts(*documents(50)), BYTES, 4)
        flow.restore({"blocks": None, "chunk": 3, "document": state[0], "offset": state[1]})
        with pytest.raises(DataError, match=f"texts ends before token {state[1]} of document {state[0]}"):
            flow.batch(0, 3 * CHUNK, 1)


def test_bad_sizes() -> None:
    for bad in (-1, True, 1.5):
        with pytest.raises(DataError, match="shuffle_buffer"):
            Stream(Texts("abc"), BYTES, 1, bad)  # type: ignore[arg-type]
        with pytest.raises(DataError, match="block_length"):
            Stream(Texts("abc"), BYTES, bad)  # type: ignore[arg-type]
