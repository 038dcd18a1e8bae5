"""From a configuration to the objects of a run: tokenizer, blocks, model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spikelm.config import ModelConfig
from spikelm.errors import ConfigError, DataError
from spikelm.model import SpikeLM
from spikelm.recurrence import Part
from spikelm.train.reporting import ProgressFactory, silent_progress

if TYPE_CHECKING:
    from spikelm.data.blocks import TokenBlocks
    from spikelm.data.samples import Samples
    from spikelm.tokenizer import Tokenizer
    from spikelm.train.config import DataConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Text:
    """Tokenizer and samples of a run.

    Attributes:
        tokenizer: of both texts.
        train: training samples.
        valid: held-out blocks, or None.
        options: those of the ``data`` section that change the samples and are not at their default.
    """

    tokenizer: Tokenizer
    train: Samples
    valid: TokenBlocks | None
    options: Mapping[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> dict[str, Any]:
        """What the training numbers depend on, under the names of the configuration keys."""
        return {
            "data.tokenizer (fingerprint)": self.tokenizer.sha256,
            "data.train (fingerprint)": self.train.fingerprint(),
            **{f"data.{name}": value for name, value in self.options.items()},
        }

    def describe(self) -> dict[str, Any]:
        """What is read, for the log of a run."""
        return {
            "train": self.train.describe(),
            "train_tokens": self.train.num_tokens,
            "train_bytes": self.train.num_bytes,
            "valid_tokens": None if self.valid is None else self.valid.num_tokens,
        }


def load_text(
    config: DataConfig, progress: ProgressFactory = silent_progress, batch_size: int | None = None
) -> Text:
    """Open and tokenise the sources (once: the blocks are cached; a stream is tokenised while it is used).

    Args:
        config: what to read.
        progress: opens a bar for every source that must be tokenised.
        batch_size: samples of a step, which are the lanes of a carried run.

    Raises:
        DataError: a source or tokenizer cannot be used, or there is not one block of text.
        ConfigError: a carried run without ``batch_size``.
    """
    from spikelm.data import TokenBlocks, open_source
    from spikelm.data.lanes import Lanes
    from spikelm.data.mixture import Mixture
    from spikelm.data.store import TokenStore, tokenise
    from spikelm.data.stream import Stream
    from spikelm.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(config.tokenizer)
    cache = None if config.cache is None else Path(config.cache)
    length = config.block_length

    def store(spec: str) -> TokenStore:
        with progress(f"tokenise {spec}", None, "bytes") as bar:
            done = 0

            def count(nbytes: int) -> None:
                nonlocal done
                bar.advance(nbytes - done)
                done = nbytes

            return tokenise(open_source(spec), tokenizer, cache, count)

    def samples(spec: str) -> Samples:
        if config.stream:
            return Stream(open_source(spec), tokenizer, length, config.shuffle_buffer, _workers())
        if not config.carried:
            return TokenBlocks(store(spec), tokenizer, length)
        if batch_size is None:
            raise ConfigError("data.carried needs the batch size, one lane for each sample; give batch_size")
        return Lanes(store(spec), tokenizer, length, batch_size)

    valid = None if config.valid is None else TokenBlocks(store(config.valid), tokenizer, length)
    train: Samples
    if isinstance(config.train, str):
        train = samples(config.train)
    else:
        used = [part for part in config.train if part.weight > 0]
        train = Mixture({part.source: samples(part.source) for part in used}, [part.weight for part in used])
    given = {
        "stream": config.stream,
        "shuffle_buffer": config.shuffle_buffer,
        "carried": config.carried,
    }
    options = {name: value for name, value in given.items() if value}
    return Text(tokenizer=tokenizer, train=train, valid=valid, options=options)


def _workers() -> int:
    """Processes for this rank's stream: the cores are shared among the ranks of the machine."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, len(os.sched_getaffinity(0)) // (int(ranks) if ranks.isdecimal() and int(ranks) else 1))


def model_config(
    model: str | Mapping[str, Any], tokenizer: Tokenizer, start: ModelConfig | None = None
) -> ModelConfig:
    """The model of a training configuration.

    Args:
        model: preset, file, or mapping (see :class:`spikelm.train.config.TrainConfig`).
        tokenizer: gives vocabulary size and special tokens where the configuration does not.
        start: the model of the checkpoint whose weights are taken; ``model`` replaces values of it.

    Raises:
        ConfigError: the model is not valid, or its vocabulary is smaller than the tokenizer's.
    """
    own: dict[str, Any] = {"preset": model} if isinstance(model, str) else dict(model)
    preset, twin = own.pop("preset", None), own.pop("twin", False)
    if not isinstance(twin, bool):
        raise ConfigError(f"model.twin is {twin!r}; expected true or false")
    if start is not None:
        merged = ModelConfig.from_dict(_merge(start.to_dict(), own))
        return merged.twin() if twin else merged
    base = {} if preset is None else ModelConfig.from_yaml(preset).to_dict()
    from_tokenizer = {
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_id,
        "bos_token_id": tokenizer.bos_id,
        "pad_token_id": None,
    }
    config = ModelConfig.from_dict({**_merge(base, own), **_without(from_tokenizer, own)})
    if config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.vocab_size} and the tokenizer has {tokenizer.vocab_size} tokens; "
            "leave model.vocab_size out or make it at least as large"
        )
    return config.twin() if twin else config


def build_model(config: TrainConfig, tokenizer: Tokenizer) -> SpikeLM:
    """The model with the initial weights of the run's seed, or with those of ``init_from``.

    Raises:
        ConfigError: the model is not valid, or its state grows and the run carries it.
        CheckpointError: the checkpoint of ``init_from`` is missing, damaged, or of another shape.
        DataError: its tokenizer is another one.
    """
    if config.init_from is None:
        resolved = model_config(config.model, tokenizer)
        refuse_int8(resolved, "the model")
        torch.manual_seed(config.seed)
        model = SpikeLM(resolved)
    else:
        model = _from_checkpoint(config, config.init_from, tokenizer)
    if config.data.carried and model.grows:
        growing = [module.path for module in model.modules() if isinstance(module, Part) and module.grows]
        raise ConfigError(
            f"data.carried is true, and the state of {growing[0]} (full attention) keeps every token: "
            "carried over the whole text it would grow without bound; set data.carried: "
            "false, or use the mixer swa"
        )
    return model


def refuse_int8(config: ModelConfig, what: str) -> None:
    """Refuse to train a model some of whose weights are int8.

    Raises:
        ConfigError: naming ``what`` has such weights.
    """
    if config.has_int8:
        raise ConfigError(
            f"{what} has int8 weights, which cannot be trained: train the float checkpoint it was made from, "
            "and quantise that again"
        )


def _from_checkpoint(config: TrainConfig, folder: str, tokenizer: Tokenizer) -> SpikeLM:
    """The checkpoint's model with its weights in float32."""
    from spikelm.checkpoint import check_weights, load_tokenizer, read_config, read_weights

    start = read_config(folder)
    refuse_int8(start, f"init_from {folder}")
    try:
        own = load_tokenizer(folder)
    except DataError:  # converted weights may have none, and then there is nothing to compare
        own = None
    if own is not None and own.sha256 != tokenizer.sha256:
        raise DataError(
            f"data.tokenizer is {config.data.tokenizer} with {tokenizer.vocab_size} tokens, and init_from "
            f"{folder} was trained with another one of {own.vocab_size}; leave data.tokenizer out to take "
            "the checkpoint's"
        )
    if tokenizer.vocab_size > start.vocab_size:
        raise DataError(
            f"data.tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens and the model of "
            f"init_from {folder} only {start.vocab_size}; use the tokenizer it was trained with"
        )
    resolved = model_config(config.model, tokenizer, start)
    refuse_int8(resolved, "the model")
    torch.manual_seed(config.seed)
    model = SpikeLM(resolved)
    weights = read_weights(folder)
    if start.tie_word_embeddings and "embedding.weight" in weights:
        weights["head.linear.weight"] = weights["embedding.weight"]
    check_weights(model, weights, folder)
    model.load_state_dict({n: w.float() if w.is_floating_point() else w for n, w in weights.items()})
    return model


def _merge(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``own``; a part that is not named anew keeps its other options."""
    merged = dict(base)
    for key, value in own.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping) and "name" not in value:
            merged[key] = _merge(before, value)
        else:
            merged[key] = value
    return merged


def _without(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in given}
