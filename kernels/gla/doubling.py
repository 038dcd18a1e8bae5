"""Weights of the tokens of a chunk for each other, built by doubling, and their gradient.

Token i sees token j <= i with weight sum_c q_ic k_jc P_ijc, where P_ij is the product of the decays of the
tokens j + 1 to i. P cannot be written as a quotient of products from the start of the chunk: those underflow,
and are zero for a closed gate. So neighbouring blocks of 1, 2, 4, ... tokens are joined. A query of the right
block carries ``since``, the product of the decays from its block's start to itself, a key of the left block
``until``, that of the decays after itself to its block's end, and one matrix product of the two gives all
weights between the blocks. Every factor is a product of numbers between 0 and 1: nothing overflows, no large
numbers cancel, any decay from 1 to 0 is exact. The rounds together cost as many operations as one product of
all queries with all keys.

The gradient is written out, because autograd would keep the factors of every round, and fill a tensor of
zeros for every half that a round takes. Kept are the inputs; the products of the decays are formed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def doubled(q: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and products of decays within chunks.

    Args:
        q: [B, G, N, L, n, K], N chunks of L tokens (a power of 2), n queries that share a key.
        k: [B, G, N, L, K].
        decay: [B, G, N, L, K], between 0 and 1.

    Returns:
        weights [B, G, N, L, n, L], zero above the diagonal; and for each token the product of the decays from
        the chunk's start to it, and of those after it to the chunk's end, both [B, G, N, L, K].
    """
    weights, since, until = _Doubled.apply(q, k, decay)  # type: ignore[no-untyped-call]
    return weights, since, until


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(q, k, decay)
        length = q.shape[3]
        weights = q.new_zeros(*q.shape[:5], length)
        _diagonal(weights).copy_((q * k[..., None, :]).sum(-1))
        since, until = decay.clone(), torch.ones_like(decay)
        for size in _sizes(length):
            right = _halves(q, size)[1] * _halves(since, size)[1][..., None, :]
            left = _halves(k, size)[0] * _halves(until, size)[0]
            across = right.flatten(4, 5) @ left.mT
            _between(weights, size).copy_(across.unflatten(4, (size, -1)))
            _join(since, until, size)
        return weights, since, until

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_weights: Tensor, grad_since: Tensor, grad_until: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, decay = ctx.saved_tensors
        rounds = []
        since, until = decay.clone(), torch.ones_like(decay)
        for size in _sizes(q.shape[3]):
            (since_left, since_right), until_left = _halves(since, size), _halves(until, size)[0]
            all_left = since_left[..., -1:, :].clone()
            rounds.append((size, all_left, since_right.clone(), until_left.clone()))
            _join(since, until, size)
        on_diagonal = _diagonal(grad_weights)[..., None]
        grad_q, grad_k = on_diagonal * k[..., None, :], (on_diagonal * q).sum(-2)
        grad_since, grad_until = grad_since.clone(), grad_until.clone()
        for size, all_left, since_right, until_left in reversed(rounds):
            _unjoin(grad_since, grad_until, all_left, since_right, until_left)
            right, left = _halves(q, size)[1], _halves(k, size)[0]
            across = _between(grad_weights, size).flatten(4, 5)
            to_right = (across @ (left * until_left)).unflatten(4, (size, -1))
            to_left = across.mT @ (right * since_right[..., None, :]).flatten(4, 5)
            _halves(grad_q, size)[1].addcmul_(to_right, since_right[..., None, :])
            _halves(grad_since, size)[1].add_((to_right * right).sum(-2))
            _halves(grad_k, size)[0].addcmul_(to_left, until_left)
            _halves(grad_until, size)[0].addcmul_(to_left, left)
        return grad_q, grad_k, grad_since


def _sizes(length: int) -> Iterator[int]:
    """Tokens of the blocks of each round: 1, 2, 4, ... up to half a chunk."""
    size = 1
    while size < length:
        yield size
        size *= 2


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Left and right blocks of ``size`` tokens of x [B, G, N, L, ...], views [B, G, N, pairs, size, ...]."""
    left, right = x.unflatten(3, (-1, 2, size)).unbind(4)
    return left, right


def _diagonal(weights: Tensor) -> Tensor:
    """Weights of the tokens for themselves, a view [B, G, N, L, n] of weights [B, G, N, L, n, L]."""
    return weights.diagonal(dim1=3, dim2=5).mT


def _between(weights: Tensor, size: int) -> Tensor:
    """Weights of left for right blocks, a view [B, G, N, pairs, size, n, size] of [B, G, N, L, n, L]."""
    pairs = weights.unflatten(5, (-1, 2, size)).unflatten(3, (-1, 2, size))
    between: Tensor = pairs[:, :, :, :, 1, :, :, :, 0].diagonal(dim1=3, dim2=6)
    return between.movedim(-1, 3)


def _join(since: Tensor, until: Tensor, size: int) -> None:
    """From the products within blocks to those within pairs of blocks, in place."""
    (since_left, since_right), until_left = _halves(since, size), _halves(until, size)[0]
    until_left *= since_right[..., -1:, :]
    since_right *= since_left[..., -1:, :]


def _unjoin(
    grad_since: Tensor, grad_until: Tensor, all_left: Tensor, since_right: Tensor, until_left: Tensor
) -> None:
    """The gradient of :func:`_join`, in place, from products before it (all_left: of a whole left block)."""
    size = since_right.shape[-2]
    (to_left, to_right), to_until = _halves(grad_since, size), _halves(grad_until, size)[0]
    to_all_left, to_all_right = (to_right * since_right).sum(-2), (to_until * until_left).sum(-2)
    to_right *= all_left
    to_until *= since_right[..., -1:, :]
    to_left[..., -1, :] += to_all_left
    to_right[..., -1, :] += to_all_right
