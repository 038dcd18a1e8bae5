"""The published configuration of SpikingBrain-7B (model_type ``gla_swa``) and our model of it.

Layers named in ``attn_layers`` are sliding-window attention with rotary positions, the others gated linear
attention without; all share heads, SwiGLU and RMSNorm. Code named in ``auto_map`` is never looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikelm.config import ModelConfig, Spec
from spikelm.errors import CheckpointError, nearest
from spikelm.formats.safetensors_folder import read_json

MODEL_TYPE = "gla_swa"
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "hidden_act": "swish",
    "sliding_window": 4096,
    "norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "gate_logit_normalizer": 16,
    "gate_low_rank_dim": 16,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_short_conv": False,
    "elementwise_affine": True,
    "attn_layers": None,
    "quant_weight_group_size": None,
    "rope_scaling": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""Keys that are read, and what the release assumes where they are missing."""

IGNORED = frozenset(
    {
        # of the architecture, without effect on what is computed here
        "attn_mode",
        "conv_size",
        "attention_dropout",
        "fuse_cross_entropy",
        "max_position_embeddings",
        "attn_type_list",
        "head_dim",
        # of transformers
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "_name_or_path",
        "name_or_path",
        "_attn_implementation_autoset",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
        "is_encoder_decoder",
    }
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a published config.json says.

    Attributes:
        vocab: tokens.
        hidden: D.
        layers: blocks.
        heads: query heads.
        kv_heads: heads of keys, values and gates.
        head_dim: features of a head.
        channel: width inside SwiGLU.
        window: keys a token sees, itself included.
        attention: indices of the layers with sliding-window attention.
        epsilon: of every norm.
        rope_theta: base of the rotary positions.
        gate_divisor: of the log gates.
        gate_rank: features between the two matrices of the gate, where it is not merged.
        group: weights that share a scale, as the configuration says; None where it does not.
        tied: whether the head shares the embedding's weights.
        initializer_range: of a fresh model.
        tokens: bos, eos and pad, or None.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    channel: int
    window: int
    attention: frozenset[int]
    epsilon: float
    rope_theta: float
    gate_divisor: float
    gate_rank: int
    group: int | None
    tied: bool
    initializer_range: float
    tokens: Mapping[str, int | None]

    def model(
        self,
        *,
        gate_rank: int | None,
        neuron: Spec,
        weights: Spec,
        neuron_overrides: Mapping[str, Spec],
        weight_overrides: Mapping[str, Spec],
    ) -> ModelConfig:
        """Our configuration.

        Args:
            gate_rank: rank of the gates, None for merged ones.
            neuron: before every projection.
            weights: how projections hold their weights.
            neuron_overrides: neurons of single projections.
            weight_overrides: weights of single projections.
        """
        heads = {
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "qkv_bias": True,
        }
        linear = {
            "name": "gla",
            **heads,
            "feature_map": "relu",
            "gate_rank": gate_rank,
            "gate_divisor": self.gate_divisor,
        }
        window = {"name": "swa", **heads, "window": self.window, "rope_theta": self.rope_theta}
        channel = {"name": "swiglu", "hidden": self.channel}
        every = [
            {"mixer": window if layer in self.attention else linear, "channel": channel}
            for layer in range(self.layers)
        ]
        return ModelConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            layers=tuple(every[: _period(every)]),
            norm="rmsnorm",
            embedding_norm=False,
            layer_norm_epsilon=self.epsilon,
            initializer_range=self.initializer_range,
            placement="before",
            neuron=neuron,
            neuron_overrides=neuron_overrides,
            weights=weights,
            weight_overrides=weight_overrides,
            tie_word_embeddings=self.tied,
            bos_token_id=self.tokens["bos_token_id"],
            eos_token_id=self.tokens["eos_token_id"],
            pad_token_id=self.tokens["pad_token_id"],
        )


def read_published(folder: Path) -> Published:
    """Read ``config.json`` of a folder.

    Raises:
        CheckpointError: another kind of model, an unknown key, or a value this reader cannot honour.
    """
    path = folder / "config.json"
    given = read_json(path)
    if given.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{path} has model_type {given.get('model_type')!r}; expected {MODEL_TYPE!r} (SpikingBrain-7B)"
        )
    for key in given:
        if key not in DEFAULTS and key not in IGNORED and key != "model_type":
            raise CheckpointError(
                f"{path}: {nearest('key', key, DEFAULTS)}; remove it if it changes nothing that is computed"
            )
    values = {**DEFAULTS, **given}

    def refuse(key: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{path}: {key} is {values[key]!r}; expected {expected}")

    def whole(key: str) -> int:
        value = values[key]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**24:
            raise refuse(key, f"a whole number from 1 to {2**24 - 1}")
        return value

    def positive(key: str) -> float:
        value = values[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise refuse(key, "a positive number")
        if not math.isfinite(value) or value <= 0:
            raise refuse(key, "a positive number")
        return float(value)

    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if values["hidden_act"] not in ("swish", "silu"):
        raise refuse("hidden_act", "'swish', the gate of SwiGLU")
    for key, only in (("use_short_conv", False), ("elementwise_affine", True)):
        if values[key] is not only:
            raise refuse(key, f"{str(only).lower()}, as in the release")
    if values["rope_scaling"] is not None:
        raise refuse("rope_scaling", "null, as in the release")
    if not isinstance(values["tie_word_embeddings"], bool):
        raise refuse("tie_word_embeddings", "true or false")
    hidden, heads, kv_heads = whole("hidden_size"), whole("num_attention_heads"), whole("num_key_value_heads")
    if hidden % heads:
        raise refuse("num_attention_heads", f"a divisor of hidden_size, {hidden}")
    if heads % kv_heads:
        raise refuse("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    layers = whole("num_hidden_layers")
    if "head_dim" in given and given["head_dim"] != hidden // heads:
        raise CheckpointError(
            f"{path}: head_dim is {given['head_dim']!r}; expected hidden_size / num_attention_heads, "
            f"{hidden // heads}"
        )
    vocab = whole("vocab_size")
    return Published(
        vocab=vocab,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        channel=whole("intermediate_size"),
        window=whole("sliding_window"),
        attention=_attention(path, values["attn_layers"], layers),
        epsilon=positive("norm_eps"),
        rope_theta=positive("rope_theta"),
        gate_divisor=positive("gate_logit_normalizer"),
        gate_rank=whole("gate_low_rank_dim"),
        group=None if values["quant_weight_group_size"] is None else whole("quant_weight_group_size"),
        tied=values["tie_word_embeddings"],
        initializer_range=positive("initializer_range"),
        tokens={key: _token(path, key, values[key], vocab) for key in _TOKENS},
    )


_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _token(path: Path, key: str, value: Any, vocab: int) -> int | None:
    """A special token; the first of a list."""
    if isinstance(value, list) and value:
        value = value[0]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab:
        raise CheckpointError(f"{path}: {key} is {value!r}; expected a token from 0 to {vocab - 1}, or null")
    return value


def _attention(path: Path, value: Any, layers: int) -> frozenset[int]:
    """Layers with sliding-window attention: the odd ones where the configuration names none."""
    if value is None:
        return frozenset(range(1, layers, 2))
    fits = isinstance(value, list) and all(
        isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < layers for entry in value
    )
    if not fits or len(set(value)) != len(value):
        raise CheckpointError(
            f"{path}: attn_layers is {value!r}; expected a list of different layers from 0 to {layers - 1}"
        )
    return frozenset(value)


def _period(layers: list[Any]) -> int:
    """Length of the shortest pattern that repeats to all the layers."""
    return next(p for p in range(1, len(layers) + 1) if all(a == layers[i % p] for i, a in enumerate(layers)))
