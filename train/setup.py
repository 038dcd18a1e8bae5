"""From a configuration to the objects of a run: tokenizer, blocks, model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spikelm.config import ModelConfig
from spikelm.errors import ConfigError, DataError
from spikelm.model import SpikeLM
from spikelm.train.reporting import ProgressFactory, silent_progress

if TYPE_CHECKING:
    from spikelm.data.blocks import TokenBlocks
    from spikelm.tokenizer import Tokenizer
    from spikelm.train.config import DataConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Text:
    """Tokenizer and token blocks of a run."""

    tokenizer: Tokenizer
    train: TokenBlocks
    valid: TokenBlocks | None

    def fingerprint(self) -> dict[str, Any]:
        """What the training numbers depend on, under the names of the configuration keys."""
        return {
            "data.tokenizer (fingerprint)": self.tokenizer.sha256,
            "data.train (fingerprint)": self.train.store.index.tokens_sha256,
        }


def load_text(config: DataConfig, progress: ProgressFactory = silent_progress) -> Text:
    """Open and tokenise the sources (once: the blocks are cached).

    Args:
        config: what to read.
        progress: opens a bar for every source that must be tokenised.

    Raises:
        DataError: a source or tokenizer cannot be used, or there is not one block of text.
    """
    from spikelm.data import TokenBlocks, open_source
    from spikelm.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(config.tokenizer)
    cache = None if config.cache is None else Path(config.cache)

    def blocks(spec: str) -> TokenBlocks:
        with progress(f"tokenise {spec}", None, "bytes") as bar:
            done = 0

            def count(nbytes: int) -> None:
                nonlocal done
                bar.advance(nbytes - done)
                done = nbytes

            return TokenBlocks.build(open_source(spec), tokenizer, config.block_length, cache, count)

    valid = None if config.valid is None else blocks(config.valid)
    return Text(tokenizer=tokenizer, train=blocks(config.train), valid=valid)


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
        ConfigError: the model is not valid.
        CheckpointError: the checkpoint of ``init_from`` is missing, damaged, or of another shape.
        DataError: its tokenizer is another one.
    """
    if config.init_from is None:
        resolved = model_config(config.model, tokenizer)
        torch.manual_seed(config.seed)
        return SpikeLM(resolved)
    return _from_checkpoint(config, config.init_from, tokenizer)


def _from_checkpoint(config: TrainConfig, folder: str, tokenizer: Tokenizer) -> SpikeLM:
    """The checkpoint's model with its weights in float32."""
    from spikelm.checkpoint import check_weights, load_tokenizer, read_config, read_weights

    start = read_config(folder)
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
