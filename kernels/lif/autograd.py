"""Gradient of the C form of leaky integrate-and-fire, and the call that the public op makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spikelm.errors import KernelError
from spikelm.kernels.lif.c import SURROGATES, forward, lif_backward, lif_forward
from spikelm.kernels.lif.neuron import Neuron
from spikelm.kernels.pointers import runs_directly


def lif(
    x: Tensor, v: Tensor, rate: Tensor, neuron: Neuron, reset: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Spikes [B, T, C] and last membrane [B, C] of x [B, T, C], v [B, C], rate [C]; float32 or float64.

    Raises:
        KernelError: the surrogate is a function or a name that the C form lacks.
    """
    if neuron.surrogate not in SURROGATES:
        raise KernelError(
            f"lif in C knows the surrogates {', '.join(SURROGATES)}, not {neuron.surrogate!r}; "
            "use the torch back-end for your own"
        )
    run = forward if runs_directly(x, v, rate, reset, valid) else lif_forward
    spikes, last, _ = run(
        x,
        v,
        rate,
        reset,
        valid,
        neuron.threshold,
        neuron.v_reset,
        neuron.soft_reset,
        neuron.decay_input,
        neuron.detach_reset,
        str(neuron.surrogate),
        neuron.alpha,
    )
    return spikes, last


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, rate, reset, valid, *constants = inputs
    ctx.save_for_backward(x, rate, output[2], reset, valid)
    ctx.mark_non_differentiable(output[2])
    ctx.constants = constants


def _backward(ctx: Any, grad_spikes: Tensor, grad_v: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, rate, checkpoints, reset, valid = ctx.saved_tensors
    grad_x, grad_first, grad_rate = lif_backward(
        grad_spikes, grad_v, x, rate, checkpoints, reset, valid, *ctx.constants
    )
    return grad_x, grad_first, grad_rate, None, None, *[None] * len(ctx.constants)


lif_forward.register_autograd(_backward, setup_context=_setup)
