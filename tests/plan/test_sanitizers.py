"""The interpreter of decode plans under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spikelm.errors import KernelError
from spikelm.kernels.compile import compiler_command

HERE = Path(__file__).parent
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so")


@pytest.mark.slow
def test_no_sanitizer_complains(tmp_path: Path) -> None:
    """The tests of plans again, with C that stops at a wrong access or undefined operation."""
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
    environment = {
        **os.environ,
        "CC": f"{compiler} -g -fsanitize=address,undefined",
        "SPIKELM_CACHE": str(tmp_path / "cache"),
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    files = sorted(str(path) for path in HERE.glob("test_*.py") if path.name != Path(__file__).name)
    command = [sys.executable, "-m", "pytest", *files, "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", "-k", "not hundred and not compiler"]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (built,) = (tmp_path / "cache").glob("plan-*.so")
    assert b"__asan_init" in built.read_bytes()
