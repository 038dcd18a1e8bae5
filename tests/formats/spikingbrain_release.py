"""SpikingBrain folders at small size under the published names, and what they compute, in straight lines.

Written from the technical report and the published layout; nothing is shared with the package. One
sequence, float64, token by token; keys, values, gates and states are repeated for every query head, as in the
release.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]

CONFIG: dict[str, Any] = {
    "architectures": ["GLAswaForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_gla_swa.GLAswaConfig",
        "AutoModelForCausalLM": "modeling_gla_swa.GLAswaForCausalLM",
    },
    "attention_dropout": 0.0,
    "attn_layers": [1, 3],
    "attn_mode": "chunk",
    "bos_token_id": 38,
    "conv_size": 4,
    "elementwise_affine": True,
    "eos_token_id": 38,
    "fuse_cross_entropy": True,
    "hidden_act": "swish",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 131072,
    "model_type": "gla_swa",
    "norm_eps": 1e-06,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "sliding_window": 5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
    "use_short_conv": False,
    "vocab_size": 40,
}
GROUP = 32
RANK = 16


def weights(
    *, quantised: bool, config: dict[str, Any] = CONFIG, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Weights:
    """Random tensors under the published names: the float release, or W8ASpike with its scales."""
    g = torch.Generator().manual_seed(seed)
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = D // config["num_attention_heads"]
    narrow = config["num_key_value_heads"] * head
    w: Weights = {}

    def normal(name: str, *shape: int, scale: float = 1.0, mean: float = 0.0) -> None:
        w[name] = (mean + scale * torch.randn(*shape, generator=g)).to(dtype)

    def linear(name: str, outputs: int, inputs: int, bias: bool = False) -> None:
        normal(f"{name}.weight", outputs, inputs, scale=1.5 * inputs**-0.5)
        if bias:
            normal(f"{name}.bias", outputs, scale=0.3)
        if quantised:
            grouped = w[f"{name}.weight"].float().view(outputs, -1, GROUP)
            w[f"{name}.weight_quantizer.scales"] = grouped.abs().amax(-1, keepdim=True) / 127

    normal("model.embeddings.weight", V, D)
    for i in range(config["num_hidden_layers"]):
        b = f"model.layers.{i}."
        normal(b + "attn_norm.weight", D, scale=0.2, mean=1.0)
        normal(b + "mlp_norm.weight", D, scale=0.2, mean=1.0)
        linear(b + "attn.q_proj", D, D, bias=True)
        linear(b + "attn.k_proj", narrow, D, bias=True)
        linear(b + "attn.v_proj", narrow, D, bias=True)
        linear(b + "attn.o_proj", D, D)
        if i not in config["attn_layers"]:
            if quantised:
                linear(b + "attn.gk_proj", narrow, D, bias=True)
            else:
                normal(b + "attn.gk_proj.0.weight", RANK, D, scale=D**-0.5)
                normal(b + "attn.gk_proj.1.weight", narrow, RANK, scale=8.0 * RANK**-0.5)
                normal(b + "attn.gk_proj.1.bias", narrow, scale=2.0)
            normal(b + "attn.g_norm.weight", head, scale=0.2, mean=1.0)
        linear(b + "mlp.gate_proj", F, D)
        linear(b + "mlp.up_proj", F, D)
        linear(b + "mlp.down_proj", D, F)
    normal("model.norm.weight", D, scale=0.2, mean=1.0)
    if not config["tie_word_embeddings"]:
        normal("lm_head.weight", V, D, scale=0.5)
    return w


def write(folder: Path, tensors: Weights, config: dict[str, Any] = CONFIG, shards: int = 1) -> Path:
    """A folder as published; with several shards neighbours lie apart, as in the worst of orders."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    place = {name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(place.values())):
        save_file({name: tensors[name] for name in names if place[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def logits(
    tensors: Weights,
    tokens: list[int],
    *,
    k: float | None = None,
    config: dict[str, Any] = CONFIG,
    dense_down: bool = False,
    product: torch.dtype = torch.float64,
) -> Tensor:
    """Logits [T, V] of one sequence.

    Args:
        tensors: as published.
        tokens: T ids.
        k: of the spikes before every projection; None for none.
        config: as published.
        dense_down: W8ASpike's code gives the down projection the float activation and the stored weight.
        product: dtype of integer times scale; the release rounds it to the dtype of the weights.
    """
    w = {name: value.double() for name, value in tensors.items()}
    D, H = config["hidden_size"], config["num_attention_heads"]
    d, repeat = D // H, H // config["num_key_value_heads"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config["norm_eps"]) * w[name + ".weight"]

    def linear(x: Tensor, name: str, dense: bool = False) -> Tensor:
        matrix = w[name + ".weight"]
        scales = w.get(name + ".weight_quantizer.scales")
        if scales is not None and not dense:
            # Integers in float32, as the release divides; in float64 some would round the other way.
            integers = torch.round(matrix.float().unflatten(1, (scales.shape[1], -1)) / scales.float())
            matrix = (integers.to(product) * scales.to(product)).double().flatten(1)
        if k is not None and not dense:
            threshold = (x.abs().mean() / k).clamp(1e-5, 1e4)
            x = torch.round(x / threshold) * threshold
        y = matrix @ x
        return y + w[name + ".bias"] if name + ".bias" in w else y

    def rotated(x: Tensor, position: int) -> Tensor:
        """Pairs (i, i + d/2) turned by position / theta^(2i/d)."""
        y = x.clone()
        for i in range(d // 2):
            angle = position / config["rope_theta"] ** (2 * i / d)
            a, b = x[:, i], x[:, i + d // 2]
            y[:, i] = a * math.cos(angle) - b * math.sin(angle)
            y[:, i + d // 2] = b * math.cos(angle) + a * math.sin(angle)
        return y

    layers = range(config["num_hidden_layers"])
    memory = {i: torch.zeros(H, d, d, dtype=torch.float64) for i in layers}
    past: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in layers}
    found = []
    for position, token in enumerate(tokens):
        x = w["model.embeddings.weight"][token]
        for i in layers:
            b = f"model.layers.{i}."
            a = norm(x, b + "attn_norm")
            q = linear(a, b + "attn.q_proj").view(H, d)
            key = linear(a, b + "attn.k_proj").view(-1, d)
            value = linear(a, b + "attn.v_proj").view(-1, d)
            if i in config["attn_layers"]:
                q, key = rotated(q, position), rotated(key, position)
                past[i].append((key.repeat_interleave(repeat, 0), value.repeat_interleave(repeat, 0)))
                seen = past[i][-config["sliding_window"] :]
                score = torch.stack([(q * kk).sum(-1) for kk, _ in seen]) / math.sqrt(d)
                share = torch.softmax(score, 0)
                o = sum(s[:, None] * v for s, (_, v) in zip(share, seen, strict=True))
            else:
                q, key = torch.relu(q), torch.relu(key)
                merged = f"{b}attn.gk_proj"
                gate = (
                    linear(a, merged)
                    if f"{merged}.weight" in w
                    else linear(linear(a, merged + ".0"), merged + ".1")
                )
                alpha = torch.sigmoid(gate.view(-1, d)) ** (1 / 16)
                key, value, alpha = (z.repeat_interleave(repeat, 0) for z in (key, value, alpha))
                memory[i] = alpha[:, :, None] * memory[i] + key[:, :, None] * value[:, None, :]
                o = norm((q[:, :, None] * memory[i]).sum(1) / math.sqrt(d), b + "attn.g_norm")
            x = x + linear(o.reshape(D), b + "attn.o_proj")
            c = norm(x, b + "mlp_norm")
            gate = linear(c, b + "mlp.gate_proj")
            inner = gate * torch.sigmoid(gate) * linear(c, b + "mlp.up_proj")
            x = x + linear(inner, b + "mlp.down_proj", dense=dense_down)
        head = w["model.embeddings.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
        found.append(head @ norm(x, "model.norm"))
    return torch.stack(found)
