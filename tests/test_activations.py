"""Sigmoid, silu, logsigmoid and softplus give the same bits at any place of a tensor of any length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spikelm.activations import logsigmoid, sigmoid, silu, softplus, squared_relu

PAIRS = {
    "sigmoid": (sigmoid, torch.sigmoid),
    "silu": (silu, torch.nn.functional.silu),
    "logsigmoid": (logsigmoid, torch.nn.functional.logsigmoid),
    "softplus": (softplus, torch.nn.functional.softplus),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_the_same_bits_everywhere(name: str, dtype: torch.dtype) -> None:
    ours: Callable[[Tensor], Tensor] = PAIRS[name][0]
    x = (4 * torch.randn(700, generator=torch.Generator().manual_seed(0))).to(dtype)
    with torch.no_grad():
        whole = ours(x)
        for length in (1, 3, 8, 13, 24, 40, 127):
            for start in range(0, 700 - length, length):
                assert torch.equal(ours(x[start : start + length].clone()), whole[start : start + length])


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_extremes(name: str) -> None:
    ours, torchs = PAIRS[name]
    x = torch.tensor([-1e30, -200.0, -90.0, -1.0, 0.0, 1.0, 90.0, 1e30])
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            found = ours(x.to(dtype))
            assert found.dtype == dtype
            torch.testing.assert_close(found, torchs(x.to(dtype)))
    given = x.clone().requires_grad_()
    ours(given).sum().backward()
    assert given.grad is not None and given.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_squared_relu(dtype: torch.dtype) -> None:
    x = torch.tensor([-3.0, -0.0, 0.0, 1.5, -1e30, torch.inf, torch.nan], dtype=dtype, requires_grad=True)
    y = squared_relu(x)
    expected = torch.relu(x).square()
    assert torch.equal(y.nan_to_num(), expected.nan_to_num()) and y[-1].isnan()
    inside = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(squared_relu, inside)
