"""All experts of a mixture in three grouped matrix products, instead of three products per expert.

Only where that is the same computation: float weights, whole on this rank and called by nobody's hooks, and
input neurons that are alike, have no parameters and no firing-rate loss. Then a token is encoded once for all
of its experts, and its counts reach the weights of each in one call of ``torch.nn.functional.grouped_mm``.
The weights are stacked for it in every call, so that each expert keeps its own parameters, names and
projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from spikelm.channels.swiglu import PROJECTIONS, SwiGLU
from spikelm.projection import Projection
from spikelm.recurrence import Context

ALIGNMENT = 16
"""Bytes; grouped_mm wants rows that begin at multiples of it."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(experts: Sequence[nn.Module], x: Tensor, ctx: Context) -> str | None:
    """Why these experts cannot be grouped on tokens like x [.., D], or None where they can."""
    if not hasattr(nn.functional, "grouped_mm"):
        return "this torch has no grouped_mm"
    if ctx.meter is not None or ctx.coding is not None:
        return "a meter or a coding looks at each projection"
    for name in PROJECTIONS:
        parts = [getattr(expert, name, None) for expert in experts if isinstance(expert, SwiGLU)]
        if len(parts) < len(experts) or not all(type(part) is Projection for part in parts):
            return "an expert is no SwiGLU of plain projections"
        projections = cast(list[Projection], parts)
        problem = _neurons(projections) or _weights(projections, x)
        if problem is not None:
            return f"{problem} ({name})"
    if repr(_options(experts[0], "gate")) != repr(_options(experts[0], "up")):
        return "gate and up have different neurons"
    return None


def _options(expert: nn.Module, name: str) -> dict[str, object]:
    """What says how the input neuron of a projection computes."""
    neuron = getattr(expert, name).neuron
    return {"type": type(neuron)} | {
        key: value for key, value in vars(neuron).items() if not key.startswith("_") and key != "path"
    }


def _neurons(parts: list[Projection]) -> str | None:
    neurons = [part.neuron for part in parts]
    if any(neuron.rate_target is not None for neuron in neurons):
        return "a neuron has a rate_target of its own"
    if any(list(neuron.parameters()) for neuron in neurons):
        return "a neuron has parameters of its own"
    if any(neuron.training != neurons[0].training for neuron in neurons):
        return "some experts train and some do not"
    kinds = {
        repr({key: value for key, value in vars(n).items() if not key.startswith("_") and key != "path"})
        for n in neurons
    }
    if len({type(neuron) for neuron in neurons}) > 1 or len(kinds) > 1:
        return "the experts' neurons differ"
    return None


def _weights(parts: list[Projection], x: Tensor) -> str | None:
    for part in parts:
        linear = part.linear
        if type(linear) is not nn.Linear or part.bias is not None:
            return "weights are not float matrices"
        if linear.weight.dim() != 2 or hasattr(linear.weight, "ds_id"):
            return "weights are split among ranks"
        hooked = (part, linear)
        if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in hooked):
            return "a hook waits for the call of a projection"
    weight = cast(nn.Linear, parts[0].linear).weight
    low = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if low else weight.dtype
    if dtype not in DTYPES:
        return f"grouped_mm does not know {dtype}"
    if any(size * dtype.itemsize % ALIGNMENT for size in weight.shape):
        return f"{tuple(weight.shape)} {dtype} is no multiple of {ALIGNMENT} bytes"
    return None


def grouped(experts: Sequence[nn.Module], tokens: Tensor, rows: Tensor, load: Tensor, ctx: Context) -> Tensor:
    """Outputs of all experts on their tokens.

    Args:
        experts: those that :func:`refusal` has nothing against.
        tokens: [N, 1, D] or [N, D].
        rows: int64 [M], the token of every row of the result, sorted by expert.
        load: int64 [E], rows of each expert.
        ctx: without masks.

    Returns:
        [M, D].
    """
    ends = load.cumsum(0).to(torch.int32)
    first = cast(SwiGLU, experts[0])
    spikes, scale, _ = first.gate.neuron.encode(tokens, {}, ctx)
    spikes = spikes.flatten(1)[rows]
    scale = None if scale is None else scale.flatten(1)[rows]
    gate = _product(experts, "gate", spikes, scale, ends)
    up = _product(experts, "up", spikes, scale, ends)
    hidden = (silu(gate) * up).unflatten(0, (-1, *[1] * (tokens.dim() - 2)))
    spikes, scale, _ = first.down.neuron.encode(hidden, {}, ctx)
    return _product(
        experts, "down", spikes.flatten(1), None if scale is None else scale.flatten(1), ends
    )


def _product(
    experts: Sequence[nn.Module], name: str, spikes: Tensor, scale: Tensor | None, ends: Tensor
) -> Tensor:
    weights = torch.stack([cast(Projection, getattr(expert, name)).linear.weight for expert in experts])
    low = torch.is_autocast_enabled(spikes.device.type)
    dtype = torch.get_autocast_dtype(spikes.device.type) if low else weights.dtype
    y = nn.functional.grouped_mm(spikes.to(dtype), weights.to(dtype).transpose(1, 2), offs=ends)
    return y if scale is None else (y * scale).to(y.dtype)
