"""What a trainer needs from the machinery below it: one small interface, one implementation per machinery.

A backend owns the model as it is executed, the optimisers and their memory. The trainer owns data order,
schedule, log, evaluation and checkpoints. The interface is shaped so that a wrapped model fits: the forward
pass goes through :class:`LossModule` (DistributedDataParallel and ZeRO act in ``forward``), ``backward`` is
told which micro-batch is the last one (gradients are exchanged once), ``step`` alone changes parameters and
refuses gradients that are not finite, and everything that ranks must agree on goes through ``agree`` and
``total``.
"""

from __future__ import annotations

import abc
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spikelm.errors import ConfigError
from spikelm.loss import LossOutput, next_token_loss
from spikelm.recurrence import Context
from spikelm.state import State
from spikelm.train.optim import (
    StepReport,
    build_optimizers,
    load_optimizer_tensors,
    optimizer_step,
    optimizer_tensors,
    set_learning_rate,
)

if TYPE_CHECKING:
    from spikelm.model import SpikeLM
    from spikelm.tokenizer import Tokenizer
    from spikelm.train.config import TrainConfig


OPTIMIZER = "optimizer/"
"""Prefix of the optimiser's tensors in training.safetensors."""


class LossModule(nn.Module):
    """Model and loss in one ``forward``, so that whatever wraps modules wraps the whole pass."""

    def __init__(self, model: SpikeLM, l2wrap: float) -> None:
        super().__init__()
        self.model = model
        self.l2wrap = l2wrap

    def forward(self, inputs: Tensor, targets: Tensor, state: State | None, ctx: Context) -> LossOutput:
        """Loss of inputs [B, T] against targets [B, T]."""
        return next_token_loss(self.model, inputs, targets, state, ctx, l2wrap=self.l2wrap)


class Backend(abc.ABC):
    """Executes passes and steps for the trainer.

    Attributes:
        name: how logs call it.
        model: the core model (never a wrapper), for evaluation, samples and checkpoints.
        device: where batches go.
        rank, world_size: this process among those of the run.
    """

    name: str
    model: SpikeLM
    device: torch.device
    rank: int
    world_size: int

    @abc.abstractmethod
    def loss(self, inputs: Tensor, targets: Tensor, state: State | None, ctx: Context) -> LossOutput:
        """Forward pass in the precision of the run; inputs and targets [B, T] on any device."""

    @abc.abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss``; ``last`` is true for the last micro-batch of the step."""

    @abc.abstractmethod
    def step(self, lr_factor: float) -> StepReport:
        """Clip, check and update with the peak learning rates times ``lr_factor``, then clear the gradients.

        A gradient that is not finite on any rank leaves every parameter as it was.
        """

    @abc.abstractmethod
    def clear_gradients(self) -> None:
        """Forget gradients of a step that was not taken."""

    @abc.abstractmethod
    def agree(self, flag: bool) -> bool:
        """Whether ``flag`` is true on every rank."""

    @abc.abstractmethod
    def total(self, value: Tensor) -> Tensor:
        """Sum of ``value`` over the ranks."""

    @abc.abstractmethod
    def save(self, folder: Path, tokenizer: Tokenizer | None) -> None:
        """Write the model (Hugging Face layout) and the optimiser state into a new folder.

        The caller makes the folder appear at its final name only when it is complete.
        """

    @abc.abstractmethod
    def load(self, folder: Path) -> None:
        """Restore what :meth:`save` wrote (its checksums have been compared by the caller)."""


class TorchBackend(Backend):
    """One process with plain torch."""

    name = "torch"

    def __init__(self, model: SpikeLM, config: TrainConfig, device: torch.device) -> None:
        """Move the model to ``device`` and build its optimisers."""
        self.device = device
        self.rank, self.world_size = 0, 1
        self.model = model.to(device)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self._module = LossModule(self.model, config.l2wrap)
        self._optimizers = build_optimizers(self.model, config.optim)
        self._parameters = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self._clip = config.optim.clip
        self._bf16 = config.precision == "bf16"

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16)

    def loss(self, inputs: Tensor, targets: Tensor, state: State | None, ctx: Context) -> LossOutput:
        """Forward pass, under bf16 autocast where the configuration says so."""
        with self._autocast():
            output: LossOutput = self._module(inputs, targets, state, ctx)
        return output

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Back-propagate; with one process every micro-batch is the same."""
        torch.autograd.backward(loss)

    def step(self, lr_factor: float) -> StepReport:
        """One optimiser step, refused when the gradient is not finite."""
        set_learning_rate(self._optimizers, lr_factor)
        return optimizer_step(self._parameters, self._optimizers, clip=self._clip)

    def clear_gradients(self) -> None:
        """Set every gradient to None."""
        for _, parameter in self._parameters:
            parameter.grad = None

    def agree(self, flag: bool) -> bool:
        """The flag itself: there is one rank."""
        return flag

    def total(self, value: Tensor) -> Tensor:
        """The value itself: there is one rank."""
        return value

    def save(self, folder: Path, tokenizer: Tokenizer | None) -> None:
        """Write model and optimiser; tensors are stored as they are, bit for bit."""
        from spikelm.checkpoint import save_checkpoint
        from spikelm.train.training_state import write_tensors

        save_checkpoint(folder, self.model, tokenizer)
        optimizer = {
            f"optimizer/{name}": value for name, value in optimizer_tensors(self._optimizers).items()
        }
        write_tensors(folder, {**optimizer, **random_tensors(self.device)})

    def load(self, folder: Path) -> None:
        """Restore model and optimiser into the objects that exist already."""
        from spikelm.checkpoint import load_model
        from spikelm.train.training_state import read_tensors

        stored = load_model(folder, device="cpu")
        self.model.load_state_dict(stored.state_dict())
        tensors = read_tensors(folder)
        restore_random(tensors, self.device)
        prefix = "optimizer/"
        mine = {
            name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
        }
        load_optimizer_tensors(self._optimizers, mine)


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """State of torch's global generators."""
    tensors = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def restore_random(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Inverse of :func:`random_tensors`; a run that changes device keeps its new generator."""
    if "random/cpu" in tensors:
        torch.set_rng_state(tensors["random/cpu"])
    if device.type == "cuda" and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"], device)


def choose_device(name: str) -> torch.device:
    """The device of ``auto | cpu | cuda | cuda:N``.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= present:
        raise ConfigError(
            f"device is {name!r}, but torch sees {present} CUDA devices; use device=cpu or device=auto"
        )
    return device
