"""Fixtures of the Triton tests: one suite, interpreted on a CPU and compiled on a GPU.

Without a GPU the kernels run under Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors, in float32: its
``tl.dot`` of bfloat16 is silently wrong. With one every test that uses the device carries the mark ``gpu``,
so that ``make gpu`` (``pytest -m gpu``) runs it there, in bfloat16 too. Nothing here needs more than pytest,
torch and triton: a GPU machine may have nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    # Read when a kernel is decorated, so it must be set before the kernels are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

DTYPES = (torch.float32, torch.bfloat16) if ON_GPU else (torch.float32,)


ON_DEVICE = {"device", "dtype", "dtypes", "triton_form"}
"""Fixtures of tests that run on the GPU; what only compiles or starts programs needs none."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``dtype`` runs once per dtype."""
    if "dtype" in metafunc.fixturenames and not any(
        "dtype" in str(mark.args[0]).replace(",", " ").split()
        if isinstance(mark.args[0], str)
        else "dtype" in mark.args[0]
        for mark in metafunc.definition.iter_markers("parametrize")
    ):
        metafunc.parametrize("dtype", DTYPES, ids=[str(dtype).removeprefix("torch.") for dtype in DTYPES])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU machine every test of this folder that uses the device is part of ``make gpu``."""
    if not ON_GPU:
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and ON_DEVICE & set(getattr(item, "fixturenames", ())):
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU; or the CPU, where the kernels are interpreted."""
    pytest.importorskip("triton")
    if ON_GPU:
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")
    return torch.device("cpu")


@pytest.fixture(scope="session")
def dtypes() -> tuple[torch.dtype, ...]:
    """Dtypes of the inputs to test: float32, and on a GPU bfloat16."""
    return DTYPES


@pytest.fixture
def triton_form(device: torch.device) -> Iterator[torch.device]:
    """Inside the test every op runs its Triton form; gives the device."""
    from spikelm.kernels.dispatch import use_backend

    with use_backend("triton"):
        yield device
