"""Checkpoint folders in the Hugging Face layout: config.json, model.safetensors, tokenizer.json.

Written whole or not at all (a temporary folder beside it, synced, then renamed). Weights are read from
safetensors only; nothing in a folder is ever executed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spikelm.config import FORMAT_VERSION, ModelConfig
from spikelm.errors import CheckpointError, nearest
from spikelm.firing import firing_file, take_firing
from spikelm.model import SpikeLM

if TYPE_CHECKING:
    from spikelm.tokenizer import Tokenizer

CONFIG, WEIGHTS, WEIGHTS_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PREFIX = "model."
"""What transformers puts before the core's parameter names."""

_STANDARD_KEYS = frozenset(
    {  # fmt: skip
        "architectures",
        "model_type",
        "format_version",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "auto_map",
        "id2label",
        "label2id",
        "num_labels",
        "classifier_pooling",
        "problem_type",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "_name_or_path",
        "name_or_path",
        "quantization_config",
    }
)
"""Keys of config.json that belong to transformers, or to the classifier of :mod:`spikelm.classifier`."""


def config_json(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Content of config.json."""
    return {
        "model_type": "spikelm",
        "architectures": ["SpikeLMForCausalLM"],
        "format_version": FORMAT_VERSION,
        "dtype": str(dtype).removeprefix("torch."),
        **config.to_dict(),
    }


def resolve_folder(folder: str | Path) -> Path:
    """The folder itself, or its ``latest`` where it is the folder of a training run."""
    root = Path(folder)
    if not (root / CONFIG).is_file() and (root / "latest" / CONFIG).is_file():
        return root / "latest"
    return root


def read_config(folder: str | Path) -> ModelConfig:
    """The model configuration of a checkpoint folder.

    Raises:
        CheckpointError: no folder, no config.json, another model type or a newer format.
        ConfigError: an unknown key or a bad value.
    """
    path = resolve_folder(folder) / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {CONFIG}; expected a checkpoint folder (spikelm train writes one)"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}); the checkpoint is damaged, restore the file"
        ) from error
    if not isinstance(values, dict) or values.get("model_type") != "spikelm":
        kind = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise CheckpointError(
            f"{path} has model_type {kind!r}, expected 'spikelm'; spikelm convert reads other models"
        )
    version = values.get("format_version", FORMAT_VERSION)
    if isinstance(version, bool) or not isinstance(version, int):
        raise CheckpointError(f"{path} has format_version {version!r}; expected a whole number")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this release reads up to {FORMAT_VERSION}; upgrade spikelm"
        )
    known = [f.name for f in fields(ModelConfig)]
    for key in values:
        if key not in known and key not in _STANDARD_KEYS:
            raise CheckpointError(f"{path}: {nearest('model configuration key', key, known)}")
    return ModelConfig.from_dict({key: value for key, value in values.items() if key in known})


def save_checkpoint(
    folder: str | Path,
    model: SpikeLM,
    tokenizer: Tokenizer | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a checkpoint folder whole, replacing an older one.

    Args:
        folder: where to.
        model: its weights are written in their own dtype.
        tokenizer: written beside, if given.
        extra: more files, name -> content.

    Raises:
        CheckpointError: if the disk refuses (full, read-only); an older folder is then left as it was.
    """
    weights = {PREFIX + name: value.contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop(f"{PREFIX}head.linear.weight", None)
    content = config_json(model.config, model.embedding.weight.dtype)
    files = {**firing_file(model), **(extra or {})}
    return write_whole(folder, "checkpoint", content, weights, tokenizer, files)


def write_whole(
    folder: str | Path,
    kind: str,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    extra: Mapping[str, bytes],
) -> Path:
    """Write a folder in the Hugging Face layout whole, replacing an older one.

    Args:
        folder: where to.
        kind: what to call it in an error.
        config: content of config.json.
        weights: under the names of the file.
        tokenizer: written beside, if given.
        extra: more files, name -> content.

    Raises:
        CheckpointError: if the disk refuses (full, read-only); an older folder is then left as it was.
    """
    target = Path(folder)
    temporary = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")
        save_file(dict(weights), temporary / WEIGHTS, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read; the mode of the others is the user's choice.
        (temporary / WEIGHTS).chmod((temporary / CONFIG).stat().st_mode & 0o777)
        if tokenizer is not None:
            tokenizer.save(temporary)
        for name, data in extra.items():
            (temporary / name).write_bytes(data)
        sync_folder(temporary)
        replace_folder(temporary, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot write the {kind} {target}: {error}; free space or choose another folder"
        ) from error
    except KeyboardInterrupt:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def sync_folder(folder: Path) -> None:
    """Flush every file of a folder, then the folder, to the disk."""
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_folder(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``, moving an existing ``target`` out of the way first."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    replaced = target.exists() or target.is_symlink()
    if replaced:
        os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        if replaced:
            os.rename(old, target)
        raise
    if old.is_symlink():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint under the core's names (one file, or sharded with an index).

    Raises:
        CheckpointError: missing or damaged files.
    """
    root = resolve_folder(folder)
    files = [WEIGHTS]
    if not (root / WEIGHTS).is_file() and (root / WEIGHTS_INDEX).is_file():
        try:
            index = json.loads((root / WEIGHTS_INDEX).read_text(encoding="utf-8"))
            files = sorted({Path(name).name for name in index["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{root / WEIGHTS_INDEX} is damaged ({error!r}); restore it from a copy"
            ) from error
    weights: dict[str, Tensor] = {}
    for name in files:
        if not (root / name).is_file():
            raise CheckpointError(
                f"{root} holds no {name}; expected weights as safetensors (others: spikelm convert)"
            )
        try:
            weights.update(load_file(root / name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{root / name} is damaged ({error}); restore it from a copy") from error
    return {name.removeprefix(PREFIX): value for name, value in weights.items()}


def load_model(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> SpikeLM:
    """The model of a checkpoint folder, in evaluation mode.

    Args:
        folder: checkpoint folder.
        device: where to.
        dtype: of the weights; None keeps what is stored. Decays and neuron parameters stay float32 in a
            lower precision.

    Raises:
        CheckpointError: missing, left-over or misshapen weights, damaged files.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = SpikeLM(config)
    weights = read_weights(folder)
    if "score.weight" in weights:
        raise CheckpointError(
            f"{folder} holds a text classifier, not a language model; spikelm finetune and transformers' "
            "AutoModelForSequenceClassification read it"
        )
    if config.tie_word_embeddings and "embedding.weight" in weights:
        weights["head.linear.weight"] = weights["embedding.weight"]
    check_weights(model, weights, str(folder))
    kept = model.fp32_parameters()
    for name, value in weights.items():
        wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
        if name in kept and wanted in (torch.bfloat16, torch.float16):
            wanted = torch.float32
        weights[name] = value.to(device=device, dtype=wanted)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    take_firing(model, resolve_folder(folder))
    return model.eval()


def check_weights(
    model: SpikeLM,
    weights: Mapping[str, Tensor],
    source: str,
    shapes: Mapping[str, torch.Size] | None = None,
) -> None:
    """Refuse weights that do not fit a model, naming the first tensor at fault.

    Args:
        model: says what is expected.
        weights: what there is.
        source: what to call it.
        shapes: expected shapes of tensors whose model holds only a part of them.

    Raises:
        CheckpointError: a tensor is missing, unknown or has another shape.
    """
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing:
        raise CheckpointError(
            f"{source}: {missing[0]!r} is missing ({len(missing)} in all); the checkpoint is incomplete"
        )
    if unknown:
        raise CheckpointError(f"{source}: {unknown[0]!r} is not part of this model ({len(unknown)} in all)")
    for name, value in expected.items():
        shape = (shapes or {}).get(name, value.shape)
        if weights[name].shape != shape:
            raise CheckpointError(
                f"{source}: {name!r} is {tuple(weights[name].shape)}, "
                f"the configuration expects {tuple(shape)}"
            )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder."""
    from spikelm.tokenizer import Tokenizer

    return Tokenizer.load(resolve_folder(folder))
