"""The experts of a mixture, called on the tokens that were routed to them.

Tokens are sorted by expert, every expert computes its own in one call (or all experts theirs in one grouped
product, see grouped.py), and each token's k results are summed in the order of its choices: always the same
order, whatever else is in the batch.

In training, and wherever several processes work together, an expert without a token is called too, with none:
ZeRO-3 gathers its weights on all ranks or on none, and its parameters get gradients of zero, which
DistributedDataParallel waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spikelm.channels.grouped import grouped, refusal, worthwhile
from spikelm.channels.routing import Routing
from spikelm.errors import ConfigError
from spikelm.projection import Projection
from spikelm.recurrence import Context, Part, memory_dtype
from spikelm.state import flatten
from spikelm.weights import Int8Linear


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
        parts, rows = list(self), order // top_k
        if worthwhile(parts, len(rows)) and refusal(parts, tokens.device, ctx) is None:
            by_expert = grouped(parts, tokens, rows, routing.load, ctx)
        else:
            by_expert = _looped(parts, tokens, rows, routing.load, ctx)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        chosen = by_expert[back].unflatten(0, (len(tokens), top_k))
        weights = routing.weights.to(memory_dtype(chosen))
        total: Tensor = (chosen * weights[..., None]).sum(1)
        return total.to(chosen.dtype)


def _looped(parts: Sequence[nn.Module], tokens: Tensor, rows: Tensor, load: Tensor, ctx: Context) -> Tensor:
    """Outputs of all experts on their tokens, one expert after the other; see :func:`grouped`."""
    everyone = torch.is_grad_enabled() or _together()
    loads = load.tolist()
    outputs = []
    # Gathered once: a gather per expert would have a gradient of all tokens' size for each of them.
    for part, x, own in zip(parts, tokens[rows].split(loads), rows.split(loads), strict=True):
        if len(own) or everyone:
            outputs.append(_call(cast(Part, part), x, own, ctx))
    return torch.cat(outputs) if outputs else tokens.flatten(1)


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


def routed_shares(model: nn.Module) -> dict[nn.Module, float]:
    """Modules inside routed experts -> share of the tokens that each of them sees when all get the same."""
    found: dict[nn.Module, float] = {}
    for module in model.modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, Experts):
            share = cast(int, module.top_k) / len(experts)
            found.update((inner, share) for inner in experts.modules())
    return found


def active_parameters(model: nn.Module) -> int:
    """Parameters that one token uses: all but those of the experts it is not routed to.

    Shared ones count once, int8 weights (which torch holds as buffers) like others.
    """
    shares = routed_shares(model)
    seen: set[int] = set()
    active = 0.0
    for module in model.modules():
        held: list[Tensor] = [*module.parameters(recurse=False)]
        if isinstance(module, Int8Linear):
            held.append(module.weight)
        for parameter in held:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                active += parameter.numel() * shares.get(module, 1.0)
    return round(active)
