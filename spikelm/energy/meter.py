"""What the ledger watches while a model reads: counts, what batches share, spikes that meet in attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from spikelm.channels.moe import MoE
from spikelm.channels.routing import route
from spikelm.codings.meter import CountMeter
from spikelm.energy.activity import Pairs
from spikelm.mixers.spiking_attention import SpikingAttention
from spikelm.projection import Projection
from spikelm.recurrence import Context


@dataclass
class Union:
    """What N tokens of a batch need together.

    Attributes:
        groups: batches of N tokens that were looked at.
        touched: batches in which at least one token reached the projection.
        active: inputs that fired for at least one token, summed over the batches.
    """

    groups: float = 0.0
    touched: float = 0.0
    active: float = 0.0


@dataclass
class EnergyMeter(CountMeter):
    """Counts of every projection, and their unions over batches.

    A batch is made of N tokens of a call that stand far apart: the m tokens of a call are cut into N equal
    stretches, and the first of each form a batch, then the second. What is left over at the end belongs to
    none.

    Attributes:
        batch: N.
        unions: path of a projection -> what batches need.
        sums: path of a spiking attention -> sums of the figures of :class:`Pairs` over the tokens.
        tokens: tokens that the model read.
    """

    batch: int = 1
    unions: dict[str, Union] = field(default_factory=dict)
    sums: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    _places: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    """Path of an expert -> (places of its tokens among those of the call, number of those)."""
    _spikes: dict[str, Tensor] = field(default_factory=dict)

    def record(
        self, path: str, x: Tensor, *, spiking: bool, out_features: int, valid: Tensor | None, cap: int | None
    ) -> None:
        """Add one call of a projection; see :class:`spikelm.meter.Meter`."""
        super().record(path, x, spiking=spiking, out_features=out_features, valid=valid, cap=cap)
        if path in self.outside:
            return
        rows = x.detach().reshape(-1, x.shape[-1])
        if valid is not None and x.dim() == 3:
            rows = rows[valid.reshape(-1)]
        self._unite(path, rows != 0)

    def _unite(self, path: str, fired: Tensor) -> None:
        expert = next((name for name in self._places if path.startswith(f"{name}.")), None)
        if expert is None:
            places, tokens = torch.arange(len(fired), device=fired.device), len(fired)
        else:
            places, tokens = self._places[expert]
        groups = tokens // self.batch
        if groups == 0:
            return
        kept = places < groups * self.batch
        group = places[kept] % groups
        together = torch.zeros(groups, fired.shape[-1], device=fired.device)
        together.index_add_(0, group, fired[kept].to(together.dtype))
        union = self.unions.setdefault(path, Union())
        union.touched += float(len(group.unique()))
        union.active += float((together > 0).sum())
        if expert is None:
            union.groups += groups

    def pairs(self) -> dict[str, Pairs]:
        """Means per token of what met in every spiking attention."""
        found: dict[str, Pairs] = {}
        for path, sums in self.sums.items():
            written, read, added, gathered = (value / self.tokens for value in sums)
            found[path] = Pairs(written=written, read=read, added=added, gathered=gathered)
        return found


@contextmanager
def watching(model: nn.Module, meter: EnergyMeter) -> Iterator[None]:
    """While the block runs, spiking attentions and routers of the model report to the meter."""
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, SpikingAttention):
            for name in module.inputs:
                neuron = module.get_submodule(f"{name}_neuron")
                handles.append(neuron.register_forward_hook(_keep_spikes(meter, f"{path}.{name}")))
            handles.append(module.register_forward_hook(_count_pairs(meter, path)))
        elif isinstance(module, MoE):
            handles.append(module.router.register_forward_hook(_keep_places(meter, path, module)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Hook = Callable[[nn.Module, tuple[Any, ...], tuple[Tensor, Any]], None]


def _context(inputs: tuple[Any, ...]) -> Context:
    """The context of a part's call, its last argument."""
    return cast(Context, inputs[-1])


def _keep_spikes(meter: EnergyMeter, key: str) -> Hook:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        meter._spikes[key] = output[0].detach()

    return hook


def _count_pairs(meter: EnergyMeter, path: str) -> Hook:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        if _context(inputs).meter is not meter:
            return
        part = cast(SpikingAttention, module)
        found = (meter._spikes.pop(f"{path}.{name}") for name in part.inputs)
        heads = tuple(spikes.unflatten(-1, (-1, part.head_dim)) for spikes in found)
        q, k, v = ((operand != 0).sum(-1).to(torch.float64) for operand in part._operands(heads))
        valid = _context(inputs).valid
        if valid is not None:
            q, k, v = (number * valid[..., None] for number in (q, k, v))
        figures = (k.sum(), q.sum(), (k * v).sum(), q.sum() * part.head_dim)  # in the order of Pairs
        before = meter.sums.get(path, [0.0] * len(figures))
        meter.sums[path] = [old + float(new) for old, new in zip(before, figures, strict=True)]

    return hook


def _keep_places(meter: EnergyMeter, path: str, part: MoE) -> Hook:
    """Where among a call's tokens those of each expert stand; the router says so before the experts run."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        ctx = _context(inputs)
        if ctx.meter is not meter:
            return
        logits = output[0].flatten(0, -2)
        if ctx.valid is not None:
            logits = logits[ctx.valid.reshape(-1)]
        routing = route(
            logits,
            part.expert_bias,
            router=part.kind,
            top_k=part.top_k,
            normalise=part.normalise,
            scale=part.scale,
        )
        groups = len(logits) // meter.batch
        for index in range(len(part.experts)):
            places = (routing.experts == index).any(-1).nonzero()[:, 0]
            expert = f"{path}.experts.{index}"
            meter._places[expert] = (places, len(logits))
            for name, child in part.experts[index].named_modules():
                if isinstance(child, Projection):  # also where no token comes
                    meter.unions.setdefault(f"{expert}.{name}", Union()).groups += groups

    return hook
