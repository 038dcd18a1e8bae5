"""The only place where activations meet weights.

A projection is an input neuron followed by a matrix product. With an integer neuron the product is taken of
the counts themselves and scaled by the threshold afterwards, y = V * (n W^T): what reaches the weights are
integers, exact in bfloat16 and int8. The weights are a plain ``nn.Linear`` child, so that tensor-parallel,
quantisation and LoRA tools find and wrap it, and see spikes as its input.

With int8 weights and an integer neuron the product is one of integers, exact, and its result has the same
bits in any batch. Counts beyond 127 are cut off there. Without a neuron (``none``) int8 weights only save
memory: the product is the float one with what they stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from spikelm.codings.product import expanded_product
from spikelm.errors import PlanError
from spikelm.kernels.plan.builder import INT8_SPIKES, SPIKES
from spikelm.kernels.plan.observation import Observation
from spikelm.neurons.base import LoweredSpikes, Neuron
from spikelm.recurrence import Context, Part, zero_invalid
from spikelm.state import State
from spikelm.weights import FLOAT, LARGEST, Int8Linear, build_weights

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register
    from spikelm.tensor_parallel import Parallel


class Projection(Part):
    """y = scale * linear(spikes) + bias with (spikes, scale) = neuron(x).

    Args:
        in_features: D.
        out_features: D'.
        neuron: input neuron; its state is the projection's state.
        bias: whether to add a bias (after the scale).
        weights: how the weights are held, see :func:`spikelm.weights.build_weights`.

    Attributes:
        shard: what tensor parallelism splits: ``column``, ``row`` or None.
    """

    shard: str | None = None
    parallel: Parallel | None = None
    """What the product does with other ranks, once this is a shard (:mod:`spikelm.tensor_parallel`)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        neuron: Neuron,
        bias: bool = False,
        weights: Mapping[str, Any] = FLOAT,
    ) -> None:
        """Weights are drawn by ``nn.Linear``; the model's initialisation replaces them."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.neuron = neuron
        self.linear = build_weights(weights, in_features, out_features)
        if isinstance(self.linear, Int8Linear) and getattr(neuron, "cap", 0) is None:
            neuron.cap = LARGEST  # type: ignore[assignment]
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        """The neuron's state."""
        return self.neuron.init_state(batch, device, dtype, max_len)

    def _product(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        whole = isinstance(self.linear, Int8Linear) and self.neuron.spiking
        if whole and ctx.coding is None and self.parallel is None and not torch.is_grad_enabled():
            return self._integer_product(x, state, ctx)
        spikes, scale, state = self.neuron.encode(x, state, ctx)
        self._report(x, spikes, scale, ctx)
        parallel = self.parallel
        y = self.multiply(spikes, ctx) if parallel is None else parallel.product(self, spikes, ctx)
        if scale is not None:
            y = (y * scale).to(y.dtype)  # the scale keeps its precision: small ones underflow in float16
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return (y.to(x.dtype) if isinstance(self.linear, Int8Linear) else y), state

    def _integer_product(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """The same bits without gradients: counts stay int8, and scale and bias are part of the product."""
        # A meter is shown counts that are NaN as such.
        encode = self.neuron.encode if ctx.meter is not None else self.neuron.encode_int8
        spikes, scale, state = encode(x, state, ctx)
        self._report(x, spikes, scale, ctx)
        return self.linear(spikes, scale, self.bias).to(x.dtype), state

    def _report(self, x: Tensor, spikes: Tensor, scale: Tensor | None, ctx: Context) -> None:
        """Tell the meter what reaches the weights."""
        if ctx.meter is not None:
            ctx.meter.record(
                self.path,
                spikes,
                spiking=self.neuron.spiking,
                out_features=self.out_features,
                valid=ctx.valid,
                cap=getattr(self.neuron, "cap", None),
            )
            clipped = self.neuron.clipped(x, spikes, scale)
            if clipped is not None:
                ctx.meter.record_clipped(self.path, clipped, valid=ctx.valid)

    def multiply(self, spikes: Tensor, ctx: Context) -> Tensor:
        """Spikes times weights; float32 for int8 weights, else the weights' dtype."""
        if isinstance(self.linear, Int8Linear) and not self.neuron.spiking:
            return self.linear.weight_only(spikes)
        # Binary spikes are one micro-step already, and without a neuron there is nothing to expand.
        if ctx.coding is not None and hasattr(self.neuron, "cap"):
            return expanded_product(self.linear, _as_weights(spikes, self.linear), ctx.coding)
        return cast(Tensor, self.linear(_as_weights(spikes, self.linear)))

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """Neuron and product in a decode plan."""
        if self.parallel is not None:
            raise PlanError(
                f"{self.path} is a shard of a tensor-parallel model; decode plans run whole models"
            )
        bias = self.bias
        if isinstance(self.linear, Int8Linear):
            return self._lower_int8(plan, x, state, bias)
        if type(self.linear) is not nn.Linear or self.linear.bias is not None:
            raise PlanError(f"{self.path} has {type(self.linear).__name__} weights, which have no records")
        weight, y = self.linear.weight, plan.register(self.out_features)
        spikes = self.neuron.lower_spikes(plan, x, state)
        self._observe(plan, spikes)
        row = plan.statistics(self.path, self.in_features, self.out_features)
        plan.record(
            "linear",
            *(cast("Register", spikes.values), y, self.in_features, self.out_features),
            *(-1 if spikes.scale is None else spikes.scale, row),
            p=(weight, bias),
            flags=SPIKES if self.neuron.spiking else 0,
        )
        return y

    def _lower_int8(self, plan: Builder, x: Register, state: Fields, bias: Tensor | None) -> Register:
        linear, y = cast(Int8Linear, self.linear), plan.register(self.out_features)
        row = plan.statistics(self.path, self.in_features, self.out_features)
        if not self.neuron.spiking:
            values = self.neuron.lower(plan, x, state)
            self._observe(plan, LoweredSpikes(values=values))
            plan.record(
                "linear_int8_float",
                *(values, y, row),
                p=(plan.int8_rows(linear.weight, linear.scales, linear.group_size), bias),
            )
            return y
        packed = linear.packed
        weights = (
            plan.int8_rows(linear.weight, linear.scales, linear.group_size)
            if packed is None
            else plan.keep(packed).pointer
        )
        plan.need_scratch(plan.int8_scratch(weights))
        spikes = self.neuron.lower_spikes(plan, x, state, integer=True)
        self._observe(plan, spikes)
        plan.record(
            "linear_int8",
            *(cast("Register", spikes.counts), y, -1 if spikes.scale is None else spikes.scale, row),
            p=(weights, bias),
        )
        return y

    def _observe(self, plan: Builder, spikes: LoweredSpikes) -> None:
        """What :meth:`_product` tells a meter."""
        values = spikes.values if spikes.counts is None else spikes.counts
        clipped = spikes.before is not None and spikes.scale is not None
        plan.observe(
            Observation(
                path=self.path,
                spiking=self.neuron.spiking,
                in_features=self.in_features,
                out_features=self.out_features,
                cap=getattr(self.neuron, "cap", None),
            ),
            cast("Register", values),
            cast("tuple[Register, Register]", (spikes.before, spikes.scale)) if clipped else None,
            flags=0 if spikes.counts is None else INT8_SPIKES,
        )

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One token: x [B, D] -> y [B, D']."""
        return self._product(x, state, ctx)

    def sequence(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """T tokens: x [B, T, D] -> y [B, T, D'], zero where invalid."""
        y, state = self._product(x, state, ctx)
        return (zero_invalid(y, ctx) if self.bias is not None else y), state


def _as_weights(x: Tensor, linear: nn.Module) -> Tensor:
    """X in the dtype of the weights (autocast converts by itself)."""
    # Whole numbers need no other dtype, and packed weights are made anew at every look.
    weight = None if isinstance(linear, Int8Linear) else getattr(linear, "weight", None)
    if weight is None or not weight.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)
