"""The configuration of a classification fine-tuning: one YAML file, as :mod:`spikelm.train.config`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from spikelm.errors import ConfigError
from spikelm.presets import find
from spikelm.train.config import Count, OptimConfig, Positive, ScheduleConfig, Section
from spikelm.train.overrides import apply_overrides, explain
from spikelm.yaml_values import read_yaml

FOLDS = 10
"""Parts into which a hash divides a file without a test set (ten-fold cross-validation)."""

OpenShare = Annotated[float, Field(gt=0.0, lt=1.0)]
DropShare = Annotated[float, Field(ge=0.0, lt=1.0)]


class LabelledConfig(Section):
    """Labelled text.

    Attributes:
        train: file of ``label text`` lines, or a .jsonl; also compressed. ``$NAME`` is a variable of the
            environment.
        dev: file that chooses the epoch; None holds ``dev_share`` of the training lines out, by a hash of the
            text.
        test: file that is measured once at the end; None measures fold ``fold``, or nothing.
        fold: with ``test: null``, which tenth of the lines (by a hash of the text) is the test set: 0 to 9.
        dev_share: see ``dev``.
        text_field, label_field: keys of a .jsonl file.
        labels: label in the file -> name of the class, in the order of the scores; None takes the labels of
            the training lines, sorted.
        encoding: of plain files (a .jsonl is UTF-8).
        tokenizer: ``bytes``, a tokenizer.json, a folder, or ``bpe:N``, a BPE of N tokens trained on the
            training lines; None takes that of ``init_from``, else ``bytes``.
        max_length: tokens; longer texts lose their end, and are counted.
    """

    train: str
    dev: str | None = None
    test: str | None = None
    fold: Annotated[int, Field(ge=0, lt=FOLDS)] | None = None
    dev_share: OpenShare = 0.1
    text_field: str = "text"
    label_field: str = "label"
    labels: dict[str, str] | None = None
    encoding: Literal["utf-8", "latin-1", "cp1252"] = "utf-8"
    tokenizer: str | None = None
    max_length: Positive = 512

    @model_validator(mode="after")
    def _consistent(self) -> LabelledConfig:
        """A test file and a test fold exclude one another."""
        if self.test is not None and self.fold is not None:
            raise ValueError("data.test and data.fold both name a test set; set one of them to null")
        return self


class FinetuneConfig(Section):
    """A whole fine-tuning. Defaults are those of SpikeGPT's scripts where these say something.

    Attributes:
        data: see the section.
        model: preset, file or mapping, as in a training configuration: a classifier from scratch.
        init_from: checkpoint folder whose body is fine-tuned; exactly one of the two is given.
        pooling: what the classifier reads: ``mean`` over the tokens, ``last`` token, or ``max``.
        score_dropout: share of the pooled features dropped in training.
        optim, schedule: see :mod:`spikelm.train.config`; the schedule spans all ``epochs``.
        epochs: passes over the training lines, at most.
        patience: epochs without a better dev figure after which a run ends (0: none does).
        metric: the dev figure that chooses the epoch.
        batch_size: texts of one optimiser step.
        precision: ``fp32``, or ``bf16`` (autocast).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        seed: of initial weights, order and dropout; run i of several has ``seed + i``.
        seeds: runs.
        gradient_checkpointing: recompute blocks in backward to save memory.
        out: folder.
        resume: continue what is found in ``out``.
    """

    data: LabelledConfig
    model: str | dict[str, Any] | None = None
    init_from: str | None = None
    pooling: Literal["mean", "last", "max"] = "mean"
    score_dropout: DropShare = 0.1
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=1e-4, weight_decay=0.0))
    schedule: ScheduleConfig = Field(default_factory=lambda: ScheduleConfig(name="constant"))
    epochs: Positive = 20
    patience: Count = 3
    metric: Literal["accuracy", "macro_f1"] = "accuracy"
    batch_size: Positive = 32
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    seeds: Positive = 1
    gradient_checkpointing: bool = False
    out: str = "runs/finetune"
    resume: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneConfig:
        """Weights come from one place."""
        if (self.model is None) == (self.init_from is None):
            both = "neither is" if self.model is None else "both are"
            raise ValueError(
                f"model (from scratch) or init_from (a checkpoint folder): {both} given; give one of them "
                "and set the other to null"
            )
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinetuneConfig:
        """Checked configuration.

        Raises:
            ConfigError: one sentence that names the first wrong key.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from error

    @classmethod
    def from_yaml(cls, source: str | Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
        """Read a file, or a preset of configs/finetune by name, and apply ``key=value`` overrides.

        ``init_from=FOLDER`` replaces the file's ``model`` and its tokenizer.

        Raises:
            ConfigError: the file cannot be read, or a key or value is wrong.
        """
        return cls.from_dict(
            _exclusive(apply_overrides(read_yaml(find("finetune", source)), overrides), overrides)
        )

    @classmethod
    def from_checkpoint(cls, folder: str | Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
        """Defaults on a checkpoint folder; the overrides name at least ``data.train``.

        Raises:
            ConfigError: a key or value is wrong or missing.
        """
        values: dict[str, Any] = {"init_from": str(folder), "data": {}}
        return cls.from_dict(apply_overrides(values, overrides))


def _exclusive(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Let the one of ``model`` and ``init_from`` that the command line names win over the file's.

    With ``init_from`` the file's tokenizer, which belongs to its ``model``, gives way too.
    """
    keys = {pair.partition("=")[0].strip() for pair in overrides}
    named = {key.partition(".")[0] for key in keys}
    for mine, other in (("init_from", "model"), ("model", "init_from")):
        if mine in named and other not in named and values.get(mine) is not None:
            values[other] = None
            data = values.get("data")
            if mine == "init_from" and isinstance(data, dict) and "data.tokenizer" not in keys:
                data["tokenizer"] = None
    return values
