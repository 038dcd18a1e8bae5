"""The training step for models trained by transformers' Trainer."""

from __future__ import annotations

from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spikelm.channels.moe import MoE
from spikelm.errors import ConfigError
from spikelm.neurons.base import Neuron


class StepCallback(TrainerCallback):
    """Tells the model the optimiser step, which firing-rate schedules (``start``, ``ramp``) go by.

    It also moves the biases of mixtures of experts (``loss_free_bias``) after every optimiser step, by the
    loads of all ranks; without it they stay where they are.

    Use it as ``Trainer(model=model, ..., callbacks=[StepCallback()])``. It sets ``training_step`` on every
    SpikeLM inside the trained model, so PEFT and other wrappers do no harm. In a loop of your own, set
    ``training_step`` of the SpikeLM model itself before every step.
    """

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Pass on the number of optimiser steps done so far."""
        for module in () if model is None else model.modules():
            if hasattr(type(module), "training_step"):  # not on wrappers, which pass attributes on
                setattr(module, "training_step", state.global_step)  # noqa: B010 (nn.Module is typed otherwise)
                setattr(module, "expert_loads", {})  # noqa: B010

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Sum the loads of the step over the ranks, and let every mixture move its bias."""
        for module in () if model is None else model.modules():
            if hasattr(type(module), "expert_loads"):
                for path, load in sorted(cast("dict[str, Tensor]", module.expert_loads or {}).items()):
                    load = load.clone()
                    if dist.is_available() and dist.is_initialized():
                        dist.all_reduce(load)
                    cast(MoE, cast(nn.Module, module.model).get_submodule(path)).balance(load)
                setattr(module, "expert_loads", None)  # noqa: B010


def scheduled(model: nn.Module) -> bool:
    """Whether a neuron's firing-rate loss depends on the training step."""
    targets = (module.rate_target for module in model.modules() if isinstance(module, Neuron))
    return any(target is not None and (target.start > 0 or target.ramp > 0) for target in targets)


def step_of(model: nn.Module, training_step: int | None) -> int:
    """The training step for the context.

    Raises:
        ConfigError: if a schedule needs one and none was ever set.
    """
    if training_step is None and scheduled(model):
        raise ConfigError(
            "a rate_target has start or ramp, but nobody tells the model the training step; give the Trainer "
            "callbacks=[spikelm.hf.StepCallback()], or set model.training_step before every step"
        )
    return training_step or 0
