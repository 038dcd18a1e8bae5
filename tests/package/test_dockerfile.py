"""The Dockerfile names what exists. It is not built here: that needs a registry and a Docker daemon."""

from __future__ import annotations

import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from spikelm.cli import COMMANDS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Instruction and its text, continued lines joined, comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def texts(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [text for word, text in instructions if word == name]


def test_every_instruction_is_one_of_dockers(instructions: list[tuple[str, str]]) -> None:
    known = "FROM RUN COPY ENV WORKDIR USER VOLUME HEALTHCHECK STOPSIGNAL ENTRYPOINT CMD".split()
    assert {word for word, _ in instructions} <= set(known)
    assert instructions[0][0] == "FROM"


def test_base_image_is_pinned_and_of_the_ordinary_registry(instructions: list[tuple[str, str]]) -> None:
    for image in texts(instructions, "FROM"):
        name, _, tag = image.partition(":")
        assert re.search(r"\d+\.\d+\.\d+", tag) and tag != "latest"
        assert "devel" in tag  # nvcc
        assert "." not in name.split("/")[0]  # a host would have one


def test_copied_files_exist_and_make_the_package(instructions: list[tuple[str, str]], project: Any) -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    sources = [source for text in texts(instructions, "COPY") for source in shlex.split(text)[:-1]]
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not any(fnmatch(source, pattern) for pattern in ignored), source
    links = {path.readlink().name for path in (ROOT / "spikelm").iterdir() if path.is_symlink()}
    assert links | {"spikelm", "pyproject.toml", project["readme"], *project["license-files"]} == set(sources)


def test_extras_and_torch_fit_the_project(instructions: list[tuple[str, str]], project: Any) -> None:
    commands = " ".join(texts(instructions, "RUN"))
    (extras,) = re.findall(r'pip install "\.\[([\w,]+)\]"', commands)
    assert set(extras.split(",")) == {"gpu", "train"} <= set(project["optional-dependencies"])
    (torch,) = [line for line in project["dependencies"] if line.startswith("torch")]
    (pinned,) = re.findall(r'pip install "(torch[^"]+)"', commands)
    assert pinned.startswith(f"{torch},<")
    assert "http" not in commands and "--index" not in commands and "--extra" not in commands


def test_runs_without_rights_and_is_examined_by_the_doctor(instructions: list[tuple[str, str]]) -> None:
    order = [word for word, _ in instructions]
    (user,) = texts(instructions, "USER")
    assert user not in {"root", "0"} and f"useradd --create-home --uid 10001 {user}" in str(instructions)
    assert order.index("USER") > max(index for index, word in enumerate(order) if word == "RUN")
    (check,) = texts(instructions, "HEALTHCHECK")
    words = re.findall(r'"([^"]+)"', check)
    assert words[:2] == ["spikelm", "doctor"] and "doctor" in COMMANDS
    (entry,) = texts(instructions, "ENTRYPOINT")
    assert re.findall(r'"([^"]+)"', entry)[-1] == "spikelm"
