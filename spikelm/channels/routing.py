"""Which experts a token goes to, with which weights, and how evenly: the arithmetic of a router.

Everything is computed in float32 (float64 for float64 logits). Sources: softmax routing and its balance loss
from the Switch Transformer (arXiv 2101.03961, equations 4 to 6, here for k experts per token), sigmoid
routing from DeepSeek-V3 (arXiv 2412.19437, equations 13 to 16), the bias of loss-free balancing from
arXiv 2408.15664 (algorithm 1), the z-loss from ST-MoE (arXiv 2202.08906, equation 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikelm.activations import sigmoid, softmax
from spikelm.recurrence import memory_dtype

ROUTERS = ("softmax", "sigmoid")


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a router decided for N tokens.

    Attributes:
        experts: int64 [N, k], the chosen experts, best first; of equal ones the first.
        weights: [N, k], what their outputs are multiplied with.
        probabilities: [N, E], the scores scaled to a sum of 1 per token, for the balance loss.
        load: int64 [E], tokens that go to each expert.
    """

    experts: Tensor
    weights: Tensor
    probabilities: Tensor
    load: Tensor


def route(
    logits: Tensor, bias: Tensor | None, *, router: str, top_k: int, normalise: bool, scale: float
) -> Routing:
    """Choose experts.

    Args:
        logits: [N, E].
        bias: [E], added to the scores for the choice only; the weights do not see it. None for none.
        router: ``softmax`` or ``sigmoid``: what makes scores of logits.
        top_k: experts per token.
        normalise: whether the weights of a token are scaled to a sum of 1 (before ``scale``).
        scale: factor of all weights.
    """
    logits = logits.to(memory_dtype(logits))
    scores = softmax(logits) if router == "softmax" else sigmoid(logits)
    with torch.no_grad():
        wanted = scores if bias is None else scores + bias.to(scores.dtype)
        # A stable sort and not topk, which may break a tie otherwise in another batch.
        chosen = wanted.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        load = torch.bincount(chosen.flatten(), minlength=logits.shape[-1])
    weights = scores.gather(-1, chosen)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
    probabilities = scores if router == "softmax" else scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)
    return Routing(experts=chosen, weights=weights * scale, probabilities=probabilities, load=load)


def balance_loss(routing: Routing) -> Tensor:
    """E * sum_i f_i P_i, scalar: 1 where all experts get the same, up to E / k where k of them get all.

    f_i is the share of the N k choices that fell on expert i (no gradient), P_i the mean probability of
    expert i over the N tokens. Zero without tokens.
    """
    tokens, experts = routing.probabilities.shape
    share = routing.load.to(routing.probabilities.dtype) / max(routing.experts.numel(), 1)
    mean = routing.probabilities.sum(0) / max(tokens, 1)
    return experts * (share * mean).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean squared logarithm of the softmax's denominator over the N tokens of logits [N, E], scalar."""
    logits = logits.to(memory_dtype(logits))
    return logits.logsumexp(-1).square().sum() / max(logits.shape[0], 1)
