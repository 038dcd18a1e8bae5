"""``torch.nn.functional.grouped_mm`` as a custom op for graphs: torch allows its shapes in bfloat16 alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.library.custom_op("spikelm::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """y = x W_e^T for the rows of each expert e.

    Args:
        x: [M, D], sorted by expert.
        weights: [E, O, D], of the same dtype.
        ends: int32 [E], one past the last row of each expert.

    Returns:
        [M, O].
    """
    return nn.functional.grouped_mm(x, weights.transpose(1, 2), offs=ends)


@grouped_product.register_fake
def _(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[1])


@torch.library.custom_op("spikelm::grouped_product_backward", mutates_args=())
def grouped_product_backward(grad: Tensor, x: Tensor, weights: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and the weights for that of y [M, O]."""
    grad = grad.contiguous()
    grad_x = nn.functional.grouped_mm(grad, weights, offs=ends)
    return grad_x, nn.functional.grouped_mm(grad.t(), x, offs=ends)


@grouped_product_backward.register_fake
def _(grad: Tensor, x: Tensor, weights: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    grad_x, grad_weights = grouped_product_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weights, None


grouped_product.register_autograd(_backward, setup_context=_setup)
