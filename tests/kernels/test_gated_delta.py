"""gated_delta: outputs, final state and every gradient against the fp64 loop; masks, splits, strong decay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from spikelm.errors import ShapeError
from spikelm.kernels.dispatch import choose, use_backend
from spikelm.kernels.gated_delta import gated_delta
from spikelm.kernels.gated_delta.chunked import LONGEST_CHUNK

from .gated_delta_cases import NAMES, SCALE, SHAPES, assert_close, call, make_case, reference, run


def test_reference_is_the_equation() -> None:
    """S_t = exp(g) (I - beta k^T k) S_{t-1} + beta k^T v with the matrices written out."""
    case = make_case(2, 9, 6, 3, 4, 5)
    q, k, v, g, beta, state = case.inputs
    outputs = torch.zeros(2, 9, 6, 5).double()
    last = torch.zeros_like(state)
    for row in range(2):
        for head in range(3):
            S = state[row, head]
            for t in range(9):
                key, value = k[row, t, head][:, None], v[row, t, head][None]
                strength = beta[row, t, head]
                S = g[row, t, head].exp() * (torch.eye(4).double() - strength * key @ key.T) @ S
                S = S + strength * key @ value
                for query in (2 * head, 2 * head + 1):
                    outputs[row, t, query] = SCALE * q[row, t, query] @ S
            last[row, head] = S
    with use_backend("reference"):
        o, end = call(case.inputs)
    torch.testing.assert_close(o, outputs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masks", ["none", "reset", "valid", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_fp64_loop(
    form: str, shape: tuple[int, int, int, int, int, int], masks: str, poisoned: None
) -> None:
    case = make_case(*shape, masks=masks)
    expected = reference(case)
    assert_close(run(case), expected, 1e-10)
    assert_close(run(case, torch.float32), expected, 2e-4)


@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("strongest", [1.0, 2.0])
def test_any_decay_and_strength(form: str, strongest: float, masks: str) -> None:
    """Decays from none to complete beside each other, beta from 0 to 1 or 2: as exact as the loop in fp32."""
    case = make_case(2, 130, 4, 2, 8, 6, masks=masks, decay="mixed", strongest=strongest)
    assert case.inputs[3].isneginf().any() and (case.inputs[3] == 0).any()
    assert (case.inputs[4] == 0).any() and (case.inputs[4] == strongest).any()
    expected = reference(case)
    assert_close(run(case), expected, 1e-10)
    got, loop = run(case, torch.float32), reference(case, torch.float32)
    for name, a, b, exact in zip(NAMES, got, loop, expected, strict=True):
        assert torch.isfinite(a).all(), name
        scale = exact.abs().max().clamp(min=1)
        error, error_loop = (a - exact).abs().max() / scale, (b - exact).abs().max() / scale
        assert error < 2 * error_loop + 1e-6, f"{name}: {error:.1e}, the fp32 loop {error_loop:.1e}"


def test_small_decays_survive_beside_a_large_one(form: str) -> None:
    """In fp32 the running sum -1e5 - 1e-3 - 1e-3 - .. knows nothing of the small steps; theirs alone does."""
    steps = 60
    k, v = torch.zeros(1, steps, 1, 2), torch.zeros(1, steps, 1, 1)
    g, beta = torch.full((1, steps, 1), -1e-3), torch.zeros(1, steps, 1)
    k[0, 1, 0, 0] = v[0, 1, 0, 0] = beta[0, 1, 0] = 1.0
    g[0, 0] = -1e5
    q = torch.ones(1, steps, 1, 2)
    o, _ = gated_delta(q, k, v, g, beta, torch.zeros(1, 1, 2, 1), scale=1.0)
    expected = torch.exp(-1e-3 * torch.arange(steps - 1))
    torch.testing.assert_close(o[0, 1:, 0, 0], expected, rtol=1e-6, atol=0)


def test_what_is_written_is_read_back(form: str) -> None:
    """With beta = 1 and no decay a key returns the last value that was written under it."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.linalg.qr(torch.randn(8, 8, generator=generator).double()).Q
    order = torch.randint(8, (100,), generator=generator)
    values = torch.randn(100, 3, generator=generator).double()
    k, v = keys[order][None, :, None], values[None, :, None]
    o, state = gated_delta(
        k, k, v, torch.zeros(1, 100, 1), torch.ones(1, 100, 1), torch.zeros(1, 1, 8, 3), scale=1.0
    )
    torch.testing.assert_close(o[0, :, 0], values, rtol=1e-10, atol=1e-10)
    for key in range(8):
        newest = int((order == key).nonzero()[-1])
        torch.testing.assert_close(keys[key] @ state[0, 0], values[newest], rtol=1e-10, atol=1e-10)


def test_repeated_keys_and_reflections_stay_bounded(form: str) -> None:
    """beta = 2 is a reflection and equal keys make the triangular system as full as it can be."""
    generator = torch.Generator().manual_seed(0)
    k = normalize(torch.randn(1, 3, 1, 16, generator=generator), dim=-1)
    k = k[:, torch.randint(3, (500,), generator=generator)]
    state = torch.randn(1, 1, 16, 16, generator=generator)
    inputs = (k, k, torch.zeros(1, 500, 1, 16), torch.zeros(1, 500, 1), torch.full((1, 500, 1), 2.0), state)
    _, last = call(inputs)
    with use_backend("reference"):
        _, exact = call([x.double() for x in inputs])
    torch.testing.assert_close(last.norm(), state.norm(), rtol=1e-4, atol=0)
    torch.testing.assert_close(last.double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("decay", ["mild", "mixed"])
def test_splitting_anywhere(form: str, decay: str) -> None:
    case = make_case(2, LONGEST_CHUNK + 6, 4, 2, 5, 3, masks="both", decay=decay)
    *tokens, state = case.inputs
    assert case.reset is not None and case.valid is not None
    whole, last = call(case.inputs, case.reset, case.valid)
    for cut in range(1, LONGEST_CHUNK + 6):
        left = [x[:, :cut] for x in tokens]
        right = [x[:, cut:] for x in tokens]
        head, middle = call([*left, state], case.reset[:, :cut], case.valid[:, :cut])
        tail, end = call([*right, middle], case.reset[:, cut:], case.valid[:, cut:])
        torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(end, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cut", [1, 20, 32, 49])
def test_gradients_pass_through_a_split(form: str, cut: int) -> None:
    case = make_case(2, 50, 4, 2, 5, 3, masks="both")
    inputs = [x.clone().requires_grad_() for x in case.inputs]
    *tokens, state = inputs
    assert case.reset is not None and case.valid is not None
    head, middle = call([*(x[:, :cut] for x in tokens), state], case.reset[:, :cut], case.valid[:, :cut])
    tail, last = call([*(x[:, cut:] for x in tokens), middle], case.reset[:, cut:], case.valid[:, cut:])
    o = torch.cat([head, tail], 1)
    grads = torch.autograd.grad([o, last], inputs, [case.grad_o, case.grad_state])
    assert_close([o.detach(), last.detach(), *grads], reference(case), 1e-10)


def test_reset_equals_separate_sequences(form: str) -> None:
    case = make_case(1, 90, 4, 2, 5, 3)
    *tokens, _ = case.inputs
    starts = [0, 1, 25, 87]
    reset = torch.zeros(1, 90, dtype=torch.bool)
    reset[0, starts] = True
    packed, last = call([*tokens, torch.full((1, 2, 5, 3), 5.0).double()], reset)
    empty = torch.zeros(1, 2, 5, 3).double()
    for start, end in zip(starts, [*starts[1:], 90], strict=True):
        alone, end_state = call([*(x[:, start:end] for x in tokens), empty])
        torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, end_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_none(any_form: str, side: str) -> None:
    """Padding changes nothing, even where everything in it is NaN."""
    case = make_case(2, 40, 4, 2, 5, 3)
    valid = torch.ones(2, 49, dtype=torch.bool)
    here = slice(9, None) if side == "left" else slice(0, 40)
    valid[:, slice(0, 9) if side == "left" else slice(40, None)] = False
    expected = reference(case)
    inputs = [x.clone().requires_grad_() for x in case.inputs]
    padded = []
    for x in inputs[:-1]:
        nan = x.new_full((2, 9, *x.shape[2:]), torch.nan)
        padded.append(torch.cat([nan, x] if side == "left" else [x, nan], 1))
    o, last = call([*padded, inputs[-1]], None, valid)
    grads = torch.autograd.grad([o[:, here], last], inputs, [case.grad_o, case.grad_state])
    assert (o[~valid] == 0).all()
    assert_close([o[:, here].detach(), last.detach(), *grads], expected, 1e-10)


def test_a_reset_at_padding_empties_the_state(any_form: str) -> None:
    case = make_case(1, 6, 2, 1, 4, 3)
    *tokens, state = case.inputs
    reset, valid = torch.zeros(2, 1, 6, dtype=torch.bool)
    reset[0, 2], valid[0, :2] = True, True
    _, last = call([*tokens, state], reset, valid)
    assert not last.any()
    valid[0, 4] = True
    o, _ = call([*tokens, state], reset, valid)
    alone, _ = call([*(x[:, 4:5] for x in tokens), torch.zeros_like(state)])
    torch.testing.assert_close(o[:, 4:5], alone, rtol=1e-12, atol=1e-12)


def test_no_state_leaks_out_of_infinite_memory(form: str) -> None:
    """g = -inf and a reset are the same."""
    case = make_case(2, 70, 4, 2, 5, 3)
    q, k, v, g, beta, state = case.inputs
    reset = torch.zeros(2, 70, dtype=torch.bool)
    reset[:, [0, 3, 50, 69]] = True
    closed = torch.where(reset[..., None], -torch.inf, g)
    by_reset, by_decay = call(case.inputs, reset), call((q, k, v, closed, beta, state))
    torch.testing.assert_close(by_reset, by_decay, rtol=0, atol=0)


def test_rows_and_heads_are_independent(form: str) -> None:
    case = make_case(3, 70, 4, 2, 5, 3, masks="both")
    whole, last = call(case.inputs, case.reset, case.valid)
    q, k, v, g, beta, state = case.inputs
    assert case.reset is not None and case.valid is not None
    for row in range(3):
        one = slice(row, row + 1)
        o, end = call([x[one] for x in case.inputs], case.reset[one], case.valid[one])
        torch.testing.assert_close((o, end), (whole[one], last[one]), rtol=1e-12, atol=1e-12)
    for group in range(2):
        one = slice(group, group + 1)
        two = slice(2 * group, 2 * group + 2)
        inputs = (q[:, :, two], k[:, :, one], v[:, :, one], g[..., one], beta[..., one], state[:, one])
        o, end = call(inputs, case.reset, case.valid)
        torch.testing.assert_close((o, end), (whole[:, :, two], last[:, one]), rtol=1e-12, atol=1e-12)


def test_groups_equal_repeated_heads(form: str) -> None:
    case = make_case(2, 70, 6, 2, 5, 3, masks="both")
    q, k, v, g, beta, state = case.inputs
    grouped, last = call(case.inputs, case.reset, case.valid)
    repeated = [x.repeat_interleave(3, 2) for x in (k, v, g, beta)]
    o, end = call([q, *repeated, state.repeat_interleave(3, 1)], case.reset, case.valid)
    torch.testing.assert_close(o, grouped, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end[:, ::3], last, rtol=1e-12, atol=1e-12)


def test_gradcheck(form: str) -> None:
    case = make_case(1, LONGEST_CHUNK + 3, 2, 1, 2, 2, masks="both")
    inputs = [x.clone().requires_grad_() for x in case.inputs]
    assert torch.autograd.gradcheck(
        lambda *x: call(x, case.reset, case.valid), inputs, eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=True
    )


def test_only_one_result_used(form: str) -> None:
    case = make_case(2, 12, 4, 2, 5, 3)
    for pick in (0, 1):
        grads = []
        for backend in (form, "reference"):
            with use_backend(backend):
                inputs = [x.clone().requires_grad_() for x in case.inputs]
                result = call(inputs)[pick]
                weight = case.grad_o if pick == 0 else case.grad_state
                grads.append(torch.autograd.grad((result * weight).sum(), inputs, materialize_grads=True))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_low_precision_inputs_are_computed_in_fp32(form: str) -> None:
    case = make_case(2, 70, 4, 2, 8, 8)
    low = [x.bfloat16() for x in case.inputs[:5]]
    state = case.inputs[5].float()
    exact, exact_last = call([*(x.float() for x in low), state])
    o, last = call([*low, state])
    assert o.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert torch.equal(o, exact.bfloat16()) and torch.equal(last, exact_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, last = call([*low, state])
    assert torch.equal(o, exact.bfloat16()) and torch.equal(last, exact_last)


def test_any_memory_layout(form: str) -> None:
    case = make_case(2, 35, 4, 2, 8, 6, masks="both")
    q, k, v, g, beta, state = case.inputs
    assert case.reset is not None and case.valid is not None
    expected = run(case)
    strided = replace(
        case,
        inputs=(
            q.transpose(1, 2).contiguous().transpose(1, 2),
            k.mT.contiguous().mT,
            torch.cat([v, v], 3)[..., :6],
            g.repeat_interleave(2, 1)[:, ::2],
            beta.mT.contiguous().mT,
            state.mT.contiguous().mT,
        ),
        reset=case.reset.T.contiguous().T,
    )
    assert_close(run(strided), expected, 1e-12)


def test_nothing_to_do(form: str) -> None:
    state = torch.randn(2, 1, 4, 3)
    shapes = ((2, 0, 2, 4), (2, 0, 1, 4), (2, 0, 1, 3), (2, 0, 1), (2, 0, 1))
    o, last = call([*(torch.zeros(shape) for shape in shapes), state])
    assert o.shape == (2, 0, 2, 3) and torch.equal(last, state)
    for steps in (1, 5):
        shapes = ((0, steps, 2, 4), (0, steps, 1, 4), (0, steps, 1, 3), (0, steps, 1), (0, steps, 1))
        o, last = call([*(torch.zeros(shape) for shape in shapes), state[:0]])
        assert o.shape == (0, steps, 2, 3) and last.shape == (0, 1, 4, 3)


def test_nan_is_not_swallowed(form: str) -> None:
    case = make_case(2, 70, 4, 2, 5, 3)
    k = case.inputs[1].clone()
    k[0, 2, 0, 0] = torch.nan
    o, last = call((case.inputs[0], k, *case.inputs[2:]))
    assert o[0, 2:, :2].isnan().all() and last[0, 0].isnan().any()
    assert torch.isfinite(o[0, :, 2:]).all() and torch.isfinite(o[1]).all()


def test_other_devices_run_the_torch_form() -> None:
    meta = torch.device("meta")
    assert choose("gated_delta", meta) == "torch"
    case = make_case(2, 130, 4, 2, 5, 3, masks="both")
    assert case.reset is not None and case.valid is not None
    o, last = call([x.to(meta) for x in case.inputs], case.reset.to(meta), case.valid.to(meta))
    assert o.shape == (2, 130, 4, 3) and last.shape == (2, 2, 5, 3)


def test_wrong_shapes_are_refused() -> None:
    case = make_case(2, 5, 4, 2, 3, 6)
    q, k, v, g, beta, state = case.inputs
    for inputs, match in (
        ((q, k[0], v, g, beta, state), r"floating k \[B, T, G, K\]"),
        ((q, k.long(), v, g, beta, state), r"floating k \[B, T, G, K\]"),
        ((q[:, :, :3], k, v, g, beta, state), "a multiple of 2 heads"),
        ((q[..., :2], k, v, g, beta, state), "a multiple of 2 heads"),
        ((q, k, v[:, :, :1], g, beta, state), r"v \[2, 5, 2, V\]"),
        ((q, k, v, g[..., :1], beta, state), r"g \[2, 5, 2\]"),
        ((q, k, v, g, beta[:, :1], state), r"beta \[2, 5, 2\]"),
        ((q, k, v, g, beta, state.mT), r"state \[2, 2, 3, 6\]"),
    ):
        with pytest.raises(ShapeError, match=match):
            call(inputs)
    with pytest.raises(ShapeError, match=r"reset must be bool \[2, 5\]"):
        call(case.inputs, torch.zeros(2, 5))


@pytest.mark.parametrize("peer", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("steps", [1, 63, 130])
def test_equals_transformers(form: str, peer: str, steps: int) -> None:
    """An independent implementation: Qwen3-Next's, in fp32, with and without its own normalisation."""
    case = make_case(2, steps, 3, 3, 8, 6)
    q, k, v, g, beta, state = (x.float() for x in case.inputs)
    scale = 8**-0.5
    expected, expected_state = getattr(qwen3_next, peer)(
        q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True
    )
    o, last = gated_delta(q, k, v, g, beta, state, scale=scale)
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, expected_state, rtol=1e-4, atol=1e-5)
