"""The gated delta rule in C: odd and large sizes, and what stays the same to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spikelm.kernels.gated_delta.c import CHUNK, gated_delta_backward, gated_delta_forward

from .gated_delta_cases import NAMES, SCALE, call, make_case, reference, run


@pytest.mark.parametrize(
    "shape",
    [(1, 127, 3, 1, 17, 37), (1, 257, 2, 2, 65, 16), (1, 45, 2, 1, 256, 256), (2, CHUNK, 4, 2, 33, 20)],
    ids=str,
)
@pytest.mark.parametrize("decay", ["mild", "mixed"])
def test_odd_and_large_sizes(c_form: None, shape: tuple[int, ...], decay: str, poisoned: None) -> None:
    case = make_case(*shape, masks="both", decay=decay)
    expected = reference(case)
    for got, tolerance in ((run(case), 1e-11), (run(case, torch.float32), 1e-5)):
        for name, a, b in zip(NAMES, got, expected, strict=True):
            error = (a - b).abs().max() / b.abs().max().clamp(min=1)
            assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.slow
def test_a_long_text(c_form: None) -> None:
    case = make_case(1, 4097, 2, 1, 9, 11, masks="both")
    for name, a, b in zip(NAMES, run(case, torch.float32), reference(case), strict=True):
        assert (a - b).abs().max() / b.abs().max().clamp(min=1) < 1e-5, name


def test_neither_threads_nor_the_batch_change_a_bit(c_form: None) -> None:
    case = make_case(3, 70, 6, 2, 40, 24, masks="both")
    whole = run(case, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for a, b in zip(run(case, torch.float32), whole, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)
    assert case.reset is not None and case.valid is not None
    alone = replace(
        case,
        inputs=tuple(x[1:2] for x in case.inputs),
        reset=case.reset[1:2],
        valid=case.valid[1:2],
        grad_o=case.grad_o[1:2],
        grad_state=case.grad_state[1:2],
    )
    for a, b in zip(run(alone, torch.float32), whole, strict=True):
        assert torch.equal(a, b[1:2])


def test_what_is_the_same_to_the_bit(c_form: None) -> None:
    """Outputs do not depend on later tokens, nor on cuts at multiples of a chunk."""
    *tokens, state = (x.float() for x in make_case(2, 3 * CHUNK + 5, 4, 2, 12, 20).inputs)
    whole, last = call([*tokens, state])
    for cut in (2, 7, CHUNK, CHUNK + 9, 2 * CHUNK):
        left, middle = call([*(x[:, :cut] for x in tokens), state])
        assert torch.equal(left, whole[:, :cut]), cut
        if cut % CHUNK == 0:
            right, end = call([*(x[:, cut:] for x in tokens), middle])
            assert torch.equal(right, whole[:, cut:]) and torch.equal(end, last)


def test_nothing_passes_a_reset(c_form: None) -> None:
    """NaN in one document reaches no other one in the same chunk: neither values nor gradients."""
    case = make_case(1, 2 * CHUNK, 4, 2, 6, 5)
    reset = torch.zeros(1, 2 * CHUNK, dtype=torch.bool)
    reset[0, [5, 20]] = True
    q, k, v, g, beta, state = (x.float().requires_grad_() for x in case.inputs)
    bad = k.detach().clone()
    bad[0, 7] = torch.nan
    o, last = call((q, bad, v, g, beta, state), reset)
    assert o[0, 7:20].isnan().all()
    assert o[0, :5].isfinite().all() and o[0, 20:].isfinite().all() and last.isfinite().all()
    arriving = [case.grad_o.float().where(~o.isnan(), 0.0), case.grad_state.float()]
    *grads, first = torch.autograd.grad([o, last], [q, v, g, beta, state], arriving)
    assert first.isfinite().all()
    for grad in grads:
        assert grad[0, :5].isfinite().all() and grad[0, 20:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(c_form: None, dtype: torch.dtype) -> None:
    case = make_case(2, CHUNK + 3, 2, 1, 3, 4, masks="both")
    leaves = [x.to(dtype).requires_grad_() for x in case.inputs]
    fixed = [x.detach() for x in leaves]
    torch.library.opcheck(gated_delta_forward, (*leaves, SCALE, case.reset, None, True))
    torch.library.opcheck(gated_delta_forward, (*fixed, SCALE, None, case.valid, False))
    _, _, states = gated_delta_forward(*fixed, SCALE, case.reset, case.valid, True)
    grads = (case.grad_o.to(dtype), case.grad_state.to(dtype))
    torch.library.opcheck(gated_delta_backward, (*grads, *fixed[:5], states, SCALE, case.reset, case.valid))
