"""Kernels compile ahead of time, in a process where Triton does not interpret, and tell what they take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spikelm.errors import KernelError
from spikelm.kernels import ahead

KERNEL = """
import triton
import triton.language as tl

from spikelm.kernels.ahead import TARGETS, Compilation, compile_one

@triton.jit
def scaled(x, y, n, scale, DOUBLE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n)
    tl.store(y + i, a * scale * (2 if DOUBLE else 1), mask=i < n)

types = {"x": "*bf16", "y": "*fp32", "n": "i32", "scale": "fp32"}
for target in TARGETS:
    constants = {"DOUBLE": True, "BLOCK": 1024}
    wanted = Compilation(kernel=scaled, name="scaled", signature=types, constants=constants)
    print(target, compile_one(wanted, target))
try:
    wanted = Compilation(kernel=scaled, name="scaled", signature=types, constants={"BLOCKS": 1024})
    compile_one(wanted, "sm_90")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_compiles_for_every_target(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "kernel.py"  # Triton reads a kernel's source
    file.write_text(KERNEL)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(file)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    *compiled, refused = done.stdout.splitlines()
    assert [line.split()[0] for line in compiled] == list(ahead.TARGETS)
    for line in compiled:
        assert "spilled=0" in line and "registers=0" not in line
    assert refused.startswith("KernelError scaled: arguments without type or value: ['BLOCK', 'DOUBLE']")


def test_what_must_not_be_shipped_is_named() -> None:
    taken = {"registers": 255, "shared": 70000, "spilled": 65}
    found = {"modules": {"m": {"kernels": {"k": {"sm_90": taken, "gfx942": {**taken, "spilled": 64}}}}}}
    assert ahead.problems(found) == [
        "k spills 65 bytes on sm_90",
        "k needs 70000 bytes of shared memory on gfx942",
    ]


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(KernelError, match="target 'sm_70' is unknown; expected one of sm_80"):
        ahead.compilations("spikelm.kernels.lif.triton", "sm_70")
