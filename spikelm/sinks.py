"""Sink tokens: learned vectors that stand before every text (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Sinks(nn.Module):
    """Features of the sink tokens.

    A module of its own and no parameter of the model, because ZeRO stage 3 gathers the parameters of modules
    that are called, and the model's state begins outside its ``forward``.

    Args:
        number: of sink tokens.
        features: D.
    """

    vector_parameters = ("weight",)
    """Optimisers treat them as vectors: a token's features each."""

    def __init__(self, number: int, features: int) -> None:
        """Zeros; ``spikelm.initialisation`` draws them."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(number, features))

    def forward(self) -> Tensor:
        """[1, number, D]."""
        return self.weight[None]
