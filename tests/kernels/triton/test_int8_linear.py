"""int8_linear in Triton: bits of the reference, both layouts, threshold and bias, few tokens or many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spikelm.errors import KernelError, ShapeError
from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.int8_linear import in_out, int8_linear

CASES = [  # N, D, outs, group
    (1, 1, 1, None),
    (3, 7, 5, 3),
    (1, 64, 33, 64),
    (2, 130, 40, 128),
    (4, 300, 17, 128),
    (5, 256, 64, 128),
    (17, 300, 40, 128),
    (66, 96, 72, 48),
    (130, 128, 136, 64),
    (3, 1041, 9, None),
    (20, 600, 24, None),
]


def make(
    N: int,
    D: int,
    outs: int,
    group: int | None,
    device: torch.device,
    silent: float = 0.6,
    largest: int = 127,
) -> tuple[Tensor, ...]:
    """Counts with zeros, weights over the whole range, scales of several magnitudes, thresholds and bias."""
    generator = torch.Generator().manual_seed(D)
    counts = torch.randint(-largest, largest + 1, (N, D), generator=generator)
    counts = (counts * (torch.rand(N, D, generator=generator) >= silent)).to(torch.int8)
    weight = torch.randint(-127, 128, (outs, D), generator=generator, dtype=torch.int8)
    groups = 1 if group is None else -(-D // group)
    scales = torch.randn(outs, groups, generator=generator).exp() * 1e-2
    threshold = torch.randn(N, 1, generator=generator).exp()
    bias = torch.randn(outs, generator=generator)
    return tuple(x.to(device) for x in (counts, weight, scales, threshold, bias))


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


def by_reference(
    counts: Tensor, weight: Tensor, scales: Tensor, group: int | None, threshold: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    with use_backend("reference"):
        plain = int8_linear(counts.cpu(), weight.cpu(), scales.cpu(), group)
    return plain, plain * threshold.cpu() + bias.cpu()


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize(("N", "D", "outs", "group"), CASES)
def test_bits_of_the_reference(
    N: int, D: int, outs: int, group: int | None, layout: str, triton_form: torch.device
) -> None:
    counts, weight, scales, threshold, bias = make(N, D, outs, group, triton_form)
    plain, whole = by_reference(counts, weight, scales, group, threshold, bias)
    stored = in_out(weight) if layout == "in_out" else weight
    assert torch.equal(stored, weight)
    assert same(int8_linear(counts, stored, scales, group).cpu(), plain)
    assert same(int8_linear(counts, stored, scales, group, threshold=threshold, bias=bias).cpu(), whole)
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.float64) if N < 6 else ():
        got = int8_linear(counts.to(dtype), stored, scales, group, threshold=threshold, bias=bias)
        assert same(got.cpu(), whole)


def test_other_forms_have_threshold_and_bias_too(device: torch.device) -> None:
    counts, weight, scales, threshold, bias = make(3, 300, 20, 128, device)
    _, whole = by_reference(counts, weight, scales, 128, threshold, bias)
    for name in ("reference", "torch", "triton"):
        with use_backend(name):
            got = int8_linear(counts, weight, scales, 128, threshold=threshold, bias=bias)
            low = int8_linear(counts, weight, scales, 128, threshold=threshold.double(), bias=bias.bfloat16())
        assert same(got.cpu(), whole)
        with use_backend("reference"):
            y = int8_linear(counts, weight, scales, 128)
        assert same(low, (y * threshold.double()).float() + bias.bfloat16().float())


@pytest.mark.parametrize("silent", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("largest", [1, 127])
def test_every_share_of_silent_channels(silent: float, largest: int, triton_form: torch.device) -> None:
    """Binary spikes (here with signs) and graded counts, none fired and all fired."""
    for N in (1, 2, 3, 4):
        counts, weight, scales, threshold, bias = make(N, 520, 70, 128, triton_form, silent, largest)
        _, whole = by_reference(counts, weight, scales, 128, threshold, bias)
        assert same(
            int8_linear(counts, in_out(weight), scales, 128, threshold=threshold, bias=bias).cpu(), whole
        )


def test_the_largest_sums(triton_form: torch.device) -> None:
    """127 * 127 * 4096 needs 26 bits: float32 would not hold it, int32 does."""
    counts = torch.full((2, 4096), 127, dtype=torch.int8, device=triton_form)
    weight = torch.full((16, 4096), 127, dtype=torch.int8, device=triton_form)
    weight[1, 0] = 126
    scales = torch.ones(16, 1, device=triton_form)
    expected = torch.full((2, 16), float(127 * 127 * 4096))
    expected[:, 1] = float(127 * 127 * 4096 - 127)
    for stored in (weight, in_out(weight)):
        assert same(int8_linear(counts, stored, scales).cpu(), expected)


def test_a_row_alone_in_a_batch_and_in_the_other_layout(triton_form: torch.device) -> None:
    counts, weight, scales, threshold, bias = make(40, 300, 50, 128, triton_form)
    whole = int8_linear(counts, weight, scales, 128, threshold=threshold, bias=bias)
    for rows in (slice(0, 1), slice(39, 40), slice(7, 11), slice(3, 20)):
        for stored in (weight, in_out(weight)):
            part = int8_linear(counts[rows], stored, scales, 128, threshold=threshold[rows], bias=bias)
            assert same(part, whole[rows])
    scattered = counts.t().contiguous().t()
    assert same(int8_linear(scattered, weight, scales, 128, threshold=threshold, bias=bias), whole)
    view = counts.view(4, 10, 300)
    assert same(
        int8_linear(view, weight, scales, 128, bias=bias),
        int8_linear(counts, weight, scales, 128, bias=bias).view(4, 10, 50),
    )


def test_memory_that_was_never_written_is_never_read(poisoned: None, triton_form: torch.device) -> None:
    for N in (3, 18):
        counts, weight, scales, threshold, bias = make(N, 130, 20, 48, triton_form)
        _, whole = by_reference(counts, weight, scales, 48, threshold, bias)
        for stored in (weight, in_out(weight)):
            got = int8_linear(counts.float(), stored, scales, 48, threshold=threshold, bias=bias)
            assert same(got.cpu(), whole)


def test_counts_beyond_127_saturate_and_nan_is_not_hidden(device: torch.device) -> None:
    """As on CUDA devices: what a CPU refuses is cut off here (the op is called below that check)."""
    from spikelm.kernels.int8_linear import triton

    for N in (2, 20):
        counts, weight, scales, *_ = make(N, 300, 20, 128, device)
        large = counts.float()
        large[0, :4] = torch.tensor([1000.0, -1000.0, float("inf"), 127.0], device=device)
        cut = large.clamp(-127, 127)
        large[1, 5] = float("nan")
        for stored in (weight, in_out(weight)):
            y = triton.product(large, stored, scales, 128, None, None)
            expected = triton.product(cut.to(torch.int8), stored, scales, 128, None, None)
            assert y[1].isnan().all() and same(y[0], expected[0]) and same(y[2:], expected[2:])


def test_gradient_is_that_of_the_dequantised_product(triton_form: torch.device) -> None:
    counts, weight, scales, threshold, bias = make(6, 300, 20, 128, triton_form)
    leaf, factor = counts.float().requires_grad_(), threshold.clone().requires_grad_()
    y = int8_linear(leaf, weight, scales, 128, threshold=factor, bias=bias)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(triton_form)
    got = torch.autograd.grad(y, (leaf, factor), gradient)
    with use_backend("torch"):
        y = int8_linear(leaf, weight, scales, 128, threshold=factor, bias=bias)
    for a, b in zip(got, torch.autograd.grad(y, (leaf, factor), gradient), strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_to_do(triton_form: torch.device) -> None:
    counts, weight, scales, *_ = make(2, 8, 4, None, triton_form)
    assert int8_linear(counts[:0], weight, scales).shape == (0, 4)


def test_what_it_refuses(triton_form: torch.device) -> None:
    counts, weight, scales, threshold, bias = make(2, 8, 4, None, triton_form)
    with pytest.raises(KernelError, match=r"no torch.float64 scales; use auto or torch"):
        int8_linear(counts, weight, scales.double())
    with pytest.raises(ShapeError, match=r"threshold is \[2\]; expected \[2, 1\]"):
        int8_linear(counts, weight, scales, threshold=threshold[:, 0])
    with pytest.raises(ShapeError, match=r"bias is \[3\]; expected \[4\]"):
        int8_linear(counts, weight, scales, bias=bias[:3])


def test_the_custom_op(device: torch.device) -> None:
    from spikelm.kernels.int8_linear import triton

    counts, weight, scales, threshold, bias = make(3, 64, 16, 32, device)
    for arguments in ((threshold[:, 0], bias), (None, None)):
        torch.library.opcheck(triton.product, (counts, weight, scales, 32, *arguments))
