"""gated_delta's Triton kernels against the fp64 loop: outputs, final state, every gradient; the decode step.

Few and small cases for the interpreter; on a GPU the same ones run in float32 and bfloat16, and larger ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

pytest.importorskip("triton")

from spikelm.errors import KernelError, ShapeError
from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.gated_delta import gated_delta, gated_delta_decode
from spikelm.kernels.gated_delta import triton as form

NAMES = ("o", "state", "grad q", "grad k", "grad v", "grad g", "grad beta", "grad state")
SCALE = 0.4
# Largest error as a share of the largest entry. float32: sums of some hundred products, and a triangular
# system whose inverse has entries of several units. bfloat16: operands are rounded to 2^-9, also the inverse.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 3e-2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs (q, k, v, g, beta, state) of a dtype in fp64, masks, and the gradients that arrive."""

    inputs: tuple[Tensor, ...]
    reset: Tensor | None
    valid: Tensor | None
    grads: tuple[Tensor, Tensor]


def make(
    sizes: tuple[int, int, int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    strength: float = 0.3,
    closed: float = 0.0,
    masks: bool = False,
    highest_beta: float = 1.0,
) -> Case:
    """sizes: B, T, H, G, K, V; ``closed`` is the share of decays at -inf."""
    batch, steps, heads, groups, key_dim, value_dim = sizes
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def put(x: Tensor, kind: torch.dtype = torch.float32) -> Tensor:
        return x.to(device, kind).double()

    g = strength * logsigmoid(normal(batch, steps, groups))
    g = g.masked_fill(torch.rand(g.shape, generator=generator) < closed, -torch.inf)
    beta = highest_beta * torch.rand(batch, steps, groups, generator=generator)
    draw = torch.rand(2, batch, steps, generator=generator).to(device)
    return Case(
        inputs=(
            put(normal(batch, steps, heads, key_dim), dtype),
            put(normalize(normal(batch, steps, groups, key_dim), dim=-1), dtype),
            put(normal(batch, steps, groups, value_dim), dtype),
            put(g),
            put(beta),
            put(normal(batch, groups, key_dim, value_dim)),
        ),
        reset=draw[0] < 0.1 if masks else None,
        valid=draw[1] < 0.75 if masks else None,
        grads=(
            put(normal(batch, steps, heads, value_dim), dtype),
            put(normal(batch, groups, key_dim, value_dim)),
        ),
    )


def run(case: Case, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Results in fp64; q, k, v have the dtype, the others float32 (float64 for the reference)."""
    side = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = (dtype, dtype, dtype, side, side, side)
    leaves = [x.to(kind).requires_grad_() for x, kind in zip(case.inputs, kinds, strict=True)]
    with use_backend(backend):
        o, last = gated_delta(*leaves, scale=SCALE, reset=case.reset, valid=case.valid)
    arriving = [x.to(y.dtype) for x, y in zip(case.grads, (o, last), strict=True)]
    grads = torch.autograd.grad([o, last], leaves, arriving)
    for x, grad in zip(leaves, grads, strict=True):
        assert grad.dtype == x.dtype and grad.shape == x.shape
    return [x.detach().double() for x in (o, last, *grads)]


def assert_equal_to_the_loop(case: Case, dtype: torch.dtype) -> None:
    got, expected = run(case, "triton", dtype), run(case, "reference", torch.float64)
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert torch.isfinite(a).all(), name
        error = (a - b).abs().max() / b.abs().max().clamp(min=1)
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"


def test_chunks_and_query_heads(device: torch.device, dtype: torch.dtype) -> None:
    """Several chunks in float32, strong writes (beta up to 2), two query heads share a key head."""
    case = make((1, 34, 2, 1, 5, 7), device, dtype, highest_beta=2.0)
    assert_equal_to_the_loop(case, dtype)


def test_masks_and_infinite_decay(device: torch.device, dtype: torch.dtype) -> None:
    case = make((2, 17, 1, 1, 5, 7), device, dtype, strength=20.0, closed=0.1, masks=True)
    assert_equal_to_the_loop(case, dtype)


def test_several_blocks_of_keys_and_values(device: torch.device, dtype: torch.dtype) -> None:
    assert_equal_to_the_loop(make((1, 9, 1, 1, 70, 40), device, dtype), dtype)


def test_the_form_that_is_listed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU: zeros up to whole tiles, both masks, copies for query heads in float32."""
    monkeypatch.setattr(form, "gated_delta", form.gated_delta_in_tiles)
    assert_equal_to_the_loop(make((1, 19, 2, 1, 5, 7), device, torch.float32), torch.float32)


def test_wide_keys_are_multiplied_in_blocks(device: torch.device) -> None:
    """In float32 above 32 channels, in bfloat16 above 128: K of 130 is held as 256."""
    assert_equal_to_the_loop(make((1, 17, 1, 1, 130, 5), device, torch.float32), torch.float32)


def test_one_token(device: torch.device, dtype: torch.dtype) -> None:
    assert_equal_to_the_loop(make((1, 1, 2, 2, 5, 7), device, dtype), dtype)


def test_small_decays_survive_beside_a_large_one(device: torch.device) -> None:
    """In float32 the running sum -1e5 - 1e-3 - .. knows nothing of the small steps; theirs alone does."""
    steps = 16
    k, v = torch.zeros(1, steps, 1, 2, device=device), torch.zeros(1, steps, 1, 1, device=device)
    g, beta = torch.full((1, steps, 1), -1e-3, device=device), torch.zeros(1, steps, 1, device=device)
    k[0, 1, 0, 0] = v[0, 1, 0, 0] = beta[0, 1, 0] = 1.0
    g[0, 0] = -1e5
    with use_backend("triton"):
        o, _ = gated_delta(
            torch.ones_like(k), k, v, g, beta, torch.zeros(1, 1, 2, 1, device=device), scale=1.0
        )
    expected = torch.exp(-1e-3 * torch.arange(steps - 1, device=device))
    torch.testing.assert_close(o[0, 1:, 0, 0], expected, rtol=1e-6, atol=0)


def test_custom_ops(device: torch.device) -> None:
    case = make((1, 2, 1, 1, 3, 3), device, torch.float32)
    inputs = [x.float().requires_grad_() for x in case.inputs]
    torch.library.opcheck(form.gated_delta_forward, (*inputs, SCALE, None, None))


def test_what_the_kernels_do_not_hold_is_refused(device: torch.device) -> None:
    q, k, v, g, beta, state = make((1, 2, 1, 1, 300, 4), device, torch.float32).inputs
    with use_backend("triton"):
        with pytest.raises(KernelError, match="an input is float64"):
            gated_delta(q, k, v, g, beta, state, scale=1.0)
        rows = [x.float() for x in (q, k, v, g, beta, state)]
        with pytest.raises(KernelError, match="up to 256 key channels, got 300"):
            gated_delta(*rows, scale=1.0)


def test_what_the_decode_kernel_does_not_hold_is_refused(device: torch.device) -> None:
    k, g, pool = (torch.zeros(*shape, device=device) for shape in ((1, 1, 300), (1, 1), (1, 1, 300, 4)))
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    with use_backend("triton"):
        with pytest.raises(KernelError, match="hold up to 256 key channels, got 300"):
            gated_delta_decode(k, k, k[..., :4], g, g, pool, slots, scale=1.0)
        with pytest.raises(KernelError, match="compute in float32 and an input is float64"):
            rows = k[..., :4].double()
            gated_delta_decode(rows, rows, rows, g, g, pool[:, :, :4].double(), slots, scale=1.0)


def test_decode_in_place(device: torch.device, dtype: torch.dtype) -> None:
    """Rows use slots in any order; a negative slot does nothing; states of other slots stay bit for bit."""
    q, k, v, g, beta, _ = make((4, 1, 4, 2, 5, 7), device, dtype, closed=0.1).inputs
    token = [x[:, 0] for x in (q, k, v, g, beta)]
    pool = torch.randn(6, 2, 5, 7, generator=torch.Generator().manual_seed(1)).to(device)
    slots = torch.tensor([4, -1, 0, 2], dtype=torch.int32, device=device)
    results = {}
    for backend, kind in (("reference", torch.float64), ("triton", dtype)):
        states = pool.to(torch.float64 if kind == torch.float64 else torch.float32)
        with use_backend(backend):
            o = gated_delta_decode(*(x.to(kind) for x in token), states, slots, scale=SCALE)
        assert o.dtype == kind and not o[1].any()
        assert torch.equal(states[[1, 3, 5]].float(), pool[[1, 3, 5]])
        results[backend] = (o.double(), states.double())
    # bfloat16: beta and g are rounded here too, and the reference sees them unrounded.
    near = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(results["triton"], results["reference"], rtol=near, atol=near)


def test_decode_is_the_sequence(device: torch.device) -> None:
    case = make((2, 3, 2, 1, 5, 7), device, torch.float32)
    *rows, state = (x.float() for x in case.inputs)
    with use_backend("torch"):
        expected, last = gated_delta(*rows, state, scale=SCALE)
    pool, slots = state.clone(), torch.arange(2, device=device)
    with use_backend("triton"):
        steps = [gated_delta_decode(*(x[:, t] for x in rows), pool, slots, scale=SCALE) for t in range(3)]
    torch.testing.assert_close(torch.stack(steps, 1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pool, last, rtol=1e-5, atol=1e-5)


def test_decode_ops(device: torch.device) -> None:
    from spikelm.kernels.gated_delta import decode, triton_decode

    q, k, g, pool = (
        torch.randn(*shape, device=device) for shape in ((2, 2, 3), (2, 1, 3), (2, 1), (3, 1, 3, 3))
    )
    slots = torch.tensor([2, 0], device=device)
    torch.library.opcheck(decode.step_in_pool, (q, k, k, -g.abs(), g, pool, slots, SCALE))
    torch.library.opcheck(triton_decode.gated_delta_decode, (q, k, k, -g.abs(), g, pool, slots, SCALE))
    with pytest.raises(ShapeError, match="needs beta"):
        gated_delta_decode(q, k, k, g, g[:1], pool, slots, scale=1.0)


LARGE = [
    (2, 257, 4, 2, 64, 64),
    (1, 509, 4, 4, 128, 128),
    (1, 129, 2, 1, 256, 256),
    (1, 1009, 2, 2, 33, 65),
]


@pytest.mark.gpu
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_large(sizes: tuple[int, ...], masks: bool, device: torch.device, dtype: torch.dtype) -> None:
    assert_equal_to_the_loop(make(sizes, device, dtype, masks=masks), dtype)


@pytest.mark.gpu
def test_the_same_bits_again(device: torch.device, dtype: torch.dtype) -> None:
    case = make((2, 300, 4, 2, 128, 128), device, dtype, masks=True)
    for a, b in zip(run(case, "triton", dtype), run(case, "triton", dtype), strict=True):
        assert torch.equal(a, b)
