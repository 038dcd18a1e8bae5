"""The block of SpikingBrain-7B, written out from the equations of arXiv 2509.05276, gives the same logits.

Everything at once: linear attention as the sum over all pairs of tokens that it is, attention with an
explicit mask, nothing of the package but the configuration and the names of the weights. float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.config import ModelConfig
from spikelm.model import SpikeLM

D, H, G, d, F, V, W = 48, 6, 2, 8, 80, 29, 4
"""Sizes: features, query heads, key-value heads, features of a head, channel, vocabulary, window."""
EPSILON, THETA, RANK = 1e-6, 1e6, 16


def small_7b(k: float | None) -> SpikeLM:
    """The 7B's structure: one layer of either kind, twice."""
    heads = {"num_heads": H, "num_kv_heads": G, "head_dim": d, "qkv_bias": True}
    channel = {"name": "swiglu", "hidden": F}
    config = ModelConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=4,
        layers=(
            {"mixer": {"name": "gla", **heads}, "channel": channel},
            {"mixer": {"name": "swa", **heads, "window": W, "rope_theta": THETA}, "channel": channel},
        ),
        norm="rmsnorm",
        embedding_norm=False,
        layer_norm_epsilon=EPSILON,
        initializer_range=0.02,
        neuron={"name": "none"} if k is None else {"name": "adaptive", "k": k},
    )
    model = SpikeLM(config).double().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * (0.3 if parameter.dim() == 1 else 1.5 * parameter.shape[1] ** -0.5))
    return model


def straight_line(w: dict[str, Tensor], tokens: Tensor, k: float | None) -> Tensor:
    """Logits [T, V] of one sequence."""
    T = len(tokens)
    time = torch.arange(T)

    def rms(x: Tensor, gain: Tensor) -> Tensor:
        return gain * x / (x.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt()

    def project(x: Tensor, name: str) -> Tensor:
        """V (W n) + b with V = mean|x| / k, n = round(x / V)."""
        if k is not None:
            threshold = x.abs().mean(-1, keepdim=True) / k
            x = threshold * (x / threshold).round()
        y = x @ w[f"{name}.linear.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def heads(x: Tensor) -> Tensor:
        """[T, n d] -> [H, T, d], key-value heads repeated for the queries that read them."""
        x = x.reshape(T, -1, d).transpose(0, 1)
        return x.repeat_interleave(H // x.shape[0], 0)

    def rope(x: Tensor) -> Tensor:
        """As complex numbers x_i + i x_(i + d/2), times e^(i t theta^(-2i/d))."""
        pair = torch.complex(x[..., : d // 2], x[..., d // 2 :])
        angle = time[:, None] * THETA ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        pair = pair * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pair.real, pair.imag], -1)

    def linear_attention(x: Tensor, m: str) -> Tensor:
        """o_t = sum over j <= t of (q_t prod_(j < s <= t) alpha_s k_j) v_j / sqrt(d)."""
        q, key = heads(project(x, f"{m}.query")).relu(), heads(project(x, f"{m}.key")).relu()
        gate = project(project(x, f"{m}.gate_low"), f"{m}.gate_high")
        forgotten = heads(torch.log(torch.sigmoid(gate)) / 16).cumsum(1)  # log of the product up to t
        o = torch.zeros(H, T, d, dtype=torch.float64)
        value = heads(project(x, f"{m}.value"))
        for t in range(T):
            for j in range(t + 1):
                kept = torch.exp(forgotten[:, t] - forgotten[:, j])
                o[:, t] += (q[:, t] * kept * key[:, j]).sum(-1, keepdim=True) * value[:, j]
        return rms(o / d**0.5, w[f"{m}.output_norm.weight"])

    def window_attention(x: Tensor, m: str) -> Tensor:
        """Softmax over the last W tokens, the present one among them."""
        q, key = rope(heads(project(x, f"{m}.query"))), rope(heads(project(x, f"{m}.key")))
        distance = time[:, None] - time[None, :]
        score = torch.where((distance >= 0) & (distance < W), q @ key.transpose(1, 2) / d**0.5, -torch.inf)
        return torch.softmax(score, -1) @ heads(project(x, f"{m}.value"))

    x = w["embedding.weight"][tokens]
    for layer in range(4):
        b = f"blocks.{layer}"
        mix = window_attention if layer % 2 else linear_attention
        o = mix(rms(x, w[f"{b}.mixer_norm.weight"]), f"{b}.mixer")
        x = x + project(o.transpose(0, 1).reshape(T, H * d), f"{b}.mixer.output")
        c = rms(x, w[f"{b}.channel_norm.weight"])
        gate = project(c, f"{b}.channel.gate")
        x = x + project(gate * torch.sigmoid(gate) * project(c, f"{b}.channel.up"), f"{b}.channel.down")
    return rms(x, w["norm.weight"]) @ w["head.linear.weight"].T


def compare(k: float | None) -> None:
    model = small_7b(k)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, V, (3, 19), generator=generator)
    weights = dict(model.state_dict())
    with torch.no_grad():
        logits, _ = model(tokens)
        for row, expected in zip(logits, (straight_line(weights, t, k) for t in tokens), strict=True):
            torch.testing.assert_close(row, expected, atol=1e-10, rtol=0)


def test_continuous() -> None:
    compare(None)


def test_spikes_of_k_3() -> None:
    compare(3.0)


def test_every_weight_counts() -> None:
    """The comparison sees each of the model's weights: moving any of them moves the straight line."""
    model = small_7b(None)
    tokens = torch.arange(12) % V
    weights = dict(model.state_dict())
    with torch.no_grad():
        before = straight_line(weights, tokens, None)
        for name, value in weights.items():
            after = straight_line({**weights, name: value * 1.01}, tokens, None)
            assert (after - before).abs().max() > 1e-8, name
