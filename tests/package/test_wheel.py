"""A wheel built from the tree works without the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = [
    ".gitignore",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "configs",
    "kernels",
    "serve",
    "spikelm",
    "train",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, so that nothing is left behind in the checkout."""
    tree = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, tree / name)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel installed into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*command, str(target), str(wheel)], check=True, capture_output=True)
    return target


def expected_files() -> set[str]:
    """Every file of the package that git knows or could know, by its name inside the wheel."""
    wanted = {".py", ".c", ".h", ".css", ".yaml", ".json", ".typed"}
    names = set()
    for top in ("spikelm", "spikelm/kernels", "spikelm/train", "spikelm/serve", "spikelm/configs"):
        for path in (ROOT / top).resolve().rglob("*"):
            inside = Path(top) / path.relative_to((ROOT / top).resolve())
            linked = top == "spikelm" and inside.parts[1] in {"kernels", "train", "serve", "configs"}
            if path.is_file() and path.suffix in wanted and "__pycache__" not in path.parts and not linked:
                names.add(inside.as_posix())
    return names


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        information = {
            name.partition(".dist-info/")[2] for name in archive.namelist() if ".dist-info/" in name
        }
    assert names == expected_files()
    assert "licenses/LICENSE" in information
    assert any(name.startswith("spikelm/kernels/") and name.endswith(".c") for name in names)
    assert "spikelm/configs/models/spikegpt-46m.yaml" in names
    assert "spikelm/py.typed" in names


def run(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "120"}
    command = [sys.executable, "-m", "spikelm", *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_installed_wheel_is_the_one_that_runs(installed: Path, tmp_path: Path) -> None:
    code = "import spikelm, spikelm.kernels.dispatch as d; print(spikelm.__file__); print(d.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert all(line.startswith(str(installed)) for line in out.stdout.splitlines())


def test_installed_wheel_answers(installed: Path, tmp_path: Path) -> None:
    shown = run(installed, tmp_path, "--help")
    assert shown.returncode == 0 and "inspect" in shown.stdout
    inspected = run(installed, tmp_path, "inspect", "spikegpt-46m")
    assert inspected.returncode == 0, inspected.stderr
    assert "parameters" in inspected.stdout
