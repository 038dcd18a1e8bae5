"""Fixtures of the kernel tests: every form of an op, and the reference it is held against."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from spikelm.kernels.dispatch import available, use_backend


def skip_without_c(op: str) -> None:
    """Skip where this machine cannot compile C."""
    problem = available()[op]["c"]
    if problem is not True:
        pytest.skip(f"no C kernels: {problem}")


@pytest.fixture(params=["torch", "c"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once per fast back-end; inside it every op uses that back-end."""
    name: str = request.param
    if name == "c":
        skip_without_c("lif")
    with use_backend(name):
        yield name


@pytest.fixture
def c_form() -> Iterator[None]:
    """Run the test on the C back-end."""
    skip_without_c("lif")
    with use_backend("c"):
        yield


@pytest.fixture(params=["reference", "torch", "c"])
def any_form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once per back-end that runs on a CPU, the loop among them."""
    name: str = request.param
    if name == "c":
        skip_without_c("lif")
    with use_backend(name):
        yield name
