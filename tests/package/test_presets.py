"""Presets are found by name or path, and errors name what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikelm import presets
from spikelm.errors import ConfigError


def test_finds_presets_and_files(tmp_path: Path) -> None:
    assert "models" in presets.kinds()
    assert "spikegpt-46m" in presets.names("models")
    assert presets.find("models", "spikegpt-46m").name == "spikegpt-46m.yaml"
    file = tmp_path / "own.yaml"
    file.write_text("hidden_size: 8\n")
    assert presets.find("models", file) == file
    assert presets.find("models", str(file)) == file


def test_unknown_names() -> None:
    with pytest.raises(
        ConfigError, match="unknown models preset 'spikegpt-47m'; did you mean 'spikegpt-46m'?"
    ):
        presets.find("models", "spikegpt-47m")
    with pytest.raises(ConfigError, match="known: none"):
        presets.find("nonsense", "small")
    with pytest.raises(ConfigError, match="missing.yaml is not a file; known presets .*spikegpt-46m"):
        presets.find("models", "missing.yaml")
    assert presets.names("nonsense") == []
