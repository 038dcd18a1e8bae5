"""Optimisers, their parameter groups, and the one function that takes an optimiser step.

Groups (every trainable parameter is in exactly one):

| group | members | weight decay |
| --- | --- | --- |
| matrices | two or more dimensions larger than one | yes (none for ``adam``) |
| hidden (``muon`` only) | matrices of the blocks, without embedding and head | yes |
| vectors | gains, biases, token-shift mixtures, sink tokens, filters of short convolutions | no |
| neurons | decays, thresholds, time constants, routers: ``model.fp32_parameters()`` | no |

Sink tokens [n, D] and filters [D, n] are rows of vectors and no matrices: modules name such parameters in
``vector_parameters``. Muon, which makes an update orthogonal, is not for them, nor is weight decay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spikelm.errors import TrainingError

if TYPE_CHECKING:
    from spikelm.model import SpikeLM
    from spikelm.train.config import OptimConfig

Named = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True, kw_only=True)
class ParameterGroups:
    """Names and parameters by role."""

    hidden: Named
    matrices: Named
    vectors: Named
    neurons: Named


@dataclass(frozen=True, kw_only=True)
class BadGradient:
    """A gradient that is not finite.

    Attributes:
        micro_batch: index of the micro-batch that brought it, on the rank that tells; -1 if it is not known.
        parameters: names of the parameters it belongs to.
    """

    micro_batch: int
    parameters: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What became of one optimiser step.

    Attributes:
        applied: whether the parameters were updated; they are not when a gradient is not finite.
        grad_norm: global norm of the gradient before clipping.
        bad: this rank's gradients that are not finite (when not applied; empty where only the sum is not).
    """

    applied: bool
    grad_norm: float
    bad: tuple[BadGradient, ...] = ()


def parameter_groups(model: SpikeLM) -> ParameterGroups:
    """Sort the trainable parameters of a model by role.

    Raises:
        TrainingError: a parameter is not fp32 (or fp64): master weights must be.
    """
    kept, rows = model.fp32_parameters(), _rows_of_vectors(model)
    outer = _embedding_and_head(model)
    groups = ParameterGroups(hidden=[], matrices=[], vectors=[], neurons=[])
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype not in (torch.float32, torch.float64):
            raise TrainingError(
                f"parameter {name} is {parameter.dtype}; training needs float32 master weights "
                "(use precision: bf16 for bf16 arithmetic)"
            )
        if name in kept:
            groups.neurons.append((name, parameter))
        elif id(parameter) in rows or sum(size > 1 for size in parameter.shape) < 2:
            groups.vectors.append((name, parameter))
        elif parameter.dim() == 2 and id(parameter) not in outer:
            groups.hidden.append((name, parameter))
        else:
            groups.matrices.append((name, parameter))
    return groups


def _rows_of_vectors(model: nn.Module) -> set[int]:
    """Identities of the parameters that modules name in ``vector_parameters``."""
    return {
        id(getattr(module, name))
        for module in model.modules()
        for name in getattr(module, "vector_parameters", ())
        if getattr(module, name) is not None
    }


def _embedding_and_head(model: SpikeLM) -> set[int]:
    """Identities of the parameters outside the blocks with a vocabulary dimension, and of all embeddings."""
    found = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    blocks = {id(parameter) for block in _block_lists(model) for parameter in block.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in blocks and model.config.vocab_size in parameter.shape:
            found.add(id(parameter))
    return found


def _block_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of blocks of a model."""
    return [module for module in model.children() if isinstance(module, nn.ModuleList)]


def build_optimizers(model: SpikeLM, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """The optimisers of a configuration; each group has its ``base_lr`` and its ``names``."""
    groups = parameter_groups(model)
    decay = config.weight_decay or 0.0
    betas = config.betas or (0.9, 0.95)
    eps = config.eps or 1e-8
    plain = [*groups.vectors, *groups.neurons]
    if config.name == "adam":
        everything = [*groups.hidden, *groups.matrices, *plain]
        adam = torch.optim.Adam(_groups([(everything, 0.0)]), lr=config.lr, betas=betas, eps=eps, fused=True)
        return _with_base(adam)
    if config.name == "adamw":
        chosen = _groups([([*groups.hidden, *groups.matrices], decay), (plain, 0.0)])
        return _with_base(torch.optim.AdamW(chosen, lr=config.lr, betas=betas, eps=eps, fused=True))
    optimizers: list[torch.optim.Optimizer] = []
    if groups.hidden:
        muon = config.muon
        own = decay if muon.weight_decay is None else muon.weight_decay
        optimizers += _with_base(
            torch.optim.Muon(
                _groups([(groups.hidden, own)]),
                lr=config.lr if muon.lr is None else muon.lr,
                weight_decay=own,
                momentum=muon.momentum,
                nesterov=muon.nesterov,
                ns_steps=muon.ns_steps,
                # Scales the update to the size of AdamW's, so that one learning rate serves both.
                adjust_lr_fn="match_rms_adamw",
            )
        )
    rest = _groups([(groups.matrices, decay), (plain, 0.0)])
    if rest:
        optimizers += _with_base(torch.optim.AdamW(rest, lr=config.lr, betas=betas, eps=eps, fused=True))
    return optimizers


def _groups(members: Sequence[tuple[Named, float]]) -> list[dict[str, object]]:
    """Torch parameter groups of the non-empty ones among ``members`` with their weight decays."""
    return [
        {"params": [p for _, p in named], "names": [n for n, _ in named], "weight_decay": decay}
        for named, decay in members
        if named
    ]


def _with_base(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Remember each group's peak learning rate."""
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return [optimizer]


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every group to ``factor`` times its peak learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def optimizer_step(
    parameters: Sequence[tuple[str, nn.Parameter]],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    clip: float,
) -> StepReport:
    """Measure and clip the gradient, check it, update, clear it: the only place where parameters change.

    Args:
        parameters: names and parameters whose gradients count.
        optimizers: the optimisers, learning rates set.
        clip: largest global norm; 0 does not clip.

    Returns:
        a report; when the gradient is not finite nothing was updated and the gradients are still there.
    """
    gradients = [parameter.grad for _, parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    value = float(norm)
    if not torch.isfinite(norm):
        bad = tuple(
            name for name, p in parameters if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        )
        return StepReport(
            applied=False,
            grad_norm=value,
            bad=(BadGradient(micro_batch=-1, parameters=bad),) if bad else (),
        )
    if clip > 0.0:
        torch.nn.utils.clip_grads_with_norm_([p for _, p in parameters], clip, norm)
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return StepReport(applied=True, grad_norm=value)


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimisers' memory as ``index/parameter name/key`` -> tensor, for safetensors."""
    tensors: dict[str, Tensor] = {}
    for index, optimizer in enumerate(optimizers):
        for name, parameter in named_parameters(optimizer):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{index}/{name}/{key}"] = torch.as_tensor(value)
    return tensors


def optimizer_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """What an optimiser of :func:`build_optimizers` remembers of every parameter."""
    return (
        ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else ("step", "exp_avg", "exp_avg_sq")
    )


def load_optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors`; the tensors are taken over, not copied.

    Raises:
        TrainingError: a tensor belongs to no parameter, or its shape does not fit.
    """
    left = dict(tensors)
    for index, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for position, (name, parameter) in enumerate(named_parameters(optimizer)):
            prefix = f"{index}/{name}/"
            own = {key[len(prefix) :]: left.pop(key) for key in list(left) if key.startswith(prefix)}
            for key, value in own.items():
                if value.dim() and value.shape != parameter.shape:
                    raise TrainingError(
                        f"optimiser state {prefix}{key} has shape {tuple(value.shape)}, "
                        f"its parameter {tuple(parameter.shape)}"
                    )
            if own:
                state[position] = own
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if left:
        raise TrainingError(f"optimiser state {sorted(left)[0]!r} belongs to no parameter of this run")


def named_parameters(optimizer: torch.optim.Optimizer) -> Named:
    """Names and parameters in the order of the optimiser's own numbering."""
    return [
        pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)
    ]
