"""Model cards and exported folders: what others get, and what they do not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.checkpoint import load_model
from spikelm.cli import main
from spikelm.errors import CheckpointError
from spikelm.train import shards
from spikelm.train.card import public, sparkline
from spikelm.train.config import TrainConfig
from spikelm.train.export import export
from spikelm.train.trainer import Trainer

WANTED = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_export_leaves_the_training_state(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "release"
    assert main(["export", str(whole), str(out), "--json", str(tmp_path / "r.json")]) == 0
    assert {path.name for path in out.iterdir()} == WANTED
    told = json.loads((tmp_path / "r.json").read_text())
    assert set(told["files"]) == WANTED and told["source"].endswith("step-00000012")
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_transformers_loads_checkpoints_and_exports(whole: Path, tmp_path: Path) -> None:
    """Also weights in several files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import spikelm.hf  # noqa: F401 (registers the architecture)

    export(whole, tmp_path / "release")
    core = load_model(whole)
    ids = torch.tensor([[1, 2, 3, 200]])
    for folder in (whole / "latest", tmp_path / "release"):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(model(ids).logits, core(ids)[0])
        assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"] == [97]


def test_large_weights_are_split_as_transformers_expects(
    make_values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    import spikelm.hf  # noqa: F401

    monkeypatch.setattr(shards, "WEIGHTS_LIMIT", 20_000)
    run = Trainer(TrainConfig.from_dict(make_values(checkpoint_every=6)))
    run.run()
    folder = tmp_path / "run" / "latest"
    files = sorted(path.name for path in folder.glob("model-*"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert not (folder / "model.safetensors").exists()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    expected = run.model.state_dict()
    for model in (load_model(folder), AutoModelForCausalLM.from_pretrained(folder).model):
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(shards, "WEIGHTS_LIMIT", 10**9)  # another limit reads them as well
    longer = Trainer(TrainConfig.from_dict(make_values(steps=13)))
    assert longer.run().resumed_from == 12
    export(tmp_path / "run", tmp_path / "release", step=12)
    assert set(files) < {path.name for path in (tmp_path / "release").iterdir()}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--step", "5"], "no checkpoint of step 5; there are 9, 12"),
        (["--best"], "no best checkpoint; train with keep_best=true"),
        (["--step", "9", "--best"], "give one of them"),
    ],
)
def test_wrong_choices_are_one_sentence(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert main(["export", str(whole), str(tmp_path / "x"), *words]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_exported(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        export(tmp_path, tmp_path / "x")
    with pytest.raises(CheckpointError, match="exists already"):
        export(whole, whole)
    with pytest.raises(CheckpointError, match="cannot be written"):
        export(whole, Path("/proc/nowhere/x"))
    path = whole / "checkpoints" / "step-00000012" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="is corrupted"):
        export(whole, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert export(whole / "checkpoints" / "step-00000009", tmp_path / "x").name == "step-00000009"


def test_card(finished_run: Path) -> None:
    """The Hub's own library reads its front matter; it names no place of this machine."""
    from huggingface_hub import ModelCard

    card = ModelCard((finished_run / "latest" / "README.md").read_text())
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    (bits, _) = card.data.eval_results
    record = json.loads((finished_run / "latest" / "training.json").read_text())
    evaluation = record["progress"]["evaluation"]
    assert bits.metric_type == "bits_per_byte" and bits.metric_value == evaluation["bits_per_byte"]
    text = card.text
    assert str(finished_run.parent) not in card.content and os.sep + "tmp" not in card.content
    assert "training text: `train.txt`" in text and "768 in 48 samples" in text
    assert f"{evaluation['bits_per_byte']:.4f} bits per byte" in text
    assert "| blocks.0.mixer.key |" in text and "| 12 | 768 |" in text
    assert "spikelm train train.yaml" in text and "- torch: " in text and "## Licence" in text
    curve = text.split("Loss over the steps")[1].split("`")[1]
    assert len(curve) == 6 and curve[0] == "█" and curve[-1] in "▁▂"


def test_the_configuration_in_a_card_trains(finished_run: Path, make_values: Any, tmp_path: Path) -> None:
    import yaml

    text = (finished_run / "latest" / "README.md").read_text()
    values = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert values["data"]["train"] == "train.txt" and "out" not in values and "cache" not in values["data"]
    for key in ("train", "valid"):
        values["data"][key] = str(tmp_path / values["data"][key])
    config = TrainConfig.from_dict({**values, "out": str(tmp_path / "run")})
    again = Trainer(
        config.model_copy(update={"data": config.data.model_copy(update={"cache": str(tmp_path)})})
    )
    again.run()
    whole = load_model(finished_run)
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in again.model.state_dict().items())


def test_an_edited_card_does_not_matter(make_values: Any, whole: Path) -> None:
    (whole / "checkpoints" / "step-00000012" / "README.md").write_text("mine")
    result = Trainer(TrainConfig.from_dict(make_values(out=str(whole)))).run()
    assert result.resumed_from == 12


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/me/text.txt#train", "text.txt#train"),
        ("~/text.txt", "text.txt"),
        ("builtin:python-docs#train", "builtin:python-docs#train"),
        ("data/enwik8/train.txt", "data/enwik8/train.txt"),
        ("https://me:secret@host/a/b.txt?key=secret", "https://host/a/b.txt"),
        ("s3://bucket/b.txt", "s3://bucket/b.txt"),
        (["/a/b.txt", 0.5], ["b.txt", 0.5]),
    ],
)
def test_sources_without_places(given: Any, shown: Any) -> None:
    assert public({"data": {"train": given, "cache": "/x"}, "out": "/y"}) == {"data": {"train": shown}}


def test_sparkline() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁" and sparkline([float("nan")]) == ""
    assert len(sparkline([1.0 / n for n in range(1, 500)])) == 40
