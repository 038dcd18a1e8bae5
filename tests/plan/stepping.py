"""A plan and the model's own step side by side: what must be equal, and where a spike may fall either way."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spikelm import state as states
from spikelm.decoding import DecodePlan
from spikelm.model import SpikeLM
from spikelm.neurons.adaptive import Adaptive
from spikelm.neurons.base import Neuron
from spikelm.neurons.heaviside import Heaviside
from spikelm.neurons.lif import IntegrateAndFire
from spikelm.recurrence import Context
from spikelm.state import State

AMBIGUOUS = 2e-4
"""A spike is ambiguous where its neuron is this near to deciding otherwise, in thresholds: float32 sums in
another order (some hundred terms, relative 1e-6 each, a few layers on) may then move it."""


def python_step(model: SpikeLM, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """Logits [B, V] and the new state, the way generation calls the model."""
    logits, state = model(tokens[:, None], state)
    return logits[:, 0], state


class Margin:
    """Smallest distance to another decision among the neurons of one step."""

    def __init__(self) -> None:
        self.least = float("inf")

    def see(self, distance: Tensor) -> None:
        """Distances of some neurons, of any shape."""
        if distance.numel():
            self.least = min(self.least, float(distance.abs().min()))


@contextmanager
def margins(monkeypatch: Any) -> Iterator[Margin]:
    """Look at the input of every spiking neuron."""
    margin = Margin()
    encode, lif_fast, heaviside = Adaptive._counts, IntegrateAndFire.fast, Heaviside.step

    def counts(self: Adaptive, x: Tensor, state: State, ctx: Context, **options: Any) -> Any:
        found = encode(self, x, state, ctx, **options)
        scaled = (x / found[1]).double()
        distance = ((scaled.abs() % 1.0) - 0.5).abs()
        if self.dead_zone:
            mean = x.abs().double().mean(-1, keepdim=True)
            distance = torch.minimum(distance, (x.abs() / mean - self.dead_zone).abs())
        margin.see(distance)
        return found

    def fast(self: IntegrateAndFire, x: Tensor, state: State, ctx: Context) -> Any:
        h = self._drive(x)
        for t in range(x.shape[1]):
            v, leak = state["membrane"], self.leak(h)
            rest = v - self.v_reset
            now = v + (h[:, t] - rest) * leak if self.decay_input else v - rest * leak + h[:, t]
            margin.see((now - self.threshold) / self.threshold)
        return lif_fast(self, x, state, ctx)

    def step(self: Heaviside, x: Tensor, state: State, ctx: Context) -> Any:
        h = x if self.gain is None else self.gain(x)
        # Zero is what nothing makes ambiguous: sums of no spikes are exactly zero in every order.
        margin.see((h - self.threshold)[h != 0])
        return heaviside(self, x, state, ctx)

    with monkeypatch.context() as patch:
        patch.setattr(Adaptive, "_counts", counts)
        patch.setattr(IntegrateAndFire, "fast", fast)
        patch.setattr(Heaviside, "step", step)
        yield margin


def spikes(model: SpikeLM) -> bool:
    """Whether any neuron of the model spikes."""
    return any(isinstance(module, Neuron) and module.spiking for module in model.modules())


def assert_states(got: State, wanted: State, tolerance: float, exact: State | None = None) -> None:
    """Two states of the same structure, floats within a tolerance relative to their largest.

    Args:
        got: of the plan.
        wanted: of the model.
        tolerance: see above; 0 for equal bits.
        exact: of the model in float64. Where it shows the model's own error, twice that is allowed too: some
            outputs amplify rounding (a norm over a head that hardly answers), in every form alike.
    """
    flat, other = states.flatten(got), states.flatten(wanted)
    truth = other if exact is None else states.flatten(exact)
    assert flat.keys() == other.keys()
    for name, value in other.items():
        assert flat[name].shape == value.shape and flat[name].dtype == value.dtype, name
        if value.dtype == torch.int64:
            assert torch.equal(flat[name], value), name
        else:
            assert_close(flat[name], value, tolerance, truth[name])


def assert_close(got: Tensor, wanted: Tensor, tolerance: float, exact: Tensor) -> None:
    """As :func:`assert_states` says, of one tensor."""
    scale = max(1.0, float(wanted.abs().max()))
    error = float((wanted - exact).abs().max())
    assert float((got - wanted).abs().max()) <= tolerance * scale + 2 * error


@torch.no_grad()
def assert_steps(
    model: SpikeLM, plan: DecodePlan, tokens: Tensor, monkeypatch: Any, tolerance: float = 1e-5
) -> int:
    """Every step of a plan equals the model's, from the model's state, unless a spike was ambiguous.

    Args:
        model: the model.
        plan: its plan.
        tokens: int64 [T].
        monkeypatch: pytest's.
        tolerance: of logits and states, relative to the largest.

    Returns:
        Steps that were compared.
    """
    double = None
    state = model.init_state(1, max_len=len(tokens))
    assert_states(plan.read(0), state, 0.0)
    compared = 0
    for token in tokens.split(1):
        before = state
        with margins(monkeypatch) as margin:
            wanted, state = python_step(model, token, state)
        got = plan.step(token)
        if margin.least > AMBIGUOUS:
            compared += 1
            try:
                assert_close(got, wanted, tolerance, wanted)
                assert_states(plan.read(0), state, tolerance)
            except AssertionError:  # the model itself may be that far from the truth
                double = double or copy.deepcopy(model).double()
                truth, exact = python_step(double, token, states.tree_map(_doubled, before))
                assert_close(got, wanted, tolerance, truth)
                assert_states(plan.read(0), state, tolerance, exact)
        plan.write(0, state)
    return compared


def _doubled(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value
