"""adaptive_encode_int8 and decode_counts: the counts of adaptive_encode, exact statistics, the way back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spikelm.errors import KernelError, ShapeError
from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.encode import adaptive_encode, adaptive_encode_int8, decode_counts

SHAPES = [(1, 1), (40, 1), (2, 3), (7, 17), (3, 5, 64), (1, 1000), (33, 1000), (2, 2, 3, 33), (3, 2500), (5,)]
OPTIONS: list[dict[str, Any]] = [
    {"k": 3.0},
    {"k": 3.0, "dead_zone": 1.4},
    {"k": 3.1, "dead_zone": 0.9, "cap": 4},
    {"k": 3.1, "cap": 1},
    {"k": 40.3},
]


def make(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * torch.randn(*shape[:-1], 1, generator=generator).exp()


def statistics_of(x: Tensor, counts: Tensor, threshold: Tensor, options: dict[str, Any]) -> Tensor:
    """The four figures of each row, counted in another way than any form does."""
    rows = []
    mean = x.abs().mean(-1, keepdim=True)
    loud = x.abs() >= options.get("dead_zone", 0.0) * mean
    cut = (torch.round(x / threshold).abs() > options.get("cap", 127)) & loud
    for row, clipped in zip(counts.flatten(0, -2).tolist(), cut.flatten(0, -2).sum(-1).tolist(), strict=True):
        rows.append([row.count(0), sum(map(abs, row)), clipped, max(map(abs, row))])
    return torch.tensor(rows).view(*counts.shape[:-1], 4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 1], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_counts_of_adaptive_encode_and_their_statistics(
    form: str, shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype, poisoned: None
) -> None:
    x = make(*shape).to(dtype)
    expected, expected_threshold = adaptive_encode(x, **options)
    counts, threshold, statistics = adaptive_encode_int8(x, **options)
    assert counts.dtype == torch.int8 and statistics.dtype == torch.int64
    assert torch.equal(counts.to(expected.dtype), expected)
    assert torch.equal(threshold, expected_threshold)
    wide = x.to(threshold.dtype)
    assert torch.equal(statistics, statistics_of(wide, counts, threshold, options))


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0, 4), (3, 0), (0,)], ids=str)
def test_rows_without_a_batch_and_nothing_to_do(form: str, shape: tuple[int, ...]) -> None:
    x = make(*shape)
    counts, threshold, statistics = adaptive_encode_int8(x, k=3.0)
    assert (counts.shape, threshold.shape, statistics.shape) == (shape, (*shape[:-1], 1), (*shape[:-1], 4))
    assert torch.equal(counts.float(), adaptive_encode(x, k=3.0)[0])
    if shape[-1] == 0:
        assert not statistics.any()


def test_a_row_that_is_given_its_mean(form: str) -> None:
    """Halves of rows, encoded with the mean of the whole ones, give the whole rows' counts."""
    x = make(6, 40)
    whole, threshold, statistics = adaptive_encode_int8(x, k=3.0, dead_zone=1.0, cap=5)
    mean = x.abs().mean(-1, keepdim=True)
    parts = [adaptive_encode_int8(half, k=3.0, dead_zone=1.0, cap=5, mean=mean) for half in x.split(13, -1)]
    assert torch.equal(torch.cat([part[0] for part in parts], -1), whole)
    for part in parts:
        torch.testing.assert_close(part[1], threshold, rtol=1e-6, atol=0)
    summed = torch.stack([part[2] for part in parts])
    assert torch.equal(summed[..., :3].sum(0), statistics[..., :3])
    assert torch.equal(summed[..., 3].amax(0), statistics[..., 3])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_show_in_the_threshold(form: str, bad: float) -> None:
    x = make(4, 37)
    alone = adaptive_encode_int8(x, k=3.0, dead_zone=1.0, cap=4)
    x[1, 36] = bad
    got = adaptive_encode_int8(x, k=3.0, dead_zone=1.0, cap=4)
    for value, before in zip(got, alone, strict=True):
        assert torch.equal(value[[0, 2, 3]], before[[0, 2, 3]])
    assert not got[0][1].any() and not got[1][1].isfinite()
    assert decode_counts(got[0], got[1])[1].isnan().all()
    assert got[2][1].tolist() == [37, 0, 0, 0]


def test_no_gradient(form: str) -> None:
    x = make(3, 8).requires_grad_()
    assert not any(value.requires_grad for value in adaptive_encode_int8(x, k=3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoding(form: str, dtype: torch.dtype) -> None:
    x = make(3, 7, 33).to(dtype)
    counts, threshold, _ = adaptive_encode_int8(x, k=3.0)
    floating, _ = adaptive_encode(x, k=3.0)
    y = decode_counts(counts, threshold)
    assert y.dtype == dtype and torch.equal(y, counts * threshold)
    assert torch.equal(decode_counts(floating, threshold), y)
    assert (y - x).abs().le(threshold / 2 * 1.001).all()  # within half a count: nothing was clipped
    assert torch.equal(decode_counts(counts.mT.contiguous().mT, threshold), y)
    assert decode_counts(counts[:0], threshold[:0]).shape == (0, 7, 33)


def test_decoding_is_the_straight_through_partner(form: str) -> None:
    x = make(20, 65).double().requires_grad_()
    counts, threshold = adaptive_encode(x, k=3.0, cap=6)
    clipped = torch.round(x.detach() / threshold).abs() > 6
    grad = make(20, 65, seed=1).double()
    (grad_x,) = torch.autograd.grad(decode_counts(counts, threshold), x, grad)
    torch.testing.assert_close(grad_x, torch.where(clipped, 0.0, grad), rtol=1e-12, atol=1e-12)
    assert clipped.any()


def test_low_precision_thresholds_are_refused() -> None:
    counts, threshold, _ = adaptive_encode_int8(make(3, 4), k=3.0)
    with pytest.raises(
        ShapeError, match=r"threshold \[3, 1\] of float32 or float64 on cpu, got torch.bfloat16"
    ):
        decode_counts(counts, threshold.bfloat16())


def test_wrong_inputs_are_refused() -> None:
    x = make(3, 4)
    with pytest.raises(
        ShapeError, match=r"adaptive_encode_int8 needs floating x \[\.\., D\], got torch.int64"
    ):
        adaptive_encode_int8(torch.ones(3, dtype=torch.int64), k=3.0)
    with pytest.raises(
        ShapeError, match=r"mean must be floating \[3, 1\] on cpu .*, got torch.float32 \[3\]"
    ):
        adaptive_encode_int8(x, k=3.0, mean=torch.ones(3))
    with pytest.raises(ShapeError, match="on meta"):
        adaptive_encode_int8(x, k=3.0, mean=torch.ones(3, 1, device="meta"))
    for cap in (0, 128):
        with pytest.raises(KernelError, match=f"got cap {cap}; int8 counts need one from 1 to 127"):
            adaptive_encode_int8(x, k=3.0, cap=cap)
    counts, threshold, _ = adaptive_encode_int8(x, k=3.0)
    with pytest.raises(ShapeError, match="int8 or floating counts"):
        decode_counts(counts.long(), threshold)
    with pytest.raises(ShapeError, match=r"threshold \[3, 1\]"):
        decode_counts(counts, threshold[:2])


def test_forms_agree_where_the_mean_is_exact() -> None:
    """Powers of two and few of them: the mean has no rounding, so every form gives the same bits."""
    x = torch.tensor([[0.5, -0.5, 1.5, -1.5, 2.5, 3.5, -2.5, 4.0], [1.0, 0, 0, 0, -1.0, 0, 0, 2.0]])
    with use_backend("reference"):
        expected = adaptive_encode_int8(x, k=2.0, dead_zone=0.5, cap=3)
    for name in ("torch", "auto"):
        with use_backend(name):
            for a, b in zip(adaptive_encode_int8(x, k=2.0, dead_zone=0.5, cap=3), expected, strict=True):
                assert torch.equal(a, b)
