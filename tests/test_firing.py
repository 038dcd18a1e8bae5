"""``firing.json`` reaches every model that is loaded for decoding, and with it the layout of int8 weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from spikelm.checkpoint import load_model, save_checkpoint
from spikelm.config import ModelConfig
from spikelm.decoding import DecodePlan
from spikelm.errors import CheckpointError
from spikelm.firing import FIRING, read_firing
from spikelm.hf import SpikeLMForCausalLM
from spikelm.kernels.dispatch import available
from spikelm.model import SpikeLM
from spikelm.weights import pack_model

SILENT = {"blocks.0.mixer.key": 0.95, "blocks.0.mixer.value": 0.1, "blocks.1.channel.value": 0.8, "head": 0.9}
NEEDS_C = pytest.mark.skipif(
    available()["int8_linear"]["c"] is not True, reason="packed weights need the C kernels"
)


def int8_model() -> SpikeLM:
    torch.manual_seed(0)
    spec = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "neuron": {"name": "adaptive", "k": 3.0},
        "head_neuron": {"name": "adaptive", "k": 3.0},
        "weights": {"name": "int8", "group_size": 16},
        "weight_overrides": {"head": {"name": "int8", "group_size": 16}},
    }
    return SpikeLM(ModelConfig.from_dict(spec)).eval()


def layouts(model: torch.nn.Module) -> dict[str, str]:
    """Layout of every projection that was packed, by its path in the core."""
    found = {}
    for module in model.modules():
        layout = getattr(getattr(module, "linear", None), "layout", None)
        if layout is not None:
            found[module.path] = layout
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose inputs were measured."""
    model = int8_model()
    model.firing = dict(SILENT)
    return save_checkpoint(tmp_path / "checkpoint", model)


def test_transformers_takes_what_load_model_takes(folder: Path) -> None:
    assert load_model(folder).firing == SILENT
    assert AutoModelForCausalLM.from_pretrained(folder).model.firing == SILENT
    model, info = SpikeLMForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert model.model.firing == SILENT and not info["missing_keys"]
    assert SpikeLMForCausalLM.from_pretrained(folder.parent, subfolder=folder.name).model.firing == SILENT


def test_a_classifier_has_no_head_to_know_of(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert model.model.firing == {path: share for path, share in SILENT.items() if path != "head"}


@NEEDS_C
def test_every_way_of_loading_gives_the_same_layouts(folder: Path) -> None:
    core, wrapper = load_model(folder), AutoModelForCausalLM.from_pretrained(folder)
    wrapped = AutoModelForCausalLM.from_pretrained(folder)
    pack_model(core)
    pack_model(wrapper.model)
    pack_model(wrapped)  # what wraps the core may be given itself
    found = layouts(core)
    assert layouts(wrapper) == layouts(wrapped) == found
    assert {path for path, layout in found.items() if layout == "in_out"} == {
        path for path, share in SILENT.items() if share > 0.65
    }
    assert len(found) == 15


@NEEDS_C
def test_a_plan_lays_out_what_is_left(folder: Path) -> None:
    """Also where some matrix was packed by hand before, and stays as it is."""
    model = load_model(folder)
    model.blocks[0].mixer.key.linear.pack_("out_in")  # type: ignore[union-attr]
    DecodePlan(model, slots=1)
    found = layouts(model)
    assert found["blocks.0.mixer.key"] == found["blocks.0.mixer.value"] == "out_in"
    assert found["blocks.1.channel.value"] == found["head"] == "in_out"


def test_saving_keeps_it_and_leaves_no_old_file(folder: Path, tmp_path: Path) -> None:
    model = SpikeLMForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "copy")
    assert read_firing(tmp_path / "copy") == SILENT == load_model(tmp_path / "copy").firing
    model.model.firing = {}
    model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / FIRING).exists()
    assert SpikeLMForCausalLM.from_pretrained(tmp_path / "copy").model.firing == {}


@pytest.mark.parametrize("load", [load_model, SpikeLMForCausalLM.from_pretrained], ids=["core", "hf"])
def test_a_file_of_another_model_is_refused(folder: Path, load: object) -> None:
    (folder / FIRING).write_text(json.dumps({"blocks.0.mixer.kex": 0.5}))
    with pytest.raises(CheckpointError, match=r"'blocks\.0\.mixer\.kex'.*belongs to another model"):
        load(folder)  # type: ignore[operator]
    (folder / FIRING).write_text(json.dumps({"head": 1.5}))
    with pytest.raises(CheckpointError, match=r"head is 1\.5; expected the silent share"):
        load(folder)  # type: ignore[operator]
