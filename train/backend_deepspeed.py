"""DeepSpeed: ZeRO splits optimiser memory (stage 1), gradients (2) and weights (3) among the ranks.

DeepSpeed runs in float32 with torch's autocast for bfloat16 products, so that weights, decays and neuron
parameters stay float32 whatever the precision. It never writes a checkpoint: tensors are taken out whole,
under their names, and put back in the same way, so any stage on any number of ranks continues any run.

Two habits of DeepSpeed's are used here. Its optimisers refuse a gradient whose norm is not finite, clear
what they hold and say so; a step that must not be taken is therefore ended by giving them such a gradient.
And they make their memory in the first step; before memory is restored, one step with gradients of zero at a
learning rate of zero is taken, which leaves every weight as it is.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spikelm.checkpoint import check_weights
from spikelm.errors import ConfigError, TrainingError
from spikelm.loss import LossOutput
from spikelm.recurrence import Context
from spikelm.state import State
from spikelm.train.backend import MODEL, OPTIMIZER, Backend, LossModule, Read, Wanted
from spikelm.train.backend_torch import model_tensors
from spikelm.train.deepspeed_config import complete, offloads_optimizer, read_settings, stage_of
from spikelm.train.gradients import GradientWatch
from spikelm.train.ops import prepare
from spikelm.train.optim import StepReport, build_optimizers, optimizer_step
from spikelm.train.ranks import Ranks

if TYPE_CHECKING:
    from spikelm.model import SpikeLM
    from spikelm.train.config import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedBackend(Backend):
    """A DeepSpeed engine on one rank or several."""

    def __init__(self, model: SpikeLM, config: TrainConfig, device: torch.device, ranks: Ranks) -> None:
        """Build the engine; all ranks begin with rank 0's weights.

        Raises:
            ConfigError: DeepSpeed is not installed, or the settings cannot be used.
        """
        settings = read_settings(config.deepspeed or "zero1")
        prepare(settings)
        self.device, self.ranks = device, ranks
        self.stage = stage_of(settings)
        self.name = f"deepspeed-zero{self.stage}"
        self.forward_alone = self.stage < 3  # weights that are split are gathered layer by layer
        self.model = model.to(device)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self._clip = config.optim.clip
        deepspeed = _library(ranks, device)
        self._parameters = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        optimizer = _optimizer(self.model, config, offloads_optimizer(settings))
        self._groups = [
            {"names": list(group["names"]), "base_lr": group["base_lr"]} for group in optimizer.param_groups
        ]
        self._watch = GradientWatch(self._parameters)
        try:
            self._engine, *_ = deepspeed.initialize(
                model=LossModule(self.model, config.l2wrap),
                optimizer=optimizer,
                config=complete(settings, config, ranks.world_size),
                dist_init_required=False,
            )
        except (AssertionError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"DeepSpeed refuses the settings deepspeed={config.deepspeed!r}: {reason}"
            ) from error
        self._passes = 0
        """Backward passes since the last step."""
        self._linked = False

    def loss(
        self, inputs: Tensor, targets: Tensor, state: State | None, ctx: Context, *, last: bool = True
    ) -> LossOutput:
        """Forward pass through the engine (its autocast follows the precision)."""
        self._engine.set_gradient_accumulation_boundary(last)
        output: LossOutput = self._engine(inputs, targets, state, ctx)
        return output

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Back-propagate; ZeRO takes the mean over the ranks, and the shares are to be summed."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.ranks.world_size, scale_wrt_gas=False)
        self._watch.end_micro_batch()
        self._passes += 1
        if not last:
            self._engine.step()  # counts the micro-batch; nothing is updated before the last one

    def step(self, lr_factor: float) -> StepReport:
        """One optimiser step; where the gradient's norm is not finite, everything stays as it was."""
        for mine, group in zip(self._groups, self._engine.optimizer.param_groups, strict=True):
            group["lr"] = mine["base_lr"] * lr_factor
        # Flagged before the step, on all ranks: what is finite here may still overflow in the sum.
        good = self.ranks.agree(self._watch.finite())
        if self.stage == 0:
            report = optimizer_step(self._parameters, [self._engine.optimizer], clip=self._clip)
            applied, norm = report.applied, report.grad_norm
            self._engine.zero_grad()
        else:
            if not good:
                self._tiny_pass(math.nan)  # its norm in float64 may be finite where ours overflows
            self._engine.step()
            applied = bool(self._engine.was_step_applied())
            norm = float(self._engine.get_global_grad_norm() or 0.0) if applied else math.nan
        self._passes = 0
        if applied and not good:
            raise TrainingError(
                "DeepSpeed updated the weights with a gradient that is not finite; start the same command "
                "again to go back to the newest checkpoint, and report this with DeepSpeed's version"
            )
        if applied:
            self._watch.forget()
            return StepReport(applied=True, grad_norm=norm)
        return StepReport(applied=False, grad_norm=norm, bad=self._watch.take())

    def clear_gradients(self) -> None:
        """Have DeepSpeed drop what the backward passes of an abandoned step left in its buffers."""
        self._watch.forget()
        if self._passes == 0:
            return
        if self.stage == 0:
            self._engine.zero_grad()
        else:
            self._tiny_pass(math.nan)
            self._engine.step()
            if self._engine.was_step_applied():
                raise TrainingError("DeepSpeed updated the weights in a step that was to be abandoned")
        self._watch.forget()
        self._passes = 0

    def _tiny_pass(self, factor: float) -> None:
        """Forward and backward over one token, the loss multiplied with ``factor``."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        training = self.model.training
        self.model.train()
        output = self.loss(token, token, None, Context(losses=[]), last=True)
        self._engine.backward(output.loss * factor, scale_wrt_gas=False)
        self.model.train(training)

    # --- tensors in and out ---------------------------------------------------------------------------------

    def tensors(self, wanted: Wanted) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors, gathered one at a time; a rank that does not want one helps and drops it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        trained = dict(self._parameters)
        for name, value in model_tensors(self.model).items():
            size = self._numel(trained.get(name, value)) * value.element_size()
            mine = wanted(MODEL + name, size)
            whole = value
            if self.stage == 3 and name in trained:
                whole = safe_get_full_fp32_param(trained[name])
            if mine:
                yield MODEL + name, whole
        if not self._has_memory():
            return
        self._link()
        step = self._step_count()
        for group in self._groups:
            for name in group["names"]:
                parameter = trained[name]
                for key in MOMENTS:
                    full = f"{OPTIMIZER}0/{name}/{key}"
                    mine = wanted(full, self._numel(parameter) * 4)
                    if self.stage == 0:
                        whole = self._engine.optimizer.state[parameter][key]
                    else:
                        whole = safe_get_full_optimizer_state(parameter, key)
                    if mine:
                        yield full, whole.reshape(self._shape(parameter))
                if wanted(f"{OPTIMIZER}0/{name}/step", 4):
                    yield f"{OPTIMIZER}0/{name}/step", torch.tensor(float(step))

    def restore(self, read: Read) -> None:
        """Every rank reads everything once and keeps its part."""
        self.clear_gradients()
        trained, buffers = dict(self._parameters), dict(self.model.named_buffers())
        values = {name: read(MODEL + name) for name in model_tensors(self.model)}
        found = {name: value for name, value in values.items() if value is not None}
        if self.model.config.tie_word_embeddings and "embedding.weight" in found:
            found["head.linear.weight"] = found["embedding.weight"]
        check_weights(self.model, found, "the checkpoint", shapes=self._shapes())
        for name, value in found.items():
            if name in trained:
                self._set_weight(trained[name], value)
            elif name in buffers:  # whole on every rank, under every stage
                buffers[name].copy_(value)
        first = self._parameters[0][0]
        if read(f"{OPTIMIZER}0/{first}/step") is None:
            return
        if self.stage > 0 and not self._has_memory():
            self._make_memory()
        self._link()
        for name, parameter in self._parameters:
            self._set_memory(name, parameter, read)

    def _set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        from deepspeed import zero
        from deepspeed.utils import safe_set_full_fp32_param

        on_device = value.to(self.device, torch.float32)
        with torch.no_grad():
            if self.stage == 3:
                with zero.GatheredParameters([parameter], modifier_rank=0):
                    if self.ranks.main:
                        parameter.data.copy_(on_device)
            else:
                parameter.data.copy_(on_device)
            if self.stage > 0:
                safe_set_full_fp32_param(parameter, on_device)

    def _set_memory(self, name: str, parameter: nn.Parameter, read: Read) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        step = read(f"{OPTIMIZER}0/{name}/step")
        moments = {key: read(f"{OPTIMIZER}0/{name}/{key}") for key in MOMENTS}
        shape = self._shape(parameter)
        for key, value in moments.items():
            if value is None or step is None or value.shape != shape:
                got = "missing" if value is None else f"of shape {tuple(value.shape)}"
                raise TrainingError(
                    f"optimiser state {name}/{key} is {got}, its parameter has shape {tuple(shape)}"
                )
            value = value.to(self.device, torch.float32)
            if self.stage == 0:
                memory = self._engine.optimizer.state[parameter]
                memory[key] = value.clone()
                memory["step"] = torch.tensor(float(step))
            else:
                safe_set_full_optimizer_state(parameter, value, key)
        if self.stage > 0 and step is not None:
            for memory in self._inner().state.values():
                kept = memory.get("step")
                memory["step"] = (
                    torch.full_like(kept, float(step)) if isinstance(kept, Tensor) else int(float(step))
                )

    def _make_memory(self) -> None:
        """Have the optimiser make its memory in a step that changes no weight."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = 0.0
        self._tiny_pass(0.0)
        self._engine.step()
        self._watch.forget()
        if not self._engine.was_step_applied():
            raise TrainingError("DeepSpeed did not take the empty step that makes room for its memory")

    def _link(self) -> None:
        """Have ZeRO 1 and 2 find the moments of every parameter group.

        They look once, after the first group's first update, when the moments of the others do not exist yet
        (seen in DeepSpeed 0.19.8).
        """
        zero = self._engine.optimizer
        if self.stage in (1, 2) and not self._linked and hasattr(zero, "_hp_optimizer_states_linked"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
            self._linked = True

    def _inner(self) -> Any:
        """The optimiser inside ZeRO's."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    def _has_memory(self) -> bool:
        return any(MOMENTS[0] in memory for memory in self._inner().state.values())

    def _step_count(self) -> float:
        return max(float(memory["step"]) for memory in self._inner().state.values() if "step" in memory)

    def _shape(self, parameter: Tensor) -> torch.Size:
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    def _numel(self, parameter: Tensor) -> int:
        return int(getattr(parameter, "ds_numel", parameter.numel()))

    def _shapes(self) -> dict[str, torch.Size]:
        return {name: self._shape(p) for name, p in self.model.named_parameters(remove_duplicate=False)}

    def inference_model(self) -> SpikeLM | None:
        """Under stage 3 a copy on rank 0's CPU, gathered by all ranks."""
        if self.stage < 3:
            return super().inference_model()
        from spikelm.model import SpikeLM

        main = self.ranks.main
        weights = {
            name.removeprefix(MODEL): value.detach().cpu().clone()
            for name, value in self.tensors(lambda name, nbytes: main and name.startswith(MODEL))
        }
        if not main:
            return None
        with torch.device("meta"):
            copy = SpikeLM(self.model.config)
        if self.model.config.tie_word_embeddings:
            weights["head.linear.weight"] = weights["embedding.weight"]
        copy.load_state_dict(weights, assign=True)
        copy.tie_weights()
        return copy.eval()


def _optimizer(model: SpikeLM, config: TrainConfig, offloaded: bool) -> torch.optim.Optimizer:
    """The configuration's Adam; DeepSpeed's own where it works on the CPU."""
    if config.optim.name == "muon":
        complete({}, config, 1)  # says why not
    (optimizer,) = build_optimizers(model, config.optim)
    if not offloaded:
        return optimizer
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    options = config.optim
    groups = [dict(group) for group in optimizer.param_groups]
    chosen: torch.optim.Optimizer = DeepSpeedCPUAdam(
        groups,
        lr=options.lr,
        betas=options.betas or (0.9, 0.95),
        eps=options.eps or 1e-8,
        weight_decay=0.0,
        adamw_mode=options.name == "adamw",
    )
    return chosen


def _worth_telling(record: logging.LogRecord) -> bool:
    """Drop what the trainer says better (a refused step) and what is no news (the class of the loss)."""
    text = record.getMessage()
    return "OVERFLOW!" not in text and "unknown inputs or outputs type" not in text


def _library(ranks: Ranks, device: torch.device) -> Any:
    """The deepspeed module, meeting the ranks that met already.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    try:
        import deepspeed
        import deepspeed.comm
    except ImportError as error:
        raise ConfigError(
            f"backend deepspeed needs DeepSpeed ({error}); install it with pip install 'spikelm[train]'"
        ) from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.utils.logger.addFilter(_worth_telling)
    # Its calls have newer names in torch; each of them would be told to the user.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    if device.type == "cpu":
        # A shared-memory all-reduce for inference, compiled for a minute at every first start: not used here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if ranks.world_size == 1:
        for name, value in {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }.items():
            os.environ.setdefault(name, value)
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False, auto_mpi_discovery=False
    )
    return deepspeed
