"""The configuration of a training run: one YAML file, checked before anything else happens.

Every value that changes the numbers of a run is here, so a checkpoint can say whether it belongs to a
configuration. Unknown keys, wrong types and impossible values are one sentence that names the key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)

from spikelm.errors import ConfigError, nearest
from spikelm.presets import find
from spikelm.train.components import Component, parse_components, plain
from spikelm.train.overrides import apply_overrides, explain
from spikelm.yaml_values import read_yaml

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Betas = Annotated[tuple[Beta, Beta], Strict(False)]

TRACKERS = ("tensorboard", "wandb", "trackio")
PUBLISHED_ADAM = {"betas": (0.9, 0.99), "eps": 4e-9, "weight_decay": 0.0}
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class Section(BaseModel):
    """Base of all sections: frozen, strict types, no unknown keys, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """Text, tokenizer and block length.

    Attributes:
        train: source specification (a file, a folder, ``file.jsonl#field``, ``builtin:python-docs#train``),
            or a list of ``{source: SPEC, weight: 0.7}``, whose shares are those of the samples.
        valid: source for evaluation, or None for no evaluation.
        tokenizer: ``bytes``, a tokenizer.json, or a folder that holds one.
        block_length: tokens of one sample.
        cache: folder of the tokenised blocks; None lets the data code choose.
        stream: tokenise ``train`` while training instead of once before it.
        shuffle_buffer: blocks of a stream that are shuffled together (0: the order of the documents).
        carried: carry the state from step to step over long documents, in ``batch_size`` lanes.
        prefetch: steps whose samples are made ahead in a thread (0: none).
    """

    train: Annotated[str | list[Component], PlainValidator(parse_components), PlainSerializer(plain)]
    valid: str | None = None
    tokenizer: str = "bytes"
    block_length: Positive = 256
    cache: str | None = None
    stream: bool = False
    shuffle_buffer: Count = 0
    carried: bool = False
    prefetch: Count = 2

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        """Options that need, or exclude, one another."""
        if self.shuffle_buffer and not self.stream:
            raise ValueError("shuffle_buffer is for stream: true; without it all blocks are shuffled anyway")
        if self.carried and (self.stream or not isinstance(self.train, str)):
            other = "stream: true" if self.stream else "a mixture"
            raise ValueError(f"carried needs one tokenised source, not {other}; leave one of the two out")
        return self


class MuonConfig(Section):
    """Options of Muon for the hidden matrices; the other parameters use AdamW with ``optim.lr``.

    Attributes:
        lr: peak learning rate of the matrices; None takes ``optim.lr`` (the update is scaled to AdamW's RMS).
        weight_decay: None takes ``optim.weight_decay``.
        momentum: momentum of the matrices.
        nesterov: Nesterov form of the momentum.
        ns_steps: Newton-Schulz iterations.
    """

    lr: Rate | None = None
    weight_decay: Weight | None = None
    momentum: Beta = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5


class OptimConfig(Section):
    """Optimiser. What is None takes the default of the named optimiser, so the log shows every value.

    Attributes:
        name: ``adamw`` (betas .9/.95, eps 1e-8, decay 0.1 on matrices only), ``adam`` (as SpikeGPT published:
            betas .9/.99, eps 4e-9, no decay) or ``muon``.
        lr: peak learning rate.
        min_lr: learning rate at the end of the schedule.
        betas: decay rates of Adam's moments.
        eps: Adam's epsilon.
        weight_decay: decoupled decay of the matrices.
        clip: largest global gradient norm; 0 does not clip.
        muon: options of Muon.
    """

    name: Literal["adamw", "adam", "muon"] = "adamw"
    lr: Rate = 1e-3
    min_lr: Weight = 1e-5
    betas: Betas | None = None
    eps: Rate | None = None
    weight_decay: Weight | None = None
    clip: Weight = 1.0
    muon: MuonConfig = MuonConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """Fill what is missing with the defaults of the named optimiser."""
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        for key, value in (PUBLISHED_ADAM if filled.get("name") == "adam" else ADAMW).items():
            if filled.get(key) is None:
                filled[key] = value
        return filled

    @model_validator(mode="after")
    def _consistent(self) -> OptimConfig:
        """The learning rate may not rise at the end; published Adam has no decay."""
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr}, above lr {self.lr}; choose min_lr <= lr")
        if self.name == "adam" and self.weight_decay:
            raise ValueError("weight_decay is not part of the published adam; use name: adamw for decay")
        return self


class ScheduleConfig(Section):
    """Learning rate over the steps.

    Attributes:
        name: ``cosine``, ``wsd`` (warm-up, stable, decay), ``constant`` or ``exponential``.
        warmup: steps of linear warm-up.
        decay: share of all steps that ``wsd`` spends decaying.
    """

    name: Literal["cosine", "wsd", "constant", "exponential"] = "cosine"
    warmup: Count = 0
    decay: Share = 0.2


class LossSpikeConfig(Section):
    """When a loss or gradient norm is called a spike (see :mod:`spikelm.train.loss_spikes`), and then what.

    Attributes:
        window: steps that say what is ordinary; nothing is called a spike before half of them are done.
        threshold: robust standard deviations above the median.
        action: ``warn``; ``stop``; ``rollback`` (go back to the newest checkpoint and pass over the batch);
            ``off``.
    """

    window: Annotated[int, Field(ge=10)] = 100
    threshold: Rate = 6.0
    action: Literal["warn", "stop", "rollback", "off"] = "warn"

    @field_validator("action", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """YAML reads a bare ``off`` as false."""
        return "off" if value is False else value


class TrainConfig(Section):
    """A whole run.

    Attributes:
        model: a preset, a file, or a mapping: either a complete model configuration or ``preset: NAME`` with
            values that replace the preset's; ``twin: true`` turns every neuron off. Without an own
            ``vocab_size`` the model takes the tokenizer's.
        init_from: checkpoint folder whose weights (and nothing else) the run starts from. The model is then
            the checkpoint's; ``model`` may hold single values that replace its, as ``{dropout: 0.1}``. The
            tokenizer must be the checkpoint's, and is where ``data.tokenizer`` names none.
        data, optim, schedule: see the sections.
        steps: optimiser steps.
        batch_size: samples of one optimiser step, whatever the accumulation.
        accumulation: micro-batches into which a step's samples are split.
        precision: ``fp32``, or ``bf16`` (autocast; master weights, states and neuron parameters stay fp32).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        seed: seed of initial weights, sample order and dropout.
        eval_every: steps between evaluations (0: only at the end).
        eval_batches: an evaluation uses this many times ``batch_size`` samples (0: the whole validation set).
        sample_every: steps between written samples (0: none).
        sample_prompt, sample_tokens: how a sample starts and how long it is.
        checkpoint_every: steps between checkpoints (0: only at the end).
        keep: newest checkpoints that are kept.
        keep_best: also save when an evaluation is the best so far, and keep that checkpoint (link ``best``).
        milestone_every: steps between checkpoints that are kept for ever (0: none).
        async_checkpoints: write in the background; training waits for the copy to host memory only.
        log_every: steps between lines of the log.
        backend: ``torch`` (one process, or DistributedDataParallel on several ranks), ``deepspeed`` (ZeRO),
            or ``auto``: deepspeed where ``deepspeed`` is given.
        deepspeed: settings of DeepSpeed: a name in configs/deepspeed (``zero2``), or a JSON file.
        timeout: seconds that ranks wait for one another before the run ends with an error.
        on_bad_step: what happens when a loss or gradient is not finite, always before the update: ``stop``,
            ``skip`` (pass over the batch) or ``rollback`` (also go back to the newest checkpoint).
        bad_step_limit: bad steps in a row, or returns to the same checkpoint; with one more a run stops
            whatever the policy.
        loss_spike: what a jump of the loss or gradient norm is, and what happens then.
        trackers: where curves go beside the log: ``auto`` (TensorBoard where it is installed), a list of
            ``tensorboard``, ``wandb`` and ``trackio``, or ``[]``.
        measure_mfu: measure the peak of this machine at the start (under a second), and log the share of it
            that the run uses.
        l2wrap: factor of the L2Wrap gradient (1e-4 as SpikeGPT published, 0 for none).
        gradient_checkpointing: recompute blocks in backward to save memory.
        out: folder of the run.
        resume: continue the run found in ``out``.
    """

    model: str | dict[str, Any]
    init_from: str | None = None
    data: DataConfig
    optim: OptimConfig = Field(default_factory=OptimConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    steps: Positive = 1000
    batch_size: Positive = 16
    accumulation: Positive = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    eval_every: Count = 200
    eval_batches: Count = 20
    sample_every: Count = 0
    sample_prompt: str = "The "
    sample_tokens: Positive = 120
    checkpoint_every: Count = 200
    keep: Positive = 2
    keep_best: bool = False
    milestone_every: Count = 0
    async_checkpoints: bool = True
    log_every: Positive = 10
    backend: Literal["auto", "torch", "deepspeed"] = "auto"
    deepspeed: str | None = None
    timeout: Annotated[float, Field(ge=1.0)] = 600.0
    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    bad_step_limit: Positive = 10
    loss_spike: LossSpikeConfig = LossSpikeConfig()
    trackers: Literal["auto"] | list[str] = "auto"
    measure_mfu: bool = True
    l2wrap: Weight = 0.0
    gradient_checkpointing: bool = False
    out: str = "runs/train"
    resume: bool = True

    @field_validator("trackers", mode="before")
    @classmethod
    def _known_trackers(cls, value: Any) -> Any:
        """One name may stand without brackets; unknown ones are told with those that exist."""
        names = [value] if isinstance(value, str) and value != "auto" else value
        if names == "auto":
            return names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{value!r} is no list of names; expected auto, [], or some of {list(TRACKERS)}")
        for name in names:
            if name not in TRACKERS:
                raise ValueError(nearest("tracker", name, ["auto", *TRACKERS]))
        return list(dict.fromkeys(names))

    @model_validator(mode="before")
    @classmethod
    def _from_checkpoint(cls, values: Any) -> Any:
        """With ``init_from``, model and tokenizer are the checkpoint's unless said otherwise."""
        if not isinstance(values, Mapping) or not isinstance(folder := values.get("init_from"), str):
            return values
        data = values.get("data")
        if isinstance(data, Mapping) and data.get("tokenizer") is None:
            latest = Path(folder) / "latest"
            data = {**data, "tokenizer": str(latest if latest.is_dir() else folder)}
        model = values.get("model")
        return {**values, "model": {} if model is None else model, "data": data}

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        """Sizes that contradict one another, and two models."""
        named = isinstance(self.model, str) or "preset" in self.model
        if self.init_from is not None and named:
            raise ValueError(
                f"init_from is {self.init_from!r} and brings its model; leave model out (on the "
                "command line: model=null), or give single values that replace the checkpoint's, for example "
                "model.dropout=0.1"
            )
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"accumulation is {self.accumulation} and batch_size {self.batch_size}; "
                "each micro-batch needs at least one sample"
            )
        if self.schedule.warmup > self.steps:
            raise ValueError(
                f"schedule.warmup is {self.schedule.warmup}, longer than the {self.steps} steps; set "
                f"schedule.warmup too, for example schedule.warmup={max(1, self.steps // 20)}, or raise steps"
            )
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Checked configuration.

        Raises:
            ConfigError: one sentence that names the first wrong key.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from error

    @classmethod
    def from_yaml(cls, source: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Read a file, or a preset of configs/train by name, and apply ``key=value`` overrides.

        Raises:
            ConfigError: the file cannot be read, or a key or value is wrong.
        """
        return cls.from_dict(apply_overrides(read_yaml(find("train", source)), overrides))
