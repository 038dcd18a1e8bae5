"""planes: bit planes of counts against arithmetic on Python integers, and back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from spikelm.errors import KernelError, ShapeError
from spikelm.kernels.dispatch import OPS, use_backend
from spikelm.kernels.planes import collapse_planes, expand_planes

SHAPES = [(1,), (7,), (8,), (9,), (3, 64), (2, 3, 65), (4, 1000), (1, 31), (2, 2, 2, 17)]


@pytest.fixture(params=[name for name in OPS["planes"] if name != "triton"])
def any_form(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def make(*shape: int, largest: int = 127, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(torch.int8)


def bit(packed: Tensor, plane: int, row: int, channel: int) -> int:
    value = packed[plane].reshape(-1, packed.shape[-1])[row, channel // 8]
    return int(value) >> (channel % 8) & 1


@pytest.mark.parametrize("planes", [1, 2, 4, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planes_hold_the_bits_and_give_the_counts_back(
    any_form: str, shape: tuple[int, ...], planes: int, poisoned: None
) -> None:
    counts = make(*shape, largest=2**planes - 1)
    packed = expand_planes(counts, planes)
    width = shape[-1]
    assert packed.dtype == torch.uint8 and packed.shape == (planes + 1, *shape[:-1], (width + 7) // 8)
    rows = counts.reshape(-1, width).tolist()
    for row in range(0, len(rows), max(1, len(rows) // 3)):
        for channel in range(0, width, 1 if width < 100 else 37):
            n = rows[row][channel]
            assert bit(packed, 0, row, channel) == (n < 0)
            got = sum(bit(packed, 1 + b, row, channel) << b for b in range(planes))
            assert got == abs(n)
        for channel in range(width, 8 * packed.shape[-1]):
            assert not any(bit(packed, plane, row, channel) for plane in range(planes + 1))
    assert torch.equal(collapse_planes(packed, width), counts)


def test_every_count_with_every_number_of_planes(any_form: str) -> None:
    for planes in range(1, 8):
        counts = torch.arange(-(2**planes) + 1, 2**planes).to(torch.int8)
        assert torch.equal(collapse_planes(expand_planes(counts, planes), counts.numel()), counts)


def test_what_does_not_matter_is_ignored(any_form: str) -> None:
    """Bits beyond the last channel, and the sign of a zero."""
    counts = make(3, 13, largest=3)
    packed = expand_planes(counts, 2)
    packed[..., -1] |= 0b11100000
    zero_sign = torch.zeros_like(packed)
    zero_sign[0, 1] = 0xFF
    assert torch.equal(collapse_planes(packed, 13), counts)
    assert not collapse_planes(zero_sign, 13).any()


def test_any_memory_layout(any_form: str) -> None:
    counts = make(6, 40, largest=15)
    packed = expand_planes(counts, 4)
    assert torch.equal(expand_planes(counts.mT.contiguous().mT, 4), packed)
    assert torch.equal(expand_planes(counts.repeat_interleave(2, -1)[..., ::2], 4), packed)
    assert torch.equal(collapse_planes(packed.mT.contiguous().mT, 40), counts)
    assert torch.equal(collapse_planes(packed.flip(0).flip(0), 40), counts)


def test_nothing_to_do(any_form: str) -> None:
    for shape in ((0, 5), (2, 0, 4), (3, 0), (0,)):
        counts = make(*shape)
        packed = expand_planes(counts, 3)
        assert packed.shape == (4, *shape[:-1], (shape[-1] + 7) // 8)
        assert collapse_planes(packed, shape[-1]).shape == shape


def test_a_count_that_does_not_fit_is_refused(any_form: str) -> None:
    counts = make(4, 70, largest=7)
    counts[2, 69] = -8
    with pytest.raises(KernelError, match="magnitude 8; 3 planes hold up to 7"):
        expand_planes(counts, 3)
    counts[2, 69] = -128
    with pytest.raises(KernelError, match="magnitude 128; 7 planes hold up to 127"):
        expand_planes(counts, 7)


def test_wrong_inputs_are_refused() -> None:
    counts = make(2, 9)
    with pytest.raises(ShapeError, match=r"int8 counts \[\.\., D\], got torch.int64 \[2, 9\]"):
        expand_planes(counts.long(), 3)
    with pytest.raises(ShapeError, match="int8 counts"):
        expand_planes(counts[0, 0], 3)
    for planes in (0, 8):
        with pytest.raises(KernelError, match=f"got {planes} planes; expected from 1 to 7"):
            expand_planes(counts, planes)
    packed = expand_planes(counts, 7)
    for wrong, width in ((packed, 8), (packed[:1], 9), (packed.long(), 9), (packed[0, 0], 9), (packed, -1)):
        with pytest.raises(ShapeError, match=r"collapse_planes needs uint8 \[2 to 8, \.\., "):
            collapse_planes(wrong, width)
