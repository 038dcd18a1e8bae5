"""The C kernels under the address and undefined-behaviour sanitizers, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spikelm.errors import KernelError
from spikelm.kernels.compile import compiler_command
from spikelm.kernels.dispatch import OPS

HERE = Path(__file__).parent
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so")


@pytest.mark.slow
def test_no_sanitizer_complains(tmp_path: Path) -> None:
    """Every test of the C forms again, with kernels that stop at a wrong access or undefined operation."""
    try:
        (compiler, *_) = compiler_command()
    except KernelError as error:
        pytest.skip(str(error))
    # The sanitizers' runtime must be the first library of a process that was not built with it.
    preload = []
    for name in LIBRARIES:
        found = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False
        ).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"the compiler has no {name}")
        preload.append(found)
    cache = tmp_path / "cache"
    environment = {
        **os.environ,
        "CC": f"{compiler} -g -fsanitize=address,undefined",
        "SPIKELM_CACHE": str(cache),
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    in_c = [op for op, forms in OPS.items() if "c" in forms]
    files = [str(HERE / f"test_{op}.py") for op in in_c]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-k", "not torch and not opcheck"]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    built = list(cache.glob("*.so"))
    assert {library.name.rpartition("-")[0] for library in built} >= set(in_c)
    assert all(b"__asan_init" in library.read_bytes() for library in built)
