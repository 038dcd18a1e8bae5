"""event_linear: only the rows of channels that fired, in Triton and in the other forms."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from spikelm.errors import KernelError, ShapeError
from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.event_linear import event_linear, spmv

SHAPES = [(1, 1, 1), (1, 7, 5), (2, 300, 130), (3, 257, 31), (4, 520, 140)]


def make(
    N: int, D: int, outs: int, dtype: torch.dtype, device: torch.device, silent: float = 0.7
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(D)
    x = torch.randn(N, D, generator=generator) * (torch.rand(N, D, generator=generator) >= silent)
    wt = torch.randn(D, outs, generator=generator) / D**0.5
    return x.to(device, dtype), wt.to(device, dtype)


@pytest.mark.parametrize(("N", "D", "outs"), SHAPES)
def test_the_sum_over_what_fired(N: int, D: int, outs: int, dtype: torch.dtype, device: torch.device) -> None:
    """Float32 sums of exact products: errors of a few roundings; a bfloat16 result is rounded once more."""
    x, wt = make(N, D, outs, dtype, device)
    exact = (x.double() @ wt.double()).cpu()
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8
    for name in ("reference", "torch", "triton"):
        with use_backend(name):
            y = event_linear(x, wt)
        assert y.dtype == dtype and y.shape == (N, outs)
        torch.testing.assert_close(y.double().cpu(), exact, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("silent", [0.0, 0.9, 1.0])
def test_silent_rows_are_not_part_of_it(silent: float, dtype: torch.dtype, device: torch.device) -> None:
    """NaN in every silent row would show, 0 * NaN being NaN."""
    x, wt = make(2, 300, 40, dtype, device, silent)
    union = (x != 0).any(0)
    wt[~union] = float("nan")
    with use_backend("triton"):
        y = event_linear(x, wt)
    exact = x[:, union].double() @ wt[union].double()
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=2**-8)
    x[1, 3] = float("nan")
    with use_backend("triton"):
        y = event_linear(x, wt.nan_to_num(0.0))
    assert y[0].isfinite().all() and y[1].isnan().all()


FORBIDDEN = """
import ctypes, mmap
import torch
from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.event_linear import event_linear
from spikelm.kernels.int8_linear import int8_linear

libc = ctypes.CDLL(None, use_errno=True)
page, rows = mmap.PAGESIZE, 40
memory = mmap.mmap(-1, page * rows)
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
counts = torch.zeros(1, rows, dtype=torch.int8)
counts[0, [3, 4, 17, 39]] = torch.tensor([1, -2, 127, 5], dtype=torch.int8)
fired = counts[0] != 0
for dtype in (torch.int8, torch.float32):
    wt = torch.frombuffer(memory, dtype=dtype).view(rows, -1)
    wt.copy_(torch.randint(-127, 128, wt.shape))
    exact = counts[:, fired].double() @ wt[fired].double()
    for row in (~fired).nonzero()[:, 0].tolist():
        assert libc.mprotect(ctypes.c_void_p(base + row * page), page, 0) == 0
    with use_backend("triton"):
        if dtype == torch.int8:
            y = int8_linear(counts, wt.t(), torch.ones(wt.shape[1], 3), 16)
        else:
            y = event_linear(counts.to(dtype), wt)
    assert torch.equal(y.double(), exact)
    for row in range(rows):
        assert libc.mprotect(ctypes.c_void_p(base + row * page), page, 3) == 0
print("only the rows that fired", flush=True)
with use_backend("triton"):
    libc.mprotect(ctypes.c_void_p(base), page, 0)
    event_linear(torch.ones(1, rows), wt)  # reads a forbidden page
"""


def test_silent_rows_are_not_read(device: torch.device) -> None:
    """Rows of silent channels are pages that may not be touched: reading one kills the process."""
    if device.type != "cpu":
        pytest.skip("pages of a GPU's memory cannot be forbidden; the interpreter proves it")
    command = [sys.executable, "-c", FORBIDDEN]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=120, check=False)
    assert "only the rows that fired" in done.stdout, done.stderr
    assert done.returncode < 0, done.stderr


def test_same_bits_every_time_and_in_any_view(dtype: torch.dtype, triton_form: torch.device) -> None:
    x, wt = make(3, 520, 70, dtype, triton_form)
    y = event_linear(x, wt)
    assert torch.equal(event_linear(x, wt), y)
    assert torch.equal(event_linear(x.t().contiguous().t(), wt.t().contiguous().t()), y)
    assert torch.equal(event_linear(x[None], wt)[0], y) and torch.equal(spmv(x, wt), y)


def test_more_tokens_and_gradients_are_one_dense_product(triton_form: torch.device) -> None:
    x, wt = make(5, 64, 16, torch.float32, triton_form)
    assert torch.equal(event_linear(x, wt), x @ wt)
    leaf = x[:1].clone().requires_grad_()
    (got,) = torch.autograd.grad(event_linear(leaf, wt).sum(), leaf)
    torch.testing.assert_close(got, wt.sum(1)[None])


def test_what_it_refuses_and_nothing_to_do(triton_form: torch.device) -> None:
    x, wt = make(1, 8, 4, torch.float32, triton_form)
    with pytest.raises(ShapeError, match=r"x \[\.\., D\] and wt \[D, O\], got \[1, 7\] and \[8, 4\]"):
        event_linear(x[:, :7], wt)
    with pytest.raises(ShapeError, match="one floating dtype, got torch.bfloat16 and torch.float32"):
        event_linear(x.bfloat16(), wt)
    with pytest.raises(KernelError, match="has no torch.float64; use auto or torch"):
        event_linear(x.double(), wt.double())
    assert event_linear(x[:0], wt).shape == (0, 4)
    assert not event_linear(torch.zeros_like(x), wt).any()


def test_the_custom_op(device: torch.device) -> None:
    from spikelm.kernels.event_linear import triton

    torch.library.opcheck(triton.product, make(2, 64, 16, torch.float32, device))
