"""Whatever a call of gla or gated_delta asks for, on a GPU it launches configurations that the table lists.

The calls are made on paper: tensors on the meta device, launches noted instead of started.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from spikelm.kernels import ahead
from spikelm.kernels.gated_delta import triton as delta
from spikelm.kernels.gated_delta.triton_decode import launch_decode as decode_delta
from spikelm.kernels.gla import triton as gla
from spikelm.kernels.gla.triton_decode import launch_decode as decode_gla
from spikelm.kernels.triton_launch import Recorder, both_masks, compact, copied, whole_tiles, widened

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPS, STEPS = 2, 1030  # two segments of the longest chunks
SIZES = [(1, 1, 1), (33, 80, 1), (64, 64, 7), (100, 128, 1), (128, 128, 4), (200, 300, 2), (256, 256, 1)]
"""K, V, query heads of a key head."""


def inputs(dtype: torch.dtype, key_dim: int, value_dim: int, heads: int) -> dict[str, Tensor]:
    tokens = torch.empty(1, STEPS, GROUPS, device="meta")
    return {
        "q": tokens.new_empty(1, STEPS, GROUPS * heads, key_dim, dtype=dtype),
        "k": tokens.new_empty(1, STEPS, GROUPS, key_dim, dtype=dtype),
        "v": tokens.new_empty(1, STEPS, GROUPS, value_dim, dtype=dtype),
        "state": tokens.new_empty(1, GROUPS, key_dim, value_dim),
        "heads": tokens.to(dtype),
        "mask": tokens[..., 0].bool(),
    }


def launched(
    module: Any, op: str, target: str, arguments: tuple[Any, ...], patch: pytest.MonkeyPatch
) -> set[str]:
    """Names of what a call launches, forward and backward, on a large and a small device."""
    found: set[str] = set()

    def forward(*inner: Any) -> tuple[Tensor, Tensor]:
        for processors in (1, 400):
            paper = Recorder(op, target, processors)
            o, last = module.launch_forward(paper, *inner)
            module.launch_backward(paper, o, last, *inner)
            found.update(paper.found)
        return o, last

    patch.setattr(module, f"{op}_forward", forward)
    o, last = getattr(module, f"{op}_in_tiles")(*arguments)
    q, v, state = arguments[0], arguments[2], arguments[-4]
    assert o.shape == (*q.shape[:3], v.shape[3]) and o.dtype == v.dtype
    assert last.shape == state.shape and last.dtype == torch.float32
    return found


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_every_call_of_gla_is_listed(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {x.name for x in ahead.compilations("spikelm.kernels.gla.triton_compilations", target)}
    seen: set[str] = set()
    for dtype, sizes, gate, masks in itertools.product(
        DTYPES, SIZES, ("none", "head", "channel"), ((0, 0), (1, 0), (0, 1), (1, 1))
    ):
        x = inputs(dtype, *sizes)
        g = {"none": None, "head": x["heads"][..., None], "channel": x["k"]}[gate]
        reset, valid = (x["mask"] if there else None for there in masks)
        arguments = (x["q"], x["k"], x["v"], g, x["state"], 1.0, reset, valid)
        found = launched(gla, "gla", target, arguments, monkeypatch)
        assert found <= names, (dtype, sizes, gate, masks, found - names)
        seen |= found
    assert {name for name in names if "decode" not in name} == seen, "listed, and never launched"


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_every_call_of_gated_delta_is_listed(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {x.name for x in ahead.compilations("spikelm.kernels.gated_delta.triton_compilations", target)}
    seen: set[str] = set()
    for dtype, sizes, masks in itertools.product(DTYPES, SIZES, ((0, 0), (1, 0), (0, 1), (1, 1))):
        x = inputs(dtype, *sizes)
        reset, valid = (x["mask"] if there else None for there in masks)
        arguments = (x["q"], x["k"], x["v"], x["heads"], x["heads"], x["state"], 1.0, reset, valid)
        found = launched(delta, "gated_delta", target, arguments, monkeypatch)
        assert found <= names, (dtype, sizes, masks, found - names)
        seen |= found
    assert {name for name in names if "decode" not in name} == seen, "listed, and never launched"


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_decode_steps_are_listed(target: str) -> None:
    """At the widths of models; the others hold as many numbers of state in as many registers."""
    both = ("gla", "gated_delta")
    names = {
        op: {x.name for x in ahead.compilations(f"spikelm.kernels.{op}.triton_compilations", target)}
        for op in both
    }
    found: dict[str, set[str]] = {}
    for op in both:
        paper = Recorder(op, target)
        for dtype in DTYPES:
            k = torch.empty(1, GROUPS, 128, dtype=dtype, device="meta")
            q, slots = torch.cat([k, k], 1), torch.empty(1, dtype=torch.int64, device="meta")
            pool = k.new_empty(3, GROUPS, 128, 128, dtype=torch.float32)
            gates = {None: None, 1: k[..., :1], 128: k}
            if op == "gla":
                for g in gates.values():
                    assert decode_gla(paper, q, k, k, g, pool, slots, 1.0).shape == q.shape
            else:
                decode_delta(paper, q, k, k, k[..., 0], k[..., 0], pool, slots, 1.0)
        found[op] = set(paper.found)
    assert [len(found[op]) for op in both] == [9, 3]
    for op in both:
        assert found[op] <= names[op], op


def test_inputs_come_in_the_listed_form() -> None:
    assert [whole_tiles(key, value) for key, value in ((1, 1), (64, 65), (65, 128), (256, 300))] == [
        (64, 64),
        (64, 128),
        (128, 128),
        (256, 320),
    ]
    x = torch.ones(2, 3)
    assert torch.equal(widened(x, 4, 5).nonzero(), x.nonzero()) and widened(x, 4, 5).shape == (4, 5)
    assert widened(x, 3) is x
    assert copied(x, 1, 1) is x
    assert torch.equal(copied(torch.tensor([[1, 2]]), 1, 2), torch.tensor([[1, 1, 2, 2]]))
    mask = torch.tensor([[True, False, True]])
    reset, valid = both_masks(mask, None, None)
    assert reset.shape == valid.shape == mask.shape and not reset.any() and valid.all()
    assert both_masks(mask, mask, None)[0] is mask and both_masks(mask, None, mask)[1] is mask


def test_pointers_are_multiples_of_16_bytes() -> None:
    """Triton compiles another kernel for a pointer that is not."""
    x = torch.arange(40.0)
    assert compact(x) is x
    for part in (x[1:], x[4:], x.view(2, 20).t()):
        assert torch.equal(compact(part), part) and compact(part).is_contiguous()
        assert compact(part).data_ptr() % 16 == 0
    assert compact(x[4:]).data_ptr() == x[4:].data_ptr()
