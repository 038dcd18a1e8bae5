"""The compile cache: keys, races, damage, failures; and the exponential that all kernels share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spikelm.errors import KernelError
from spikelm.kernels import compile as compiler
from spikelm.kernels.dispatch import c_source
from spikelm.kernels.lif import c as lif_c
from spikelm.kernels.wkv4 import c as wkv4_c

ADDER = "int add(int a, int b) { return a + b + OFFSET; }\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of this test's own; skips where there is no compiler."""
    try:
        compiler.compiler_command()
    except KernelError as error:
        pytest.skip(str(error))
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPIKELM_CACHE", str(folder))
    return folder


@pytest.fixture
def adder(tmp_path: Path) -> Path:
    folder = tmp_path / "adder"
    folder.mkdir()
    (folder / "op.c").write_text(ADDER)
    return folder / "op.c"


def test_compiles_once_per_source_and_definition(cache: Path, adder: Path) -> None:
    assert compiler.load(adder, ["OFFSET=1"]).add(2, 3) == 6
    assert compiler.load(adder, ["OFFSET=2"]).add(2, 3) == 7
    built = sorted(cache.iterdir())
    assert [path.suffix for path in built] == [".so", ".so"]
    first = [path.stat().st_mtime_ns for path in built]
    compiler.load(adder, ["OFFSET=1"])
    adder.write_text(ADDER + "\n")
    compiler._load.cache_clear()
    assert compiler.load(adder, ["OFFSET=1"]).add(2, 3) == 6
    assert len(list(cache.iterdir())) == 3
    assert [path.stat().st_mtime_ns for path in built] == first


def test_a_header_belongs_to_the_key(cache: Path, adder: Path) -> None:
    """Also one that another header in another folder includes."""
    other = adder.parent.parent / "other"
    other.mkdir()
    (other / "step.h").write_text('#include "deep.h"\n')
    (other / "deep.h").write_text("/* old */\n")
    adder.write_text('#include "../other/step.h"\n' + ADDER)
    compiler.load(adder, ["OFFSET=1"])
    (other / "deep.h").write_text("/* new */\n")
    compiler._load.cache_clear()
    compiler.load(adder, ["OFFSET=1"])
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_library_is_built_again(cache: Path, adder: Path) -> None:
    compiler.load(adder, ["OFFSET=5"])
    (library,) = cache.iterdir()
    # a new file: the old one is still mapped into this process
    library.unlink()
    library.write_bytes(b"cut short")
    compiler._load.cache_clear()
    assert compiler.load(adder, ["OFFSET=5"]).add(1, 1) == 7


def test_a_source_that_does_not_compile_is_one_sentence(cache: Path, adder: Path) -> None:
    adder.write_text("int add(int a) { return b; }\n")
    with pytest.raises(KernelError, match="failed with exit code 1: .*error") as caught:
        compiler.load(adder)
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, adder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SPIKELM_CACHE", str(blocked))
    with pytest.raises(KernelError, match="set SPIKELM_CACHE"):
        compiler.load(adder, ["OFFSET=1"])


def test_a_wrong_cc_is_named(adder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(KernelError, match="CC='/nowhere/cc' names no program"):
        compiler.load(adder)
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(KernelError, match="no C compiler"):
        compiler.load(adder)


def test_cc_may_hold_arguments(cache: Path, adder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{compiler.compiler_command()[0]} -DOFFSET=9")
    assert compiler.load(adder).add(0, 0) == 9


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPIKELM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "spikelm" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / ".cache" / "spikelm" / "kernels"


def test_two_processes_may_compile_at_once(cache: Path) -> None:
    code = (
        "import torch\n"
        "from spikelm.kernels.dispatch import use_backend\n"
        "from spikelm.kernels.wkv4 import initial_state, wkv4\n"
        "with use_backend('c'):\n"
        "    k = torch.ones(1, 3, 4)\n"
        "    print(wkv4(torch.zeros(4), torch.zeros(4), k, k, initial_state(1, 4))[0].sum().item())\n"
    )
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in started:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert float(output) == pytest.approx(12.0)
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_flags_never_change_arithmetic() -> None:
    flags = {flag for flags in (compiler.BASE_FLAGS, *compiler.TARGET_FLAGS) for flag in flags}
    assert "-ffp-contract=off" in flags
    assert not {"-ffast-math", "-Ofast", "-funsafe-math-optimizations"} & flags


@pytest.mark.parametrize("op", ["lif", "wkv4"])
def test_python_and_c_agree_on_the_segment(op: str) -> None:
    found = re.search(r"^#define SEGMENT (\d+)$", c_source(op).read_text(), re.MULTILINE)
    assert found is not None
    assert int(found[1]) == {"lif": lif_c.SEGMENT, "wkv4": wkv4_c.SEGMENT}[op]


def test_exponential_is_within_two_units_in_the_last_place(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "exp" / "op.c"
    source.parent.mkdir()
    header = os.path.relpath(Path(compiler.__file__).with_name("real.h").resolve(), source.parent.resolve())
    source.write_text(
        f'#include "{header}"\n'
        "void run(int64_t n, const real *x, real *y) {\n"
        "    for (int64_t i = 0; i < n; i++) y[i] = exp_nonpositive(x[i]);\n"
        "}\n"
    )
    x = torch.cat([torch.linspace(-87, 0, 1_000_001), -torch.logspace(-12, 1.9, 100_003), torch.zeros(1)])
    y = torch.empty_like(x)
    from ctypes import c_int64, c_void_p

    library = compiler.load(source)
    library.run(c_int64(x.numel()), c_void_p(x.data_ptr()), c_void_p(y.data_ptr()))
    exact = x.double().exp()
    unit = torch.nextafter(exact.float(), torch.tensor(2.0)).double() - exact.float()
    assert ((y - exact).abs() / unit).max() <= 2
    assert y[-1] == 1
    edge = torch.tensor([-87.5, -1e3, -1e38, -torch.inf, torch.nan])
    out = torch.empty_like(edge)
    library.run(c_int64(5), c_void_p(edge.data_ptr()), c_void_p(out.data_ptr()))
    assert out[:4].tolist() == [0, 0, 0, 0] and out[4].isnan()
