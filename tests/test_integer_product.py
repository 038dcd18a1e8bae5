"""Without gradients int8 counts, scale and bias reach int8 weights in one call: the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikelm.codings import build_coding
from spikelm.kernels.dispatch import available, use_backend
from spikelm.meter import Meter
from spikelm.neurons.adaptive import Adaptive
from spikelm.neurons.base import build_neuron
from spikelm.projection import Projection
from spikelm.recurrence import EMPTY, Context
from spikelm.state import State
from spikelm.weights import Int8Linear

ADAPTIVE = {"name": "adaptive", "k": 3.0, "dead_zone": 0.5, "cap": 5}
BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            not all(available()[op].get(name) is True for op in ("encode", "int8_linear")),
            reason=f"no {name} kernels here",
        ),
    )
    for name in ("reference", "torch", "c")
]


def projection(neuron: dict[str, Any], bias: bool = True, layout: str | None = None) -> Projection:
    torch.manual_seed(0)
    made = Projection(70, 90, build_neuron(neuron, 70), bias, {"name": "int8", "group_size": 16})
    linear = made.linear
    assert isinstance(linear, Int8Linear)
    linear.load_float(torch.randn(90, 70))
    if made.bias is not None:
        nn.init.normal_(made.bias)
    if layout is not None:
        linear.pack_(layout)
    return made.eval()


def both(made: Projection, x: Tensor, ctx: Context = EMPTY) -> tuple[Tensor, Tensor]:
    """Output with gradients enabled, one operation after the other, and without, in one."""
    with torch.enable_grad():
        apart = made(x, made.init_state(len(x)), ctx)[0].detach()
    with torch.no_grad():
        return apart, made(x, made.init_state(len(x)), ctx)[0]


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(3, 5, 70, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[0, 2] = 0.0
    x[1, 3] *= 1e-12  # below the smallest threshold
    return x.to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_the_bits_are_those_of_separate_operations(backend: str, dtype: torch.dtype, bias: bool) -> None:
    made, x = projection(ADAPTIVE, bias), inputs(dtype)
    valid = torch.ones(3, 5, dtype=torch.bool)
    valid[2, 1:3] = False
    with use_backend(backend):
        for ctx in (EMPTY, Context(valid=valid)):
            apart, one = both(made, x, ctx)
            assert torch.equal(apart, one) and one.dtype == dtype
        step = both(made, x[:, 0])
        assert torch.equal(*step) and torch.equal(step[1], both(made, x)[1][:, 0])


@pytest.mark.skipif(available()["int8_linear"]["c"] is not True, reason="packed weights need the C kernels")
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_packed_weights_too(layout: str, dtype: torch.dtype) -> None:
    plain, packed = projection(ADAPTIVE), projection(ADAPTIVE, layout=layout)
    if dtype == torch.bfloat16:
        plain, packed = plain.to(dtype), packed.to(dtype)  # the bias is bfloat16, the scales are not
    apart, one = both(packed, inputs(dtype))
    assert torch.equal(apart, one) and torch.equal(one, both(plain, inputs(dtype))[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_is_seen_in_its_row(backend: str, bad: float) -> None:
    """(int8 has no NaN; the threshold keeps it.)"""
    made, x = projection(ADAPTIVE), inputs()
    x[1, 1, 3] = bad
    with use_backend(backend):
        apart, one = both(made, x)
    assert bool(one[1, 1].isnan().all()) and not bool(apart[1, 1].isfinite().any())
    good = torch.ones(3, 5, dtype=torch.bool)
    good[1, 1] = False
    assert torch.equal(apart[good], one[good]) and bool(one[good].isfinite().all())


def reached(made: Projection, x: Tensor, ctx: Context = EMPTY) -> tuple[torch.dtype, bool]:
    """Dtype of what the weights were multiplied with, and whether the scale came with it."""
    seen: list[tuple[torch.dtype, bool]] = []
    hook = made.linear.register_forward_pre_hook(
        lambda _, given: seen.append((given[0].dtype, len(given) > 1 and given[1] is not None))
    )
    with torch.no_grad():
        made(x, made.init_state(len(x)), ctx)
    hook.remove()
    return seen[-1]


def test_counts_are_int8_where_nobody_looks_at_them() -> None:
    made, x = projection(ADAPTIVE), inputs()
    assert reached(made, x) == (torch.int8, True)
    assert reached(made, x, Context(meter=Meter())) == (torch.float32, True)
    assert reached(projection({"name": "adaptive", "cap": None}), x) == (torch.int8, True)  # 127 before int8
    assert reached(projection({"name": "lif", "threshold": 0.3}), x) == (torch.float32, False)
    coded, _ = made(x, None, Context(coding=build_coding("bidirectional")))
    assert torch.equal(coded.detach(), both(made, x)[1])


class Halved(Adaptive):
    """Another encode(), which the int8 form knows nothing of."""

    def encode(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, Tensor | None, State]:
        return super().encode(x / 2, state, ctx)


def test_a_neuron_with_its_own_encoding_is_asked_for_that() -> None:
    made = projection(ADAPTIVE)
    made.neuron = Halved(70, **{key: value for key, value in ADAPTIVE.items() if key != "name"})
    apart, one = both(made, inputs())
    assert torch.equal(apart, one)
    assert not torch.equal(one, both(projection(ADAPTIVE), inputs())[1])
