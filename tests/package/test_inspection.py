"""``spikelm inspect``: the figures are those of the model itself."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spikelm.checkpoint import save_checkpoint
from spikelm.cli import main
from spikelm.config import ModelConfig
from spikelm.errors import CheckpointError, ConfigError
from spikelm.inspection import describe, inspect_config, inspect_model
from spikelm.model import SpikeLM
from spikelm.presets import names
from spikelm.state import state_bytes

SMALL = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 3}


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("tied", [False, True])
def test_figures_are_those_of_the_model(placement: str, tied: bool) -> None:
    config = ModelConfig(**SMALL, placement=placement, neuron={"name": "lif"}, tie_word_embeddings=tied)
    inspection, model = inspect_config(config), SpikeLM(config)
    assert inspection.parameters == model.num_parameters() == sum(inspection.parameters_by_kind.values())
    assert inspection.state_bytes == state_bytes(model.init_state(1))
    assert inspection.state_bytes == sum(inspection.state_bytes_by_kind.values())
    assert sum(layer.state_bytes for layer in inspection.layers) <= inspection.state_bytes
    assert inspection.growth_bytes == 0
    assert ("head" in inspection.parameters_by_kind) is not tied


def test_published_size() -> None:
    assert inspect_model("spikegpt-216m").parameters == 215_399_424


@pytest.mark.parametrize("name", names("models"))
def test_every_preset_can_be_inspected(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", name, "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["name"] == name and result["parameters"] > 0 and result["state_bytes"] > 0
    assert len(result["layers"]) == result["config"]["num_hidden_layers"]


def test_takes_no_memory() -> None:
    code = (
        "import resource; from spikelm.inspection import inspect_model; inspect_model('spikegpt-46m');"
        "first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; inspect_model('spikegpt-216m');"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) < 50_000  # KiB; the weights would be 860,000


def test_checkpoint_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = SpikeLM(ModelConfig(**SMALL)).to(torch.bfloat16)
    save_checkpoint(tmp_path / "model", model)
    inspection = inspect_model(tmp_path / "model")
    assert inspection.parameters == model.num_parameters()
    assert inspection.weights is not None
    assert sum(inspection.weights["dtypes"].values()) == model.num_parameters()
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "Weights: " in capsys.readouterr().out


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "spikegpt-46m-sd"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "parameters",
        "State of one sequence",
        "placement: before",
        "0 to 11",
        "wkv4",
        "adaptive(k=3.0",
    ):
        assert words in shown


def test_mixtures_of_experts(capsys: pytest.CaptureFixture[str]) -> None:
    """76B parameters, 12B of which one token uses, as the preset's name says."""
    large = inspect_model("spikingbrain-76b-a12b")
    assert large.parameters == 76_878_154_808 and large.active_parameters == 12_717_100_088
    assert main(["inspect", "spikingbrain-moe-nano"]) == 0
    shown = capsys.readouterr().out
    assert "active per token" in shown and "channel.experts.0 to 7.gate" in shown
    assert main(["inspect", "spikegpt-46m-sd"]) == 0
    assert "active per token" not in capsys.readouterr().out


def test_int8_weights_are_active_too() -> None:
    """Int8 matrices are buffers to torch, and count like the parameters they stand for."""
    small = ModelConfig.from_yaml("spikingbrain-moe-nano")
    held = dataclasses.replace(small, weights={"name": "int8"})
    assert inspect_config(held).active_parameters == inspect_config(small).active_parameters


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        inspect_model(tmp_path)
    with pytest.raises(ConfigError, match="unknown neuron 'lef'"):
        inspect_config(ModelConfig(**SMALL, neuron={"name": "lef"}))
    channel = {"name": "swiglu"}
    for branches in (None, 3, "gla", {"name": "gla"}, [], [{"name": "gla"}]):
        mixer = {"name": "parallel", "branches": branches}
        with pytest.raises(ConfigError, match="expected a list of two mixers or more"):
            inspect_config(ModelConfig(**SMALL, layers=[{"mixer": mixer, "channel": channel}]))
    with pytest.raises(ConfigError, match=r"mixer is 'gla'; .* such as \{name: gla\}"):
        inspect_config(ModelConfig(**SMALL, layers=[{"mixer": "gla", "channel": channel}]))
    overrides = {"blocks.*.channel.ruoter": {"name": "none"}}
    moe = dataclasses.replace(ModelConfig.from_yaml("spikingbrain-moe-nano"), neuron_overrides=overrides)
    with pytest.raises(ConfigError, match=r"did you mean 'blocks\.\*\.channel\.router'") as refused:
        inspect_config(moe)
    assert len(str(refused.value)) < 1000


def test_describe() -> None:
    assert describe({"name": "lif", "tau": 2.0, "reset": "hard"}) == "lif(tau=2.0, reset=hard)"
    assert describe({"name": "none"}) == "none"
    assert describe({"name": "adaptive", "k": 8.485281374238571, "cap": 63}) == "adaptive(k=8.485, cap=63)"
