"""Gates that are none are refused on CPUs in every form, by name and place, and leave no trace in a state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spikelm.errors import GateError, KernelError, ShapeError
from spikelm.kernels import gates
from spikelm.kernels.encode import adaptive_encode, adaptive_encode_int8
from spikelm.kernels.event_linear import event_linear
from spikelm.kernels.gated_delta import gated_delta, gated_delta_decode
from spikelm.kernels.gla import gla, gla_decode
from spikelm.kernels.lif import lif, lif_decode
from spikelm.kernels.rowwise import lerp, norm, softmax, unary
from spikelm.kernels.shift_encode import shift_encode
from spikelm.kernels.wkv4 import initial_state, wkv4, wkv4_decode

B, H, G, K, V, C = 2, 4, 2, 5, 3, 37
NAN, INF = math.nan, math.inf
Maker = Callable[[int], dict[str, Tensor]]


def gla_inputs(T: int, width: int) -> dict[str, Tensor]:
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, G, K), torch.randn(B, T, G, V)
    return {"q": q, "k": k, "v": v, "g": -torch.rand(B, T, G, width), "state": torch.randn(B, G, K, V)}


def delta_inputs(T: int) -> dict[str, Tensor]:
    found = gla_inputs(T, 1)
    return {**found, "g": found["g"][..., 0], "beta": torch.rand(B, T, G), "k": found["k"] / K}


def wkv_inputs(T: int) -> dict[str, Tensor]:
    k, v = torch.randn(2, B, T, C)
    return {"w": torch.randn(C), "u": torch.randn(C), "k": k, "v": v, "state": initial_state(B, C)}


def lif_inputs(T: int) -> dict[str, Tensor]:
    return {"x": torch.randn(B, T, C), "v0": torch.zeros(B, C), "rate": torch.rand(C)}


OPS: dict[str, tuple[Callable[..., Any], Maker, dict[str, float]]] = {
    "gla-channel": (gla, lambda T: gla_inputs(T, K), {"scale": 0.5}),
    "gla-head": (gla, lambda T: gla_inputs(T, 1), {"scale": 0.5}),
    "gated_delta": (gated_delta, delta_inputs, {"scale": 0.5}),
    "wkv4": (wkv4, wkv_inputs, {}),
    "lif": (lif, lif_inputs, {}),
}
TOKEN = [("gla-channel", "g"), ("gla-head", "g"), ("gated_delta", "g"), ("gated_delta", "beta")]
CHANNEL = [("wkv4", "w"), ("wkv4", "u"), ("lif", "rate")]


def wrong_for(name: str) -> tuple[float, ...]:
    return (NAN, INF, 0.25) if name == "g" else (NAN,) if name == "w" else (NAN, INF, -INF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 3, 67])
@pytest.mark.parametrize(("op", "name"), TOKEN)
def test_one_wrong_gate_of_a_token_is_found(
    any_form: str, op: str, name: str, T: int, dtype: torch.dtype
) -> None:
    """Wherever it stands: at the first and last token, head and channel."""
    call, make, options = OPS[op]
    for bad in wrong_for(name):
        given = {key: x if key == "state" else x.to(dtype) for key, x in make(T).items()}
        call(**given, **options)
        for place in (tuple(0 for _ in given[name].shape), tuple(n - 1 for n in given[name].shape)):
            broken = given[name].clone()
            broken[place] = bad
            words = rf"{op.partition('-')[0]} got \S+ at {name}\[{', '.join(map(str, place))}\]; expected"
            with pytest.raises(GateError, match=words):
                call(**{**given, name: broken}, **options)


@pytest.mark.parametrize(("op", "name"), CHANNEL)
def test_one_wrong_channel_is_found(any_form: str, op: str, name: str) -> None:
    call, make, options = OPS[op]
    for bad in wrong_for(name):
        for channel in (0, C - 1):
            given = make(40)
            given[name][channel] = bad
            with pytest.raises(KernelError, match=rf"{op} got \S+ at \S+\[{channel}\]; expected"):
                call(**given, **options)


@pytest.mark.parametrize("op", ["gla-channel", "gla-head", "gated_delta"])
def test_minus_infinity_is_a_gate(any_form: str, op: str) -> None:
    """It closes: what was before is forgotten."""
    call, make, options = OPS[op]
    given = make(9)
    given["g"][:, 4] = -INF
    o, last = call(**given, **options)
    later = {key: x if key == "state" else x[:, 4:] for key, x in given.items()}
    expected, end = call(**{**later, "state": torch.zeros_like(given["state"])}, **options)
    torch.testing.assert_close(o[:, 4:], expected)
    torch.testing.assert_close(last, end)


def test_a_decay_so_strong_that_nothing_stays(any_form: str) -> None:
    given = wkv_inputs(6)
    given["w"][:] = 80.0
    y, _ = wkv4(**given)
    assert y.isfinite().all()


@pytest.mark.parametrize(("op", "name"), TOKEN)
def test_what_an_invalid_token_holds_does_not_matter(any_form: str, op: str, name: str) -> None:
    call, make, options = OPS[op]
    given = make(35)
    valid = torch.rand(B, 35) < 0.6
    valid[:, 0], valid[:, -1] = False, True
    given[name][~valid] = NAN
    o, last = call(**given, **options, valid=valid)
    assert o.isfinite().all() and last.isfinite().all()
    given[name][0, -1] = NAN
    with pytest.raises(GateError):
        call(**given, **options, valid=valid)


@pytest.mark.parametrize("threads", [1, 2])
def test_any_thread_tells(c_form: None, threads: int) -> None:
    """Large enough for a team."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for row in range(B):
            q = torch.randn(B, 130, 4, 64)
            g = -torch.rand_like(q)
            g[row, 129, 3, 63] = NAN
            with pytest.raises(GateError, match=rf"g\[{row}, 129, 3, 63\]"):
                gla(q, q, q, g, torch.zeros(B, 4, 64, 64), scale=1.0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("op", ["gla-channel", "gated_delta", "wkv4", "lif"])
def test_compiled_and_differentiated_calls_tell_too(c_form: None, op: str) -> None:
    """The C form is asked by autograd and by torch.compile through a custom op."""
    call, make, options = OPS[op]
    given = make(5)
    name = {"wkv4": "w", "lif": "rate"}.get(op, "g")
    given[name].view(-1)[3] = NAN
    leaves = {key: x.clone().requires_grad_() for key, x in given.items()}
    with pytest.raises(GateError):
        call(**leaves, **options)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **x: call(**x, **options), backend="aot_eager", fullgraph=True)
    with pytest.raises(GateError):
        compiled(**given)


def decode_calls() -> dict[str, tuple[Callable[..., Any], dict[str, Tensor], Tensor, str, dict[str, float]]]:
    """name -> (op, inputs of two rows, pool, the gate, options)."""
    heads = {key: x[:, 0] for key, x in gla_inputs(1, K).items() if key != "state"}
    delta = {key: x[:, 0] for key, x in delta_inputs(1).items() if key != "state"}
    wkv = {key: x if key in "wu" else x[:, 0] for key, x in wkv_inputs(1).items() if key != "state"}
    matrices, sums = torch.randn(3, G, K, V), torch.rand(3, 3, C)
    current = {"x": torch.randn(B, C), "rate": torch.rand(C)}
    return {
        "gla": (gla_decode, heads, matrices, "g", {"scale": 0.5}),
        "gated_delta": (gated_delta_decode, delta, matrices, "g", {"scale": 0.5}),
        "gated_delta-beta": (gated_delta_decode, delta, matrices, "beta", {"scale": 0.5}),
        "wkv4": (wkv4_decode, wkv, sums, "w", {}),
        "lif": (lif_decode, current, torch.rand(3, C), "rate", {}),
    }


@pytest.mark.parametrize("name", list(decode_calls()))
def test_a_refused_step_leaves_the_states_as_they_were(name: str) -> None:
    call, given, pool, gate, options = decode_calls()[name]
    slots, before = torch.tensor([2, 0]), pool.clone()
    given[gate].view(-1)[-1] = NAN
    with pytest.raises(GateError, match="_decode got nan at"):
        call(**given, pool=pool, slots=slots, **options)
    assert torch.equal(pool, before)
    if given[gate].dim() > 1:  # the last row's gates do not matter when it does nothing
        call(**given, pool=pool, slots=torch.tensor([2, -1]), **options)
        assert not torch.equal(pool[2], before[2]) and torch.equal(pool[:2], before[:2])


def test_constants() -> None:
    given = lif_inputs(3)
    for name in ("threshold", "v_reset", "alpha"):
        for bad in (NAN, INF):
            with pytest.raises(KernelError, match=f"lif got {name}={bad}; expected a finite number"):
                lif(**given, **{name: bad})
    with pytest.raises(KernelError, match="lif_decode got threshold=nan"):
        lif_decode(given["x"][:, 0], given["v0"], torch.tensor([0, 1]), given["rate"], threshold=NAN)
    x, one = torch.randn(2, 3, C), torch.ones(C)
    for options in (
        {"k": NAN},
        {"k": 0.0},
        {"k": -1.0},
        {"k": 3.0, "dead_zone": NAN},
        {"k": 3.0, "dead_zone": -1.0},
    ):
        for encode in (adaptive_encode, adaptive_encode_int8):
            with pytest.raises(KernelError, match="expected a finite k above 0"):
                encode(x, **options)  # type: ignore[operator]
        with pytest.raises(KernelError, match="expected a finite k above 0"):
            shift_encode(x, one, None, 1e-5, "rmsnorm", x[:, 0], one[None], **options)
    with pytest.raises(KernelError, match="a cap of at least 1"):
        adaptive_encode(x, k=3.0, cap=0)


def test_vectors_that_do_not_fit_are_refused() -> None:
    """In C they would be read beyond their end."""
    x, short = torch.randn(2, 8), torch.ones(7)
    for call in (
        lambda: norm(x, short, None, 1e-5, "rmsnorm"),
        lambda: norm(x, torch.ones(8), short, 1e-5, "layernorm"),
        lambda: norm(x, torch.ones(8).bfloat16(), None, 1e-5, "rmsnorm"),
        lambda: lerp(x, x, short),
        lambda: lerp(x[:1], x, torch.ones(8)),
        lambda: lerp(x.double(), x, torch.ones(8)),
        lambda: unary(torch.ones(3, dtype=torch.int64), "exp"),
        lambda: softmax(torch.tensor(1.0)),
        lambda: event_linear(x, torch.ones(8, 3, device="meta")),
    ):
        with pytest.raises(ShapeError, match="needs"):
            call()


def test_nobody_looks_where_that_would_break_a_trace() -> None:
    x = torch.tensor([NAN])
    assert gates.looks(x) and gates.looks(None, torch.nn.Parameter(x))
    assert not gates.looks(x.to("meta"))
    torch.func.vmap(lambda y: [y, assert_untouched(y)][0])(x)


def assert_untouched(x: Tensor) -> None:
    assert not gates.looks(x)
