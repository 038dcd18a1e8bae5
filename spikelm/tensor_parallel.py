"""Tensor parallelism: a model whose projections are split over ranks computes what the whole one does.

A projection says how it is split (``shard``). ``column``: each rank has some of the output features; the
input is whole. ``row``: each rank has some of the input features, which a column projection in front of it
left there; the ranks' partial products are added. Between the two everything works on the features (heads)
of its own rank.

The rule for spikes: an adaptive threshold V = mean|x| / k is that of the whole row. So before a row-parallel
projection the ranks add up their sums of |x|, one number per token. Counts are then those of the unsharded
model (up to the rounding of the mean; with ``exact`` to the bit, see :func:`shard`).

Sums over ranks are taken in the order of the ranks, integer sums are exact in any order. With one int8 scale
per output the integer sums are added before they are scaled, which gives the bits of the unsharded product;
with groups every rank must hold whole groups, and the scaled sums are added.

Works forward and backward. A shared parameter that sees only the rank's own heads (norms of a head) gets its
gradient summed over the ranks; projections that are not split see everything and need nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spikelm.errors import ConfigError
from spikelm.kernels.encode import adaptive_encode
from spikelm.kernels.int8_linear import scaled_sums
from spikelm.neurons.adaptive import Adaptive
from spikelm.projection import Projection
from spikelm.recurrence import Context, Part, memory_dtype
from spikelm.weights import Int8Linear

TINY = 2.0**-20
"""k of an encoding whose threshold is the mean times 2^20, exactly, far from the threshold's floor."""


class Ranks:
    """The ranks that hold one model together.

    Args:
        group: of torch.distributed; None for all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def gathered(self, x: Tensor) -> list[Tensor]:
        """Everyone's x, in the order of the ranks."""
        x = x.contiguous()
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x, group=self.group)
        return found

    def total(self, x: Tensor) -> Tensor:
        """Sum over the ranks: exact for integers, else in the order of the ranks, in float32 or float64."""
        if not x.is_floating_point():
            x = x.clone()
            dist.all_reduce(x, group=self.group)
            return x
        first, *others = self.gathered(x.to(memory_dtype(x)))
        for other in others:
            first = first + other
        return first.to(x.dtype)

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share of a tensor, a copy."""
        return x.chunk(self.size, dim)[self.rank].clone(memory_format=torch.contiguous_format)


class Parallel(Protocol):
    """What a sharded projection does in place of its product."""

    def product(self, projection: Projection, spikes: Tensor, ctx: Context) -> Tensor:
        """Spikes of this rank's inputs -> this rank's outputs, before scale and bias."""


class Column:
    """Every rank has some of the outputs; gradients of the common input are added up."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def product(self, projection: Projection, spikes: Tensor, ctx: Context) -> Tensor:
        """The product with the rank's own rows of the weights."""
        shared: Tensor = _Spread.apply(spikes, self.ranks)  # type: ignore[no-untyped-call]
        return projection.multiply(shared, ctx)


class Row:
    """Every rank has some of the inputs; the products are added up.

    Args:
        ranks: who has the others.
        one_scale: whether the weights are int8 with the same scale for all inputs of an output.
    """

    def __init__(self, ranks: Ranks, one_scale: bool) -> None:
        self.ranks, self.one_scale = ranks, one_scale

    def product(self, projection: Projection, spikes: Tensor, ctx: Context) -> Tensor:
        """The sum of all ranks' products with their own columns of the weights."""
        if self.one_scale and projection.neuron.spiking and not spikes.requires_grad:
            # Added as integers and scaled once: events of a coding add up to the same sums.
            held = cast(Int8Linear, projection.linear)
            return scaled_sums(self.ranks.total(held.integer_sums(spikes)), held.scales)
        y: Tensor = _Collect.apply(projection.multiply(spikes, ctx), self.ranks)  # type: ignore[no-untyped-call]
        return y


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.total(grads[0]), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, ranks: Ranks) -> Tensor:
        return ranks.total(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def summed_mean(ranks: Ranks, features: int, x: Tensor) -> Tensor:
    """mean|x| [.., 1] of whole rows of ``features``, from sums of x [.., D'] on every rank, in float64."""
    sums = x.to(torch.float64).abs().sum(-1, keepdim=True)
    return (ranks.total(sums) / features).to(memory_dtype(x))


def gathered_mean(ranks: Ranks, features: int, x: Tensor) -> Tensor:
    """The same with the bits that the encoding of whole rows gives: every rank gets them whole."""
    rows = torch.cat(ranks.gathered(x.to(memory_dtype(x))), -1)
    return adaptive_encode(rows, k=TINY)[1] * TINY


def shard(model: nn.Module, group: dist.ProcessGroup | None = None, *, exact: bool = False) -> nn.Module:
    """Keep this rank's share of every projection that says how it is split; in place.

    Every rank calls it on the same whole model and gives it the same inputs; outputs are whole everywhere.
    Memory (states, caches) made afterwards is this rank's share. Save the whole model before: what is left
    here is a part of it.

    Args:
        model: model or part.
        group: ranks of torch.distributed; None for all.
        exact: before row-parallel projections gather the whole rows in place of their sums, so that an
            adaptive threshold has the bits of the unsharded one; costs D numbers per token, not one.

    Returns:
        The model.

    Raises:
        ConfigError: features, heads or int8 groups that the ranks do not divide, naming the sizes.
    """
    ranks = Ranks(group)
    if ranks.size == 1:
        return model
    mean = gathered_mean if exact else summed_mean
    plans: list[Callable[[], None]] = []
    for path, module in model.named_modules():
        if isinstance(module, Projection):
            _check_projection(path, module, ranks)
            plans.append(partial(_split_projection, module, ranks, mean))
        elif isinstance(module, Part):
            split = [child for child in module.children() if isinstance(child, Projection) and child.shard]
            per_head = [getattr(module, name) for name in getattr(module, "per_head", ())]
            _check_heads(path, module, [child for child in split if child not in per_head], ranks)
            plans.append(partial(_split_part, module, bool(split), ranks))
    for plan in plans:  # nothing is split unless everything can be
        plan()
    return model


def _check_projection(path: str, projection: Projection, ranks: Ranks) -> None:
    size = ranks.size
    if projection.parallel is not None:
        raise ConfigError(f"{path} is a shard already; shard the whole model once")
    if projection.shard == "column" and projection.out_features % size:
        raise ConfigError(
            f"{path} has {projection.out_features} output features, which {size} ranks cannot share evenly"
        )
    if projection.shard != "row":
        return
    if projection.in_features % size:
        raise ConfigError(
            f"{path} has {projection.in_features} input features, which {size} ranks cannot share evenly"
        )
    if projection.neuron.rate_target is not None:
        raise ConfigError(
            f"{path}: a rate_target before a row-parallel projection would see one rank's features only; "
            "train without it, or without tensor parallelism"
        )
    linear, share = projection.linear, projection.in_features // size
    if isinstance(linear, Int8Linear) and linear.scales.shape[1] > 1 and share % cast(int, linear.group_size):
        raise ConfigError(
            f"{path}: {size} ranks get {share} of {projection.in_features} input features each, which is no "
            f"multiple of the int8 group_size {linear.group_size}; use null or one that divides it"
        )


def _check_heads(path: str, part: Part, split: list[Projection], ranks: Ranks) -> None:
    """A shard must hold whole heads, so every column must be a multiple of ranks times the head's size."""
    dim = getattr(part, "head_dim", None)
    for child in split:
        features = child.out_features if child.shard == "column" else child.in_features
        if isinstance(dim, int) and features >= dim and features % (dim * ranks.size):
            raise ConfigError(
                f"{path}: {features // dim} heads of {dim} features cannot be shared by {ranks.size} ranks; "
                "num_heads and num_kv_heads must be multiples of the ranks"
            )


@torch.no_grad()
def _split_projection(
    projection: Projection, ranks: Ranks, mean: Callable[[Ranks, int, Tensor], Tensor]
) -> None:
    linear: Any = projection.linear
    if projection.shard == "column":
        _keep(linear, "weight", ranks, 0)
        if isinstance(linear, Int8Linear):
            _keep(linear, "scales", ranks, 0)
        if projection.bias is not None:
            _keep(projection, "bias", ranks, 0)
        linear.out_features = projection.out_features = projection.out_features // ranks.size
        projection.parallel = Column(ranks)
    elif projection.shard == "row":
        _keep(linear, "weight", ranks, 1)
        one_scale = isinstance(linear, Int8Linear) and linear.scales.shape[1] == 1
        if one_scale:
            linear.group_size = None
        elif isinstance(linear, Int8Linear):
            _keep(linear, "scales", ranks, 1)
        neuron, features = projection.neuron, projection.in_features
        for module in neuron.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dim() and parameter.shape[0] == features:
                    _keep(module, name, ranks, 0)
        if isinstance(neuron, Adaptive):
            neuron.whole_mean = partial(mean, ranks, features)
        neuron.features = linear.in_features = projection.in_features = features // ranks.size
        projection.parallel = Row(ranks, one_scale)


@torch.no_grad()
def _split_part(part: Part, has_split: bool, ranks: Ranks) -> None:
    own = [name for name, _ in part.named_parameters(recurse=False)]
    split = own if getattr(part, "shard", None) == "column" else getattr(part, "column_vectors", ())
    for name in split:
        _keep(part, name, ranks, 0)
    if not has_split:
        return
    # What is neither a projection nor split sees this rank's heads only: its gradient is a part of the whole.
    for child in part.children():
        if not isinstance(child, Part):
            for parameter in child.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(partial(_sum_gradient, ranks))


@torch.no_grad()
def _sum_gradient(ranks: Ranks, parameter: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad = ranks.total(parameter.grad)


def _keep(module: nn.Module, name: str, ranks: Ranks, dim: int) -> None:
    """Replace a parameter or buffer by this rank's share."""
    value = getattr(module, name)
    share = ranks.part(value.detach(), dim)
    if isinstance(value, nn.Parameter):
        setattr(module, name, nn.Parameter(share, requires_grad=value.requires_grad))
    else:
        setattr(module, name, share)
