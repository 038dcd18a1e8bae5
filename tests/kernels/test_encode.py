"""encode: counts, thresholds and the straight-through gradient against the fp64 equations, and fixed bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spikelm.errors import ShapeError
from spikelm.kernels.dispatch import choose, use_backend
from spikelm.kernels.encode import adaptive_encode
from spikelm.kernels.encode.c import encode_backward, encode_forward

SHAPES = [(1, 1), (40, 1), (2, 3), (7, 17), (3, 5, 64), (1, 1000), (33, 1000), (2, 2, 3, 33), (3, 2500), (5,)]
OPTIONS: list[dict[str, Any]] = [
    {"k": 3.0},
    {"k": 3.0, "dead_zone": 1.4},
    {"k": 3.1, "dead_zone": 0.9, "cap": 4},  # not 1.0: with D = 1 that is the very edge
    {"k": 3.1, "cap": 1},
    {"k": 40.3},
    {"k": 0.3, "dead_zone": 0.2},
]
AMBIGUOUS = 1e-4


def make(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Activations and a gradient: fp32 values in fp64, so that the fp32 forms see exactly the same inputs."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(2, *shape, generator=generator)
    scale = torch.randn(*shape[:-1], 1, generator=generator).exp()
    return (x * scale).double(), grad.double()


def run(x: Tensor, grad: Tensor, dtype: torch.dtype = torch.float64, **options: Any) -> list[Tensor]:
    leaf = x.detach().to(dtype).requires_grad_()
    counts, threshold = adaptive_encode(leaf, **options)
    assert not threshold.requires_grad
    (grad_x,) = torch.autograd.grad(counts, leaf, grad.to(dtype))
    return [counts.detach(), threshold, grad_x]


def reference(x: Tensor, grad: Tensor, dtype: torch.dtype = torch.float64, **options: Any) -> list[Tensor]:
    with use_backend("reference"):
        return run(x, grad, dtype, **options)


def clear(x: Tensor, options: dict[str, Any]) -> Tensor:
    """True where x / V is well away from a half and |x| from the edge of the dead zone."""
    mean = x.abs().mean(-1, keepdim=True)
    steps = x.abs() / (mean / options["k"]).clamp(min=1e-8)
    from_half = (steps - steps.floor() - 0.5).abs()
    from_edge = (x.abs() / mean.clamp(min=1e-30) - options.get("dead_zone", 0.0)).abs()
    return (from_half > AMBIGUOUS) & ((from_edge > AMBIGUOUS) | (options.get("dead_zone", 0.0) == 0.0))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_fp64_equations(
    form: str, shape: tuple[int, ...], options: dict[str, Any], poisoned: None
) -> None:
    x, grad = make(*shape)
    expected = reference(x, grad, **options)
    got = run(x, grad, **options)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1:], expected[1:], rtol=1e-10, atol=1e-10)

    single = run(x, grad, torch.float32, **options)
    assert all(value.dtype == torch.float32 for value in single)
    sure = clear(x, options)
    assert (~sure).double().mean() < 1e-3
    assert torch.equal(single[0].double()[sure], expected[0][sure])
    torch.testing.assert_close(single[1].double(), expected[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(single[2].double()[sure], expected[2][sure], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cap", [1, 3, 127])
def test_a_large_tensor(form: str, cap: int) -> None:
    options = {"k": 3.0, "dead_zone": 1.0, "cap": cap}
    x, grad = make(300, 700)
    expected, got = reference(x, grad, **options), run(x, grad, torch.float32, **options)
    sure = clear(x, options)
    assert 0 < (~sure).double().mean() < 1e-3
    assert torch.equal(got[0].double()[sure], expected[0][sure])
    torch.testing.assert_close(got[2].double()[sure], expected[2][sure], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fp32_rounds_half_to_even_of_the_quotient(form: str, dtype: torch.dtype) -> None:
    """Given the threshold, the counts are exact, ambiguous or not."""
    x, _ = make(50, 333)
    x = x.to(dtype)
    counts, threshold = adaptive_encode(x, k=3.0, cap=9)
    assert torch.equal(counts, torch.round(x / threshold).clamp(-9, 9))
    halves = torch.tensor([[0.5, -0.5, 1.5, -1.5, 2.5, 3.5, -2.5, 4.0]], dtype=dtype)  # mean 2.0625
    counts, threshold = adaptive_encode(halves, k=2.0625)
    assert threshold.item() == 1.0
    assert counts.tolist() == [[0, 0, 2, -2, 2, 4, -2, 4]]


def test_sums_are_accurate(c_form: None) -> None:
    """The mean of 100 000 equal-signed fp32 values is good to a few units in the last place."""
    x = torch.rand(3, 100_003)
    _, threshold = adaptive_encode(x, k=1.0)
    exact = x.double().mean(-1, keepdim=True)
    assert ((threshold.double() - exact).abs() / exact).max() < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dead_zone", [0.0, 1.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_bit_equal_alone_in_any_batch_and_chunk(
    c_form: None, dtype: torch.dtype, dead_zone: float
) -> None:
    x, grad = make(4, 41, 515)
    options: dict[str, Any] = {"k": 3.0, "dead_zone": dead_zone, "cap": 5}
    whole = run(x, grad, dtype, **options)
    for cut in (1, 8, 40):
        parts = [run(x[:, :cut], grad[:, :cut], dtype, **options)]
        parts.append(run(x[:, cut:], grad[:, cut:], dtype, **options))
        for value, head, tail in zip(whole, *parts, strict=True):
            assert torch.equal(torch.cat([head, tail], 1), value)
    for row in (0, 3):
        for t in (0, 17, 40):
            for value, alone in zip(whole, run(x[row, t], grad[row, t], dtype, **options), strict=True):
                assert torch.equal(alone, value[row, t])


@pytest.mark.parametrize("cap", [1, 7, 127])
def test_threads_do_not_change_a_bit(c_form: None, cap: int) -> None:
    x, grad = make(130, 600)
    one = run(x, grad, torch.float32, k=3.0, dead_zone=1.0, cap=cap)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for a, b in zip(run(x, grad, torch.float32, k=3.0, dead_zone=1.0, cap=cap), one, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


def test_gradient_is_straight_through(form: str) -> None:
    """d(n V)/dx = 1 where the cap does not bite, in the dead zone too; 0 where it does."""
    x, grad = make(20, 65)
    leaf = x.clone().requires_grad_()
    counts, threshold = adaptive_encode(leaf, k=3.0, dead_zone=1.0, cap=6)
    (grad_x,) = torch.autograd.grad(counts * threshold, leaf, grad)
    clipped = (torch.round(x / threshold).abs() > 6) & (x.abs() >= threshold * 3)
    assert 0.01 < clipped.double().mean() < 0.5
    assert ((counts == 0) & (grad_x != 0)).any()
    torch.testing.assert_close(grad_x, torch.where(clipped, 0.0, grad), rtol=1e-12, atol=1e-12)


def test_a_mask_is_kept_only_for_rows_that_were_clipped(c_form: None) -> None:
    x, _ = make(6, 64)
    x[1, 3], x[4, 60] = 50 * x[1].abs().sum(), -50 * x[4].abs().sum()
    _, _, slots, mask = encode_forward(x, 3.0, 0.0, 100)
    assert slots.tolist() == [-1, 0, -1, -1, 1, -1]
    assert mask.nonzero().tolist() == [[0, 3], [1, 60]]
    _, _, slots, mask = encode_forward(x, 3.0, 0.0, 1000)
    assert slots.eq(-1).all() and mask.shape == (0, 64)
    _, _, slots, _ = encode_forward(torch.ones(2, 5), 1.0, 0.0, 1)  # counts just reach the cap
    assert slots.eq(-1).all()


def test_zero_rows(form: str) -> None:
    x, grad = make(5, 33)
    x[2] = 0.0
    for dead_zone in (0.0, 1.4):
        for dtype in (torch.float32, torch.float64):
            counts, threshold, grad_x = run(x, grad, dtype, k=3.0, dead_zone=dead_zone)
            assert (counts[2] == 0).all() and threshold[2].item() == torch.tensor(1e-8, dtype=dtype).item()
            torch.testing.assert_close(grad_x[2], grad[2].to(dtype) / 1e-8)
            assert counts.isfinite().all() and (counts[3] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dead_zone", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_in_their_row(
    form: str, bad: float, dead_zone: float, dtype: torch.dtype
) -> None:
    """They are never hidden, and every form shows them in the same places."""
    x, grad = make(4, 37)
    alone = run(x, grad, dtype, k=3.0, dead_zone=dead_zone, cap=4)
    x[1, 36] = bad
    got = run(x, grad, dtype, k=3.0, dead_zone=dead_zone, cap=4)
    expected = reference(x, grad, dtype, k=3.0, dead_zone=dead_zone, cap=4)
    others = [0, 2, 3]
    for value, before in zip(got, alone, strict=True):
        assert torch.equal(value[others], before[others])
    for value, same in zip(got, expected, strict=True):
        torch.testing.assert_close(value[1], same[1], equal_nan=True)
    assert got[0][1, 36].isnan()
    assert got[0][1].isnan().all() == math.isnan(bad)


def test_extreme_magnitudes(form: str) -> None:
    """Ones near the smallest and largest floats count as ones of magnitude one do."""
    for scale in (2.0**-20, 2.0**100):
        x, _ = make(3, 40)
        plain, threshold = adaptive_encode(x.float(), k=3.0, dead_zone=0.5)
        scaled, larger = adaptive_encode(x.float() * scale, k=3.0, dead_zone=0.5)
        assert torch.equal(plain, scaled) and torch.equal(threshold * scale, larger)
    tiny = torch.full((1, 8), 1e-42)
    counts, threshold = adaptive_encode(tiny, k=3.0)
    assert (counts == 0).all() and threshold.item() == torch.tensor(1e-8).item()


def test_any_memory_layout(form: str) -> None:
    x, grad = make(6, 9, 40)
    options: dict[str, Any] = {"k": 3.0, "dead_zone": 1.0, "cap": 4}
    expected = run(x, grad, **options)
    layouts = [
        (x.mT.contiguous().mT, grad.mT.contiguous().mT),
        (x.transpose(0, 1).contiguous().transpose(0, 1), grad),
        (x.repeat_interleave(2, -1)[..., ::2], grad.repeat_interleave(2, -1)[..., ::2]),
        (torch.cat([x, x], 1)[:, 9:], grad),
    ]
    for got_x, got_grad in layouts:
        assert torch.equal(got_x, x)
        for a, b in zip(run(got_x, got_grad, **options), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    leaf = x.clone().requires_grad_()
    counts, _ = adaptive_encode(leaf, **options)
    (grad_x,) = torch.autograd.grad(counts.sum(), leaf)  # an expanded gradient
    torch.testing.assert_close(grad_x, run(x, torch.ones_like(x), **options)[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_fp32(form: str, dtype: torch.dtype) -> None:
    x = make(4, 40)[0].to(dtype).requires_grad_()
    counts, threshold = adaptive_encode(x, k=3.0, dead_zone=1.0)
    exact, exact_threshold = adaptive_encode(x.detach().float(), k=3.0, dead_zone=1.0)
    assert counts.dtype == threshold.dtype == torch.float32
    assert torch.equal(counts, exact) and torch.equal(threshold, exact_threshold)
    assert torch.autograd.grad(counts.sum(), x)[0].dtype == dtype


def test_nothing_to_do(form: str) -> None:
    for shape in ((0, 5), (2, 0, 4), (0,), (3, 0)):
        x = torch.zeros(shape, requires_grad=True)
        counts, threshold = adaptive_encode(x, k=3.0)
        assert counts.shape == shape and threshold.shape == (*shape[:-1], 1)
        assert torch.autograd.grad(counts.sum(), x)[0].shape == shape


def test_inputs_are_left_alone(form: str) -> None:
    x, grad = make(3, 20)
    kept, kept_grad = x.clone(), grad.clone()
    run(x, grad, k=3.0, cap=1)
    assert torch.equal(x, kept) and torch.equal(grad, kept_grad)


def test_recomputation_in_a_checkpoint(form: str) -> None:
    """Gradient checkpointing computes the counts again; the saved tensors must come out the same."""
    x, grad = make(8, 50)
    results = []
    for again in (False, True):
        leaf = x.clone().requires_grad_()

        def call(value: Tensor) -> Tensor:
            counts, threshold = adaptive_encode(value, k=3.0, cap=5)
            return counts * threshold

        if again:
            y: Any = torch.utils.checkpoint.checkpoint(call, leaf, use_reentrant=False)
        else:
            y = call(leaf)
        results.append(torch.autograd.grad(y, leaf, grad)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("cap", [1, 127])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(c_form: None, dtype: torch.dtype, cap: int) -> None:
    x, grad = (value.to(dtype) for value in make(2, 3, 5))
    torch.library.opcheck(encode_forward, (x.clone().requires_grad_(), 3.0, 1.0, cap))
    torch.library.opcheck(encode_forward, (x, 3.0, 0.0, cap))
    _, threshold, slots, mask = encode_forward(x, 3.0, 0.0, cap)
    torch.library.opcheck(encode_backward, (grad, threshold, slots, mask))


def test_other_devices_run_the_torch_form() -> None:
    x = torch.empty(2, 3, 4, device="meta")
    assert choose("encode", x.device) == "torch"


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"floating x \[\.\., D\], got torch.int64 \[3\]"):
        adaptive_encode(torch.ones(3, dtype=torch.int64), k=3.0)
    with pytest.raises(ShapeError, match="floating x"):
        adaptive_encode(torch.tensor(1.0), k=3.0)
