"""Elementwise functions and norms: every form against float64, and the same bits in any place and batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spikelm.errors import KernelError
from spikelm.kernels import rowwise
from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.rowwise import reference
from spikelm.norms import LayerNorm, RMSNorm

WIDTHS = (1, 3, 8, 17, 31, 32, 33, 100, 512)
NORMS = ("layernorm", "rmsnorm")


def spread(count: int) -> Tensor:
    return torch.cat([torch.linspace(-95.0, 95.0, count), 3 * torch.randn(count)])


@pytest.mark.parametrize("function", rowwise.FUNCTIONS)
def test_functions(form: str, function: str) -> None:
    """Three units in the last place; below -87 exp is zero, and 95 exp(-87) = 1.6e-36."""
    x = spread(5003).clamp(max=88.0 if function == "exp" else 95.0)
    y = rowwise.unary(x, function)
    expected = reference.unary(x.double(), function)
    assert y.dtype == torch.float32
    assert ((y.double() - expected).abs() <= 3.6e-7 * expected.abs() + 1.6e-36).all()


@pytest.mark.parametrize("function", rowwise.FUNCTIONS)
def test_function_extremes(form: str, function: str) -> None:
    x = torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0, -0.0, 1e-30, -1e-30, 89.0, 3e38, -3e38])
    y, expected = rowwise.unary(x, function), reference.unary(x.double(), function)
    if function == "silu":
        expected[0] = y[0]  # minus infinity times zero: NaN, as the formula has it
    torch.testing.assert_close(y, expected.float(), rtol=1e-6, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", NORMS)
def test_norms(form: str, kind: str, width: int) -> None:
    """Rounding of a sum of up to 512 terms and of two products: relative to the row's largest output."""
    x = 3 * torch.randn(2, 5, width) + 1
    bias = torch.randn(width) if kind == "layernorm" else None
    for weight in (torch.randn(width), None):
        y = rowwise.norm(x, weight, bias, 1e-5, kind)
        expected = reference.norm(x.double(), weight, bias, 1e-5, kind)
        assert ((y.double() - expected).abs() <= 4e-6 * (1 + expected.abs().amax(-1, keepdim=True))).all()


def test_lerp_is_that_of_torch(form: str) -> None:
    """Also the bits, where torch multiplies and adds in one rounding, as this processor can."""
    for width in WIDTHS:
        start, end, weight = torch.randn(3, 2, width), torch.randn(3, 2, width), torch.rand(width)
        y = rowwise.lerp(start, end, weight)
        torch.testing.assert_close(y, torch.lerp(start, end, weight), rtol=1e-6, atol=1e-7)


def test_the_same_bits_in_any_batch_and_place(c_form: None) -> None:
    x = 2 * torch.randn(7, 133)
    for function in rowwise.FUNCTIONS:
        whole = rowwise.unary(x, function)
        for row in range(7):
            for length in (1, 5, 16, 133):
                assert torch.equal(rowwise.unary(x[row, -length:], function), whole[row, -length:])
    for kind in NORMS:
        whole = rowwise.norm(x, None, None, 1e-6, kind)
        for row in range(7):
            assert torch.equal(rowwise.norm(x[row], None, None, 1e-6, kind), whole[row])


def test_threads_change_nothing(c_form: None) -> None:
    x = torch.randn(600, 96)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            results.append([rowwise.norm(x, None, None, 1e-5, kind) for kind in NORMS])
            results[-1] += [rowwise.unary(x, function) for function in rowwise.FUNCTIONS]
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_non_contiguous_and_empty(form: str) -> None:
    x = torch.randn(6, 10).t()
    torch.testing.assert_close(rowwise.unary(x, "silu"), nn.functional.silu(x))
    torch.testing.assert_close(
        rowwise.norm(x, None, None, 1e-5, "layernorm"), nn.functional.layer_norm(x, (6,))
    )
    assert rowwise.unary(x[:0], "exp").shape == (0, 6)
    assert rowwise.norm(x[:0], None, None, 1e-5, "rmsnorm").shape == (0, 6)


def test_opcheck(c_form: None) -> None:
    from spikelm.kernels.rowwise import c

    x, w = torch.randn(3, 9), torch.randn(9)
    torch.library.opcheck(c.unary, (x, 1))
    torch.library.opcheck(c.lerp, (x, x.clone(), w))
    torch.library.opcheck(c.norm, (x, w, None, 1e-5, False))


def test_unknown_names_are_one_sentence() -> None:
    with pytest.raises(KernelError, match="did you mean 'sigmoid'"):
        rowwise.unary(torch.ones(3), "sigmoit")
    with pytest.raises(KernelError, match="did you mean 'rmsnorm'"):
        rowwise.norm(torch.ones(3), None, None, 1e-5, "rmsnorms")


def test_modules_keep_torchs_form_with_gradients() -> None:
    """And are the same norm without."""
    for ours, theirs in ((LayerNorm(20), nn.LayerNorm(20)), (RMSNorm(20), nn.RMSNorm(20))):
        x = torch.randn(4, 20)
        assert torch.equal(ours(x), theirs(x))
        assert ours(x).requires_grad
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x))
            with use_backend("torch"):
                torch.testing.assert_close(ours(x), theirs(x))
            assert ours(x.bfloat16().to(torch.float64).float()).dtype == torch.float32
