"""Fixtures for every test: one thread, fixed seeds, memory that is never zero by luck, the data folder."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

try:
    import numpy as np
except ImportError:  # a GPU machine may have torch and triton alone
    np = None  # type: ignore[assignment]

# More threads are slower on busy cores, and the sums of a matmul depend on how many there are.
torch.set_num_threads(1)

# Without a GPU Triton's kernels are interpreted; Triton looks at this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Compiled kernels and token stores of tests stay out of the user's cache (`make clean` removes them).
os.environ.setdefault("SPIKELM_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "spikelm"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where torch sees none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers in every run and in every order of tests."""
    random.seed(0)
    if np is not None:
        np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data sets and small models named by SPIKELM_DATA; skips the test where it is not set."""
    named = os.environ.get("SPIKELM_DATA")
    if not named:
        pytest.skip("SPIKELM_DATA is not set: no data folder (make test sets it where ../shared/data exists)")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"SPIKELM_DATA names {folder}, which is not a folder")
    return folder


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill new memory (torch.empty and its kin) with NaN, so that reading what was never written shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


SANITIZERS = ("libasan.so", "libubsan.so", "libstdc++.so")


@pytest.fixture
def sanitized(tmp_path: Path) -> dict[str, str]:
    """Environment of a process whose kernels stop at a wrong access or an undefined operation.

    Its kernels are built into ``tmp_path / "cache"``. Skips the test where the compiler has no sanitizers.
    """
    from spikelm.errors import KernelError
    from spikelm.kernels.compile import compiler_command

    try:
        (compiler, *_) = compiler_command()
    except KernelError as error:
        pytest.skip(str(error))
    # The sanitizers' runtime must be the first library of a process that was not built with it.
    preload = []
    for name in SANITIZERS:
        found = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False
        ).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"the compiler has no {name}")
        preload.append(found)
    return {
        **os.environ,
        "CC": f"{compiler} -g -fsanitize=address,undefined,float-cast-overflow",
        "SPIKELM_CACHE": str(tmp_path / "cache"),
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
