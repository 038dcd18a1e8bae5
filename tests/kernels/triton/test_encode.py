"""encode in Triton: counts, thresholds, statistics and gradients against the equations.

The mean is summed in another order than the reference's, so thresholds agree to a few roundings of float32,
and a count may differ by one where x / V lies that close to a half: such elements are found in float64 and
left out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spikelm.errors import KernelError
from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.encode import adaptive_encode, adaptive_encode_int8, decode_counts

pytest.importorskip("triton")

SHAPES = [(1, 1), (3, 5, 67), (70, 33), (2, 4096), (2, 4097), (1, 8192), (2, 9001), (0, 8), (2, 0)]
OPTIONS: list[dict[str, Any]] = [{"k": 2.0}, {"k": 3.0, "dead_zone": 0.4, "cap": 4}, {"k": 40.0}]
NEAR = 1e-5  # of a half, relative to the count; far more than the mean's last bits


def expected(x: Tensor, k: float, dead_zone: float = 0.0, cap: int = 127) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, thresholds and where counts are unambiguous, in float64."""
    x = x.double()
    mean = x.abs().mean(-1, keepdim=True)
    threshold = (mean / k).clamp(min=1e-8)
    ratio = x / threshold
    counts = torch.where(x.abs() < dead_zone * mean, 0.0, ratio.round())
    edge = ((ratio.abs() % 1) - 0.5).abs() < NEAR * ratio.abs().clamp(min=1)
    edge |= (x.abs() - dead_zone * mean).abs() < NEAR * mean
    return counts.clamp(-cap, cap), threshold, ~edge


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counts_thresholds_statistics_and_gradients(
    shape: tuple[int, ...],
    options: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    poisoned: None,
) -> None:
    x = torch.randn(shape).to(dtype)
    if x.numel() > 5:
        x.view(-1)[3] = 40.0
    grad = torch.randn(shape)
    with use_backend("triton"):
        leaf = x.to(device).requires_grad_()
        counts, threshold = adaptive_encode(leaf, **options)
        (got,) = torch.autograd.grad(counts, leaf, grad.to(device))
        whole, same, statistics = (t.cpu() for t in adaptive_encode_int8(leaf, **options))
    counts, threshold = counts.detach().cpu(), threshold.detach().cpu()
    assert counts.dtype == threshold.dtype == torch.float32 and got.dtype == dtype
    if not x.numel():
        assert counts.shape == got.shape == x.shape and statistics.shape == (*shape[:-1], 4)
        return
    true, true_threshold, clear = expected(x, **options)
    assert (~clear).double().mean() < 0.02
    torch.testing.assert_close(threshold.double(), true_threshold, rtol=1e-6, atol=0)
    assert torch.equal(counts.double() * clear, true * clear)

    # int8: the same bits, and statistics of exactly those counts
    assert torch.equal(whole.float(), counts) and torch.equal(same, threshold)
    size = whole.long().abs()
    cap = options.get("cap", 127)
    assert torch.equal(statistics[..., 0], (size == 0).sum(-1))
    assert torch.equal(statistics[..., 1], size.sum(-1))
    assert torch.equal(statistics[..., 3], size.amax(-1))
    beyond = ((x / threshold).round().abs() > cap) & (size > 0)
    assert torch.equal(statistics[..., 2], beyond.sum(-1))

    # straight through: 1 / V where the cap does not bite; bf16 rounds it to 8 bits
    wanted = torch.where(beyond, 0.0, grad.double() / threshold.double())
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.cpu().double(), wanted, rtol=rounding, atol=0)


def test_ties_go_to_even_and_large_counts_stay_exact(triton_form: torch.device) -> None:
    """With a given mean of one and k = 1 the threshold is one: counts are round(x)."""
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 2.4999998, 8388607.5, 4194304.5, 16777216.0, 0.49999997]])
    one = torch.ones(1, 1, device=triton_form)
    counts, threshold = adaptive_encode(x.to(triton_form), k=1.0, cap=2**24, mean=one)
    assert torch.equal(counts.cpu(), x.round()) and threshold.item() == 1.0


def test_the_division_is_rounded_as_torch_rounds_it(triton_form: torch.device) -> None:
    """At a given mean nothing is ambiguous: counts and clipping equal the torch form's, bit for bit."""
    x, mean = 3 * torch.randn(40, 257), torch.rand(40, 1) + 0.1
    for options in OPTIONS:
        got = adaptive_encode(x.to(triton_form), mean=mean.to(triton_form), **options)
        whole = adaptive_encode_int8(x.to(triton_form), mean=mean.to(triton_form), **options)
        with use_backend("torch"):
            plain = adaptive_encode(x, mean=mean, **options)
            small = adaptive_encode_int8(x, mean=mean, **options)
        # torch divides by k in its own way on a GPU: compare where the thresholds agree
        rows = (got[1].cpu() == plain[1])[:, 0]
        assert rows.sum() > 10
        assert torch.equal(got[0].cpu()[rows], plain[0][rows])
        for a, b in zip(whole, small, strict=True):
            assert torch.equal(a.cpu()[rows], b[rows])


def test_a_row_gives_the_same_bits_in_any_batch(triton_form: torch.device) -> None:
    x = torch.randn(70, 96, device=triton_form)
    whole = adaptive_encode_int8(x, k=2.0)
    for rows in (slice(0, 1), slice(13, 14), slice(20, 53)):
        for a, b in zip(adaptive_encode_int8(x[rows], k=2.0), whole, strict=True):
            assert torch.equal(a, b[rows])


def test_nan_infinity_and_silence(triton_form: torch.device) -> None:
    x = torch.tensor([[1.0, torch.nan, 2.0], [1.0, torch.inf, 2.0], [0.0, 0.0, 0.0]], device=triton_form)
    counts, threshold = (t.cpu() for t in adaptive_encode(x, k=2.0))
    assert counts[0].isnan().all() and threshold[0].isnan()
    assert counts[1, 1].isnan() and not counts[1, ::2].any() and threshold[1].isinf()
    assert not counts[2].any() and threshold[2] == torch.tensor(1e-8)
    whole, _, statistics = adaptive_encode_int8(x, k=2.0)
    assert not whole.any() and statistics.tolist() == [[3, 0, 0, 0]] * 3


def test_any_memory_layout_and_determinism(triton_form: torch.device) -> None:
    x = torch.randn(6, 40, device=triton_form).T[::2, ::3].requires_grad_()
    for a, b in zip(adaptive_encode(x, k=2.0), adaptive_encode(x.contiguous(), k=2.0), strict=True):
        assert torch.equal(a, b)
    grad = torch.randn(2, 20, device=triton_form).T
    for _ in range(2):
        (first,) = torch.autograd.grad(adaptive_encode(x, k=2.0)[0], x, grad)
        (again,) = torch.autograd.grad(adaptive_encode(x.contiguous(), k=2.0)[0], x, grad.contiguous())
        assert torch.equal(first, again)


def test_decoding_gives_count_times_threshold(triton_form: torch.device) -> None:
    counts = torch.randint(-5, 6, (4, 7), device=triton_form)
    threshold = torch.rand(4, 1, device=triton_form)
    for dtype in (torch.int8, torch.float32):
        assert torch.equal(decode_counts(counts.to(dtype), threshold), counts * threshold)
    leaf = counts.float().requires_grad_()
    decode_counts(leaf, threshold).sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, threshold.expand(4, 7))


def test_operators_are_registered_well(device: torch.device) -> None:
    from spikelm.kernels.encode import triton

    x = torch.randn(2, 5, device=device, requires_grad=True)
    torch.library.opcheck(triton.encode_triton_forward, (x, 2.0, 0.1, 2, None))
    torch.library.opcheck(triton.encode_triton_int8, (x.detach(), 2.0, 0.1, 2, None))


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    from spikelm.kernels.encode import triton

    x = torch.randn(3, 5, device=device, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        counts, threshold = triton.adaptive_encode(x, 2.0, 0.0, 127, None)
        return counts * threshold

    got, plain = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)
    assert torch.equal(got, plain)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, plain)))


def test_float64_is_refused(triton_form: torch.device) -> None:
    x = torch.randn(2, 3, dtype=torch.float64, device=triton_form)
    for encode in (adaptive_encode, adaptive_encode_int8):
        with pytest.raises(KernelError, match="float32, bfloat16 and float16, not torch.float64; use auto"):
            encode(x, k=2.0)
