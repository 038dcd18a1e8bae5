"""lif: spikes, membranes and every gradient against the fp64 loop; all variants, masks, splits, threads."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spikelm.errors import KernelError, ShapeError
from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.lif import lif
from spikelm.kernels.lif.c import SEGMENT, SURROGATES, lif_backward, lif_forward
from spikelm.kernels.lif.surrogates import DERIVATIVES, spike

SHAPES = [(1, 1, 1), (2, 1, 17), (1, 2, 3), (1, 33, 1), (2, 64, 128), (3, 65, 17), (1, 40, 130), (11, 9, 5)]
VARIANTS = [
    {"soft_reset": soft, "decay_input": decay, "detach_reset": detach, "surrogate": surrogate}
    for soft, decay, detach, surrogate in itertools.product(
        (False, True), (True, False), (False, True), ("atan", "sigmoid", "triangle", "straight_through")
    )
]
OTHERS: list[dict[str, Any]] = [
    {"v_reset": -0.25, "threshold": 0.5, "alpha": 4.0},
    {"v_reset": 0.25, "threshold": 0.75, "soft_reset": True, "decay_input": False, "alpha": 0.5},
    {"v_reset": -0.5, "decay_input": False, "surrogate": "triangle", "alpha": 0.7},
    {"threshold": -0.5, "v_reset": -1.0, "surrogate": "sigmoid"},
]
AMBIGUOUS = 1e-5
NAMES = ("spikes", "membrane", "grad x", "grad v0", "grad rate")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs in fp64 and the gradients that arrive at the spikes and the last membrane."""

    x: Tensor
    v0: Tensor
    rate: Tensor
    reset: Tensor | None
    valid: Tensor | None
    grad_s: Tensor
    grad_v: Tensor
    variant: dict[str, Any] = field(default_factory=dict)


def make_case(
    batch: int,
    steps: int,
    channels: int,
    masks: str = "none",
    variant: dict[str, Any] | None = None,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        # fp32 values in fp64: the fp32 forms see exactly the same inputs
        return torch.randn(*shape, generator=generator).double()

    draw = torch.rand(2, batch, steps, generator=generator)
    return Case(
        x=2 * normal(batch, steps, channels),
        v0=0.5 * normal(batch, channels),
        rate=torch.rand(channels, generator=generator).double(),
        reset=draw[0] < 0.15 if masks in ("reset", "both") else None,
        valid=draw[1] < 0.75 if masks in ("valid", "both") else None,
        grad_s=normal(batch, steps, channels),
        grad_v=normal(batch, channels),
        variant=variant or {},
    )


def run(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    inputs = [x.to(dtype).requires_grad_() for x in (case.x, case.v0, case.rate)]
    s, v = lif(*inputs, reset=case.reset, valid=case.valid, **case.variant)
    grads = torch.autograd.grad([s, v], inputs, [case.grad_s.to(dtype), case.grad_v.to(dtype)])
    return [s.detach(), v.detach(), *grads]


def reference(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    with use_backend("reference"):
        return run(case, dtype)


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert torch.equal(got[0].double(), expected[0].double()), "spikes"
    for name, a, b in zip(NAMES, got, expected, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def first_ambiguous(case: Case) -> Tensor:
    """Step [B, C] at which a membrane first comes within 1e-5 of its threshold (T where it never does)."""
    soft, decay = case.variant.get("soft_reset", False), case.variant.get("decay_input", True)
    threshold, rest = case.variant.get("threshold", 1.0), case.variant.get("v_reset", 0.0)
    batch, steps, channels = case.x.shape
    v, first = case.v0, torch.full((batch, channels), steps)
    for t in range(steps):
        if case.reset is not None:
            v = torch.where(case.reset[:, t, None], 0.0 if soft else rest, v)
        leak = v - rest
        h = v + (case.x[:, t] - leak) * case.rate if decay else v - leak * case.rate + case.x[:, t]
        here = torch.ones(batch, 1, dtype=torch.bool) if case.valid is None else case.valid[:, t, None]
        near = ((h - threshold).abs() < AMBIGUOUS) & here
        first = torch.where(near & (first == steps), t, first)
        v = torch.where(here, torch.where(h >= threshold, h - threshold if soft else rest, h), v)
    return first


def assert_close_fp32(got: list[Tensor], expected: list[Tensor], case: Case) -> None:
    """Equal up to each channel's first ambiguous step; few steps lie beyond one."""
    steps = case.x.shape[1]
    first = first_ambiguous(case)
    before = torch.arange(steps)[None, :, None] < first[:, None]
    assert (~before).double().mean() < 1e-3
    assert torch.equal(got[0].double() * before, expected[0] * before)
    clear = first == steps  # gradients and last membranes depend on the whole channel
    for i in (1, 2, 3):
        mask = clear[:, None].expand_as(case.x) if i == 2 else clear
        torch.testing.assert_close(
            got[i].double() * mask,
            expected[i] * mask,
            rtol=1e-4,
            atol=1e-4,
            msg=lambda m, n=NAMES[i]: f"{n}: {m}",
        )
    everywhere = clear.all(0)
    torch.testing.assert_close(got[4].double() * everywhere, expected[4] * everywhere, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("masks", ["none", "reset", "valid", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_fp64_loop(form: str, shape: tuple[int, int, int], masks: str, poisoned: None) -> None:
    case = make_case(*shape, masks=masks)
    expected = reference(case)
    assert_close(run(case), expected, 1e-10)
    assert_close_fp32(run(case, torch.float32), expected, case)


@pytest.mark.parametrize(
    "variant", [*VARIANTS, *OTHERS], ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items())
)
def test_every_variant(form: str, variant: dict[str, Any]) -> None:
    case = make_case(2, 37, 19, masks="both", variant=variant)
    expected = reference(case)
    assert 0.02 < expected[0].mean() < 0.9
    assert_close(run(case), expected, 1e-10)
    assert_close_fp32(run(case, torch.float32), expected, case)


@pytest.mark.parametrize(
    "variant", [{}, {"soft_reset": True}, {"decay_input": False}, {"v_reset": -0.25}], ids=str
)
def test_fp32_spikes_are_bit_equal_to_the_loop(form: str, variant: dict[str, Any]) -> None:
    """The charge is the same operations in the same order, so not even ambiguous steps differ."""
    case = make_case(2, 200, 300, masks="both", variant=variant)
    got, expected = run(case, torch.float32), reference(case, torch.float32)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_integrate_and_fire(form: str) -> None:
    """Rate 0 without a decayed input sums the input exactly."""
    x = torch.full((1, 10, 1), 0.25)
    s, v = lif(x, torch.zeros(1, 1), torch.zeros(1), decay_input=False, soft_reset=True)
    assert s[0, :, 0].tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    assert v.item() == 0.5


def test_splitting_anywhere_is_bit_equal(form: str) -> None:
    case = make_case(2, 2 * SEGMENT + 6, 17, masks="both")
    x, v0, rate = case.x.float(), case.v0.float(), case.rate.float()
    assert case.reset is not None and case.valid is not None
    whole, last = lif(x, v0, rate, reset=case.reset, valid=case.valid)
    for cut in range(1, x.shape[1], 1 if form == "c" else 7):
        head, middle = lif(x[:, :cut], v0, rate, reset=case.reset[:, :cut], valid=case.valid[:, :cut])
        tail, end = lif(x[:, cut:], middle, rate, reset=case.reset[:, cut:], valid=case.valid[:, cut:])
        assert torch.equal(torch.cat([head, tail], 1), whole)
        assert torch.equal(end, last)


@pytest.mark.parametrize("cut", [1, 20, 32, 49])
def test_gradients_pass_through_a_split(form: str, cut: int) -> None:
    case = make_case(2, 50, 9, masks="both")
    expected = reference(case)
    x, v0, rate = inputs = [x.clone().requires_grad_() for x in (case.x, case.v0, case.rate)]
    assert case.reset is not None and case.valid is not None
    head, middle = lif(x[:, :cut], v0, rate, reset=case.reset[:, :cut], valid=case.valid[:, :cut])
    tail, last = lif(x[:, cut:], middle, rate, reset=case.reset[:, cut:], valid=case.valid[:, cut:])
    s = torch.cat([head, tail], 1)
    grads = torch.autograd.grad([s, last], inputs, [case.grad_s, case.grad_v])
    assert_close([s.detach(), last.detach(), *grads], expected, 1e-10)


@pytest.mark.parametrize("variant", [{"v_reset": -0.3}, {"v_reset": -0.3, "soft_reset": True}], ids=str)
def test_reset_equals_separate_sequences(form: str, variant: dict[str, Any]) -> None:
    case = make_case(1, 60, 11)
    starts = [0, 1, 25, 57]
    reset = torch.zeros(1, 60, dtype=torch.bool)
    reset[0, starts] = True
    rest = torch.full((1, 11), 0.0 if variant.get("soft_reset") else -0.3, dtype=torch.float64)
    packed, last = lif(case.x, torch.full((1, 11), 0.9).double(), case.rate, reset=reset, **variant)
    for start, end in zip(starts, [*starts[1:], 60], strict=True):
        alone, v = lif(case.x[:, start:end], rest, case.rate, **variant)
        assert torch.equal(packed[:, start:end], alone)
    assert torch.equal(last, v)


@pytest.mark.parametrize("backend", ["reference", "torch", "c"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_none(backend: str, side: str, c_form: None) -> None:
    """Padding changes nothing, even where it is NaN."""
    case = make_case(2, 40, 7)
    nan = torch.full((2, 9, 7), torch.nan).double()
    valid = torch.ones(2, 49, dtype=torch.bool)
    here = slice(9, None) if side == "left" else slice(0, 40)
    valid[:, slice(0, 9) if side == "left" else slice(40, None)] = False
    expected = reference(case)
    with use_backend(backend):
        x, v0, rate = inputs = [x.clone().requires_grad_() for x in (case.x, case.v0, case.rate)]
        s, last = lif(torch.cat([nan, x] if side == "left" else [x, nan], 1), v0, rate, valid=valid)
        grads = torch.autograd.grad([s[:, here], last], inputs, [case.grad_s, case.grad_v])
    assert (s[~valid] == 0).all()
    assert_close([s[:, here].detach(), last.detach(), *grads], expected, 1e-10)


def test_rows_are_independent(form: str) -> None:
    case = make_case(3, 70, 150, masks="both")
    whole = run(case, torch.float32)
    assert case.reset is not None and case.valid is not None
    for row in range(3):
        one = slice(row, row + 1)
        alone = replace(
            case,
            x=case.x[one],
            v0=case.v0[one],
            reset=case.reset[one],
            valid=case.valid[one],
            grad_s=case.grad_s[one],
            grad_v=case.grad_v[one],
        )
        got = run(alone, torch.float32)
        for i in range(4):
            assert torch.equal(got[i], whole[i][one]), NAMES[i]


def test_threads_do_not_change_a_bit(c_form: None) -> None:
    case = make_case(4, 90, 300, masks="both")
    one = run(case, torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for name, a, b in zip(NAMES, run(case, torch.float32), one, strict=True):
                assert torch.equal(a, b), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(c_form: None, dtype: torch.dtype) -> None:
    case = make_case(2, 5, 3, masks="both")
    constants = (1.0, 0.0, False, True, False, "atan", 2.0)
    leaves = [x.to(dtype).requires_grad_() for x in (case.x, case.v0, case.rate)]
    torch.library.opcheck(lif_forward, (*leaves, case.reset, None, *constants))
    x, v0, rate = (x.detach() for x in leaves)
    torch.library.opcheck(lif_forward, (x, v0, rate, None, case.valid, *constants))
    _, _, checkpoints = lif_forward(x, v0, rate, case.reset, case.valid, *constants)
    grads = (case.grad_s.to(dtype), case.grad_v.to(dtype))
    torch.library.opcheck(lif_backward, (*grads, x, rate, checkpoints, case.reset, case.valid, *constants))


def test_only_one_result_used(form: str) -> None:
    case = make_case(2, 12, 5)
    for pick in (0, 1):
        grads = []
        for backend in (form, "reference"):
            with use_backend(backend):
                inputs = [x.clone().requires_grad_() for x in (case.x, case.v0, case.rate)]
                result = lif(*inputs)[pick]
                weight = case.grad_s if pick == 0 else case.grad_v
                grads.append(torch.autograd.grad((result * weight).sum(), inputs, materialize_grads=True))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_low_precision_inputs_are_computed_in_fp32(form: str) -> None:
    case = make_case(2, 40, 12)
    x, v0, rate = case.x.bfloat16(), case.v0.float(), case.rate.float()
    s, v = lif(x, v0, rate)
    exact, exact_v = lif(x.float(), v0, rate)
    assert s.dtype == torch.bfloat16 and v.dtype == torch.float32
    assert torch.equal(s.float(), exact) and torch.equal(v, exact_v)


def test_any_memory_layout(form: str) -> None:
    case = make_case(2, 35, 8, masks="both")
    assert case.reset is not None
    strided = replace(
        case,
        x=case.x.mT.contiguous().mT,
        rate=case.rate.repeat_interleave(2)[::2],
        reset=case.reset.T.contiguous().T,
    )
    assert_close(run(strided), run(case), 1e-12)


def test_nothing_to_do(form: str) -> None:
    rate, v0 = torch.full((4,), 0.5), torch.randn(2, 4)
    s, v = lif(torch.zeros(2, 0, 4), v0, rate)
    assert s.shape == (2, 0, 4) and torch.equal(v, v0)
    s, v = lif(torch.zeros(0, 5, 4), v0[:0], rate)
    assert s.shape == (0, 5, 4) and v.shape == (0, 4)


def test_own_surrogate_runs_in_torch_only(c_form: None) -> None:
    def gaussian(u: Tensor, alpha: float) -> Tensor:
        return torch.exp(-((alpha * u) ** 2))

    case = make_case(2, 20, 5, variant={"surrogate": gaussian})
    expected = reference(case)
    for backend in ("auto", "torch"):
        with use_backend(backend):
            assert_close(run(case), expected, 1e-10)
    with pytest.raises(KernelError, match="torch back-end"):
        run(case)


@pytest.mark.parametrize("name", ["atan", "sigmoid", "triangle"])
def test_surrogates_have_unit_area(name: str) -> None:
    u = torch.linspace(-2000, 2000, 4_000_001, dtype=torch.float64)
    assert torch.trapezoid(DERIVATIVES[name](u, 2.0), u).item() == pytest.approx(1.0, abs=1e-3)


def test_surrogates_far_from_the_threshold_stay_finite() -> None:
    u = torch.tensor([-1e30, -200.0, 0.0, 200.0, 1e30], requires_grad=True)
    for name in DERIVATIVES:
        s = spike(u, name, 2.0)
        assert s.tolist() == [0, 0, 1, 1, 1]
        assert torch.isfinite(torch.autograd.grad(s.sum(), u)[0]).all()


def test_c_knows_every_surrogate() -> None:
    assert set(SURROGATES) == set(DERIVATIVES)


def test_wrong_inputs_are_refused() -> None:
    x, v0, rate = torch.zeros(2, 5, 4), torch.zeros(2, 4), torch.zeros(4)
    with pytest.raises(ShapeError, match=r"x \[B, T, C\]"):
        lif(x[0], v0, rate)
    with pytest.raises(ShapeError, match=r"v0 \[B, C\]"):
        lif(x, v0[:1], rate)
    with pytest.raises(ShapeError, match=r"rate \[C\]"):
        lif(x, v0, rate[:1])
    with pytest.raises(ShapeError, match=r"valid must be bool \[2, 5\]"):
        lif(x, v0, rate, valid=torch.ones(2, 5))
    with pytest.raises(KernelError, match="did you mean 'sigmoid'"):
        lif(x, v0, rate, surrogate="sigmoyd")
