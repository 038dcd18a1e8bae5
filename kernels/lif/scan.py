"""Leaky integrate-and-fire in plain torch with a hand-written backward: the form for machines without C.

Forward keeps the charged membrane h of every token and nothing else; backward computes everything that
does not depend on the order of tokens for the whole sequence at once, and loops over one fused operation per
token. Equations in reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikelm.kernels.lif.neuron import Neuron
from spikelm.kernels.lif.surrogates import derivative


def lif(
    x: Tensor, v: Tensor, rate: Tensor, neuron: Neuron, reset: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Spikes [B, T, C] and last membrane [B, C] of x [B, T, C], v [B, C], rate [C]; one floating dtype."""
    if valid is not None:
        # What stands at an invalid token (it may be NaN) stays out of every value and gradient.
        x = torch.where(valid[..., None], x, 0.0)
    spikes, last = _Scan.apply(x, v, rate, neuron, reset, valid)  # type: ignore[no-untyped-call]
    return spikes, last


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v_in: Tensor,
        rate: Tensor,
        neuron: Neuron,
        reset: Tensor | None,
        valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        h = torch.empty_like(x, memory_format=torch.contiguous_format)
        v = v_in.clone()
        for t in range(x.shape[1]):
            if reset is not None:
                v = torch.where(reset[:, t, None], neuron.rest, v)
            leak = v - neuron.v_reset
            charged = v + (x[:, t] - leak) * rate if neuron.decay_input else v - leak * rate + x[:, t]
            h[:, t] = charged
            after = charged - neuron.threshold if neuron.soft_reset else neuron.v_reset
            new = torch.where(charged >= neuron.threshold, after, charged)
            v = new if valid is None else torch.where(valid[:, t, None], new, v)
        spikes = (h >= neuron.threshold).to(x.dtype)
        if valid is not None:
            spikes = spikes.masked_fill(~valid[..., None], 0.0)
        ctx.save_for_backward(x, v_in, rate, h, reset, valid)
        ctx.neuron = neuron
        return spikes, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        x, v_in, rate, h, reset, valid = ctx.saved_tensors
        neuron: Neuron = ctx.neuron
        slope = derivative(neuron.surrogate)(h - neuron.threshold, neuron.alpha)
        silent = (h < neuron.threshold).to(h.dtype)
        through = torch.ones_like(h) if neuron.soft_reset else silent  # d v_new / d h
        if not neuron.detach_reset:
            jump = neuron.threshold if neuron.soft_reset else h - neuron.v_reset
            through = through - jump * slope
        direct = grad_spikes * slope
        if valid is not None:
            direct = direct.masked_fill(~valid[..., None], 0.0)

        grad_h = torch.empty_like(h)
        for t in range(h.shape[1] - 1, -1, -1):
            grad = torch.addcmul(direct[:, t], grad_v, through[:, t])
            kept = grad * (1 - rate)
            if valid is not None:
                grad = grad.masked_fill(~valid[:, t, None], 0.0)
                kept = torch.where(valid[:, t, None], kept, grad_v)
            if reset is not None:
                kept = kept.masked_fill(reset[:, t, None], 0.0)
            grad_h[:, t] = grad
            grad_v = kept

        grad_rate = None
        if ctx.needs_input_grad[2]:
            leak = _membranes(v_in, h, neuron, reset, valid) - neuron.v_reset
            drive = x - leak if neuron.decay_input else -leak
            grad_rate = (grad_h * drive).sum((0, 1))
        grad_x = grad_h * rate if neuron.decay_input else grad_h
        return grad_x, grad_v, grad_rate, None, None, None


def _membranes(v_in: Tensor, h: Tensor, neuron: Neuron, reset: Tensor | None, valid: Tensor | None) -> Tensor:
    """Membrane before every token [B, T, C], from the charged membranes."""
    after = h - neuron.threshold if neuron.soft_reset else torch.full_like(h, neuron.v_reset)
    new = torch.where(h >= neuron.threshold, after, h)
    if valid is None:
        before = torch.cat([v_in[:, None], new[:, :-1]], 1)
    else:
        v, steps = v_in, []
        for t in range(h.shape[1]):
            steps.append(v)
            if reset is not None:
                v = torch.where(reset[:, t, None], neuron.rest, v)
            v = torch.where(valid[:, t, None], new[:, t], v)
        before = torch.stack(steps, 1)
    return before if reset is None else before.masked_fill(reset[..., None], neuron.rest)
