"""Texts and settings of a fine-tuned classifier: bad ones, long ones, folds, batches, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spikelm.errors import ConfigError, DataError
from spikelm.tokenizer import Tokenizer
from spikelm.train.finetune.batches import encode, training_batches
from spikelm.train.finetune.config import FinetuneConfig
from spikelm.train.finetune.examples import bucket, load_task
from spikelm.train.finetune.metrics import measure, spread
from spikelm.train.finetune.seeds import finetune

from .finetuning import run, values, write_toy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0 fine\n1 words\nlonely\n", "line 3 is 'lonely', one word; expected a label"),
        ("0 one\n0 two\n0 three\n", r"one class only \('0'\)"),
        ("\n\n", "holds no line"),
        ('{"text": "a b", "label": 0}\n{"txt": "c", "label": 1}', "data.text_field names it"),
        ('{"text": "a b", "label": 0.5}', "the label is 0.5; expected text or a whole number"),
        ('{"text": " ", "label": 0}', "expected text that is not empty"),
        ("{", "line 1 is not JSON"),
    ],
)
def test_bad_lines(toy: Path, content: str, message: str) -> None:
    path = toy / ("bad.jsonl" if content.startswith("{") else "bad.txt")
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        run(toy, data__train=str(path))


def test_bad_sets(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (toy / "odd.txt").write_text("0 yes\n2 no\n")
    for part in ("dev", "test"):
        with pytest.raises(DataError, match=r"odd.txt line 2: unknown label '2'.*known: 0, 1 \(from"):
            run(toy, **{f"data__{part}": str(toy / "odd.txt")})
    with pytest.raises(DataError, match="no training text of class '7' of data.labels; it has 0, 1"):
        run(toy, data__labels={"0": "no", "1": "yes", "7": "never"})
    with pytest.raises(DataError, match="test.txt line 2: unknown label '1'"):
        run(toy, data__train=str(toy / "odd.txt"), data__dev=str(toy / "test.txt"))
    (toy / "latin.txt").write_bytes(b"0 caf\xe9\n1 tea\n")
    with pytest.raises(DataError, match="byte 5 .*data.encoding=latin-1"):
        run(toy, data__train=str(toy / "latin.txt"))
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(DataError, match="environment variable NOWHERE is not set"):
        run(toy, data__train="$NOWHERE/train.txt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"poling": "mean"}, "did you mean 'pooling'"),
        ({"pooling": "sum"}, "pooling is 'sum'"),
        ({"model": None}, "neither is given"),
        ({"init_from": "x"}, "both are given"),
        ({"data__fold": 2}, "data.test and data.fold both name a test set"),
        ({"data__tokenizer": "bpe:many"}, "expected bpe:N"),
        ({"schedule": {"warmup": 10_000}}, "schedule.warmup is 10000, longer than"),
    ],
)
def test_bad_configurations(toy: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(toy, **changes)


def test_long_texts_are_cut_and_counted(toy: Path) -> None:
    warnings: list[str] = []
    config = FinetuneConfig.from_dict(values(toy, epochs=1, data__max_length=4))
    report = finetune(config, warn=warnings.append)
    assert sum(report.cut.values()) > 100
    assert any(f"{sum(report.cut.values())} of 440 texts are longer than" in text for text in warnings)


def test_folds_cover_everything_and_no_text_is_on_two_sides(toy: Path) -> None:
    write_toy(toy / "train.txt", 400, 3)
    with (toy / "train.txt").open("a") as file:  # some texts twice
        file.writelines((toy / "train.txt").read_text().splitlines(keepends=True)[:50])
    seen: list[str] = []
    for fold in range(10):
        config = FinetuneConfig.from_dict(values(toy, data__test=None, data__fold=fold))
        task = load_task(config.data, lambda text: None)
        texts = [{example.text for example in part} for part in (task.train, task.dev, task.test)]
        assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
        assert len(task.train) + len(task.dev) + len(task.test) == 450
        assert 15 <= len(task.test) <= 80 and f"fold {fold} of 10" in task.protocol
        seen += [example.text for example in task.test]
    assert len(seen) == 450
    # The folds are the same on every machine and in every version.
    assert [bucket("fold", text, 10) for text in ("a text", "café")] == [0, 6]


def test_missing_classes_are_warned_about(toy: Path) -> None:
    (toy / "test.txt").write_text("0 an awful film\n")
    warnings: list[str] = []
    load_task(FinetuneConfig.from_dict(values(toy)).data, warnings.append)
    assert warnings == ["the test set has no text of class '1'; its figures say nothing about it"]


def test_batches_hold_every_text_once_in_an_order_of_seed_and_epoch(toy: Path) -> None:
    task = load_task(FinetuneConfig.from_dict(values(toy)).data, lambda text: None)
    data = encode(task.train, Tokenizer.bytes(), 64)
    orders = {}
    for key in ((0, 0), (0, 0), (0, 1), (1, 0)):
        batches = list(training_batches(data, 16, *key))
        order = [i for batch in batches for i in batch.index.tolist()]
        assert sorted(order) == list(range(len(data)))
        assert orders.setdefault(key, order) == order
        real = sum(len(ids) for ids in data.tokens)
        assert sum(batch.tokens.numel() for batch in batches) < 1.1 * real  # little padding
    assert len({tuple(order) for order in orders.values()}) == 3


def test_metrics_by_hand() -> None:
    found = measure([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1], 3, 6.0)
    assert found.confusion == ((2, 1, 0), (0, 2, 0), (0, 1, 0))
    assert found.accuracy == pytest.approx(4 / 6) and found.loss == 1.0
    assert found.stderr == pytest.approx((4 / 6 * 2 / 6 / 6) ** 0.5)
    assert found.macro_f1 == pytest.approx((2 * 2 / 5 + 2 * 2 / 6 + 0) / 3)
    assert spread([1.0, 3.0]) == {"mean": 2.0, "sd": pytest.approx(2**0.5), "stderr": pytest.approx(1.0)}
    assert spread([1.0])["sd"] is None
