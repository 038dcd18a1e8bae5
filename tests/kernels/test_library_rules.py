"""What every op owes torch: no graph breaks, the same bits again, any layout, refusals that are cheap."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from spikelm.errors import SpikeLMError
from spikelm.kernels.dispatch import OPS, use_backend
from spikelm.kernels.encode import adaptive_encode, adaptive_encode_int8, decode_counts
from spikelm.kernels.event_linear import event_linear
from spikelm.kernels.gated_delta import gated_delta
from spikelm.kernels.gla import gla
from spikelm.kernels.int8_linear import int8_linear
from spikelm.kernels.lif import lif
from spikelm.kernels.planes import collapse_planes, expand_planes
from spikelm.kernels.rowwise import lerp, norm, softmax, unary
from spikelm.kernels.shift_encode import shift_encode
from spikelm.kernels.wkv4 import initial_state, wkv4

B, C, H, K = 2, 40, 2, 16
Call = Callable[..., Any]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def counts(*shape: int) -> Tensor:
    return torch.randint(-7, 8, shape).to(torch.int8)


def calls(T: int) -> dict[str, tuple[str, Call, tuple[Tensor, ...]]]:
    """A public call of every op at T tokens: name -> (op, function of tensors, the tensors)."""
    gates = -torch.rand(B, T, H, K)
    heads, unit = normal(B, T, H, K), torch.nn.functional.normalize(normal(B, T, H, K), dim=-1)
    state, x = torch.zeros(B, H, K, K), normal(B, T, C)
    packed = expand_planes(counts(B, T, C), 3)
    vectors = (torch.ones(C), torch.zeros(C), normal(B, C), torch.rand(3, C))
    return {
        "encode": ("encode", lambda x: adaptive_encode(x, k=3.0, cap=3), (x,)),
        "encode_int8": ("encode", lambda x: adaptive_encode_int8(x, k=3.0, cap=3), (x,)),
        "decode": ("encode", decode_counts, (counts(B, T, C), torch.rand(B, T, 1))),
        "lif": ("lif", lif, (x, torch.zeros(B, C), torch.rand(C))),
        "wkv4": ("wkv4", wkv4, (normal(C), normal(C), x, normal(B, T, C), initial_state(B, C))),
        "gla": (
            "gla",
            lambda *given: gla(*given, scale=0.25),
            (heads, normal(B, T, H, K), normal(B, T, H, K), gates, state),
        ),
        "gated_delta": (
            "gated_delta",
            lambda *given: gated_delta(*given, scale=0.25),
            (heads, unit, normal(B, T, H, K), gates[..., 0], torch.rand(B, T, H), state),
        ),
        "planes_expand": ("planes", lambda n: expand_planes(n, 3), (counts(B, T, C),)),
        "planes_collapse": ("planes", lambda p: collapse_planes(p, C), (packed,)),
        "shift_encode": (
            "shift_encode",
            lambda x, w, b, last, mix: shift_encode(x, w, b, 1e-5, "layernorm", last, mix, k=3.0),
            (x, *vectors),
        ),
        "int8_linear": (
            "int8_linear",
            int8_linear,
            (counts(B, T, C), counts(24, C), torch.rand(24, 1)),
        ),
        "event_linear": ("event_linear", event_linear, (x[0, :1], normal(C, 24))),
        "unary": ("rowwise", lambda x: unary(x, "silu"), (x,)),
        "lerp": ("rowwise", lerp, (x, normal(B, T, C), torch.rand(C))),
        "softmax": ("rowwise", softmax, (x,)),
        "norm": ("rowwise", lambda x, w: norm(x, w, None, 1e-5, "rmsnorm"), (x, torch.ones(C))),
    }


NAMES = tuple(calls(1))
MASKED = {"lif", "wkv4", "gla", "gated_delta", "shift_encode"}


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if isinstance(x, Tensor)]


@pytest.fixture(autouse=True)
def _no_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_every_op_is_here() -> None:
    assert {op for op, _, _ in calls(1).values()} == set(OPS)


@pytest.mark.parametrize("T", [1, 2, 3, 31, 127, 257, pytest.param(4097, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_again_and_with_two_threads(name: str, T: int) -> None:
    _, call, given = calls(T)[name]
    first = tensors_of(call(*given))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for a, b in zip(tensors_of(call(*given)), first, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_any_layout(name: str) -> None:
    """Inputs with gaps between their elements."""
    _, call, given = calls(9)[name]
    apart = [x.repeat_interleave(2, -1)[..., ::2] for x in given]
    assert not all(x.is_contiguous() for x in apart)
    for a, b in zip(tensors_of(call(*apart)), tensors_of(call(*given)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_no_graph_breaks(name: str, backend: str) -> None:
    _, call, given = calls(5)[name]
    torch._dynamo.reset()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for a, b in zip(tensors_of(compiled(*given)), tensors_of(call(*given)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", sorted(MASKED))
@pytest.mark.parametrize("pattern", ["none valid", "all reset", "last invalid", "random"])
def test_mask_patterns_equal_the_reference(name: str, pattern: str) -> None:
    _, call, given = calls(7)[name]
    reset, valid = torch.zeros(B, 7, dtype=torch.bool), torch.ones(B, 7, dtype=torch.bool)
    if pattern == "none valid":
        valid[:] = False
    elif pattern == "all reset":
        reset[:] = True
    elif pattern == "last invalid":
        valid[:, -1] = False
        reset[:, -1] = True
    else:
        reset, valid = torch.rand(B, 7) < 0.4, torch.rand(B, 7) < 0.5
    masks = {"reset": reset, "valid": valid}
    functions: dict[str, Call] = {
        "lif": lif,
        "wkv4": wkv4,
        "gla": lambda *x, **m: gla(*x, scale=0.25, **m),
        "gated_delta": lambda *x, **m: gated_delta(*x, scale=0.25, **m),
        "shift_encode": lambda x, w, b, last, mix, **m: shift_encode(
            x, w, b, 1e-5, "layernorm", last, mix, k=3.0, **m
        ),
    }
    with use_backend("reference"):
        expected = tensors_of(functions[name](*given, **masks))
    for a, b in zip(tensors_of(functions[name](*given, **masks)), expected, strict=True):
        if a.dtype != torch.int8 and a.dtype != torch.int64:  # a count may lie on the edge
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", ["int", "complex", "meta"])
@pytest.mark.parametrize("name", [name for name in NAMES if name in {*MASKED, "int8_linear"}])
def test_wrong_tensors_are_refused(name: str, wrong: str) -> None:
    """Every floating input in turn as integers, complex numbers, or on another device."""
    _, call, given = calls(3)[name]
    refused = 0
    for i, x in enumerate(given):
        if not x.is_floating_point():
            continue
        bad = x.to("meta") if wrong == "meta" else x.to(torch.int64 if wrong == "int" else torch.complex64)
        with pytest.raises(SpikeLMError):
            call(*given[:i], bad, *given[i + 1 :])
        refused += 1
    assert refused


def test_checks_are_cheap() -> None:
    """Under 25 us each even on a busy machine."""
    from spikelm.kernels import gla as gla_module
    from spikelm.kernels import lif as lif_module
    from spikelm.kernels import wkv4 as wkv4_module
    from spikelm.kernels.masks import check_companions, check_masks

    table = calls(3)
    q, k, v, g, state = table["gla"][2]
    checks: dict[str, Callable[[], None]] = {
        "lif": lambda: lif_module._check(*table["lif"][2]),
        "wkv4": lambda: wkv4_module._check(*table["wkv4"][2]),
        "gla": lambda: gla_module._check(q, k, v, g, state),
        "companions": lambda: check_companions("gla", q, k=k, v=v, g=g, state=state),
        "masks": lambda: check_masks(q, torch.ones(B, 3).bool(), None),
    }
    for name, check in checks.items():
        best = min(_nanoseconds(check) for _ in range(300))
        assert best < 25_000, f"the check of {name} takes {best / 1e3:.1f} us"


def _nanoseconds(call: Callable[[], None]) -> int:
    start = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - start
