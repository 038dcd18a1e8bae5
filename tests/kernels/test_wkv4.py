"""wkv4: outputs, final state and every gradient against the fp64 loop; masks, splits, extremes, threads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from spikelm.errors import ShapeError
from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.wkv4 import initial_state, wkv4
from spikelm.kernels.wkv4.c import SEGMENT, wkv4_backward, wkv4_forward

SHAPES = [(1, 1, 1), (2, 1, 17), (1, 2, 3), (1, 33, 1), (2, 64, 64), (3, 65, 17), (1, 100, 130), (11, 9, 5)]
NAMES = ("y", "state", "grad w", "grad u", "grad k", "grad v", "grad state")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs in fp64 and the gradients that arrive at y and at the returned num and den."""

    inputs: tuple[Tensor, ...]
    reset: Tensor | None
    valid: Tensor | None
    grad_y: Tensor
    grad_state: Tensor


def make_case(
    batch: int, steps: int, channels: int, masks: str = "none", scale: float = 2.0, seed: int = 0
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        # fp32 values in fp64: the fp32 forms see exactly the same inputs
        return torch.randn(*shape, generator=generator).double()

    state = torch.stack(
        [normal(batch, channels), normal(batch, channels).abs() + 0.5, normal(batch, channels)], 1
    )
    inputs = (
        2 * normal(channels) - 1,
        normal(channels),
        scale * normal(batch, steps, channels),
        normal(batch, steps, channels),
        state,
    )
    draw = torch.rand(2, batch, steps, generator=generator)
    grad_state = normal(batch, 3, channels)
    grad_state[:, 2] = 0  # max is a scale, not a variable
    return Case(
        inputs=inputs,
        reset=draw[0] < 0.15 if masks in ("reset", "both") else None,
        valid=draw[1] < 0.75 if masks in ("valid", "both") else None,
        grad_y=normal(batch, steps, channels),
        grad_state=grad_state,
    )


def run(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    inputs = [x.to(dtype).requires_grad_() for x in case.inputs]
    y, state = wkv4(*inputs, case.reset, case.valid)
    grads = torch.autograd.grad([y, state], inputs, [case.grad_y.to(dtype), case.grad_state.to(dtype)])
    return [y.detach(), state.detach(), *grads]


def reference(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    with use_backend("reference"):
        return run(case, dtype)


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(NAMES, got, expected, strict=True):
        # the states' scale may differ: compare the sums they stand for
        if name == "state":
            shift = torch.exp((a[:, 2].double() - b[:, 2]).clamp(-80, 80))[:, None]
            a, b = a[:, :2] * shift, b[:, :2]
        assert torch.isfinite(a).all(), name
        torch.testing.assert_close(
            a.double(), b.double(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("masks", ["none", "reset", "valid", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_fp64_loop(form: str, shape: tuple[int, int, int], masks: str, poisoned: None) -> None:
    case = make_case(*shape, masks=masks)
    expected = reference(case)
    assert_close(run(case), expected, 1e-10)
    assert_close(run(case, torch.float32), expected, 1e-4)


@pytest.mark.parametrize("masks", ["none", "both"])
def test_large_keys(form: str, masks: str) -> None:
    """|k| up to 60 and decays from nearly none to complete: finite, and as exact as the loop in fp32."""
    case = make_case(2, 130, 24, masks=masks)
    w, u, k, v, state = case.inputs
    w, k = torch.linspace(-9, 4, 24).double(), (60 * torch.tanh(2 * k)).float().double()
    case = replace(case, inputs=(w.float().double(), u, k, v, state))
    expected = reference(case)
    assert_close(run(case), expected, 1e-10)
    got, loop = run(case, torch.float32), reference(case, torch.float32)
    for name, a, b, exact in zip(NAMES, got, loop, expected, strict=True):
        if name == "state":
            continue
        assert torch.isfinite(a).all(), name
        scale = exact.abs().max().clamp(min=1)
        error, error_loop = (a - exact).abs().max() / scale, (b - exact).abs().max() / scale
        assert error < 2 * error_loop + 1e-5, f"{name}: {error:.1e}, the fp32 loop {error_loop:.1e}"


def test_constant_extreme_keys(form: str) -> None:
    for value in (-60.0, 60.0):
        w, u = torch.zeros(3), torch.zeros(3)
        k, v = torch.full((1, 50, 3), value), torch.randn(1, 50, 3)
        y, state = wkv4(w, u, k, v, initial_state(1, 3))
        assert torch.isfinite(y).all() and torch.isfinite(state).all()
        y0, _ = wkv4(w, u, torch.zeros_like(k), v, initial_state(1, 3))
        torch.testing.assert_close(y, y0, rtol=1e-4, atol=1e-5)


def test_splitting_anywhere_is_bit_equal(c_form: None) -> None:
    case = make_case(2, 2 * SEGMENT + 6, 17, masks="both")
    w, u, k, v, state = (x.float() for x in case.inputs)
    assert case.reset is not None and case.valid is not None
    whole, last = wkv4(w, u, k, v, state, case.reset, case.valid)
    for cut in range(1, k.shape[1]):
        head, middle = wkv4(w, u, k[:, :cut], v[:, :cut], state, case.reset[:, :cut], case.valid[:, :cut])
        tail, end = wkv4(w, u, k[:, cut:], v[:, cut:], middle, case.reset[:, cut:], case.valid[:, cut:])
        assert torch.equal(torch.cat([head, tail], 1), whole)
        assert torch.equal(end, last)


def test_token_by_token_is_bit_equal(c_form: None) -> None:
    case = make_case(2, 45, 70)
    w, u, k, v, state = (x.float() for x in case.inputs)
    whole, last = wkv4(w, u, k, v, state)
    for t in range(k.shape[1]):
        y, state = wkv4(w, u, k[:, t : t + 1], v[:, t : t + 1], state)
        assert torch.equal(y[:, 0], whole[:, t])
    assert torch.equal(state, last)


@pytest.mark.parametrize("cut", [1, 20, 32, 49])
def test_gradients_pass_through_a_split(form: str, cut: int) -> None:
    case = make_case(2, 50, 9, masks="both")
    expected = reference(case)
    inputs = [x.clone().requires_grad_() for x in case.inputs]
    w, u, k, v, state = inputs
    assert case.reset is not None and case.valid is not None
    head, middle = wkv4(w, u, k[:, :cut], v[:, :cut], state, case.reset[:, :cut], case.valid[:, :cut])
    tail, last = wkv4(w, u, k[:, cut:], v[:, cut:], middle, case.reset[:, cut:], case.valid[:, cut:])
    y = torch.cat([head, tail], 1)
    grads = torch.autograd.grad([y, last], inputs, [case.grad_y, case.grad_state])
    assert_close([y.detach(), last.detach(), *grads], expected, 1e-10)


def test_reset_equals_separate_sequences(form: str) -> None:
    case = make_case(1, 60, 11)
    w, u, k, v, _ = case.inputs
    starts = [0, 1, 25, 57]
    reset = torch.zeros(1, 60, dtype=torch.bool)
    reset[0, starts] = True
    packed, last = wkv4(w, u, k, v, torch.full((1, 3, 11), 5.0).double(), reset)
    for start, end in zip(starts, [*starts[1:], 60], strict=True):
        alone, end_state = wkv4(
            w, u, k[:, start:end], v[:, start:end], initial_state(1, 11, dtype=torch.float64)
        )
        torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, end_state, rtol=1e-12, atol=1e-12)


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
        inputs = [x.clone().requires_grad_() for x in case.inputs]
        w, u, k, v, state = inputs
        pad = [[nan, x] if side == "left" else [x, nan] for x in (k, v)]
        y, last = wkv4(w, u, torch.cat(pad[0], 1), torch.cat(pad[1], 1), state, None, valid)
        grads = torch.autograd.grad([y[:, here], last], inputs, [case.grad_y, case.grad_state])
    assert (y[~valid] == 0).all()
    assert_close([y[:, here].detach(), last.detach(), *grads], expected, 1e-10)


def test_rows_and_blocks_are_independent(c_form: None) -> None:
    case = make_case(3, 70, 80, masks="both")
    whole = run(case, torch.float32)
    w, u, k, v, state = case.inputs
    assert case.reset is not None and case.valid is not None
    for row in range(3):
        one = slice(row, row + 1)
        alone = Case(
            inputs=(w, u, k[one], v[one], state[one]),
            reset=case.reset[one],
            valid=case.valid[one],
            grad_y=case.grad_y[one],
            grad_state=case.grad_state[one],
        )
        got = run(alone, torch.float32)
        for i in (0, 1, 4, 5, 6):
            assert torch.equal(got[i], whole[i][one]), NAMES[i]


def test_threads_do_not_change_a_bit(c_form: None) -> None:
    case = make_case(4, 90, 150, masks="both")
    one = run(case, torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for name, a, b in zip(NAMES, run(case, torch.float32), one, strict=True):
                assert torch.equal(a, b), name
    finally:
        torch.set_num_threads(before)


def test_gradcheck(form: str) -> None:
    case = make_case(2, SEGMENT + 3, 3, masks="both", scale=1.0)
    w, u, k, v, state = case.inputs

    def outputs(w: Tensor, u: Tensor, k: Tensor, v: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        y, last = wkv4(w, u, k, v, torch.cat([sums, state[:, 2:]], 1), case.reset, case.valid)
        # the true sums: num and den alone depend on where the maximum lies
        return y, last[:, :2] * torch.exp(last[:, 2:].detach()) * 1e-2

    inputs = [x.clone().requires_grad_() for x in (w, u, k, v, state[:, :2])]
    assert torch.autograd.gradcheck(outputs, inputs, eps=1e-6, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(c_form: None, dtype: torch.dtype) -> None:
    case = make_case(2, 5, 3, masks="both")
    decay, bonus, k, v, state = (x.to(dtype) for x in case.inputs)
    leaves = [x.requires_grad_() for x in (-decay.exp(), bonus, k, v, state)]
    torch.library.opcheck(wkv4_forward, (*leaves, case.reset, None))
    torch.library.opcheck(wkv4_forward, (*[x.detach() for x in leaves], None, case.valid))
    fixed = [x.detach() for x in leaves]
    _, _, checkpoints = wkv4_forward(*fixed, case.reset, case.valid)
    grads = (case.grad_y.to(dtype), case.grad_state.to(dtype))
    torch.library.opcheck(wkv4_backward, (*grads, *fixed[:4], checkpoints, case.reset, case.valid))


def test_only_one_result_used(form: str) -> None:
    case = make_case(2, 12, 5)
    for pick in (0, 1):
        grads = []
        for backend in (form, "reference"):
            with use_backend(backend):
                inputs = [x.clone().requires_grad_() for x in case.inputs]
                result = wkv4(*inputs)[pick]
                weight = case.grad_y if pick == 0 else case.grad_state
                grads.append(torch.autograd.grad((result * weight).sum(), inputs, materialize_grads=True))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_low_precision_inputs_are_computed_in_fp32(form: str) -> None:
    case = make_case(2, 40, 12)
    w, u, k, v, state = (x.float() for x in case.inputs)
    y, last = wkv4(w, u, k.bfloat16(), v.bfloat16(), state)
    exact, exact_last = wkv4(w, u, k.bfloat16().float(), v.bfloat16().float(), state)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert torch.equal(y, exact.bfloat16()) and torch.equal(last, exact_last)


def test_any_memory_layout(form: str) -> None:
    case = make_case(2, 35, 8, masks="both")
    w, u, k, v, state = case.inputs
    assert case.reset is not None and case.valid is not None
    expected = run(case)
    strided = replace(
        case,
        inputs=(w.repeat_interleave(2)[::2], u, k.mT.contiguous().mT, torch.cat([v, v], 2)[..., :8], state),
        reset=case.reset.T.contiguous().T,
    )
    assert_close(run(strided), expected, 1e-12)


def test_nothing_to_do(form: str) -> None:
    w = torch.zeros(4)
    state = torch.randn(2, 3, 4)
    y, last = wkv4(w, w, torch.zeros(2, 0, 4), torch.zeros(2, 0, 4), state)
    assert y.shape == (2, 0, 4) and torch.equal(last, state)
    y, last = wkv4(w, w, torch.zeros(0, 5, 4), torch.zeros(0, 5, 4), state[:0])
    assert y.shape == (0, 5, 4) and last.shape == (0, 3, 4)


def test_nan_is_not_swallowed(form: str) -> None:
    k = torch.zeros(1, 6, 2)
    k[0, 2, 0] = torch.nan
    y, state = wkv4(torch.zeros(2), torch.zeros(2), k, torch.ones(1, 6, 2), initial_state(1, 2))
    assert y[0, 2:, 0].isnan().all() and state[0, 0, 0].isnan()
    assert torch.isfinite(y[0, :, 1]).all()


def test_wrong_shapes_are_refused() -> None:
    w, k, state = torch.zeros(4), torch.zeros(2, 5, 4), initial_state(2, 4)
    with pytest.raises(ShapeError, match=r"k \[B, T, C\]"):
        wkv4(w, w, k[0], k[0], state)
    with pytest.raises(ShapeError, match="v of k's shape"):
        wkv4(w, w, k, k[:, :1], state)
    with pytest.raises(ShapeError, match=r"w \[4\]"):
        wkv4(w[:3], w, k, k, state)
    with pytest.raises(ShapeError, match=r"state \[2, 3, 4\]"):
        wkv4(w, w, k, k, state[:1])
    with pytest.raises(ShapeError, match=r"reset must be bool \[2, 5\]"):
        wkv4(w, w, k, k, state, torch.zeros(2, 5))
