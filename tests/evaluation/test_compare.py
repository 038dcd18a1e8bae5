"""Paired differences: what a unit is, that intervals cover, equal models do not differ. Loss by position."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from spikelm.data.source import open_source
from spikelm.errors import DataError
from spikelm.evaluation.compare import BLOCK_BYTES, LEVEL, MIN_UNITS, Units, UnitTally, compare
from spikelm.evaluation.corpus import read_corpus
from spikelm.evaluation.figures import BLOCK, Tally
from spikelm.evaluation.positions import PositionTally
from spikelm.evaluation.scoring import Scores
from spikelm.tokenizer import Tokenizer


def units(nats: np.ndarray, size: np.ndarray) -> Units:
    return Units(nats=nats, bytes=size, tokens=size, over="documents")


def test_the_same_model_does_not_differ() -> None:
    nats, size = np.random.default_rng(0).uniform(1, 2, 40), np.full(40, 100.0)
    found = compare({"a": {"carried": units(nats, size)}, "b": {"carried": units(nats, size)}}, seed=0)
    assert [found[0][key] for key in ("difference_bits_per_byte", "low", "high")] == [0.0, 0.0, 0.0]
    assert found[0]["n"] == 40 and (found[0]["a"], found[0]["b"]) == ("a", "b")


def test_pairing_removes_what_both_share() -> None:
    """Documents differ much, models by a constant: the paired interval is that constant."""
    rng = np.random.default_rng(1)
    size = rng.integers(50, 500, 60).astype(float)
    nats = size * rng.uniform(0.5, 3.0, 60)
    worse = nats + 0.01 * math.log(2) * size
    entry = compare({"a": {"x": units(nats, size)}, "b": {"x": units(worse, size)}}, seed=0)[0]
    for key in ("difference_bits_per_byte", "low", "high"):
        assert entry[key] == pytest.approx(0.01, abs=1e-9)


def test_every_model_against_the_first_with_the_same_draws() -> None:
    rng = np.random.default_rng(2)
    size = np.full(50, 80.0)
    a, b = (size * rng.uniform(1, 2, 50) for _ in range(2))
    figures = {label: {"x": units(nats, size)} for label, nats in (("a", a), ("b", b), ("c", b))}
    first, second = compare(figures, seed=3)
    assert (first["b"], second["b"]) == ("b", "c")
    assert {k: v for k, v in first.items() if k != "b"} == {k: v for k, v in second.items() if k != "b"}
    assert compare(figures, seed=3) == [first, second]
    assert compare(figures, seed=4)[0]["low"] != first["low"]
    assert first["low"] < first["difference_bits_per_byte"] < first["high"]


def test_intervals_cover_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 pairs of models with a known difference about 95% of the intervals hold it."""
    monkeypatch.setattr("spikelm.evaluation.compare.RESAMPLES", 400)
    rng = np.random.default_rng(5)
    truth, held = 0.05, 0
    for trial in range(300):
        size = rng.integers(80, 240, 50).astype(float)
        nats = size * rng.normal(1.5, 0.3, 50)
        other = nats + size * rng.normal(truth * math.log(2), 0.1, 50)
        entry = compare({"a": {"x": units(nats, size)}, "b": {"x": units(other, size)}}, seed=trial)[0]
        held += entry["low"] <= truth <= entry["high"]
    assert LEVEL == 0.95 and 0.90 <= held / 300 <= 0.98


@pytest.mark.parametrize("count", [1, MIN_UNITS - 1, MIN_UNITS])
def test_few_units_have_no_interval(count: int) -> None:
    """Empty units count as none."""
    size = np.concatenate([np.full(count, 4.0), np.zeros(3)])
    entry = compare({"a": {"x": units(size, size)}, "b": {"x": units(2 * size, size)}}, seed=0)[0]
    assert entry["n"] == count and entry["difference_bits_per_byte"] == pytest.approx(1 / math.log(2))
    assert (entry["low"] is None) == (entry["high"] is None) == (count < MIN_UNITS)


def test_other_text_is_refused() -> None:
    one, two = units(np.ones(3), np.ones(3)), units(np.ones(4), np.ones(4))
    with pytest.raises(DataError, match="a was measured on 3 documents and b on 4 documents"):
        compare({"a": {"x": one}, "b": {"x": two}}, seed=0)


def test_tokenizers_share_units(tmp_path: Path) -> None:
    """Blocks of bytes of one long document, documents where there are many; sums as in the figure."""
    sentence = "The spikes are rare; Größe und Stille are cheap. "
    words = Tokenizer.train_bpe([sentence], 300)
    long, many = tmp_path / "long.txt", tmp_path / "many.jsonl"
    long.write_text(sentence * 100, encoding="utf-8")
    many.write_text(f'{{"text": "{sentence}"}}\n' * 35, encoding="utf-8")
    for path, over in ((long, f"blocks of {BLOCK_BYTES} bytes"), (many, "documents")):
        found = []
        for tokenizer in (Tokenizer.bytes(), words):
            corpus = read_corpus(open_source(str(path)), tokenizer)
            shared, tally = UnitTally(corpus.byte_lengths), Tally(corpus.byte_lengths)
            for index, tokens in enumerate(corpus.tokens):
                scores = Scores(document=index, first=1, context=1, nats=np.full(len(tokens) - 1, 2.0))
                shared.add(scores)
                tally.add(scores)
            got, figure = shared.units(), tally.figure("x")
            assert got.over == over
            assert got.nats.sum() == pytest.approx(figure.nats)
            assert (round(got.bytes.sum()), round(got.tokens.sum())) == (figure.bytes, figure.tokens)
            assert [row["tokens"] for row in shared.documents()] == [len(t) - 1 for t in corpus.tokens]
            found.append(got)
        assert len(found[0].nats) == len(found[1].nats) == (35 if path == many else 5)
        # A token is counted where it begins, so a block's bytes differ by less than a token at each end.
        longest = words.token_bytes.max()
        assert np.abs(found[0].bytes - found[1].bytes).max() <= 2 * longest


def test_positions_by_hand() -> None:
    """Two documents: positions 1, 2-3 and 4; means, counts and errors over the blocks that hold them."""
    tally = PositionTally()
    tally.add(Scores(document=0, first=1, context=1, nats=np.array([4.0, 3.0])))
    tally.add(Scores(document=0, first=3, context=3, nats=np.array([1.0, 2.0])))
    tally.add(Scores(document=1, first=1, context=1, nats=np.array([2.0])))
    curve = tally.summary()
    assert [(b["from"], b["to"], b["tokens"], b["nats_per_token"]) for b in curve] == [
        (1, 1, 2, 3.0),
        (2, 3, 2, 2.0),
        (4, 7, 1, 2.0),
    ]
    assert curve[0]["stderr"] == pytest.approx(1.0) and curve[0]["units"] == "blocks"
    assert curve[1]["stderr"] is None and curve[1]["n"] == 1


def test_positions_of_many_documents_and_of_one_long_one() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(1, 2, 40)
    tally = PositionTally()
    for document, value in enumerate(values):
        tally.add(Scores(document=document, first=1, context=1, nats=np.array([value, 1.0, 1.0])))
    curve = tally.summary()
    assert curve[0]["units"] == "documents" and curve[0]["n"] == 40
    assert curve[0]["stderr"] == pytest.approx(values.std(ddof=1) / math.sqrt(40))
    assert curve[1]["stderr"] == 0.0

    tally = PositionTally()
    nats = np.repeat([1.0, 2.0, 3.0, 5.0], BLOCK)[1:]  # positions 1 to 2047
    for begin in range(0, len(nats), 100):  # pieces as they come from chunks
        tally.add(Scores(document=0, first=1 + begin, context=1 + begin, nats=nats[begin : begin + 100]))
    curve = tally.summary()
    assert [b["from"] for b in curve] == [2**e for e in range(11)]
    assert sum(b["tokens"] for b in curve) == 2047
    assert curve[9]["nats_per_token"] == 2.0 and curve[9]["n"] == 1
    assert curve[10]["nats_per_token"] == 4.0 and curve[10]["n"] == 2
    assert curve[10]["stderr"] == pytest.approx(1.0)


def test_a_window_is_a_unit_of_its_own() -> None:
    """The same document in two windows: position 1 was met twice."""
    tally = PositionTally()
    for start, value in ((0, 1.0), (4, 3.0)):
        tally.add(Scores(document=0, first=start + 1, context=1, nats=np.array([value])))
    (only,) = tally.summary()
    assert (only["nats_per_token"], only["n"], only["stderr"]) == (2.0, 2, pytest.approx(1.0))
