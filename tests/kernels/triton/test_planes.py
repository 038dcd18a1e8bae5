"""Bit planes in Triton: the reference's bytes, and the counts back. Integers, so everything is exact."""

from __future__ import annotations

import pytest
import torch

from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.planes import collapse_planes, expand_planes

pytest.importorskip("triton")


@pytest.mark.parametrize("planes", [1, 4, 7])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 13), (2, 64), (300, 17), (0, 9), (4, 0)], ids=str)
def test_equals_the_reference(
    shape: tuple[int, ...], planes: int, device: torch.device, poisoned: None
) -> None:
    most = 2**planes - 1
    counts = torch.randint(-most, most + 1, shape, dtype=torch.int8)
    with use_backend("torch"):
        expected = expand_planes(counts, planes)
    with use_backend("triton"):
        packed = expand_planes(counts.to(device), planes)
        back = collapse_planes(packed, shape[-1])
    assert torch.equal(packed.cpu(), expected)
    assert torch.equal(back.cpu(), counts)


def test_what_does_not_matter_is_ignored(triton_form: torch.device) -> None:
    counts = torch.randint(-3, 4, (2, 13), dtype=torch.int8, device=triton_form)
    packed = expand_planes(counts, 2)
    packed[..., -1] |= 0b11100000  # channels 13 to 15
    assert torch.equal(collapse_planes(packed, 13), counts)
    packed[1:] = 0  # no magnitude: the sign says nothing
    assert not collapse_planes(packed, 13).any()


def test_any_memory_layout(triton_form: torch.device) -> None:
    counts = torch.randint(-15, 16, (6, 40), dtype=torch.int8, device=triton_form)
    packed = expand_planes(counts, 4)
    assert torch.equal(expand_planes(counts.mT.contiguous().mT, 4), packed)
    assert torch.equal(collapse_planes(packed.mT.contiguous().mT, 40), counts)


def test_operators_are_registered_well(device: torch.device) -> None:
    from spikelm.kernels.planes import triton

    counts = torch.randint(-7, 8, (2, 13), dtype=torch.int8, device=device)
    torch.library.opcheck(triton.expand_planes, (counts, 3))
    torch.library.opcheck(triton.collapse_planes, (triton.expand_planes(counts, 3), 13))
