"""Every recipe that comes along is valid, can be built, and its cost is what its configuration says."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from spikelm.cli import main
from spikelm.errors import ConfigError
from spikelm.model import SpikeLM
from spikelm.presets import find, names
from spikelm.tokenizer import Tokenizer
from spikelm.train.config import TrainConfig
from spikelm.train.finetune.config import FinetuneConfig
from spikelm.train.plan import KINDS, plan, recipes
from spikelm.train.setup import model_config
from spikelm.yaml_values import read_yaml

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", names("train"))
def test_training_presets(name: str) -> None:
    """Keys are valid, the model builds, and what cannot be checked by types is sensible."""
    config = TrainConfig.from_yaml(name)
    known = read_yaml(find("reproduce", "recipes"))["train"][name]
    if config.init_from is None:
        assert config.model
        core = model_config(config.model, Tokenizer.bytes())
        with torch.device("meta"):
            assert SpikeLM(core).num_parameters() > 1_000_000
    else:
        assert known["model"] in names("models")
    assert config.batch_size % config.accumulation == 0
    assert config.schedule.warmup <= config.steps // 5
    assert config.optim.min_lr < config.optim.lr
    assert config.eval_every and config.checkpoint_every and config.data.valid
    if name != "demo":
        assert config.out.startswith("runs/") and Path(config.out).name in (
            name,
            name.removesuffix("-finetune"),
        )


@pytest.mark.parametrize("name", names("finetune"))
def test_finetuning_presets(name: str) -> None:
    config = FinetuneConfig.from_yaml(name)
    assert config.model and config.data.labels
    core = model_config(config.model, Tokenizer.bytes())
    with torch.device("meta"):
        assert SpikeLM(core, with_head=False).num_parameters() > 1_000_000
    assert (config.data.fold is None) == (name in ("sst2", "sst5"))
    started = FinetuneConfig.from_yaml(name, ["init_from=somewhere"])
    assert started.model is None and started.data.tokenizer is None
    assert FinetuneConfig.from_yaml(name, ["init_from=x", "data.tokenizer=bytes"]).data.tokenizer == "bytes"


def test_finetuning_presets_read_the_data_sets(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes as published; the numbers of recipes.yaml are those of the files."""
    from spikelm.train.finetune.examples import load_task

    monkeypatch.setenv("SPIKELM_DATA", str(data_dir))
    known = read_yaml(find("reproduce", "recipes"))["finetune"]
    sizes = {"mr": 10_662, "subj": 10_000, "sst2": 6920 + 872 + 1821, "sst5": 8544 + 1101 + 2210}
    for name, size in sizes.items():
        task = load_task(FinetuneConfig.from_yaml(name).data, pytest.fail)
        assert len(task.train) + len(task.dev) + len(task.test) == size
        assert len(task.train) == known[name]["texts"]
        assert len(task.labels) == (5 if name == "sst5" else 2)


def test_every_recipe_has_a_plan_and_every_entry_a_recipe() -> None:
    known = read_yaml(find("reproduce", "recipes"))
    assert set(known) == set(KINDS)
    for kind in KINDS:
        assert set(known[kind]) == set(names(kind))
    for kind, name in recipes():
        found = plan(name, kind=kind)
        assert found.tokens and found.flops == 6.0 * found.matrix_weights * found.tokens
        assert found.matrix_weights < found.parameters < 3e8
        assert found.published is None or found.source


def test_cost_by_hand() -> None:
    """46M on bytes: the weights of its matrix products are 12 (5 + 8) 512^2 + 256 512."""
    found = plan("spikegpt-46m-enwik8")
    assert found.matrix_weights == 12 * (4 + 9) * 512 * 512 + 256 * 512
    assert found.parameters == 41_226_240
    assert found.tokens == 60_000 * 64 * 1024
    assert found.disk_bytes == 4 * 12 * found.parameters + 2 * 90_000_000
    assert found.hours(1e15) == pytest.approx(found.flops / 3.6e18 if found.flops else None)
    characters = plan("spikegpt-46m-enwik8-characters")
    assert characters.parameters == found.parameters + 2 * 512 * (6192 - 256)
    assert any("not here yet" in note for note in characters.notes)
    assert plan("spikegpt-46m-enwik8", ["steps=30000"]).tokens == found.tokens // 2
    finetune = plan("spikegpt-216m-wikitext103-finetune")
    assert finetune.parameters == plan("spikegpt-216m-openwebtext").parameters == 215_399_424


def test_plan_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--json", str(tmp_path / "plans.json"), "--gpus", "8", "--gpu-share", "0.5"]) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "plans.json").read_text())
    assert [row["name"] for row in result["recipes"]] == [name for _, name in recipes()]
    assert all(f" {name} " in shown for _, name in recipes())
    row = next(row for row in result["recipes"] if row["name"] == "spikegpt-216m-openwebtext")
    assert row["hours_h100"] == pytest.approx(row["flops"] / (8 * 0.5 * 989e12) / 3600)
    peak = result["speeds"]["here"][row["precision"]]["flops"]
    assert row["hours_here"] == pytest.approx(row["flops"] / (0.5 * peak) / 3600)
    assert "assumed share 50%" in shown and "not measured" in shown
    own = tmp_path / "own.yaml"
    own.write_text("model: spikegpt-nano\ndata: {train: nowhere.txt}\nsteps: 10\nbatch_size: 2\n")
    assert main(["plan", str(own)]) == 0
    assert "whose size is not known" in capsys.readouterr().out
    own.write_text("model: spikegpt-nano\ndata: {train: nowhere.txt}\nepochs: 2\n")
    assert plan(own).kind == "finetune" and plan(own).flops is None
    for words, message in (
        (["plan", "novels-nan"], "did you mean 'novels-nano'?"),
        (["plan", "steps=3"], "name one before the pairs"),
        (["plan", "subj", "--gpu-share", "2"], "expected a share"),
        (["plan", "subj", "epoch=2"], "did you mean 'epochs'?"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_make_reproduce_calls_the_right_command() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make")

    def dry(*words: str) -> str:
        done = subprocess.run([make, "-n", "reproduce", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "spikelm plan" in dry()
    said = dry("RECIPE=subj", "ARGS=epochs=1 device=cpu")
    assert "finetune subj epochs=1 device=cpu" in said and "train subj" in said


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="did you mean 'subj'"):
        plan("subi")
