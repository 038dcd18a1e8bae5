"""The shape of the repository that tools and transformers rely on."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tracked() -> list[str]:
    result = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip("not a git checkout")
    return result.stdout.splitlines()


@pytest.mark.parametrize("name", ["kernels", "train", "serve", "configs"])
def test_links_are_relative(name: str) -> None:
    link = ROOT / "spikelm" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"


def test_kernels_is_no_package() -> None:
    # transformers takes a top-level package of that name for the Hub's `kernels`.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    import spikelm

    assert version("spikelm") == spikelm.__version__


def test_extras_and_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) == {"train", "gpu", "serve", "eval", "trackers", "dev"}
    assert not [line for line in project["dependencies"] if "==" in line]
    pins = (ROOT / "constraints" / "cpu.txt").read_text().split()
    assert {"torch==2.13.0", "triton==3.7.1"} <= set(pins)


def test_no_machine_leaks_into_the_tree() -> None:
    # Paths of a developer's machine and addresses of package mirrors have no place in the repository.
    pattern = re.compile(r"/work/|/root/|index-url|extra-index|files\.pythonhosted")
    found = []
    for name in tracked():
        path = ROOT / name
        if name == "tests/package/test_tree.py" or path.is_symlink() or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name}: {match.group()}" for match in pattern.finditer(text)]
    assert not found
