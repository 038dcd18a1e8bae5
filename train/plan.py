"""What a configuration costs, told before it is started: parameters, tokens, FLOPs, hours, disk.

FLOPs are 6 N D: N the weights of all matrix products (projections and head), D the tokens. Recurrent and
elementwise work and embedding lookups are not counted, nor that most spikes are zero. Hours are FLOPs over a
peak times the share of it that a run is assumed to reach; the share is an assumption and is told as one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikelm.errors import CheckpointError, ConfigError, DataError, nearest
from spikelm.presets import find, names
from spikelm.yaml_values import read_yaml

if TYPE_CHECKING:
    from spikelm.config import ModelConfig
    from spikelm.train.config import TrainConfig
    from spikelm.train.finetune.config import FinetuneConfig

KINDS = ("train", "finetune")
H100_BF16 = 989e12
"""Dense bf16 FLOP/s of an NVIDIA H100 SXM (its data sheet)."""

H100_SHARE = 0.25
"""Assumed share of it; not measured."""

HERE_SHARE = 0.5
"""Assumed share of this machine's measured peak (`spikelm bench train` finds 0.5 to 0.6 for 46M)."""

ADAM_BYTES = 16
"""Weights, gradients and two moments of a parameter in float32."""

SAVED_BYTES = 12
"""Of a parameter in a checkpoint: weights and two moments."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Cost of one configuration.

    Attributes:
        name: preset or file.
        kind: ``train`` or ``finetune``.
        parameters: all of them.
        matrix_weights: N, weights of all matrix products.
        tokens: D, tokens of the run (fine-tuning: all epochs; early stopping may need fewer); None where the
            text is not known.
        flops: 6 N D, or None.
        precision: of the products.
        state_bytes: weights, gradients and moments in memory; activations come on top.
        disk_bytes: checkpoints, and the tokens of the text where known.
        published: figure to be compared with, or None.
        source: where it was published, or None.
        notes: what was assumed.
    """

    name: str
    kind: str
    parameters: int
    matrix_weights: int
    tokens: int | None
    flops: float | None
    precision: str
    state_bytes: int
    disk_bytes: int
    published: str | None
    source: str | None
    notes: tuple[str, ...]

    def hours(self, flops_per_second: float) -> float | None:
        """Hours at a speed."""
        return None if self.flops is None else self.flops / flops_per_second / 3600.0

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**dataclasses.asdict(self), "notes": list(self.notes)}


def recipes() -> list[tuple[str, str]]:
    """(kind, name) of every recipe that comes with the package."""
    return [(kind, name) for kind in KINDS for name in names(kind)]


def plan(source: str | Path, overrides: Sequence[str] = (), kind: str | None = None) -> Plan:
    """Cost of a preset of configs/train or configs/finetune, or of a file.

    Args:
        source: name or path.
        overrides: ``key=value`` pairs.
        kind: ``train`` or ``finetune`` where the name alone does not say it.

    Raises:
        ConfigError: no such preset, or a wrong key or value.
    """
    from spikelm.train.config import TrainConfig
    from spikelm.train.finetune.config import FinetuneConfig

    kind = kind or _kind(source)
    known: Mapping[str, Any] = {}
    if str(source) in names(kind):
        known = read_yaml(find("reproduce", "recipes"))[kind].get(str(source)) or {}
    if kind == "finetune":
        return _finetuning(str(source), FinetuneConfig.from_yaml(source, overrides), known)
    return _pretraining(str(source), TrainConfig.from_yaml(source, overrides), known)


def _kind(source: str | Path) -> str:
    """Of a preset by where it lies, of a file by its keys."""
    found = [kind for kind in KINDS if str(source) in names(kind)]
    if found:
        return found[0]
    if Path(source).suffix not in {".yaml", ".yml"} and len(Path(source).parts) == 1:
        known = [name for _, name in recipes()]
        raise ConfigError(nearest("recipe", str(source), known) + " (or give the path of a .yaml file)")
    values = read_yaml(find("train", source))
    return "finetune" if {"epochs", "patience", "pooling", "seeds"} & values.keys() else "train"


def _pretraining(name: str, config: TrainConfig, known: Mapping[str, Any]) -> Plan:
    tokens = config.steps * config.batch_size * config.data.block_length
    core, notes = _core(config.model, config.init_from, config.data.tokenizer, known)
    parameters, weights = _count(core)
    disk = (config.keep + 1) * SAVED_BYTES * parameters
    corpus = known.get("corpus_tokens")
    if corpus is None:
        notes.append("disk: without the tokens of the text, whose size is not known")
    else:
        disk += int(corpus) * (2 if core.vocab_size <= 65536 else 4)
        notes.append(f"{tokens / float(corpus):.2g} passes over the text")
    return _plan(name, "train", parameters, weights, tokens, config.precision, disk, known, notes)


def _finetuning(name: str, config: FinetuneConfig, known: Mapping[str, Any]) -> Plan:
    core, notes = _core(config.model or {}, config.init_from, config.data.tokenizer or "bytes", known)
    parameters, weights = _count(core, with_head=False)
    tokens = None
    if known:
        tokens = round(known["texts"] * known["tokens_per_text"] * config.epochs * config.seeds)
        notes.append(f"at most: {config.epochs} epochs, {config.seeds} seeds")
    else:
        notes.append("tokens: known only when the text is read")
    disk = config.seeds * (2 * SAVED_BYTES + 4) * parameters
    return _plan(name, "finetune", parameters, weights, tokens, config.precision, disk, known, notes)


def _plan(
    name: str,
    kind: str,
    parameters: int,
    weights: int,
    tokens: int | None,
    precision: str,
    disk: int,
    known: Mapping[str, Any],
    notes: Sequence[str],
) -> Plan:
    return Plan(
        name=name,
        kind=kind,
        parameters=parameters,
        matrix_weights=weights,
        tokens=tokens,
        flops=None if tokens is None else 6.0 * weights * tokens,
        precision=precision,
        state_bytes=ADAM_BYTES * parameters,
        disk_bytes=disk,
        published=known.get("published"),
        source=known.get("source"),
        notes=tuple(notes),
    )


def _core(
    model: str | Mapping[str, Any], init_from: str | None, tokenizer: str, known: Mapping[str, Any]
) -> tuple[ModelConfig, list[str]]:
    """The model of a configuration, also where its tokenizer or checkpoint is not there yet."""
    from spikelm.checkpoint import read_config
    from spikelm.config import ModelConfig
    from spikelm.tokenizer import Tokenizer
    from spikelm.train.setup import model_config

    notes: list[str] = []
    vocabulary: int | None = None
    if tokenizer.startswith("bpe:") and tokenizer[4:].isdecimal():
        vocabulary = int(tokenizer[4:])
    else:
        try:
            vocabulary = Tokenizer.load(tokenizer).vocab_size
        except DataError:
            vocabulary = known.get("vocabulary")
            if vocabulary is not None:
                notes.append(f"{tokenizer} is not here yet: {vocabulary} tokens assumed")
    start: ModelConfig | None = None
    if init_from is not None:
        try:
            start = read_config(init_from)
        except CheckpointError:
            if "model" not in known:
                raise
            start = ModelConfig.from_yaml(known["model"])
            notes.append(f"{init_from} is not here yet: {known['model']} assumed")
    core = model_config(model, Tokenizer.bytes(), start)
    given = isinstance(model, Mapping) and "vocab_size" in model
    if vocabulary is not None and start is None and not given:
        core = dataclasses.replace(core, vocab_size=vocabulary)
    return core, notes


def _count(core: ModelConfig, with_head: bool = True) -> tuple[int, int]:
    """Parameters, and weights of all matrix products of a token (a tied head's included)."""
    import torch
    from torch import nn

    from spikelm.channels.experts import routed_shares
    from spikelm.model import SpikeLM

    with torch.device("meta"):
        model = SpikeLM(core, with_head=with_head)
    shares = routed_shares(model)
    matrices = (module for module in model.modules() if isinstance(module, nn.Linear))
    weights = sum(m.in_features * m.out_features * shares.get(m, 1.0) for m in matrices)
    return model.num_parameters(), round(weights)
