"""lif in Triton: spikes and membranes bit for bit, every gradient against the fp64 loop, decode in a pool.

Interpreted in float32 without a GPU. Products and sums are not contracted, so float32 membranes equal those
of the reference in the same dtype, bit for bit. Gradients are held against the fp64 loop, in channels whose
membranes never come within 1e-5 of the threshold: beyond such a step the two may spike differently.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from spikelm.errors import KernelError, ShapeError
from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.lif import lif, lif_decode

pytest.importorskip("triton")

SHAPES = [(1, 1, 1), (2, 2, 17), (1, 16, 33), (1, 31, 70), (2, 67, 5), (1, 130, 3)]
VARIANTS: list[dict[str, Any]] = [
    {"soft_reset": soft, "decay_input": decay, "surrogate": surrogate, "detach_reset": detach}
    for (soft, decay), (surrogate, detach) in zip(
        itertools.product((False, True), (True, False)),
        (("sigmoid", True), ("triangle", False), ("straight_through", True), ("atan", False)),
        strict=True,
    )
] + [
    {"v_reset": -0.25, "threshold": 0.5, "alpha": 4.0},
    {"v_reset": 0.25, "threshold": 0.75, "soft_reset": True, "decay_input": False, "alpha": 0.5},
]
AMBIGUOUS = 1e-5
NAMES = ("grad x", "grad v0", "grad rate")


class Case(NamedTuple):
    """Inputs and the gradients that arrive at spikes and last membrane, on the CPU, in fp32."""

    x: Tensor
    v0: Tensor
    rate: Tensor
    grad_s: Tensor
    grad_v: Tensor
    masks: dict[str, Tensor]


def make_case(shape: tuple[int, int, int], masks: bool, dtype: torch.dtype) -> Case:
    batch, steps, channels = shape
    draw = torch.rand(2, batch, steps)
    return Case(
        x=(2 * torch.randn(shape)).to(dtype).float(),
        v0=0.5 * torch.randn(batch, channels),
        rate=torch.rand(channels),
        grad_s=torch.randn(shape).to(dtype).float(),
        grad_v=torch.randn(batch, channels),
        masks={"reset": draw[0] < 0.15, "valid": draw[1] < 0.75} if masks else {},
    )


def run(
    case: Case, variant: dict[str, Any], device: torch.device, dtype: torch.dtype, memory: torch.dtype
) -> list[Tensor]:
    x = case.x.to(device, dtype).requires_grad_()
    v0, rate = (t.to(device, memory).requires_grad_() for t in (case.v0, case.rate))
    masks = {name: mask.to(device) for name, mask in case.masks.items()}
    s, v = lif(x, v0, rate, **masks, **variant)
    grads = torch.autograd.grad(
        [s, v], [x, v0, rate], [case.grad_s.to(device, dtype), case.grad_v.to(device, memory)]
    )
    return [t.detach().cpu() for t in (s, v, *grads)]


def clear_channels(case: Case, variant: dict[str, Any]) -> Tensor:
    """bool [B, C]: membranes that never come within 1e-5 of the threshold."""
    soft, decay = variant.get("soft_reset", False), variant.get("decay_input", True)
    threshold, rest = variant.get("threshold", 1.0), variant.get("v_reset", 0.0)
    v, rate = case.v0.double(), case.rate.double()
    clear = torch.ones_like(v, dtype=torch.bool)
    for t in range(case.x.shape[1]):
        if case.masks:
            v = torch.where(case.masks["reset"][:, t, None], 0.0 if soft else rest, v)
        x, leak = case.x[:, t].double(), v - rest
        h = v + (x - leak) * rate if decay else v - leak * rate + x
        here = case.masks["valid"][:, t, None] if case.masks else torch.ones(1, 1, dtype=torch.bool)
        clear &= ~(((h - threshold).abs() < AMBIGUOUS) & here)
        v = torch.where(here, torch.where(h >= threshold, h - threshold if soft else rest, h), v)
    return clear


def check(case: Case, variant: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    with use_backend("reference"):
        same = run(case, variant, torch.device("cpu"), torch.float32, torch.float32)
        exact = run(case, variant, torch.device("cpu"), torch.float64, torch.float64)
    with use_backend("triton"):
        got = run(case, variant, device, dtype, torch.float32)
    assert got[0].dtype == got[2].dtype == dtype and got[1].dtype == torch.float32
    assert torch.equal(got[0].float(), same[0]), "spikes"
    assert torch.equal(got[1], same[1]), "membranes"
    clear = clear_channels(case, variant)
    assert (~clear).double().mean() < 0.1
    # fp32 sums over a few hundred terms of order one; bf16 rounds grad x once more, to 8 bits
    tolerance = 1e-4
    for name, a, b in zip(NAMES, got[2:], exact[2:], strict=True):
        within = {"grad x": clear[:, None], "grad v0": clear, "grad rate": clear.all(0)}[name]
        loose = 2.0**-8 if name == "grad x" and dtype == torch.bfloat16 else tolerance
        torch.testing.assert_close(
            a.double() * within, b * within, rtol=loose, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("masks", [False, True], ids=["plain", "masks"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_loop(
    shape: tuple[int, int, int], masks: bool, device: torch.device, dtype: torch.dtype, poisoned: None
) -> None:
    check(make_case(shape, masks, dtype), {}, device, dtype)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()))
def test_every_variant(
    variant: dict[str, Any], device: torch.device, dtype: torch.dtype, poisoned: None
) -> None:
    check(make_case((1, 20, 40), True, dtype), variant, device, dtype)


@pytest.mark.gpu
def test_a_long_sequence_of_many_channels(device: torch.device, dtype: torch.dtype) -> None:
    check(make_case((3, 1031, 515), True, dtype), {}, device, dtype)
    check(make_case((2, 2048, 1024), False, dtype), {"soft_reset": True}, device, dtype)


def test_nan_at_an_invalid_token_reaches_nothing(device: torch.device) -> None:
    case = make_case((1, 9, 3), True, torch.float32)
    case.masks["valid"][:, 4] = False
    dirty = case._replace(x=case.x.clone(), grad_s=case.grad_s.clone())
    dirty.x[:, 4], dirty.grad_s[:, 4] = torch.nan, torch.nan
    with use_backend("triton"):
        clean, got = (run(c, {}, device, torch.float32, torch.float32) for c in (case, dirty))
    for a, b in zip(clean, got, strict=True):
        assert torch.equal(a, b)


def test_any_memory_layout_and_determinism(triton_form: torch.device) -> None:
    x = torch.randn(5, 3, 20, device=triton_form).permute(1, 2, 0)
    v0, rate = torch.randn(10, 3, device=triton_form).T[:, ::2], torch.rand(10, device=triton_form)[::2]
    reset = (torch.rand(20, 3, device=triton_form) < 0.2).T
    first = lif(x, v0, rate, reset=reset)
    again = lif(x.contiguous(), v0.contiguous(), rate.contiguous(), reset=reset.contiguous())
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_operators_are_registered_well(device: torch.device) -> None:
    from spikelm.kernels.lif.triton import lif_triton_forward

    x = torch.randn(1, 3, 2, device=device, requires_grad=True)
    v0, rate = torch.randn(1, 2, device=device, requires_grad=True), torch.rand(2, device=device)
    valid = torch.tensor([[True, False, True]], device=device)
    constants = (1.0, 0.0, False, True, False, "atan", 2.0)
    torch.library.opcheck(lif_triton_forward, (x, v0, rate.requires_grad_(), None, valid, *constants, True))


def test_compiles_without_a_graph_break(triton_form: torch.device) -> None:
    x = torch.randn(1, 4, 3, device=triton_form, requires_grad=True)
    v0, rate = torch.zeros(1, 3, device=triton_form), torch.rand(3, device=triton_form)
    from spikelm.kernels.lif import triton
    from spikelm.kernels.lif.neuron import Neuron

    def layer(x: Tensor) -> Tensor:
        return triton.lif(x, v0, rate, Neuron(), None, None)[0] * 2

    got, plain = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)
    assert torch.equal(got, plain)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (got, plain)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("slots", [torch.int32, torch.int64], ids=str)
def test_decode_updates_the_pool_in_place(
    slots: torch.dtype, device: torch.device, dtype: torch.dtype
) -> None:
    places = torch.tensor([3, -1, 0], dtype=slots)
    x, pool, rate = torch.randn(3, 5).to(dtype), torch.randn(4, 5), torch.rand(5)
    for options in ({}, {"soft_reset": True, "decay_input": False, "threshold": 0.25, "v_reset": 0.1}):
        expected, got = pool.clone(), pool.clone().to(device)
        with use_backend("reference"):
            spikes = lif_decode(x, expected, places, rate, **options)
        with use_backend("triton"):
            fired = lif_decode(x.to(device), got, places.to(device), rate.to(device), **options)
        assert torch.equal(fired.cpu(), spikes) and not fired[1].any()
        assert torch.equal(got.cpu(), expected) and torch.equal(expected[1:3], pool[1:3])
        whole, last = lif(x[:1, None], pool[3:], rate, **options)
        assert torch.equal(spikes[0], whole[0, 0])
        torch.testing.assert_close(expected[3], last[0])


def test_decode_is_registered_well(device: torch.device) -> None:
    x, pool, rate = torch.randn(2, 3, device=device), torch.randn(2, 3, device=device), torch.rand(3)
    slots = torch.tensor([1, -1], device=device)
    arguments = (x, pool, slots, rate.to(device), 1.0, 0.0, False, True)
    with use_backend("triton"):
        torch.library.opcheck(torch.ops.spikelm.lif_decode.default, arguments)


def test_wrong_inputs_are_refused(triton_form: torch.device) -> None:
    x, v0, rate = torch.randn(2, 3, 5), torch.randn(2, 5), torch.rand(5)
    x, v0, rate = x.to(triton_form), v0.to(triton_form), rate.to(triton_form)
    with pytest.raises(KernelError, match="float32, bfloat16 and float16, not torch.float64; use auto"):
        lif(x.double(), v0, rate)
    with pytest.raises(KernelError, match="use the torch back-end for your own"):
        lif(x, v0, rate, surrogate=lambda u, alpha: u)
    with pytest.raises(ShapeError, match=r"contiguous torch.float32 pool \[S, 5\]"):
        lif_decode(x[:, 0], v0.double(), torch.tensor([0, 1]), rate)
    with pytest.raises(ShapeError, match=r"slots of int32 or int64 \[2\]"):
        lif_decode(x[:, 0], v0, torch.tensor([0]), rate)
