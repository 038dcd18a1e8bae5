"""``--json -`` of every command that prints a result: standard output is JSON and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spikelm.checkpoint import save_checkpoint
from spikelm.cli import main
from spikelm.config import ModelConfig
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["eval", "MODEL", "--data", "TEXT"], "results"),
        (["convert", "spikegpt", "WEIGHTS", "OUT", "--dense-embedding"], "parameters"),
        (["convert", "rwkv4", "WEIGHTS", "OUT"], "parameters"),
        (["generate", "MODEL", "--max-tokens", "3"], "text"),
        (["generate", "MODEL", "--max-tokens", "3", "--stream"], "text"),
        (["inspect", "spikegpt-nano"], "parameters"),
        (["doctor"], "checks"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else None,
)
def test_only_json_on_standard_output(
    words: list[str],
    key: str,
    tmp_path: Path,
    published: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = {name: str(tmp_path / name.lower()) for name in ("MODEL", "TEXT", "WEIGHTS", "OUT")}
    torch.save(published.weights(), paths["WEIGHTS"])
    Path(paths["TEXT"]).write_text("Spikes are rare. " * 4)
    config = ModelConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1)
    save_checkpoint(Path(paths["MODEL"]), SpikeLM(config), Tokenizer.bytes())
    main([*(paths.get(word, word) for word in words), "--json", "-"])
    assert key in json.loads(capsys.readouterr().out)
