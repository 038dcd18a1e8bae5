"""Configurations that are wrong on a device: auto runs torch and says so once, by name it is an error."""

from __future__ import annotations

import logging

import pytest
import torch

from spikelm.errors import KernelError
from spikelm.kernels import triton_excluded
from spikelm.kernels.dispatch import choose, use_backend
from spikelm.kernels.triton_excluded import EXCLUDED, Excluded, why_excluded

pytest.importorskip("triton")
CUDA = torch.device("cuda")  # choosing needs no device

ENTRY = Excluded(
    op="event_linear",
    configuration={"dtype": "bfloat16"},
    targets=("sm_90",),
    since="3.4",
    mended="3.7.1",
    reason="gradients are wrong (tests/kernels/triton/test_x.py)",
)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The table with one entry, on an sm_90 device with Triton 3.6.0."""
    monkeypatch.setattr(triton_excluded, "EXCLUDED", (ENTRY,))
    monkeypatch.setattr(triton_excluded, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(triton_excluded, "_installed", lambda: "3.6.0+git1")
    return monkeypatch


def test_auto_takes_torch_and_says_so_once(
    hopper: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="spikelm"):
        for _ in range(3):
            assert choose("event_linear", CUDA, dtype="bfloat16") == "torch"
    (record,) = caplog.records
    assert record.getMessage() == (
        "kernel event_linear runs in torch: its Triton form is excluded on sm_90 with Triton 3.6.0+git1 for "
        "dtype=bfloat16: gradients are wrong (tests/kernels/triton/test_x.py)"
    )
    assert choose("event_linear", CUDA, dtype="float32") == "triton"
    assert choose("event_linear", CUDA) == "torch", "a call that does not tell is not run"
    assert choose("int8_linear", CUDA) == "triton"


def test_by_name_it_is_an_error(hopper: pytest.MonkeyPatch) -> None:
    with use_backend("triton"):
        with pytest.raises(KernelError, match="cannot use the 'triton' back-end: excluded on sm_90"):
            choose("event_linear", CUDA, dtype="bfloat16")
        assert choose("event_linear", CUDA, dtype="float16") == "triton"


def test_other_versions_and_devices_run_it(hopper: pytest.MonkeyPatch) -> None:
    told = {"dtype": "bfloat16"}
    assert why_excluded("event_linear", CUDA, told) is not None
    assert why_excluded("event_linear", torch.device("cpu"), told) is None
    for version, runs in (("3.3.1", True), ("3.4", False), ("3.7.0", False), ("3.7.1", True), ("3.10", True)):
        hopper.setattr(triton_excluded, "_installed", lambda version=version: version)
        assert (why_excluded("event_linear", CUDA, told) is None) is runs, version
    hopper.setattr(triton_excluded, "_installed", lambda: "3.6.0")
    hopper.setattr(triton_excluded, "target_of", lambda device: "sm_80")
    assert why_excluded("event_linear", CUDA, told) is None


def test_every_entry_says_what_was_seen() -> None:
    from spikelm.kernels.ahead import TARGETS
    from spikelm.kernels.dispatch import OPS

    for entry in EXCLUDED:
        assert entry.op in OPS and "triton" in OPS[entry.op]
        assert entry.targets and set(entry.targets) <= set(TARGETS)
        assert len(entry.reason) > 20, f"{entry} gives no reason"
