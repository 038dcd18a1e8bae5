"""gla's Triton kernels against the fp64 loop: outputs, final state, every gradient; the decode step.

The interpreter takes milliseconds for every operation on a tile, so that each case here stands for several
things at once. On a GPU the same cases run in float32 and bfloat16, and larger ones besides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

pytest.importorskip("triton")

from spikelm.errors import KernelError, ShapeError
from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.gla import gla, gla_decode, initial_state, triton_call
from spikelm.kernels.gla import triton as form

NAMES = ("o", "state", "grad q", "grad k", "grad v", "grad g", "grad state")
SCALE = 0.4
# Largest error as a share of the largest entry. float32: sums of up to a few hundred products, each rounded
# to 6e-8. bfloat16: operands (the state among them) are rounded to 2^-9, which adds up like a random walk.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs (q, k, v, g, state) of a dtype in fp64, masks, and the gradients that arrive."""

    inputs: tuple[Tensor | None, ...]
    reset: Tensor | None
    valid: Tensor | None
    grads: tuple[Tensor, Tensor]


def make(
    sizes: tuple[int, int, int, int, int, int],
    gate: str,
    device: torch.device,
    dtype: torch.dtype,
    strength: float = 1.0,
    closed: float = 0.0,
    masks: bool = False,
) -> Case:
    """sizes: B, T, H, G, K, V; ``closed`` is the share of gates at -inf."""
    batch, steps, heads, groups, key_dim, value_dim = sizes
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).double()

    width = {"channel": key_dim, "head": 1, "none": 0}[gate]
    g = None
    if width:
        g = (strength * logsigmoid(normal(batch, steps, groups, width))).float().double()
        g = g.masked_fill((torch.rand(g.shape, generator=generator) < closed).to(device), -torch.inf)
    draw = torch.rand(2, batch, steps, generator=generator).to(device)
    return Case(
        inputs=(
            normal(batch, steps, heads, key_dim),
            normal(batch, steps, groups, key_dim),
            normal(batch, steps, groups, value_dim),
            g,
            normal(batch, groups, key_dim, value_dim).float().double(),
        ),
        reset=draw[0] < 0.1 if masks else None,
        valid=draw[1] < 0.75 if masks else None,
        grads=(
            normal(batch, steps, heads, value_dim),
            normal(batch, groups, key_dim, value_dim).float().double(),
        ),
    )


def run(case: Case, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Results in fp64; q, k, v have the dtype, gates and states float32 (float64 for the reference)."""
    side = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = (dtype, dtype, dtype, side, side)
    leaves = [
        None if x is None else x.to(kind).requires_grad_() for x, kind in zip(case.inputs, kinds, strict=True)
    ]
    with use_backend(backend):
        o, last = gla(*leaves, scale=SCALE, reset=case.reset, valid=case.valid)
    wanted = [x for x in leaves if x is not None]
    arriving = [x.to(y.dtype) for x, y in zip(case.grads, (o, last), strict=True)]
    grads = torch.autograd.grad([o, last], wanted, arriving)
    for x, grad in zip(wanted, grads, strict=True):
        assert grad.dtype == x.dtype and grad.shape == x.shape
    return [x.detach().double() for x in (o, last, *grads)]


def assert_equal_to_the_loop(case: Case, dtype: torch.dtype) -> None:
    got, expected = run(case, "triton", dtype), run(case, "reference", torch.float64)
    names = NAMES if len(got) == len(NAMES) else [name for name in NAMES if name != "grad g"]
    for name, a, b in zip(names, got, expected, strict=True):
        assert torch.isfinite(a).all(), name
        error = (a - b).abs().max() / b.abs().max().clamp(min=1)
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"


def test_mild_gates_over_chunks(device: torch.device, dtype: torch.dtype) -> None:
    """One product per chunk; three chunks in float32; two query heads share a key head."""
    case = make((1, 67, 2, 1, 5, 7), "channel", device, dtype, strength=0.1)
    assert_equal_to_the_loop(case, dtype)


def test_strong_and_closed_gates_with_masks(device: torch.device, dtype: torch.dtype) -> None:
    """Decay by doubling: gates from mild to -inf, resets, invalid tokens, rows of different kinds."""
    case = make((1, 40, 2, 2, 5, 7), "channel", device, dtype, strength=20.0, closed=0.1, masks=True)
    assert_equal_to_the_loop(case, dtype)


def test_several_blocks_of_keys_and_values(device: torch.device, dtype: torch.dtype) -> None:
    """K and V in several blocks; strong gates in the last channels alone, so that the parts of K differ."""
    case = make((1, 17, 1, 1, 70, 70), "channel", device, dtype, strength=0.02)
    g = case.inputs[3]
    assert g is not None
    g[..., 66:] *= 1e4
    assert_equal_to_the_loop(case, dtype)


@pytest.mark.parametrize("gate", ["head", "none"])
def test_gates_of_heads_and_none(gate: str, device: torch.device, dtype: torch.dtype) -> None:
    case = make((1, 67, 2, 1, 5, 7), gate, device, dtype, closed=0.05, masks=True)
    assert_equal_to_the_loop(case, dtype)


@pytest.mark.parametrize(("gate", "steps"), [("channel", 1), ("none", 2)])
def test_few_tokens(gate: str, steps: int, device: torch.device, dtype: torch.dtype) -> None:
    assert_equal_to_the_loop(make((1, steps, 2, 1, 5, 7), gate, device, dtype), dtype)


def test_a_text_in_segments(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes, as where few heads must fill a device: states of the segments first."""
    monkeypatch.setattr(triton_call, "segment_count", lambda programs, chunks, processors: 2)
    case = make((1, 130, 1, 1, 5, 7), "head", device, dtype, masks=True)
    assert_equal_to_the_loop(case, dtype)


@pytest.mark.parametrize(("gate", "masks"), [("channel", True), ("none", False)])
def test_the_form_that_is_listed(
    gate: str, masks: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on a GPU: zeros up to whole tiles, both masks, a gate, a copy of keys for each query head."""
    monkeypatch.setattr(form, "gla_forward", Counted(form.gla_forward))
    monkeypatch.setattr(form, "gla", form.gla_in_tiles)
    case = make((1, 19, 2, 1, 5, 7), gate, device, torch.float32, strength=3.0, closed=0.05, masks=masks)
    assert_equal_to_the_loop(case, torch.float32)
    (seen,) = form.gla_forward.seen
    assert [None if x is None else x.shape[2:] for x in seen[:5]] == [
        (2, 64),
        (2, 64),
        (2, 64),
        (2, 64) if gate == "channel" else (2, 1),
        (64, 64),
    ]
    assert all(x.shape == (1, 19) for x in seen[6:])


class Counted:
    """A function that keeps what it was called with."""

    def __init__(self, inner: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.inner, self.seen = inner, list[tuple[Any, ...]]()

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        self.seen.append(arguments)
        return self.inner(*arguments)


def test_gradient_of_the_gate_does_not_cancel(device: torch.device) -> None:
    """Under strong decay dg in float32 is as good as the loop's (published kernels lose 1e-4 here)."""
    case = make((1, 40, 1, 1, 8, 8), "channel", device, torch.float32, strength=8.0)
    exact = run(case, "reference", torch.float64)[5]
    loop = run(case, "reference", torch.float32)[5]
    got = run(case, "triton", torch.float32)[5]
    error, error_loop = ((x - exact).abs().max() for x in (got, loop))
    assert error < 4 * error_loop + 1e-7, f"{error:.1e}, the fp32 loop {error_loop:.1e}"


def test_segments_fill_the_device() -> None:
    assert triton_call.segment_count(256, 64, 132) == 1
    assert triton_call.segment_count(8, 256, 132) == 17
    assert triton_call.segment_count(8, 4, 132) == 1


def test_custom_ops(device: torch.device) -> None:
    case = make((1, 2, 1, 1, 3, 3), "none", device, torch.float32)
    q, k, v, _, state = (None if x is None else x.float().requires_grad_() for x in case.inputs)
    torch.library.opcheck(form.gla_forward, (q, k, v, None, state, SCALE, None, None))


def test_what_the_kernels_do_not_hold_is_refused(device: torch.device) -> None:
    k = torch.zeros(1, 2, 1, 300, device=device)
    state = initial_state(1, 1, 300, 4, device)
    with use_backend("triton"):
        with pytest.raises(KernelError, match="up to 256 key channels, got 300"):
            gla(k, k, k[..., :4], None, state, scale=1.0)
        with pytest.raises(KernelError, match="an input is float64"):
            gla(k[..., :4].double(), k[..., :4], k[..., :4], None, state[:, :, :4], scale=1.0)


def test_what_the_decode_kernel_does_not_hold_is_refused(device: torch.device) -> None:
    k, pool = torch.zeros(1, 1, 300, device=device), torch.zeros(1, 1, 300, 4, device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    with use_backend("triton"):
        with pytest.raises(KernelError, match="gla in Triton hold up to 256 key channels, got 300"):
            gla_decode(k, k, k[..., :4], None, pool, slots, scale=1.0)
        with pytest.raises(KernelError, match="gla in Triton compute in float32 and an input is float64"):
            rows = k[..., :4].double()
            gla_decode(rows, rows, rows, None, pool[:, :, :4].double(), slots, scale=1.0)


@pytest.mark.parametrize("gate", ["channel", "head", "none"])
def test_decode_in_place(gate: str, device: torch.device, dtype: torch.dtype) -> None:
    """Rows use slots in any order; a negative slot does nothing; states of other slots stay bit for bit."""
    q, k, v, g, _ = make((4, 1, 4, 2, 5, 7), gate, device, dtype, closed=0.1).inputs
    assert q is not None and k is not None and v is not None
    token = [None if x is None else x[:, 0] for x in (q, k, v, g)]
    pool = torch.randn(6, 2, 5, 7, generator=torch.Generator().manual_seed(1)).to(device)
    slots = torch.tensor([4, -1, 0, 2], dtype=torch.int32, device=device)
    results = {}
    for backend, kind in (("reference", torch.float64), ("triton", dtype)):
        states = pool.to(torch.float64 if kind == torch.float64 else torch.float32)
        rows = [None if x is None else x.to(kind) for x in token]
        with use_backend(backend):
            o = gla_decode(*rows, states, slots, scale=SCALE)
        assert o.dtype == kind and not o[1].any()
        assert torch.equal(states[[1, 3, 5]].float(), pool[[1, 3, 5]])
        results[backend] = (o.double(), states.double())
    # Only the output is rounded to 16 bits; sums over K are float32.
    near = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(results["triton"][0], results["reference"][0], rtol=near, atol=near)
    torch.testing.assert_close(results["triton"][1], results["reference"][1], rtol=1e-6, atol=1e-6)


def test_decode_is_the_sequence(device: torch.device) -> None:
    """Token by token through the pool gives what the whole sequence gives."""
    case = make((2, 3, 2, 1, 5, 7), "channel", device, torch.float32)
    q, k, v, g, state = (x.float() for x in case.inputs if x is not None)
    with use_backend("torch"):
        expected, last = gla(q, k, v, g, state, scale=SCALE)
    pool, slots = state.clone(), torch.arange(2, device=device)
    with use_backend("triton"):
        steps = [gla_decode(q[:, t], k[:, t], v[:, t], g[:, t], pool, slots, scale=SCALE) for t in range(3)]
    torch.testing.assert_close(torch.stack(steps, 1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pool, last, rtol=1e-5, atol=1e-5)


def test_decode_ops(device: torch.device) -> None:
    from spikelm.kernels.gla import decode, triton_decode

    q, k, pool = (torch.randn(*shape, device=device) for shape in ((2, 2, 3), (2, 1, 3), (3, 1, 3, 3)))
    slots = torch.tensor([2, 0], device=device)
    torch.library.opcheck(decode.step_in_pool, (q, k, k, None, pool, slots, SCALE))
    torch.library.opcheck(triton_decode.gla_decode, (q, k, k, None, pool, slots, SCALE))


def test_decode_refuses_bad_shapes(device: torch.device) -> None:
    q, k, pool = (torch.zeros(*shape, device=device) for shape in ((2, 2, 3), (2, 1, 3), (3, 1, 3, 3)))
    slots = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ShapeError, match=r"needs k \[2, a divisor of 2, 3\]"):
        gla_decode(q, k[:1], k, None, pool, slots, scale=1.0)
    with pytest.raises(ShapeError, match="gla_decode needs a contiguous"):
        gla_decode(q, k, k, None, pool.half(), slots, scale=1.0)
    with pytest.raises(ShapeError, match="needs g"):
        gla_decode(q, k, k, k[..., :2], pool, slots, scale=1.0)


LARGE = [
    ((2, 257, 4, 2, 64, 64), "channel", 0.1),
    ((2, 257, 4, 2, 64, 64), "channel", 5.0),
    ((1, 1009, 4, 4, 128, 128), "channel", 0.05),
    ((1, 300, 4, 4, 128, 128), "channel", 3.0),
    ((1, 300, 2, 2, 128, 128), "head", 1.0),
    ((1, 129, 2, 1, 256, 256), "channel", 0.1),
    ((1, 129, 2, 1, 256, 256), "channel", 5.0),
    ((1, 4097, 2, 2, 33, 65), "none", 1.0),
]


@pytest.mark.gpu
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(("sizes", "gate", "strength"), LARGE, ids=str)
def test_large(
    sizes: tuple[int, ...], gate: str, strength: float, masks: bool, device: torch.device, dtype: torch.dtype
) -> None:
    case = make(sizes, gate, device, dtype, strength=strength, masks=masks)
    assert_equal_to_the_loop(case, dtype)


@pytest.mark.gpu
def test_the_same_bits_again(device: torch.device, dtype: torch.dtype) -> None:
    case = make((2, 300, 4, 2, 128, 128), "channel", device, dtype, masks=True)
    for a, b in zip(run(case, "triton", dtype), run(replace(case), "triton", dtype), strict=True):
        assert torch.equal(a, b)
