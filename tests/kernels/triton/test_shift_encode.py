"""Fused norm, token shift and encode in Triton against the loop over tokens in float64.

The kernel's norm and mean round otherwise than torch's: features and thresholds agree to 1e-5, and one count
in a thousand may differ by one, where its ratio lies that close to a half.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spikelm.errors import KernelError
from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.shift_encode import shift_encode

pytest.importorskip("triton")

OPTIONS: dict[str, Any] = {"k": [1.0, 2.0, 4.0], "dead_zone": [0.0, 0.3, 0.0], "cap": [127, 3, 5]}


def make(batch: int, steps: int, width: int, dtype: torch.dtype, masks: bool, bias: bool) -> dict[str, Any]:
    draw = torch.rand(2, batch, steps)
    return {
        "x": (3 * torch.randn(batch, steps, width) + 1).to(dtype),
        "norm_weight": torch.rand(width) + 0.5,
        "norm_bias": torch.randn(width) if bias else None,
        "last": torch.randn(batch, width),
        "mixes": torch.rand(3, width),
        "reset": draw[0] < 0.3 if masks else None,
        "valid": draw[1] < 0.7 if masks else None,
    }


def run(inputs: dict[str, Any], kind: str, device: torch.device, wide: bool = False) -> list[Tensor]:
    moved: dict[str, Any] = {}
    for name, value in inputs.items():
        moved[name] = value if value is None else value.to(device)
        if wide and value is not None and value.is_floating_point():
            moved[name] = moved[name].double()
    return [t.cpu() for t in shift_encode(**moved, eps=1e-5, kind=kind, **OPTIONS)]


@pytest.mark.parametrize("masks", [False, True], ids=["plain", "masks"])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 37), (1, 3, 600), (2, 0, 8)], ids=str)
def test_equals_the_loop(
    shape: tuple[int, int, int],
    kind: str,
    masks: bool,
    device: torch.device,
    dtype: torch.dtype,
    poisoned: None,
) -> None:
    inputs = make(*shape, dtype, masks, kind == "layernorm")
    with use_backend("reference"):
        expected = run(inputs, kind, torch.device("cpu"), wide=True)
    with use_backend("triton"):
        got = run(inputs, kind, device)
    counts, thresholds, last, statistics = got
    assert counts.dtype == torch.int8 and statistics.dtype == torch.int64
    torch.testing.assert_close(last.double(), expected[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(thresholds.double(), expected[1], rtol=1e-5, atol=1e-7)
    if not counts.numel():
        return
    differ = counts != expected[0]
    assert (counts.long() - expected[0].long()).abs().max() <= 1 and differ.double().mean() < 1e-3
    size = counts.long().abs()
    here = torch.ones(shape[:2], dtype=torch.bool) if inputs["valid"] is None else inputs["valid"]
    assert torch.equal(statistics[..., 0], ((size == 0) & here[..., None]).sum(-1))
    assert torch.equal(statistics[..., 1], size.sum(-1))
    assert torch.equal(statistics[..., 3], size.amax(-1))
    assert (statistics[..., 2] - expected[3][..., 2]).abs().max() <= 1
    assert not counts[:, ~here].any() and (thresholds[:, ~here] == 1e-8).all()


def test_a_split_anywhere_changes_nothing(triton_form: torch.device) -> None:
    inputs = make(2, 6, 37, torch.float32, True, True)
    whole = run(inputs, "layernorm", triton_form)
    for cut in (1, 4):
        head = {**inputs, **{name: inputs[name][:, :cut] for name in ("x", "reset", "valid")}}
        first = run(head, "layernorm", triton_form)
        tail = {**inputs, **{name: inputs[name][:, cut:] for name in ("x", "reset", "valid")}}
        second = run({**tail, "last": first[2]}, "layernorm", triton_form)
        for i in (0, 1, 3):
            assert torch.equal(torch.cat([first[i], second[i]], 2), whole[i])
        assert torch.equal(second[2], whole[2])


def test_nan_at_an_invalid_token_reaches_nothing(triton_form: torch.device) -> None:
    inputs = make(1, 6, 19, torch.float32, True, False)
    inputs["valid"][:, 2] = False
    clean = run(inputs, "rmsnorm", triton_form)
    inputs["x"][:, 2] = torch.nan
    for a, b in zip(clean, run(inputs, "rmsnorm", triton_form), strict=True):
        assert torch.equal(a, b)


def test_any_memory_layout_and_determinism(triton_form: torch.device) -> None:
    inputs = make(3, 4, 10, torch.float32, True, True)
    first = run(inputs, "layernorm", triton_form)
    for name in ("x", "last", "mixes"):
        inputs[name] = inputs[name].mT.contiguous().mT
    for a, b in zip(first, run(inputs, "layernorm", triton_form), strict=True):
        assert torch.equal(a, b)


def test_the_operator_is_registered_well(device: torch.device) -> None:
    from spikelm.kernels.shift_encode.triton import shift_encode_triton

    x, weight, last, mixes = torch.randn(1, 2, 5), torch.rand(5), torch.randn(1, 5), torch.rand(2, 5)
    x, weight, last, mixes = (t.to(device) for t in (x, weight, last, mixes))
    options = [1.0, 2.0, 0.0, 0.1, 127.0, 3.0]
    torch.library.opcheck(
        shift_encode_triton, (x, weight, None, 1e-5, True, last, mixes, options, None, None)
    )


def test_what_it_cannot_take_is_refused(triton_form: torch.device) -> None:
    inputs = make(1, 1, 4, torch.float64, False, False)
    with pytest.raises(KernelError, match="takes float32, bfloat16 and float16, not torch.float64"):
        run(inputs, "rmsnorm", triton_form)
    with pytest.raises(KernelError, match="takes up to 8192 features, not 8200"):
        run(make(1, 1, 8200, torch.float32, False, False), "rmsnorm", triton_form)
