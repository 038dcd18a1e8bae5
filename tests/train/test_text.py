"""From ``data:`` in a configuration to samples: which kind, and the one sentence for what cannot be."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikelm.data import TokenBlocks
from spikelm.data.lanes import Lanes
from spikelm.data.mixture import Mixture
from spikelm.data.stream import Stream
from spikelm.errors import ConfigError, DataError
from spikelm.tokenizer import Tokenizer
from spikelm.train.config import DataConfig, TrainConfig
from spikelm.train.overrides import apply_overrides
from spikelm.train.setup import load_text

BYTES = Tokenizer.bytes()


def config(make_values: Any, **changes: Any) -> DataConfig:
    return TrainConfig.from_dict(make_values(**changes)).data


def mixed(tmp_path: Path, *weights: float) -> list[dict[str, Any]]:
    names = ("train.txt", "valid.txt")
    return [{"source": str(tmp_path / name), "weight": w} for name, w in zip(names, weights, strict=True)]


def test_kinds(make_values: Any, tmp_path: Path) -> None:
    kinds = {
        TokenBlocks: {},
        Stream: {"data__stream": True, "data__shuffle_buffer": 5},
        Lanes: {"data__carried": True},
        Mixture: {"data__train": mixed(tmp_path, 0.7, 0.3)},
    }
    prints = []
    for kind, changes in kinds.items():
        text = load_text(config(make_values, **changes), batch_size=3)
        assert type(text.train) is kind and isinstance(text.valid, TokenBlocks)
        assert text.describe()["valid_tokens"] == text.valid.num_tokens
        prints.append(str(text.fingerprint()))
        text.train.close()
    assert len(set(prints)) == 4
    # What a checkpoint of plain blocks compares is the hash of their tokens and nothing more.
    plain = load_text(config(make_values))
    assert isinstance(plain.train, TokenBlocks)
    assert plain.fingerprint() == {
        "data.tokenizer (fingerprint)": BYTES.sha256,
        "data.train (fingerprint)": plain.train.store.index.tokens_sha256,
    }


def test_weight_zero_leaves_a_source_out(make_values: Any, tmp_path: Path) -> None:
    parts = mixed(tmp_path, 1.0, 1.0)
    values = apply_overrides(
        make_values(data__train=parts), ["data.train.1.weight=0", "data.train.0.weight=3"]
    )
    values["data"]["train"].append({"source": "no such file", "weight": 0})
    text = load_text(TrainConfig.from_dict(values).data)
    assert [part["source"] for part in text.train.describe()["parts"]] == [str(tmp_path / "train.txt")]
    again = TrainConfig.from_dict(TrainConfig.from_dict(values).model_dump(mode="json"))
    assert again == TrainConfig.from_dict(values)


@pytest.mark.parametrize("override", ["data.train.2.weight=1", "data.train.x.weight=1"])
def test_overrides_of_no_entry(make_values: Any, tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="is no entry of a list of 2; count from 0"):
        apply_overrides(make_values(data__train=mixed(tmp_path, 1, 1)), [override])


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (3, r"got 3 \(int\); expected a source, or a list"),
        ({"source": "a"}, r"\(dict\); expected a source, or a list"),
        ([], "the list is empty"),
        ([{"source": "a"}, {"source": "b"}, {"source": "a"}], "a is given twice"),
        ([{"sorce": "a"}], "entry 0 is {'sorce': 'a'}; expected {source: SPEC, weight: NUMBER}"),
        ([{"source": "a", "wieght": 1}], "entry 0 is"),
        (["a"], "entry 0 is 'a'"),
        ([{"source": 7}], r"entry 0: source is 7 \(int\)"),
        ([{"source": "a"}, {"source": "b", "weight": math.nan}], "entry 1: the weight of b is nan"),
        ([{"source": "a", "weight": -0.5}], "the weight of a is -0.5; expected a finite number"),
        ([{"source": "a", "weight": "1"}], "the weight of a is '1'; expected a number"),
        ([{"source": "a", "weight": True}], "the weight of a is True; expected a number"),
        ([{"source": "a", "weight": 0}, {"source": "b", "weight": 0.0}], "all weights are 0"),
    ],
)
def test_bad_mixtures(make_values: Any, train: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^training configuration: data.train: .*{words}") as caught:
        config(make_values, data__train=train)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no data source .*other.txt"),
        ("", "other.txt holds no text"),
        ("short", "other.txt holds 5 tokens, fewer than one block of 16"),
        (b"\xff\xfe", "other.txt"),
    ],
)
def test_a_bad_component_is_named(make_values: Any, tmp_path: Path, content: Any, words: str) -> None:
    parts = [*mixed(tmp_path, 1, 1), {"source": str(tmp_path / "other.txt")}]
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "other.txt").write_bytes(data)
    with pytest.raises(DataError, match=words):
        load_text(config(make_values, data__train=parts))


def test_tokens_of_a_component_are_checked() -> None:
    """Another tokenizer's, or outside the vocabulary: the component is named, not only its place."""
    good = TokenBlocks.from_documents(["abcd" * 20], BYTES, 4, name="good")
    store = TokenBlocks.from_documents(["abcd" * 20], BYTES, 4, name="foreign").store
    with pytest.raises(DataError, match="foreign .*was written with tokenizer"):
        TokenBlocks(store, Tokenizer.train_bpe(["abcd " * 20], 260), 4)
    tokens = np.array(store.tokens)
    tokens[41] = 300
    bad = TokenBlocks(replace(store, tokens=tokens), BYTES, 4)
    with pytest.raises(DataError, match="foreign .*token 300 at position 41 .*vocabulary of 256"):
        Mixture({"good": good, "foreign": bad}, [1, 1]).batch(0, 0, 60)


def test_carried_needs_a_batch_size(make_values: Any) -> None:
    with pytest.raises(ConfigError, match="data.carried needs the batch size"):
        load_text(config(make_values, data__carried=True))
    with pytest.raises(DataError, match="fewer than a block of 16 for each of 9999 lanes"):
        load_text(config(make_values, data__carried=True), batch_size=9999)
