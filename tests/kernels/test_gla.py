"""gla: outputs, final state and every gradient against the fp64 loop; masks, splits, closed gates, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spikelm.errors import ShapeError
from spikelm.kernels.dispatch import choose, use_backend
from spikelm.kernels.gla import gla, initial_state

from .gla_cases import GATES, NAMES, SCALE, SHAPES, assert_close, make_case, reference, run


def test_reference_is_the_equation() -> None:
    """S_t = diag(exp g_t) S_{t-1} + k_t^T v_t and o_t = scale q_t S_t, for each query head by itself."""
    case = make_case(1, 5, 6, 2, 3, 4)
    q, k, v, g, start = case.inputs
    assert q is not None and k is not None and v is not None and g is not None and start is not None
    with use_backend("reference"):
        o, last = gla(q, k, v, g, start, scale=SCALE)
    for head in range(6):
        own = head // 3
        state = start[0, own]
        for t in range(5):
            state = torch.diag(g[0, t, own].exp()) @ state + torch.outer(k[0, t, own], v[0, t, own])
            torch.testing.assert_close(o[0, t, head], SCALE * q[0, t, head] @ state)
        torch.testing.assert_close(last[0, own], state)


@pytest.mark.parametrize("masks", ["none", "reset", "valid", "both"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_fp64_loop(
    form: str, shape: tuple[int, ...], gate: str, masks: str, poisoned: None
) -> None:
    case = make_case(*shape, gate=gate, masks=masks)
    expected = reference(case)
    assert_close(run(case), expected, 1e-10)
    # Without a gate sums grow with T, and so does what rounding leaves: compare relative to the largest.
    for name, a, b in zip(NAMES, run(case, torch.float32), expected, strict=False):
        assert (a - b).abs().max() < 2e-6 * b.abs().max().clamp(min=1), name


@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("gate", ["channel", "head"])
@pytest.mark.parametrize("strength", [20.0, 1e4, 1e30])
def test_strong_decay(form: str, gate: str, masks: str, strength: float) -> None:
    """Gates far below any that a quotient of cumulative products survives, as exact as mild ones."""
    case = make_case(2, 130, 4, 2, 6, 5, gate=gate, masks=masks, strength=strength)
    expected = reference(case)
    assert_close(run(case), expected, 1e-10)
    assert_close(run(case, torch.float32), expected, 1e-4)


@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("gate", ["channel", "head"])
def test_mild_and_closed_gates_mixed(form: str, gate: str, masks: str) -> None:
    """Some channels hardly decay while others are closed (g = -inf), and the keys of some tokens are zero."""
    case = make_case(2, 130, 4, 2, 6, 5, gate=gate, masks=masks, strength=0.01)
    q, k, v, g, state = case.inputs
    assert g is not None and k is not None
    generator = torch.Generator().manual_seed(1)
    g = g.masked_fill(torch.rand(g.shape, generator=generator) < 0.2, -torch.inf)
    k = k.masked_fill(torch.rand(k.shape[:3], generator=generator)[..., None] < 0.3, 0.0)
    case = replace(case, inputs=(q, k, v, g, state))
    expected = reference(case)
    assert_close(run(case), expected, 1e-10)
    assert_close(run(case, torch.float32), expected, 2e-4)


def test_every_gate_closed(form: str) -> None:
    case = make_case(2, 70, 4, 2, 6, 5, gate="channel", masks="both")
    q, k, v, g, state = case.inputs
    assert g is not None
    case = replace(case, inputs=(q, k, v, torch.full_like(g, -torch.inf), state))
    assert_close(run(case), reference(case), 1e-12)


@pytest.mark.parametrize("strength", [8.0, 20.0, 60.0])
def test_gradient_of_the_gate_does_not_cancel(form: str, strength: float) -> None:
    """In fp32 dg is as good as the loop's, also where gates are strong (published kernels lose 1e-4 here)."""
    case = make_case(1, 256 if strength == 8.0 else 70, 2, 2, 16, 16, strength=strength)
    expected = reference(case)[5]
    with use_backend("reference"):
        loop = run(case, torch.float32)[5]
    error, error_loop = ((x - expected).abs().max() for x in (run(case, torch.float32)[5], loop))
    assert error < 4 * error_loop + 1e-7, f"{error:.1e}, the fp32 loop {error_loop:.1e}"


@pytest.mark.parametrize("gate", GATES)
def test_nothing_leaks_from_invalid_tokens(any_form: str, gate: str) -> None:
    """NaN at invalid tokens reaches no value and no gradient; a row without valid tokens keeps its state."""
    case = make_case(3, 70, 4, 2, 6, 5, gate=gate, masks="both")
    assert case.valid is not None and case.reset is not None
    case.valid[1] = False
    case.reset[1] = False
    expected = reference(case)
    hidden = ~case.valid[..., None, None]
    inputs = [None if x is None else x.masked_fill(hidden, torch.nan) for x in case.inputs[:4]]
    got = run(replace(case, inputs=(*inputs, case.inputs[4])))
    assert_close(got, expected, 1e-10)
    assert (got[0].masked_select(hidden) == 0).all()
    for gradient in got[2:-1]:
        assert (gradient.masked_select(hidden) == 0).all()
    start = case.inputs[4]
    assert start is not None and torch.equal(got[1][1], start[1])


def test_a_reset_at_an_invalid_token_counts(form: str) -> None:
    case = make_case(1, 9, 2, 1, 3, 3)
    reset, valid = torch.zeros(1, 9, dtype=torch.bool), torch.ones(1, 9, dtype=torch.bool)
    reset[0, 4], valid[0, 4] = True, False
    q, k, v, g, state = case.inputs
    assert q is not None and k is not None and v is not None and g is not None and state is not None
    whole, last = gla(q, k, v, g, state, scale=SCALE, reset=reset, valid=valid)
    empty = torch.zeros_like(state)
    tail, end = gla(q[:, 5:], k[:, 5:], v[:, 5:], g[:, 5:], empty, scale=SCALE)
    torch.testing.assert_close(whole[:, 5:], tail, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, end, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("cut", [1, 20, 63, 64, 65, 129])
def test_splitting_anywhere(form: str, gate: str, cut: int) -> None:
    """Two calls give the values and, through the state between them, the gradients of one."""
    case = make_case(2, 130, 4, 2, 3, 5, gate=gate, masks="both")
    expected = reference(case)
    leaves = [None if x is None else x.clone().requires_grad_() for x in case.inputs]
    state = leaves[4]
    assert state is not None and case.reset is not None and case.valid is not None
    outputs = []
    for part in (slice(0, cut), slice(cut, None)):
        q, k, v, g = (None if x is None else x[:, part] for x in leaves[:4])
        assert q is not None and k is not None and v is not None
        o, state = gla(q, k, v, g, state, scale=SCALE, reset=case.reset[:, part], valid=case.valid[:, part])
        outputs.append(o)
    o = torch.cat(outputs, 1)
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad([o, state], wanted, [case.grad_o, case.grad_state])
    assert_close([o.detach(), state.detach(), *grads], expected, 1e-10)


def test_reset_equals_separate_sequences(form: str) -> None:
    """What stood in the state before a reset is gone, even if it was not a number."""
    case = make_case(1, 100, 4, 2, 3, 5)
    q, k, v, g, state = case.inputs
    assert q is not None and k is not None and v is not None and g is not None and state is not None
    starts = [0, 1, 25, 97]
    reset = torch.zeros(1, 100, dtype=torch.bool)
    reset[0, starts] = True
    packed, last = gla(q, k, v, g, torch.full_like(state, torch.nan), scale=SCALE, reset=reset)
    for start, end in zip(starts, [*starts[1:], 100], strict=True):
        here = slice(start, end)
        alone, final = gla(
            q[:, here], k[:, here], v[:, here], g[:, here], torch.zeros_like(state), scale=SCALE
        )
        torch.testing.assert_close(packed[:, here], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, final, rtol=1e-12, atol=1e-12)


def test_query_heads_share_one_state(form: str) -> None:
    """Grouped queries equal keys, values, gates and states repeated for every query head."""
    case = make_case(2, 70, 6, 2, 3, 5)
    q, k, v, g, state = case.inputs
    assert q is not None and k is not None and v is not None and g is not None and state is not None
    o, last = gla(q, k, v, g, state, scale=SCALE)
    k, v, g = (x.repeat_interleave(3, 2) for x in (k, v, g))
    repeated, states = gla(q, k, v, g, state.repeat_interleave(3, 1), scale=SCALE)
    torch.testing.assert_close(o, repeated, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last.repeat_interleave(3, 1), states, rtol=1e-12, atol=1e-12)


def test_equal_channels_are_a_head_gate(form: str) -> None:
    case = make_case(2, 70, 4, 2, 3, 5, gate="head", masks="both")
    q, k, v, g, state = case.inputs
    assert q is not None and k is not None and v is not None and g is not None and state is not None
    masks = {"scale": SCALE, "reset": case.reset, "valid": case.valid}
    for a, b in zip(
        gla(q, k, v, g, state, **masks), gla(q, k, v, g.expand(-1, -1, -1, 3), state, **masks), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(form: str, gate: str) -> None:
    case = make_case(1, 6, 2, 1, 2, 3, gate=gate, masks="both")
    given = [x.clone().requires_grad_() for x in case.inputs if x is not None]

    def outputs(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        g = rest[0] if len(rest) == 2 else None
        return gla(q, k, v, g, rest[-1], scale=SCALE, reset=case.reset, valid=case.valid)

    assert torch.autograd.gradcheck(outputs, given)


@pytest.mark.parametrize("gate", ["channel", "head"])
def test_kept_for_backward(form: str, gate: str) -> None:
    """What training keeps is linear in T and far from [B, T, chunk, K]."""
    B, T, H, K = 1, 512, 2, 64
    case = make_case(B, T, H, H, K, K, gate=gate)
    leaves = [x.float().requires_grad_() for x in case.inputs if x is not None]
    q, k, v, g, state = leaves
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o, last = gla(q, k, v, g, state, scale=SCALE)
    token = 4 * B * T * H * K
    assert o.grad_fn is not None and last.grad_fn is not None
    assert sum(kept.values()) < 14 * token, f"{sum(kept.values()) / token:.1f} times the size of q"


def test_autocast_and_low_precision_are_computed_in_fp32(form: str) -> None:
    case = make_case(2, 40, 4, 2, 6, 5)
    q, k, v, g, state = (None if x is None else x.float() for x in case.inputs)
    assert q is not None and k is not None and v is not None and g is not None and state is not None
    low = [x.bfloat16() for x in (q, k, v)]
    exact, exact_last = gla(*(x.float() for x in low), g, state, scale=SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        o, last = gla(*low, g, state, scale=SCALE)
    assert o.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert torch.equal(o, exact.bfloat16()) and torch.equal(last, exact_last)


def test_any_memory_layout(form: str) -> None:
    case = make_case(2, 35, 4, 2, 6, 5, masks="both")
    expected = run(case)
    strided = [None if x is None else x.mT.contiguous().mT for x in case.inputs]
    assert case.reset is not None
    got = run(replace(case, inputs=tuple(strided), reset=case.reset.T.contiguous().T))
    assert_close(got, expected, 1e-12)


def test_nothing_to_do(any_form: str) -> None:
    state = torch.randn(2, 2, 3, 5)
    k = torch.zeros(2, 0, 2, 3)
    o, last = gla(torch.zeros(2, 0, 4, 3), k, torch.zeros(2, 0, 2, 5), k, state, scale=1.0)
    assert o.shape == (2, 0, 4, 5) and torch.equal(last, state)
    k = torch.zeros(0, 70, 2, 3)
    o, last = gla(torch.zeros(0, 70, 4, 3), k, torch.zeros(0, 70, 2, 5), k, state[:0], scale=1.0)
    assert o.shape == (0, 70, 4, 5) and last.shape == (0, 2, 3, 5)


def test_meta_tensors_and_automatic_choice(caplog: pytest.LogCaptureFixture) -> None:
    """Auto picks the torch form where no other exists, without a warning."""
    with use_backend("auto"), caplog.at_level("WARNING"):
        assert choose("gla", torch.device("cpu")) in ("torch", "c")
        q, k = torch.empty(2, 70, 4, 3, device="meta"), torch.empty(2, 70, 2, 3, device="meta")
        o, last = gla(q, k, k, k, initial_state(2, 2, 3, 3, device="meta"), scale=1.0)
    assert o.shape == q.shape and last.shape == (2, 2, 3, 3)
    assert not caplog.records


def test_wrong_shapes_are_refused() -> None:
    q, k, v, state = torch.zeros(2, 5, 4, 3), torch.zeros(2, 5, 2, 3), torch.zeros(2, 5, 2, 6), None
    state = initial_state(2, 2, 3, 6)
    with pytest.raises(ShapeError, match=r"q \[B, T, H, K\]"):
        gla(q[0], k, v, None, state, scale=1.0)
    with pytest.raises(ShapeError, match=r"k \[2, 5, G, 3\]"):
        gla(q, k[..., :2], v, None, state, scale=1.0)
    with pytest.raises(ShapeError, match="3 query heads and 2 key heads"):
        gla(q[:, :, :3], k, v, None, state, scale=1.0)
    with pytest.raises(ShapeError, match=r"v \[2, 5, 2, V\]"):
        gla(q, k, v[:, :4], None, state, scale=1.0)
    with pytest.raises(ShapeError, match=r"g \[2, 5, 2, 3\] \(or a last dimension of 1\)"):
        gla(q, k, v, k[..., :2], state, scale=1.0)
    with pytest.raises(ShapeError, match=r"state \[2, 2, 3, 6\]"):
        gla(q, k, v, k, state[:1], scale=1.0)
    with pytest.raises(ShapeError, match=r"reset must be bool \[2, 5\]"):
        gla(q, k, v, k, state, scale=1.0, reset=torch.zeros(2, 5))
