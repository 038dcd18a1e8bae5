"""The experts of a mixture, called on the tokens that were routed to them.

Tokens are sorted by expert, every expert computes its own in one call, and each token's k results are summed
in the order of its choices: always the same order, whatever else is in the batch.

In training, and wherever several processes work together, an expert without a token is called too, with none:
ZeRO-3 gathers its weights on all ranks or on none, and its parameters get gradients of zero, which
DistributedDataParallel waits for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spikelm.channels.routing import Routing
from spikelm.errors import ConfigError
from spikelm.projection import Projection
from spikelm.recurrence import Context, Part, memory_dtype
from spikelm.state import flatten


class Experts(nn.ModuleList):
    """A list of parts without memory, each computing a share of the tokens."""

    def check(self) -> None:
        """Refuse neurons that remember.

        Raises:
            ConfigError: one does.
        """
        for path, module in self.named_modules():
            if isinstance(module, Projection) and flatten(module.init_state(1)):
                neuron = type(module.neuron).__name__
                raise ConfigError(
                    f"channel moe: the input neuron of experts.{path} ({neuron}) remembers the token before, "
                    "but an expert sees only the tokens routed to it; give experts a neuron without memory, "
                    "for example neuron_overrides: {'*.experts.*': {name: adaptive}}"
                )

    def forward(self, tokens: Tensor, routing: Routing, ctx: Context) -> Tensor:
        """Weighted sum of the chosen experts' outputs.

        Args:
            tokens: [N, 1, D], sequences of one token each, or [N, D], single steps.
            routing: where they go.
            ctx: without masks; a random source has the tokens' streams [N].

        Returns:
            [N, D].
        """
        top_k = routing.experts.shape[1]
        order = routing.experts.flatten().argsort(stable=True)
        everyone = torch.is_grad_enabled() or _together()
        outputs = []
        for part, rows in zip(self, (order // top_k).split(routing.load.tolist()), strict=True):
            if len(rows) or everyone:
                outputs.append(_call(cast(Part, part), tokens[rows], rows, ctx))
        by_expert = torch.cat(outputs) if outputs else tokens.flatten(1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        chosen = by_expert[back].unflatten(0, (len(tokens), top_k))
        weights = routing.weights.to(memory_dtype(chosen))
        return (chosen * weights[..., None]).sum(1).to(chosen.dtype)


def _call(part: Part, x: Tensor, rows: Tensor, ctx: Context) -> Tensor:
    """One expert on its tokens, the ``rows`` [n] of all: x [n, 1, D] or [n, D] -> [n, D]; n may be zero."""
    random = ctx.random
    if random is not None:
        random = replace(random, stream=random.stream[rows], position=random.position[rows])
    # The firing-rate loss of no token would be a mean over nothing.
    inner = replace(ctx, random=random, losses=ctx.losses if len(rows) else None)
    y, _ = part(x, None, inner)
    return cast(Tensor, y).flatten(1)


def _together() -> bool:
    """Whether other processes may be doing the same pass."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
