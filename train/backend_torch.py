"""Plain torch: one process, or one model per rank whose gradients are averaged (DistributedDataParallel)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spikelm.checkpoint import check_weights
from spikelm.loss import LossOutput
from spikelm.recurrence import Context
from spikelm.state import State
from spikelm.train.backend import MODEL, OPTIMIZER, Backend, LossModule, Read, Wanted
from spikelm.train.gradients import GradientWatch
from spikelm.train.optim import (
    StepReport,
    build_optimizers,
    load_optimizer_tensors,
    named_parameters,
    optimizer_keys,
    optimizer_step,
    optimizer_tensors,
    set_learning_rate,
)
from spikelm.train.ranks import Ranks

if TYPE_CHECKING:
    from spikelm.model import SpikeLM
    from spikelm.train.config import TrainConfig


class TorchBackend(Backend):
    """Torch alone, on one rank or several."""

    def __init__(
        self, model: SpikeLM, config: TrainConfig, device: torch.device, ranks: Ranks | None = None
    ) -> None:
        """Move the model to ``device`` and build its optimisers; all ranks begin with rank 0's weights."""
        self.device = device
        self.ranks = ranks or Ranks()
        self.name = "torch" if self.ranks.world_size == 1 else "torch-ddp"
        self.model = model.to(device)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self._module = LossModule(self.model, config.l2wrap)
        self._optimizers = build_optimizers(self.model, config.optim)
        self._parameters = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self._clip = config.optim.clip
        self._bf16 = config.precision == "bf16"
        self._watch = GradientWatch(self._parameters)
        self._parallel = self._module if self.ranks.world_size == 1 else self._wrapped()

    def _wrapped(self) -> nn.parallel.DistributedDataParallel:
        return nn.parallel.DistributedDataParallel(
            self._module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16)

    def loss(
        self, inputs: Tensor, targets: Tensor, state: State | None, ctx: Context, *, last: bool = True
    ) -> LossOutput:
        """Forward pass, under bf16 autocast where the configuration says so."""
        module = self._parallel if torch.is_grad_enabled() else self._module
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module.require_backward_grad_sync = last
        with self._autocast():
            output: LossOutput = module(inputs, targets, state, ctx)
        return output

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Back-propagate; DistributedDataParallel exchanges gradients with the last micro-batch."""
        # It takes the mean over the ranks, and the shares are to be summed.
        torch.autograd.backward(loss * self.ranks.world_size if self.ranks.world_size > 1 else loss)
        self._watch.end_micro_batch()

    def step(self, lr_factor: float) -> StepReport:
        """One optimiser step, refused when a gradient is not finite."""
        set_learning_rate(self._optimizers, lr_factor)
        report = optimizer_step(self._parameters, self._optimizers, clip=self._clip)
        if report.applied:
            self._watch.forget()
            return report
        report = replace(report, bad=self._watch.take() or report.bad)
        self.clear_gradients()
        return report

    def clear_gradients(self) -> None:
        """Set every gradient to None."""
        for _, parameter in self._parameters:
            parameter.grad = None
        self._watch.forget()

    def tensors(self, wanted: Wanted) -> Iterator[tuple[str, Tensor]]:
        """The tensors themselves: every rank holds all of them."""
        weights = {MODEL + name: value for name, value in model_tensors(self.model).items()}
        memory = {OPTIMIZER + name: value for name, value in optimizer_tensors(self._optimizers).items()}
        for name, value in {**weights, **memory}.items():
            if wanted(name, value.numel() * value.element_size()):
                yield name, value

    def restore(self, read: Read) -> None:
        """Every rank reads everything."""
        load_weights(self.model, read)
        memory = {}
        for index, optimizer in enumerate(self._optimizers):
            for name, _ in named_parameters(optimizer):
                for key in optimizer_keys(optimizer):
                    value = read(f"{OPTIMIZER}{index}/{name}/{key}")
                    if value is not None:
                        memory[f"{index}/{name}/{key}"] = value
        load_optimizer_tensors(self._optimizers, memory)


def model_tensors(model: SpikeLM) -> dict[str, Tensor]:
    """The weights of a model as a checkpoint names them: tied ones once."""
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights.pop("head.linear.weight", None)
    return weights


def load_weights(model: SpikeLM, read: Read) -> None:
    """Copy stored weights into a model that holds its own.

    Raises:
        CheckpointError: one is missing or has another shape.
    """
    found = {name: read(MODEL + name) for name in model_tensors(model)}
    weights = {name: value for name, value in found.items() if value is not None}
    if model.config.tie_word_embeddings and "embedding.weight" in weights:
        weights["head.linear.weight"] = weights["embedding.weight"]
    check_weights(model, weights, "the checkpoint")
    model.load_state_dict(weights)
