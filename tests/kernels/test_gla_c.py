"""Gated linear attention in C: odd and large sizes, and what stays the same to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spikelm.kernels.gla import gla
from spikelm.kernels.gla.c import CHUNK, gla_backward, gla_forward

from .gla_cases import GATES, NAMES, SCALE, make_case, reference, run


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "shape",
    [(1, 127, 3, 1, 17, 37), (1, 257, 2, 2, 65, 16), (1, 45, 2, 1, 256, 256), (2, CHUNK, 4, 2, 33, 20)],
    ids=str,
)
def test_odd_and_large_sizes(c_form: None, shape: tuple[int, ...], gate: str, poisoned: None) -> None:
    case = make_case(*shape, gate=gate, masks="both", strength=0.1)
    expected = reference(case)
    for got, tolerance in ((run(case), 1e-11), (run(case, torch.float32), 3e-6)):
        for name, a, b in zip(NAMES, got, expected, strict=False):
            error = (a - b).abs().max() / b.abs().max().clamp(min=1)
            assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["channel", "head"])
def test_a_long_text(c_form: None, gate: str) -> None:
    case = make_case(1, 4097, 2, 1, 9, 11, gate=gate, masks="both", strength=0.02)
    for name, a, b in zip(NAMES, run(case, torch.float32), reference(case), strict=False):
        assert (a - b).abs().max() / b.abs().max().clamp(min=1) < 3e-6, name


@pytest.mark.parametrize("gate", GATES)
def test_neither_threads_nor_the_batch_change_a_bit(c_form: None, gate: str) -> None:
    case = make_case(3, 70, 6, 2, 40, 24, gate=gate, masks="both")
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
        inputs=tuple(None if x is None else x[1:2] for x in case.inputs),
        reset=case.reset[1:2],
        valid=case.valid[1:2],
        grad_o=case.grad_o[1:2],
        grad_state=case.grad_state[1:2],
    )
    for a, b in zip(run(alone, torch.float32), whole, strict=True):
        assert torch.equal(a, b[1:2])


@pytest.mark.parametrize("gate", GATES)
def test_what_is_the_same_to_the_bit(c_form: None, gate: str) -> None:
    """Outputs do not depend on later tokens, nor on cuts at multiples of a chunk."""
    case = make_case(2, 3 * CHUNK + 5, 4, 2, 12, 20, gate=gate)
    q, k, v, g, state = (None if x is None else x.float() for x in case.inputs)
    assert q is not None and k is not None and v is not None and state is not None
    whole, last = gla(q, k, v, g, state, scale=SCALE)
    for cut in (2, 7, CHUNK, CHUNK + 9, 2 * CHUNK):
        left, middle = gla(
            q[:, :cut], k[:, :cut], v[:, :cut], None if g is None else g[:, :cut], state, scale=SCALE
        )
        assert torch.equal(left, whole[:, :cut]), cut
        if cut % CHUNK == 0:
            right, end = gla(
                q[:, cut:], k[:, cut:], v[:, cut:], None if g is None else g[:, cut:], middle, scale=SCALE
            )
            assert torch.equal(right, whole[:, cut:]) and torch.equal(end, last)


@pytest.mark.parametrize("gate", GATES)
def test_nothing_passes_a_reset(c_form: None, gate: str) -> None:
    """NaN in one document reaches no other one in the same chunk: neither values nor gradients."""
    case = make_case(1, 2 * CHUNK, 4, 2, 6, 5, gate=gate)
    reset = torch.zeros(1, 2 * CHUNK, dtype=torch.bool)
    reset[0, [5, 20]] = True
    leaves = [None if x is None else x.float().requires_grad_() for x in case.inputs]
    q, k, v, g, state = leaves
    assert q is not None and k is not None and v is not None and state is not None
    bad = k.detach().clone()
    bad[0, 7] = torch.nan
    o, last = gla(q, bad, v, g, state, scale=SCALE, reset=reset)
    assert o[0, 7:20].isnan().all()
    assert o[0, :5].isfinite().all() and o[0, 20:].isfinite().all() and last.isfinite().all()
    grads = torch.autograd.grad(
        [o, last],
        [x for x in leaves if x is not None and x is not k],
        [case.grad_o.float().where(~o.isnan(), 0.0), case.grad_state.float()],
    )
    for grad in grads[:-1]:
        assert grad[0, :5].isfinite().all() and grad[0, 20:].isfinite().all()
    assert grads[-1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gate", GATES)
def test_opcheck(c_form: None, dtype: torch.dtype, gate: str) -> None:
    case = make_case(2, CHUNK + 3, 2, 1, 3, 4, gate=gate, masks="both")
    leaves = [None if x is None else x.to(dtype).requires_grad_() for x in case.inputs]
    fixed = [None if x is None else x.detach() for x in leaves]
    torch.library.opcheck(gla_forward, (*leaves, SCALE, case.reset, None, True))
    torch.library.opcheck(gla_forward, (*fixed, SCALE, None, case.valid, False))
    _, _, states = gla_forward(*fixed, SCALE, case.reset, case.valid, True)
    grads = (case.grad_o.to(dtype), case.grad_state.to(dtype))
    torch.library.opcheck(gla_backward, (*grads, *fixed[:4], states, SCALE, case.reset, case.valid))
