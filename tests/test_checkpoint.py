"""Checkpoint folders: whole or not at all, and refused in one sentence when damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spikelm.checkpoint import load_model, load_tokenizer, read_config, save_checkpoint
from spikelm.config import ModelConfig
from spikelm.errors import CheckpointError, SpikeLMError
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer


def small(seed: int = 0) -> SpikeLM:
    torch.manual_seed(seed)
    return SpikeLM(ModelConfig(vocab_size=256, hidden_size=8, num_hidden_layers=1))


def test_round_trip(tmp_path: Path) -> None:
    model = small()
    save_checkpoint(tmp_path / "c", model, Tokenizer.bytes(), extra={"notes.txt": b"hello"})
    again = load_model(tmp_path / "c")
    assert again.config == model.config
    assert not again.training
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert load_tokenizer(tmp_path / "c").sha256 == Tokenizer.bytes().sha256
    assert (tmp_path / "c" / "notes.txt").read_bytes() == b"hello"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"], "nothing temporary stays behind"
    modes = {p.stat().st_mode for p in (tmp_path / "c").iterdir()}
    assert len(modes) == 1, "every file can be read by those who can read the others"


def test_a_runs_folder_stands_for_its_latest_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run" / "checkpoints" / "step-1", small(), Tokenizer.bytes())
    (tmp_path / "run" / "latest").symlink_to("checkpoints/step-1")
    assert torch.equal(load_model(tmp_path / "run").embedding.weight, small().embedding.weight)
    assert load_tokenizer(tmp_path / "run").vocab_size == 256


def test_replacing_keeps_only_the_new_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", small(0), extra={"old": b""})
    save_checkpoint(tmp_path / "c", small(1))
    assert torch.equal(load_model(tmp_path / "c").embedding.weight, small(1).embedding.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    assert not (tmp_path / "c" / "old").exists()


def damage_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    values.update(changes)
    (folder / "config.json").write_text(json.dumps(values))


def test_damage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "c"

    def fresh() -> dict[str, torch.Tensor]:
        save_checkpoint(folder, small())
        return load_file(folder / "model.safetensors")

    def refused(match: str) -> None:
        with pytest.raises(SpikeLMError, match=match) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)

    with pytest.raises(CheckpointError, match="holds no config.json"):
        read_config(tmp_path / "nowhere")
    weights = fresh()
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    refused("'norm.weight' is missing")
    weights = fresh()
    weights["model.extra"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors")
    refused("'extra' is not part")
    weights = fresh()
    weights["model.norm.weight"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors")
    refused(r"\(3,\).*\(8,\)")
    fresh()
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused("damaged")
    fresh()
    (folder / "model.safetensors").unlink()
    refused("holds no model.safetensors")
    fresh()
    (folder / "config.json").write_text("{")
    refused("not JSON")
    fresh()
    damage_config(folder, model_type="llama")
    refused("llama")
    fresh()
    damage_config(folder, format_version=99)
    refused("upgrade")
    fresh()
    damage_config(folder, hidden_sise=8)
    refused("hidden_size")


def test_a_failed_replacement_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "c", small(0))
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if ".writing-" in str(source):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(tmp_path / "c", small(1))
    assert torch.equal(load_model(tmp_path / "c").embedding.weight, small(0).embedding.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", small(0))
    (tmp_path / "link").symlink_to("a")
    save_checkpoint(tmp_path / "link", small(1))
    assert torch.equal(load_model(tmp_path / "a").embedding.weight, small(0).embedding.weight)
    assert torch.equal(load_model(tmp_path / "link").embedding.weight, small(1).embedding.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "link"]


def test_a_damaged_index_of_shards_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small(), extra={})
    for content in ("{", "{}", "[]"):
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
            load_model(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "c", small())


WRITER = """
import sys, torch
from spikelm.checkpoint import save_checkpoint
from spikelm.config import ModelConfig
from spikelm.model import SpikeLM
torch.set_num_threads(1)
folder, n = sys.argv[1], 0
model = SpikeLM(ModelConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2))
print("ready", flush=True)
while True:
    n += 1
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(n)
    save_checkpoint(f"{folder}/c{n}", model)
"""


def test_kill_9_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    for trial in range(3):
        folder = tmp_path / str(trial)
        folder.mkdir()
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.25 + 0.07 * trial)
        writer.kill()
        writer.wait()
        whole = [path for path in folder.iterdir() if not path.name.startswith(".")]
        assert whole, "no checkpoint was written before the kill"
        for path in whole:
            model, n = load_model(path), int(path.name[1:])
            assert all(bool((p == n).all()) for p in model.parameters())
