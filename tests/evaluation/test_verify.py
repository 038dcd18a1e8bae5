"""``spikelm eval --verify``: what reproduces, what does not, and what cannot be run again."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spikelm.checkpoint import save_checkpoint
from spikelm.cli import main
from spikelm.config import ModelConfig
from spikelm.errors import DataError
from spikelm.evaluation.record import identity, read
from spikelm.evaluation.verify import KINDS, TOLERANCES, verify
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer

TEXT = "Spikes are rare; silence is cheap. " * 40


def checkpoint(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    # So wide an initialisation that every projection does something.
    given = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "initializer_range": 0.3}
    return save_checkpoint(folder, SpikeLM(ModelConfig(**given, **options)), Tokenizer.bytes())


@pytest.fixture(scope="module", params=["float", "int8"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, a text and the record of measuring them."""
    folder = tmp_path_factory.mktemp(request.param)
    options = {"weights": {"name": "int8", "group_size": 128}} if request.param == "int8" else {}
    names = [str(checkpoint(folder / "one", **options)), str(checkpoint(folder / "two", **options))]
    (folder / "text.txt").write_text(TEXT)
    words = ["--data", str(folder / "text.txt"), "--length", "64", "--lengths", "128,1k"]
    assert main(["eval", *names, *words, "--json", str(folder / "eval.json")]) == 0
    return folder


def changed(made: Path, change: Any) -> Path:
    """The record with something changed, in a file of its own."""
    record = json.loads((made / "eval.json").read_text())
    change(record)
    path = made / "changed.json"
    path.write_text(json.dumps(record))
    return path


def nats(record: dict[str, Any], factor: float) -> None:
    record["results"]["models"]["two"]["figures"]["carried"]["nats"] *= factor


def test_a_result_reproduces(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "verdict.json"
    assert main(["eval", "--verify", str(made / "eval.json"), "--json", str(out)]) == 0
    words = " ".join(capsys.readouterr().out.split())
    verdict = json.loads(out.read_text())
    assert "reproduces" in words and verdict["reproduced"] and verdict["differences"] == []
    assert verdict["compared"] == verdict["identical"] > 300
    if made.name.startswith("int8"):
        assert verdict["tolerance"] == 0 and "the same bits" in words
    else:
        assert verdict["tolerance"] == TOLERANCES["float32"] and "relative tolerance of 0.0001" in words


def test_a_changed_figure_is_named(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = changed(made, lambda record: nats(record, 1.01))
    assert main(["eval", "--verify", str(path)]) == 1
    captured = capsys.readouterr()
    assert "does not reproduce: 1 values" in captured.out and captured.err == ""
    assert "models.two.figures.carried.nats" in captured.out


def test_how_exact_it_must_be(made: Path) -> None:
    """A relative change of 1e-9 passes for floats and not for integers on the same machine."""
    path = changed(made, lambda record: nats(record, 1 + 1e-9))
    verdict = verify(path)
    assert verdict.reproduced == made.name.startswith("float")
    assert verdict.identical == verdict.compared - 1

    def elsewhere(record: dict[str, Any]) -> None:
        nats(record, 1 + 1e-9)
        record["machine"]["cpu"] = "another"

    verdict = verify(changed(made, elsewhere))
    assert verdict.reproduced and verdict.tolerance == TOLERANCES["float32"]
    if made.name.startswith("int8"):
        assert "another cpu" in verdict.why


def test_only_the_integers_of_a_mixed_record_are_exact(tmp_path: Path) -> None:
    """Beside a float model the int8 one must still give the same bits."""
    one = checkpoint(tmp_path / "one")
    two = checkpoint(tmp_path / "two", weights={"name": "int8", "group_size": 128})
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["--data", str(tmp_path / "text.txt"), "--mode", "carried", "--json", str(tmp_path / "eval.json")]
    assert main(["eval", str(one), str(two), *words]) == 0
    assert verify(tmp_path / "eval.json").reproduced
    for label, allowed in (("one", True), ("two", False)):

        def change(record: dict[str, Any], label: str = label) -> None:
            record["results"]["models"][label]["figures"]["carried"]["nats"] *= 1 + 1e-9

        verdict = verify(changed(tmp_path, change))
        assert verdict.reproduced == allowed and "two: int8 weights" in verdict.why


@pytest.fixture
def float_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    checkpoint(tmp_path / "one")
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["--data", str(tmp_path / "text.txt"), "--mode", "carried", "--json", str(tmp_path / "eval.json")]
    assert main(["eval", str(tmp_path / "one"), *words]) == 0
    capsys.readouterr()
    return tmp_path


def refused(folder: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--verify", str(folder / "eval.json")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


def test_other_weights(float_made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    shutil.rmtree(float_made / "one")
    model = SpikeLM(ModelConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1))
    save_checkpoint(float_made / "one", model, Tokenizer.bytes())
    refused(float_made, "the weights of checkpoint", capsys)
    shutil.rmtree(float_made / "one")
    refused(float_made, "is not at", capsys)


def test_another_configuration(float_made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = float_made / "one" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"neuron": {"name": "adaptive", "k": 2.0}}))
    refused(float_made, "the configuration of checkpoint", capsys)


def test_other_text(float_made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (float_made / "text.txt").write_text(TEXT.replace("rare", "many"))
    refused(float_made, "text.txt changed since", capsys)
    (float_made / "text.txt").unlink()
    refused(float_made, "there is no data source", capsys)


def test_another_tokenizer(float_made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = float_made / "one" / "tokenizer.json"
    spec = json.loads(path.read_text())
    vocabulary = spec["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(spec))
    refused(float_made, "the tokenizer changed since", capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "evil"}, "unknown kind of record 'evil'; did you mean 'eval'?"),
        ({"format": 99}, "has format 99; this version reads 1"),
        ({"arguments": {"data": "x"}}, "'checkpoints' or 'data' is missing"),
        ({"arguments": {"data": "x", "checkpoints": ["y"], "speed": 1}}, "'speed' is unknown"),
    ],
)
def test_what_is_no_result(
    float_made: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = float_made / "eval.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(float_made, message, capsys)
    path.write_text("{")
    refused(float_made, "cannot be read as a result", capsys)
    path.write_text("[]")
    refused(float_made, "is no result of a measurement", capsys)
    path.unlink()
    refused(float_made, "eval.json cannot be read", capsys)


def test_what_is_compared(float_made: Path) -> None:
    """Counts and words exactly, missing values, lists of other lengths; measured times never."""
    old = read(float_made / "eval.json")
    old["kind"], old["results"] = "energy", {
        "n": 3, "rate": 0.5, "zero": 0.0, "word": "x", "gone": 1, "rows": [1, 2],
        "measured": {"seconds": 1.0},
    }  # fmt: skip
    path = float_made / "energy.json"
    path.write_text(json.dumps(old))

    def again(**results: Any) -> list[str]:
        new = copy.deepcopy(old)
        new["results"] |= results
        if "gone" in results:
            del new["results"]["gone"]
        verdict = verify(path, rerun=lambda arguments: new)
        assert verdict.compared == 7 - (len(new["results"]["rows"]) != 2) + ("new" in results)
        return [difference.path for difference in verdict.differences]

    assert again() == again(measured={"seconds": 9.0}) == again(rate=0.500001, zero=1e-6) == []
    assert again(n=4, rate=0.6, zero=0.1, word="y") == ["n", "rate", "zero", "word"]
    assert again(gone=None, rows=[1], new=5) == ["gone", "rows", "new"]
    assert again(rows=[1, 3]) == ["rows[1]"]
    assert again(n=True) == ["n"]
    # As a file would have it: plain numbers, and null for what is not finite.
    assert again(rate=np.float32(0.5), n=np.int64(3)) == [] and again(rate=math.nan) == ["rate"]
    assert again(new=math.inf) == []


def test_every_kind_says_how_it_is_run_again() -> None:
    assert set(KINDS) == {"eval", "energy", "tasks", "long-context"}
    assert all(kind.rerun.count(":") == 1 for kind in KINDS.values())


def test_a_text_that_changes_while_it_is_measured(float_made: Path) -> None:
    """Hashes of the repetition count, whatever its arguments say."""
    old = read(float_made / "eval.json")
    new = copy.deepcopy(old)
    new["data"]["sha256"] = "0" * 64
    with pytest.raises(DataError, match="changed since"):
        verify(float_made / "eval.json", rerun=lambda arguments: new)


def test_the_folder_of_a_run_stands_for_its_latest_checkpoint(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run" / "latest")
    run, latest = identity(tmp_path / "run"), identity(tmp_path / "run" / "latest")
    assert run["sha256"] == latest["sha256"] and run["config"] == latest["config"] is not None
    assert run["path"] == str(tmp_path / "run")
    weights = tmp_path / "run" / "latest" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert identity(tmp_path / "run")["sha256"] != run["sha256"]
