"""All experts of a mixture in three grouped matrix products, instead of three products per expert.

Only where that is the same computation: float weights, whole on this rank and called by nobody's hooks, and
input neurons that are alike, have no parameters and no firing-rate loss. Then a token is encoded once for all
of its experts, and its counts reach the weights of each in one call of ``torch.nn.functional.grouped_mm``.
The weights are stacked for it in every call, so that each expert keeps its own parameters, names and
projections; that is worth it where every expert has something to do (measured: docs/moe.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from spikelm.activations import silu
from spikelm.channels.grouped_product import grouped_product
from spikelm.channels.swiglu import PROJECTIONS, SwiGLU
from spikelm.kernels.dispatch import backend
from spikelm.neurons.base import Neuron
from spikelm.projection import Projection
from spikelm.recurrence import Context

ALIGNMENT = 16
"""Bytes; grouped_mm wants rows that begin at multiples of it."""
ROWS_PER_EXPERT = 4
"""Without gradients fewer rows than this per expert are computed faster by the experts that have any."""


def worthwhile(experts: Sequence[nn.Module], rows: int) -> bool:
    """Whether a grouped product is the faster one; never with the ``reference`` kernels asked for."""
    if rows == 0 or backend() == "reference":
        return False
    return torch.is_grad_enabled() or rows >= ROWS_PER_EXPERT * len(experts)


def refusal(experts: Sequence[nn.Module], device: torch.device, ctx: Context) -> str | None:
    """Why experts cannot be grouped on this device, or None where they can."""
    if not hasattr(nn.functional, "grouped_mm"):
        return "this torch has no grouped_mm"
    if ctx.meter is not None or ctx.coding is not None:
        return "a meter or a coding looks at each projection"
    if not all(type(expert) is SwiGLU for expert in experts):
        return "an expert is no SwiGLU"
    neurons: dict[str, list[Neuron]] = {name: [] for name in PROJECTIONS}
    for name in PROJECTIONS:
        for expert in experts:
            part = getattr(expert, name)
            problem = _unfit(part)
            if problem is not None:
                return f"{name}: {problem}"
            neurons[name].append(part.neuron)
    dtype = _product_dtype(cast(SwiGLU, experts[0]).gate, device)
    if device.type == "cuda":
        # float32 and older cards are refused by some releases of torch.
        if dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (8, 0):
            return f"grouped_mm on CUDA wants bfloat16 on Ampere or later, not {dtype}"
    elif device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped_mm does not know {dtype} on {device.type}"
    shape = cast(Tensor, cast(SwiGLU, experts[0]).gate.linear.weight).shape
    if any(size * dtype.itemsize % ALIGNMENT for size in shape):
        return f"{tuple(shape)} {dtype} has rows that are no multiple of {ALIGNMENT} bytes"
    # Gate and up share one encoding of the token, and each of them all experts.
    return _unlike([*neurons["gate"], *neurons["up"]]) or _unlike(neurons["down"])


def _product_dtype(part: Projection, device: torch.device) -> torch.dtype:
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return cast(Tensor, part.linear.weight).dtype


def _unfit(part: nn.Module) -> str | None:
    """Why the weights of a projection cannot be used without calling it."""
    linear = getattr(part, "linear", None)
    if type(part) is not Projection or type(linear) is not nn.Linear or part.bias is not None:
        return "no plain projection with float weights"
    if getattr(part, "parallel", None) is not None or hasattr(linear.weight, "ds_id"):
        return "its weights are split among ranks"
    hooked = (part, linear)
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in hooked):
        return "a hook waits for its call"
    return None


def _unlike(neurons: Sequence[Neuron]) -> str | None:
    """Why one neuron cannot stand for all of these."""
    first = _options(neurons[0])
    for neuron in neurons:
        if neuron.rate_target is not None or neuron._parameters or neuron._modules:
            return "a neuron has parameters or a rate_target of its own"
        if type(neuron) is not type(neurons[0]) or _options(neuron) != first:
            return "the neurons differ"
    return None


def _options(neuron: Neuron) -> dict[str, object]:
    return {key: v for key, v in vars(neuron).items() if not key.startswith("_") and key != "path"}


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
    return _product(experts, "down", spikes.flatten(1), None if scale is None else scale.flatten(1), ends)


def _product(
    experts: Sequence[nn.Module], name: str, spikes: Tensor, scale: Tensor | None, ends: Tensor
) -> Tensor:
    matrices = [cast(Projection, getattr(expert, name)).linear.weight for expert in experts]
    weights = torch.stack(cast(list[Tensor], matrices))
    dtype = _product_dtype(cast(SwiGLU, experts[0]).gate, spikes.device)
    if torch.compiler.is_compiling() and dtype != torch.bfloat16:
        y = grouped_product(spikes.to(dtype), weights.to(dtype), ends)
    else:
        y = nn.functional.grouped_mm(spikes.to(dtype), weights.to(dtype).transpose(1, 2), offs=ends)
    return y if scale is None else (y * scale).to(y.dtype)
