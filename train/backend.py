"""What a trainer needs from the machinery below it: one small interface, one implementation per machinery.

A backend owns the model as it is executed, the optimisers and their memory. The trainer owns data order,
schedule, log, evaluation and checkpoints. The interface is shaped so that a wrapped model fits: the forward
pass goes through :class:`LossModule` (DistributedDataParallel and ZeRO act in ``forward``), ``backward`` is
told which micro-batch is the last one (gradients are exchanged once), ``step`` alone changes parameters and
refuses gradients that are not finite on any rank, and tensors go in and out whole and under their names,
however they are split among the ranks: so a checkpoint of one backend is one of every other.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spikelm.errors import ConfigError
from spikelm.loss import LossOutput, next_token_loss
from spikelm.recurrence import Context
from spikelm.state import State
from spikelm.train.optim import StepReport
from spikelm.train.ranks import Ranks

if TYPE_CHECKING:
    from spikelm.model import SpikeLM
    from spikelm.train.config import TrainConfig


MODEL, OPTIMIZER = "model/", "optimizer/"
"""Prefixes of the names under which :meth:`Backend.tensors` gives weights and the optimisers' memory."""

Wanted = Callable[[str, int], bool]
"""Asked with a tensor's name and its bytes, in the same order on every rank, whether this rank wants it."""

Read = Callable[[str], Tensor | None]
"""Gives the stored tensor of a name, or None where there is none."""


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
    """Executes passes and steps for the trainer. Every method but ``loss`` is called on all ranks together.

    Attributes:
        name: how logs call it.
        model: the core model (never a wrapper).
        device: where batches go.
        ranks: this process among those of the run.
        forward_alone: whether a rank's forward pass waits for no other rank, so that it may end early.
    """

    forward_alone = True
    name: str
    model: SpikeLM
    device: torch.device
    ranks: Ranks

    @abc.abstractmethod
    def loss(
        self, inputs: Tensor, targets: Tensor, state: State | None, ctx: Context, *, last: bool = True
    ) -> LossOutput:
        """Forward pass in the precision of the run; inputs and targets [B, T] on any device.

        With weights that are split among the ranks, every rank must call it equally often. ``last`` is true
        for the last micro-batch of a step (gradients are exchanged in its backward pass).
        """

    @abc.abstractmethod
    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of ``loss``, this rank's share of the step's whole loss (shares are summed)."""

    @abc.abstractmethod
    def step(self, lr_factor: float) -> StepReport:
        """Clip, check and update with the peak learning rates times ``lr_factor``, then clear the gradients.

        A gradient that is not finite on any rank leaves every parameter and the optimisers' memory as they
        were, and clears the gradients too.
        """

    @abc.abstractmethod
    def clear_gradients(self) -> None:
        """Forget gradients of a step that was not taken."""

    @abc.abstractmethod
    def tensors(self, wanted: Wanted) -> Iterator[tuple[str, Tensor]]:
        """Weights and optimiser memory, whole, under names that no backend changes.

        ``model/NAME`` are weights in their own dtype, ``optimizer/GROUP/NAME/KEY`` what the optimiser
        remembers (``exp_avg``, ``exp_avg_sq``, ``step``, for Muon ``momentum_buffer``).

        Args:
            wanted: which of them this rank is given. It is called in the same order on every rank.

        Yields:
            name and tensor; valid until the next one is asked for (the caller copies it).
        """

    @abc.abstractmethod
    def restore(self, read: Read) -> None:
        """Take over what :meth:`tensors` gave, on however many ranks and by whichever backend.

        Args:
            read: every rank calls it for what it needs of it.

        Raises:
            CheckpointError: a weight is missing or has another shape.
            TrainingError: optimiser memory does not fit.
        """

    def inference_model(self) -> SpikeLM | None:
        """A model that rank 0 can run alone, in evaluation mode; None on the other ranks."""
        return self.model if self.ranks.main else None


def build_backend(model: SpikeLM, config: TrainConfig, device: torch.device, ranks: Ranks) -> Backend:
    """The backend that a configuration names (``auto``: deepspeed where its settings are given, else torch).

    Raises:
        ConfigError: DeepSpeed is not installed or its settings cannot be used.
    """
    name = config.backend
    if name == "auto":
        name = "torch" if config.deepspeed is None else "deepspeed"
    if name == "deepspeed":
        from spikelm.train.backend_deepspeed import DeepSpeedBackend

        return DeepSpeedBackend(model, config, device, ranks)
    if config.deepspeed is not None:
        raise ConfigError(
            f"backend is torch and deepspeed is {config.deepspeed!r}; leave one of them out "
            "(backend=deepspeed uses the settings)"
        )
    from spikelm.train.backend_torch import TorchBackend

    return TorchBackend(model, config, device, ranks)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of ``auto | cpu | cuda | cuda:N``; ``cuda`` is the GPU of this rank.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if present else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
    if (device.index or 0) >= present:
        raise ConfigError(
            f"device is {str(device)!r}, but torch sees {present} CUDA devices; use device=cpu or device=auto"
        )
    return device
