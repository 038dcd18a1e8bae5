"""int8_linear: exact integer sums, the same bits in both forms, in any batch, with any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spikelm.errors import ShapeError
from spikelm.kernels.dispatch import choose, use_backend
from spikelm.kernels.int8_linear import (
    LONGEST,
    dequantised,
    eager,
    int8_linear,
    integer_sums,
    scaled_sums,
)

CASES = [  # D, outs, group
    (1, 1, None),
    (7, 5, 3),
    (64, 33, 64),
    (130, 40, 128),
    (300, 17, 128),
    (1040, 9, None),
    (1041, 9, None),
    (3000, 11, None),
    (2500, 8, 1100),
]


def make(D: int, outs: int, group: int | None, rows: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, weights over the whole range, and scales of several magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(-127, 128, (rows, D), generator=generator).float()
    weight = torch.randint(-127, 128, (outs, D), generator=generator, dtype=torch.int8)
    groups = 1 if group is None else -(-D // group)
    scales = torch.randn(outs, groups, generator=generator).exp() * 1e-2
    return counts, weight, scales


@pytest.mark.parametrize(("D", "outs", "group"), CASES)
def test_the_torch_form_has_the_bits_of_the_integers(D: int, outs: int, group: int | None) -> None:
    counts, weight, scales = make(D, outs, group)
    with use_backend("reference"):
        expected = int8_linear(counts, weight, scales, group)
    with use_backend("torch"):
        got = int8_linear(counts, weight, scales, group)
    assert got.dtype == torch.float32 and torch.equal(got.view(torch.int32), expected.view(torch.int32))
    sums = integer_sums(counts, weight, group)
    assert sums.dtype == torch.int32 and torch.equal(scaled_sums(sums, scales), expected)
    exact = counts.double() @ dequantised(weight, scales.double(), group).t()
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-3)
    with use_backend("torch"):
        for dtype in (torch.int8, torch.int64, torch.bfloat16, torch.float64):
            assert torch.equal(int8_linear(counts.to(dtype), weight, scales, group), expected)
        double = int8_linear(counts, weight, scales.double(), group)
    torch.testing.assert_close(double, exact, rtol=1e-13, atol=1e-12)


def test_float32_holds_the_largest_sum_of_1040_terms_and_not_of_more() -> None:
    """127 * 127 * 1040 < 2^24: every partial sum is a whole number that float32 represents."""
    assert eager.EXACT == 1040 and 1040 * 127**2 < 2**24 <= 1041 * 127**2
    for width in (1040, 1041, 5000, LONGEST):
        counts, weight = torch.full((1, width), 127.0), torch.full((2, width), 127, dtype=torch.int8)
        weight[1, 0] = 126  # an odd sum: not representable beyond 2^24
        sums = eager._sums(counts, weight.float())
        assert sums.tolist() == [[127.0 * 127 * width, 127.0 * 127 * width - 127]]
    # What the split is for: a plain float32 sum of this length is wrong.
    ones = torch.full((1, 5000), 127.0)
    assert (ones @ weight[1:, :5000].float().t()).item() != 127 * 127 * 5000 - 127


def test_the_worst_case_is_exact_in_every_order() -> None:
    """All sums of permutations of extreme terms are equal, which an inexact sum would not give."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.where(torch.rand(1, 1040, generator=generator) < 0.5, -127.0, 127.0)
    weight = torch.where(torch.rand(3, 1040, generator=generator) < 0.9, 127, -126).to(torch.int8)
    exact = (counts.long() @ weight.long().t()).float()
    for _ in range(20):
        order = torch.randperm(1040, generator=generator)
        assert torch.equal(eager._sums(counts[:, order], weight[:, order].float()), exact)


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize(("D", "outs", "group"), [(300, 65, 128), (515, 200, None), (1500, 64, None)])
def test_rows_have_the_same_bits_in_any_batch_and_chunk(
    form: str, D: int, outs: int, group: int | None
) -> None:
    counts, weight, scales = make(D, outs, group, rows=4 * 16)
    with use_backend(form):
        whole = int8_linear(counts, weight, scales, group)
        assert torch.equal(int8_linear(counts.view(4, 16, D), weight, scales, group).view(-1, outs), whole)
        for rows in (slice(0, 1), slice(63, 64), slice(10, 13), slice(0, 33)):
            assert torch.equal(int8_linear(counts[rows], weight, scales, group), whole[rows])
        assert torch.equal(int8_linear(counts[7], weight, scales, group), whole[7])
        scattered = counts.t().contiguous().t()  # another memory layout
        assert torch.equal(int8_linear(scattered, weight, scales, group), whole)


@pytest.mark.parametrize(("D", "outs", "group"), [(300, 700, 128), (2000, 333, None)])
def test_threads_do_not_change_a_bit(D: int, outs: int, group: int | None) -> None:
    counts, weight, scales = make(D, outs, group, rows=65)
    one = int8_linear(counts, weight, scales, group)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(int8_linear(counts, weight, scales, group), one)
            assert torch.equal(int8_linear(counts[3:4], weight, scales, group), one[3:4])
    finally:
        torch.set_num_threads(before)


def test_autocast_does_not_round() -> None:
    counts, weight, scales = make(300, 16, 128)
    plain = int8_linear(counts, weight, scales, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int8_linear(counts, weight, scales, 128), plain)


def test_gradient_is_that_of_the_dequantised_product() -> None:
    counts, weight, scales = make(300, 16, 128)
    scales = scales.double()
    for name in ("reference", "torch"):
        leaf = counts.double().requires_grad_()
        with use_backend(name):
            y = int8_linear(leaf, weight, scales, 128)
        gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (got,) = torch.autograd.grad(y, leaf, gradient)
        torch.testing.assert_close(got, gradient @ dequantised(weight, scales, 128), rtol=1e-12, atol=1e-12)


def test_nan_is_not_hidden() -> None:
    for D, group in ((300, 128), (1500, None)):
        counts, weight, scales = make(D, 16, group)
        counts[2, D - 1] = float("nan")
        with use_backend("torch"):
            y = int8_linear(counts, weight, scales, group)
        assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()


def test_nothing_to_do_and_meta_tensors() -> None:
    counts, weight, scales = make(8, 4, None)
    assert int8_linear(counts[:0], weight, scales).shape == (0, 4)
    assert choose("int8_linear", torch.device("cpu")) == "c"
    y = int8_linear(counts.to("meta").view(1, 5, 8), weight.to("meta"), scales.to("meta"))
    assert y.shape == (1, 5, 4) and y.is_meta


def test_wrong_inputs_are_refused() -> None:
    counts, weight, scales = make(8, 4, None)
    with pytest.raises(ShapeError, match=r"count of magnitude 128; expected at most 127"):
        int8_linear(torch.full((1, 8), -128, dtype=torch.int16), weight, scales)
    with pytest.raises(ShapeError, match=r"int8 weights \[O, D\], got torch.float32"):
        int8_linear(counts, weight.float(), scales)
    with pytest.raises(ShapeError, match=r"counts \[\.\., 8\] of a signed dtype, got torch.float32 \[5, 7\]"):
        int8_linear(counts[:, :7], weight, scales)
    with pytest.raises(
        ShapeError, match=r"scales \[4, 2\] of float32 or float64, got torch.float32 \[4, 1\]"
    ):
        int8_linear(counts, weight, scales, 4)
    with pytest.raises(ShapeError, match="group size is 0"):
        int8_linear(counts, weight, scales, 0)
