"""The committed table of compiled kernels is that of these sources, and nothing in it must not be shipped.

After a change of a kernel or of a configuration: ``python -m spikelm.kernels.ahead --write``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spikelm.kernels import ahead

pytest.importorskip("triton")

AGAIN = "; run `python -m spikelm.kernels.ahead --write` and commit what it writes"


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ahead.TABLE.read_text())
    return found


def same_triton(table: dict[str, Any]) -> bool:
    import triton

    return bool(table["triton"] == triton.__version__)


@pytest.mark.parametrize("module", ahead.modules())
def test_every_configuration_is_in_the_table(module: str, table: dict[str, Any]) -> None:
    """For every target, made from the sources as they are now."""
    if not ahead.shipped(module):
        pytest.skip("auto takes it on no device")
    entry = table["modules"].get(module)
    assert entry is not None, f"{module} is not in the table{AGAIN}"
    assert entry["source"] == ahead.source_hash(module), f"{module} has changed{AGAIN}"
    for target in ahead.shipped(module):
        names = [wanted.name for wanted in ahead.compilations(module, target)]
        assert names and len(names) == len(set(names)), f"{module} lists a name twice for {target}: {names}"
        listed = {name for name, taken in entry["kernels"].items() if target in taken}
        assert listed == set(names), f"{module}, {target}: {sorted(listed ^ set(names))} differ{AGAIN}"
    found = {target for taken in entry["kernels"].values() for target in taken}
    assert found == set(ahead.shipped(module))


def test_the_hash_covers_what_a_module_imports() -> None:
    """And not what others do, or every table would be stale after every change."""
    sources = ahead._sources("spikelm.kernels.event_linear.triton")
    names = [str(path.relative_to(ahead.FOLDER)) for path in sources]
    assert names == ["event_linear/triton.py", "int8_linear/triton_events.py", "triton_targets.py"]


GATED = ("spikelm.kernels.gated_delta.triton_compilations", "spikelm.kernels.gla.triton_compilations")
"""Modules whose kernels lie in many files."""


@pytest.mark.parametrize("module", GATED)
def test_the_hash_covers_every_file_that_importing_reads(module: str) -> None:
    """What a fresh process has imported is what the hash reads."""
    program = (
        "import importlib, sys; from pathlib import Path; importlib.import_module(sys.argv[1]); "
        "print(*(x.__file__ for x in list(sys.modules.values()) if getattr(x, '__file__', None)), sep='\\n')"
    )
    loaded = {Path(line).resolve() for line in compiled(program, module).splitlines()}
    ours = {
        path for path in loaded if ahead.FOLDER.resolve() in path.parents and path.name.startswith("triton")
    }
    # The dispatcher imports it for every op; it decides nothing of a kernel.
    ours.discard((ahead.FOLDER / "triton_excluded.py").resolve())
    assert {path.resolve() for path in ahead._sources(module)} == ours
    assert len(ours) > 5


@pytest.mark.parametrize("module", GATED)
def test_a_change_of_any_file_changes_the_hash(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ahead.FOLDER.glob("**/triton*.py"):
        copy = tmp_path / path.relative_to(ahead.FOLDER)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    before = ahead.source_hash(module)
    monkeypatch.setattr(ahead, "FOLDER", tmp_path)
    assert ahead.source_hash(module) == before
    read = ahead._sources(module)
    for path in sorted(tmp_path.glob("**/triton*.py")):
        text = path.read_text()
        path.write_text(text + "# changed\n")
        assert (ahead.source_hash(module) != before) is (path in read), path
        path.write_text(text)
    assert ahead.source_hash(module) == before


def test_no_module_is_left_over(table: dict[str, Any]) -> None:
    shipped = [module for module in ahead.modules() if ahead.shipped(module)]
    assert sorted(table["modules"]) == shipped, AGAIN


def test_nothing_spills_and_shared_memory_suffices(table: dict[str, Any]) -> None:
    assert ahead.problems(table) == []
    for module in table["modules"].values():
        for name, per_target in module["kernels"].items():
            for target, taken in per_target.items():
                assert 0 < taken["registers"] <= (512 if target.startswith("gfx") else 255), (name, target)


def test_the_page_is_that_of_the_table(table: dict[str, Any]) -> None:
    assert ahead.PAGE.read_text() == ahead.page(table), AGAIN


def test_every_triton_module_lists_what_it_ships() -> None:
    """A kernel that no list names would never be compiled without a GPU."""
    for path in sorted(ahead.FOLDER.glob("*/triton*.py")):
        if "@triton.jit" in path.read_text():
            listed = [
                module
                for module in ahead.modules()
                if module.startswith(f"spikelm.kernels.{path.parent.name}.")
            ]
            assert listed, f"{path} has kernels, and no module of its folder has compilations(target)"


ONE = """
import json
from dataclasses import asdict
from spikelm.kernels import ahead

found = {}
for target in ("sm_90", "gfx942"):
    (wanted,) = [c for c in ahead.compilations("spikelm.kernels.int8_linear.triton_events", target)
                 if c.name == "event_finish[pieces=1,groups=32]"]
    text = ahead.assembly(wanted, target)
    found[target] = {**asdict(ahead.compile_one(wanted, target)), "text": text}
print(json.dumps(found))
"""


def compiled(program: str, *arguments: str, timeout: int = 300) -> str:
    """Output of a process in which Triton does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_kernel_compiles_as_the_table_says_and_rounds_twice(table: dict[str, Any]) -> None:
    """Scaled sums are bit for bit the reference's only if multiplication and addition are not fused."""
    found = json.loads(compiled(ONE))
    for target, taken in found.items():
        text = taken.pop("text")
        fused = (
            ("fma.rn.f32",) if target == "sm_90" else ("v_fma_f32", "v_fmac_f32", "v_pk_fma_f32", "v_mac_f32")
        )
        apart = ("mul.rn.f32", "add.rn.f32") if target == "sm_90" else ("v_mul_f32", "v_add_f32")
        assert not [word for word in fused if word in text], target
        assert all(word in text or word.replace("v_", "v_pk_") in text for word in apart), target
        if same_triton(table):
            entry = table["modules"]["spikelm.kernels.int8_linear.triton_events"]["kernels"]
            assert taken == entry["event_finish[pieces=1,groups=32]"][target], AGAIN


def test_a_module_that_changed_is_compiled_again(
    table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not same_triton(table):
        assert "made with Triton" in str(ahead.stale(table, ahead.modules()[0]))
        return
    module = "spikelm.kernels.int8_linear.triton_events"
    assert ahead.stale(table, module) is None
    asked: list[str] = []

    def compile_one(wanted: ahead.Compilation, target: str) -> ahead.Resources:
        asked.append(target)
        return ahead.Resources(registers=1, shared=0, spilled=0)

    monkeypatch.setattr(ahead, "compile_one", compile_one)
    assert ahead.table(only=["int8_linear"], known=table)["modules"][module] == table["modules"][module]
    assert asked == []
    old = {**table, "modules": {module: {**table["modules"][module], "source": "another"}}}
    assert ahead.stale(old, module) == f"{module} has changed since the table was made"
    assert ahead.stale({**table, "modules": {}}, module) == f"{module} is not in the table"
    ahead.table(targets=["sm_90"], only=["int8_linear"], known=old)
    assert asked and set(asked) == {"sm_90"}


@pytest.mark.slow
def test_all_of_it_compiles_again_to_the_same(table: dict[str, Any], tmp_path: Path) -> None:
    program = (
        "import json, sys; from spikelm.kernels import ahead; "
        "open(sys.argv[1], 'w').write(json.dumps(ahead.table(jobs=2)))"
    )
    compiled(program, str(tmp_path / "table.json"), timeout=3600)
    found = json.loads((tmp_path / "table.json").read_text())
    assert ahead.problems(found) == []
    if same_triton(table):
        assert found == table, AGAIN


UNLISTED = """
import torch
from spikelm.kernels import ahead
from spikelm.kernels.gated_delta.triton_compilations import record_call as delta
from spikelm.kernels.gla.triton_compilations import record_call as gla
from spikelm.kernels.gla.triton_tiles import CHANNEL, HEAD
from spikelm.kernels.triton_launch import Recorder

half, full = torch.bfloat16, torch.float32
calls = [
    (gla, half, 64, 64, CHANNEL, 1, False), (gla, half, 128, 128, CHANNEL, 7, True),
    (gla, half, 64, 64, HEAD, 1, False), (gla, full, 64, 64, HEAD, 1, True),
    (delta, half, 64, 64, 1, False), (delta, half, 64, 256, 7),
    (delta, half, 128, 128, 7), (delta, full, 64, 64, 1),
]
for record, *call in calls:
    paper = Recorder(record.__module__.split(".")[2], "sm_90")
    record(paper, *call)
    for wanted in paper.found.values():
        print(ahead.compile_one(wanted, "sm_90").spilled, call[1:], wanted.name, sep="\\t")
"""


@pytest.mark.slow
def test_what_is_not_listed_spills_no_more() -> None:
    """Other V than 256, other numbers of query heads, K that shares the tiles of a wider one."""
    lines = [line.split("\t") for line in compiled(UNLISTED, timeout=1800).splitlines()]
    assert len(lines) > 30
    assert [line for line in lines if int(line[0]) > ahead.MOST_SPILLED] == []
