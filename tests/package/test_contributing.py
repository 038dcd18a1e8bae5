"""The steps of CONTRIBUTING.md, followed in a copy of the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["configs", "kernels", "serve", "spikelm", "train", "pyproject.toml", "CONTRIBUTING.md"]
MODEL = """
vocab_size: 64
hidden_size: 32
num_hidden_layers: 2
layers: [{mixer: {name: ema}, channel: {name: rwkv}}]
neuron: {name: ternary, threshold: 0.5}
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with the neuron and the mixer of the text added as it says."""
    copy = tmp_path_factory.mktemp("copy")
    for name in [*PARTS, "tests/contracts", "tests/conftest.py"]:
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    neuron, mixer = (
        textwrap.dedent(block) for block in re.findall(r"^   ```python\n(.*?)^   ```", text, re.S | re.M)
    )
    (copy / "spikelm" / "neurons" / "ternary.py").write_text(neuron, encoding="utf-8")
    (copy / "spikelm" / "mixers" / "ema.py").write_text(mixer, encoding="utf-8")
    for package, name in (("neurons", "ternary"), ("mixers", "ema")):
        with (copy / "spikelm" / package / "__init__.py").open("a", encoding="utf-8") as file:
            file.write(f"from spikelm.{package} import {name}  # noqa: E402, F401, I001\n")
    return copy


def run(tree: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", *words]
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_examples_fulfil_the_contract(tree: Path) -> None:
    out = run(tree, "pytest", "-p", "no:cacheprovider", "tests/contracts", "-k", "ternary or ema")
    assert int(re.search(r"(\d+) passed", out).group(1)) > 20  # type: ignore[union-attr]


def test_examples_can_be_used(tree: Path) -> None:
    (tree / "my-model.yaml").write_text(MODEL, encoding="utf-8")
    out = run(tree, "spikelm", "inspect", "my-model.yaml")
    assert "ternary(threshold=0.5)" in out and "ema" in out and "mean" in out


def test_examples_follow_the_style(tree: Path) -> None:
    files = ["spikelm/neurons/ternary.py", "spikelm/mixers/ema.py"]
    run(tree, "ruff", "check", "--no-cache", *files)
    run(tree, "ruff", "format", "--no-cache", "--check", *files)
