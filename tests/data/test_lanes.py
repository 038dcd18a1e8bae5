"""Lanes: what each is given, where its state starts anew, and which documents are in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikelm.data import TokenBlocks
from spikelm.data.lanes import Lanes
from spikelm.data.store import TokenStore
from spikelm.errors import DataError
from spikelm.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
BPE = Tokenizer.train_bpe(["abc abc bca cab é日 " * 30], 280)


def store(texts: list[str], tokenizer: Tokenizer = BYTES) -> TokenStore:
    return TokenBlocks.from_documents(texts, tokenizer, 1).store


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(alphabet="abc é日", max_size=60), min_size=1, max_size=10),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(0, 9),
    st.booleans(),
)
def test_lanes_agree_with_a_plain_loop(
    texts: list[str], length: int, count: int, seed: int, separated: bool
) -> None:
    tokenizer = BPE if separated else BYTES
    try:
        lanes = Lanes(store(texts, tokenizer), tokenizer, length, count)
    except DataError as error:
        assert "fewer than" in str(error)
        return
    documents = TokenBlocks(lanes.store, tokenizer, 1)
    for epoch in range(2):
        order, _ = lanes._order(seed, epoch)
        assert sorted(order.tolist()) == list(range(documents.num_documents))
        text = [(int(t), i == 0) for d in order for i, t in enumerate(documents.document(int(d)))]
        piece = lanes.steps * length
        for step in range(lanes.steps):
            batch = lanes.batch(seed, (epoch * lanes.steps + step) * count, count)
            for lane in range(count):
                at = lane * piece + step * length
                window = text[at : at + length + 1]
                assert batch.inputs[lane].tolist() == [token for token, _ in window[:-1]]
                resets = [begins for _, begins in window[:-1]]
                resets[0] |= step == 0
                assert batch.reset[lane].tolist() == resets
                targets = [-100 if begins and not separated else token for token, begins in window[1:]]
                assert batch.targets[lane].tolist() == targets


def test_a_lane_goes_on_where_it_ended() -> None:
    """One long document: no reset but at the start of each lane's piece, and no token missed or repeated."""
    text = "".join(chr(33 + (7 * i * i + i) % 90) for i in range(1000))
    lanes = Lanes(store([text]), BYTES, 16, 3)
    assert lanes.steps == 999 // 48 == 20
    batch = lanes.batch(0, 0, 60)
    for lane in range(3):
        rows = batch.inputs[lane::3]
        assert bytes(rows.flatten().tolist()).decode() == text[lane * 320 : (lane + 1) * 320]
        assert torch.equal(batch.targets[lane::3].flatten()[:-1], rows.flatten()[1:])
        assert batch.reset[lane::3].sum() == 1 and batch.reset[lane, 0]


def test_documents_come_in_another_order_in_every_epoch() -> None:
    texts = [letter * 5 for letter in "abcdefghijkl"]
    lanes = Lanes(store(texts), BYTES, 4, 2)
    orders = {tuple(lanes._order(seed, epoch)[0]) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    first = lanes.batch(0, 0, 2 * lanes.steps).inputs
    second = lanes.batch(0, 2 * lanes.steps, 2 * lanes.steps).inputs
    assert not torch.equal(first, second)
    assert lanes.epochs(0, 3 * lanes.steps) == {"the documents": 1.5}


def test_what_is_refused() -> None:
    with pytest.raises(DataError, match="holds 10 tokens, fewer than a block of 4 for each of 3 lanes"):
        Lanes(store(["a" * 10]), BYTES, 4, 3)
    for bad in (0, -1, True, 2.0):
        with pytest.raises(DataError, match="number of lanes"):
            Lanes(store(["a" * 10]), BYTES, 4, bad)  # type: ignore[arg-type]
        with pytest.raises(DataError, match="block_length"):
            Lanes(store(["a" * 10]), BYTES, bad, 2)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the documents .* was written with tokenizer"):
        Lanes(store(["a" * 10]), BPE, 4, 2)


def test_a_token_outside_the_vocabulary_is_named() -> None:
    good = store(["a" * 100])
    tokens = np.array(good.tokens)
    tokens[33] = 999
    bad = TokenStore(tokens=tokens, starts=good.starts, index=good.index)
    with pytest.raises(DataError, match="the documents .*token 999 at position .* vocabulary of 256"):
        Lanes(bad, BYTES, 8, 2).batch(0, 0, 12)
