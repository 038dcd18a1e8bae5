"""Configurations that are wrong on a device: auto runs torch and says so once, by name it is an error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import pytest
import torch

from spikelm.errors import KernelError
from spikelm.kernels import dispatch, triton_excluded
from spikelm.kernels.dispatch import choose, use_backend
from spikelm.kernels.encode import adaptive_encode, adaptive_encode_int8, decode_counts
from spikelm.kernels.event_linear import event_linear
from spikelm.kernels.gated_delta import gated_delta, gated_delta_decode
from spikelm.kernels.gla import gla, gla_decode
from spikelm.kernels.int8_linear import int8_linear
from spikelm.kernels.lif import lif, lif_decode
from spikelm.kernels.shift_encode import shift_encode
from spikelm.kernels.triton_excluded import EXCLUDED, Excluded, why_excluded
from spikelm.kernels.wkv4 import wkv4, wkv4_decode

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


def told(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> Mapping[str, object]:
    """What the call of an op tells of itself where it is asked whether it is excluded."""
    asked: list[Mapping[str, object]] = []

    def refuse(op: str, device: torch.device, configuration: Mapping[str, object]) -> str:
        asked.append(configuration)
        return "it is refused here, so that nothing runs"

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "why_excluded", refuse)
    with use_backend("triton"), pytest.raises(KernelError, match="so that nothing runs"):
        call()
    (configuration,) = asked
    return configuration


def calls(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A call of every op on tensors of a dtype."""
    x, row, state = torch.ones(2, 3, 4, dtype=dtype), torch.ones(4), torch.zeros(2, 4)
    key = torch.ones(2, 3, 1, 4, dtype=dtype)
    q, memory, slots = key[:, 0], torch.zeros(2, 1, 4, 4), torch.arange(2)
    gate, beta = -torch.ones(2, 3, 1, dtype=dtype), torch.ones(2, 3, 1, dtype=dtype)
    return {
        "lif": lambda: lif(x, state, row),
        "lif_decode": lambda: lif_decode(x[:, 0], state, slots, row),
        "wkv4": lambda: wkv4(row, row, x, x, torch.zeros(2, 3, 4)),
        "wkv4_decode": lambda: wkv4_decode(row, row, x[:, 0], x[:, 0], torch.zeros(2, 3, 4), slots),
        "encode": lambda: adaptive_encode(x, k=3.0),
        "encode_int8": lambda: adaptive_encode_int8(x, k=3.0),
        "decode_counts": lambda: decode_counts(x, torch.ones(2, 3, 1)),
        "shift_encode": lambda: shift_encode(x, row, None, 1e-5, "rmsnorm", state, row[None], k=3.0),
        "event_linear": lambda: event_linear(x, torch.ones(4, 2, dtype=dtype)),
        "int8_linear": lambda: int8_linear(x, torch.ones(2, 4, dtype=torch.int8), torch.ones(2, 1)),
        "gla": lambda: gla(key, key, key, None, memory, scale=1.0),
        "gla_decode": lambda: gla_decode(q, q, q, None, memory, slots, scale=1.0),
        "gated_delta": lambda: gated_delta(key, key, key, gate, beta, memory, scale=1.0),
        "gated_delta_decode": lambda: gated_delta_decode(
            q, q, q, gate[:, 0], beta[:, 0], memory, slots, scale=1.0
        ),
    }


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", calls(torch.float32))
def test_every_op_tells_its_dtype(name: str, given: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry for bfloat16 leaves float32 alone, whatever the op."""
    assert told(monkeypatch, calls(given)[name])["dtype"] == str(given).removeprefix("torch.")


@pytest.mark.parametrize("op", ["lif", "wkv4", "gla", "gated_delta"])
def test_sequences_and_steps_in_a_pool_are_told_apart(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """(They are kernels of their own.)"""
    forms = calls(torch.float32)
    assert told(monkeypatch, forms[op])["kernel"] == "sequence"
    assert told(monkeypatch, forms[f"{op}_decode"])["kernel"] == "decode"


def test_encoding_has_three_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = calls(torch.float32)
    names = [told(monkeypatch, forms[name])["kernel"] for name in ("encode", "encode_int8", "decode_counts")]
    assert names == ["encode", "encode_int8", "decode"]
