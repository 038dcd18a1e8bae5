"""Token stores and blocks: targets and resets at document ends, order, bytes, cache, damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikelm.data import TokenBlocks, open_source
from spikelm.data.store import tokenise
from spikelm.errors import DataError
from spikelm.tokenizer import Tokenizer

from .stores import BPE, BYTES, Texts


def blocks_of(texts: list[str], tokenizer: Tokenizer, length: int) -> TokenBlocks:
    return TokenBlocks.from_documents(texts, tokenizer, length)


def in_order(blocks: TokenBlocks):
    return blocks.blocks(np.arange(len(blocks)))


# --- what a batch holds -----------------------------------------------------------------------------------


def test_bytes_without_end_of_document() -> None:
    batch = in_order(blocks_of(["abc", "de", "fghij"], BYTES, 3))
    assert batch.inputs.tolist() == [list(b"abc"), list(b"def"), list(b"ghi")]
    assert batch.targets.tolist() == [[98, 99, -100], [101, -100, 103], list(b"hij")]
    assert batch.reset.tolist() == [[True, False, False], [True, False, True], [False] * 3]
    assert batch.target_bytes.tolist() == [2, 2, 3]
    assert batch.inputs.dtype == batch.targets.dtype == batch.samples.dtype == torch.int64
    assert batch.reset.dtype == torch.bool and batch.target_bytes.dtype == torch.int64


def test_end_of_document_is_predicted_and_predicts() -> None:
    eos = BPE.eos_id
    batch = in_order(blocks_of(["x", "yz", "w"], BPE, 2))
    x, y, z, w = (BPE.encode(c)[0] for c in "xyzw")
    assert batch.inputs.tolist() == [[x, eos], [y, z], [eos, w]]
    assert batch.targets.tolist() == [[eos, y], [z, eos], [w, eos]]
    assert batch.reset.tolist() == [[True, False], [True, False], [False, True]]
    assert batch.target_bytes.tolist() == [1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="abc é日", max_size=30), min_size=1, max_size=8), st.integers(1, 9))
def test_batches_agree_with_a_plain_loop(texts: list[str], length: int) -> None:
    for tokenizer in (BYTES, BPE):
        stream: list[tuple[int, bool]] = []
        for text in filter(None, texts):
            ids = tokenizer.encode(text) + ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
            stream += [(token, i == 0) for i, token in enumerate(ids)]
        if len(stream) <= length:
            with pytest.raises(DataError, match="fewer than one block"):
                blocks_of(texts, tokenizer, length)
            continue
        blocks = blocks_of(texts, tokenizer, length)
        assert len(blocks) == (len(stream) - 1) // length
        assert blocks.num_bytes == sum(len(text.encode()) for text in texts)
        batch = in_order(blocks)
        for row in range(len(blocks)):
            window = stream[row * length : row * length + length + 1]
            assert batch.inputs[row].tolist() == [token for token, _ in window[:-1]]
            assert batch.reset[row].tolist() == [starts for _, starts in window[:-1]]
            lone = tokenizer.eos_id is None
            targets = [-100 if starts and lone else token for token, starts in window[1:]]
            assert batch.targets[row].tolist() == targets
            counted = [tokenizer.token_bytes[token] for token in targets if token != -100]
            assert batch.target_bytes[row] == sum(counted)


def test_documents_are_given_back() -> None:
    blocks = blocks_of(["abc", "", "de"], BPE, 1)
    assert [BPE.decode(blocks.document(i)) for i in range(blocks.num_documents)] == ["abc", "de"]
    assert blocks.bytes_per_token == 5 / blocks.num_tokens
    with pytest.raises(DataError, match="document 2 does not exist"):
        blocks.document(2)


# --- order ------------------------------------------------------------------------------------------------


def test_order_does_not_depend_on_the_batch_size() -> None:
    blocks = blocks_of(["".join(chr(33 + i % 90) for i in range(1000))], BYTES, 7)
    whole = blocks.batch(5, 0, 300)
    assert whole.samples.tolist() == list(range(300))
    for size in (1, 4, 7, 100):
        parts = [blocks.batch(5, first, min(size, 300 - first)) for first in range(0, 300, size)]
        for name in ("inputs", "targets", "reset", "samples", "target_bytes"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    ranks = [blocks.gather(5, np.arange(rank, 300, 3)) for rank in range(3)]
    assert torch.equal(torch.stack([r.inputs for r in ranks], 1).flatten(0, 1), whole.inputs)


def test_every_epoch_sees_every_block_in_another_order() -> None:
    blocks = blocks_of([bytes(range(128)).decode()], BYTES, 2)
    n = len(blocks)
    epochs = [blocks.batch(0, epoch * n, n).inputs[:, 0].tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(0, 2 * n, 2)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert blocks.batch(1, 0, n).inputs[:, 0].tolist() != epochs[0]


def test_bad_requests_are_refused() -> None:
    blocks = blocks_of(["abcdef"], BYTES, 2)
    for first, size in ((-1, 1), (0, 0)):
        with pytest.raises(DataError, match="at least 1 sample"):
            blocks.batch(0, first, size)
    for length in (0, -1, True, 2.0):
        with pytest.raises(DataError, match="block_length"):
            blocks_of(["abcdef"], BYTES, length)


# --- from a source --------------------------------------------------------------------------------------


def test_runs_on_documents_in_memory_are_told_apart() -> None:
    one, two = (blocks_of([text], BYTES, 2).store.index.tokens_sha256 for text in ("abcd", "abce"))
    assert len(one) == 64 and one != two


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="was written with tokenizer"):
        TokenBlocks(tokenise(Texts("abc def " * 100), BYTES, tmp_path), BPE, 4)


def test_builtin_text_end_to_end(tmp_path: Path) -> None:
    blocks = TokenBlocks.build("builtin:python-docs#valid", BYTES, 128, tmp_path)
    batch = blocks.batch(0, 0, 8)
    assert batch.inputs.shape == (8, 128) and int(batch.inputs.max()) < 256
    texts = list(open_source("builtin:python-docs#valid").documents())
    assert blocks.num_bytes == blocks.num_tokens == sum(len(text.encode()) for text in texts)
    assert torch.equal(batch.to("cpu").inputs, batch.inputs)
