"""A synthetic SpikeGPT checkpoint and a straight-line SpikeGPT, written from the published equations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

Weights = dict[str, Tensor]


@pytest.fixture(scope="session")
def published() -> SimpleNamespace:
    """``weights(...)``: a synthetic checkpoint; ``logits(weights, tokens, binary=...)``: what it gives."""
    return SimpleNamespace(weights=published_weights, logits=straight_line_spikegpt)


def published_weights(
    *, layers: int = 2, hidden: int = 12, vocab: int = 20, channel: int = 48, seed: int = 0
) -> Weights:
    """Random tensors under the published names, in the published shapes (mixtures are [1, 1, D])."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g) * scale

    def norm(name: str) -> Weights:
        return {f"{name}.weight": 1 + normal(hidden, scale=0.3), f"{name}.bias": normal(hidden, scale=0.3)}

    def mix() -> Tensor:
        return torch.rand(1, 1, hidden, generator=g)

    w = {"emb.weight": normal(vocab, hidden)} | norm("blocks.0.ln0")
    for i in range(layers):
        b = f"blocks.{i}."
        w |= norm(b + "ln1") | norm(b + "ln2")
        w[b + "att.time_decay"] = normal(hidden, scale=2.0) - 1
        w[b + "att.time_first"] = normal(hidden)
        for name in ("time_mix_k", "time_mix_v", "time_mix_r"):
            w[b + "att." + name] = mix()
        for name in ("time_mix_k", "time_mix_r"):
            w[b + "ffn." + name] = mix()
        # Large enough that the neurons behind them fire often, but not always.
        for name in ("key", "value", "receptance", "output"):
            w[f"{b}att.{name}.weight"] = normal(hidden, hidden, scale=2.5 * hidden**-0.5)
        w[b + "ffn.key.weight"] = normal(channel, hidden, scale=1.5 * hidden**-0.5)
        w[b + "ffn.receptance.weight"] = normal(hidden, hidden, scale=hidden**-0.5)
        w[b + "ffn.value.weight"] = normal(hidden, channel, scale=1.5 * channel**-0.5)
    return w | norm("ln_out") | {"head.weight": normal(vocab, hidden, scale=0.5)}


def straight_line_spikegpt(w: Weights, tokens: list[int], *, binary: bool) -> tuple[Tensor, Tensor]:
    """Logits [T, V] of one sequence in float64, token by token, and the mean firing rate.

    Every line is one of the published equations: nothing is shared with the package.
    """
    w = {name: value.double().squeeze() for name, value in w.items()}
    hidden = w["emb.weight"].shape[1]
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))

    def norm(x: Tensor, name: str) -> Tensor:
        mean = x.mean()
        variance = ((x - mean) ** 2).mean()
        return (x - mean) / torch.sqrt(variance + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    memory = [
        {
            "att_last": torch.zeros(hidden).double(),
            "ffn_last": torch.zeros(hidden).double(),
            "v1": torch.zeros(hidden).double(),
            "v2": torch.zeros(hidden).double(),
            "keys": [],
            "values": [],
        }
        for _ in range(layers)
    ]
    logits, spikes = [], []

    def lif(m: dict, which: str, current: Tensor) -> Tensor:
        v = m[which] + (current - (m[which] - 0.0)) / 2.0
        fired = (v >= 1.0).double()
        m[which] = torch.where(fired > 0, torch.zeros_like(v), v)
        spikes.append(fired)
        return fired

    for token in tokens:
        x = w["emb.weight"][token]
        if binary:
            x = (x >= 0).double()
        for i in range(layers):
            m, b = memory[i], f"blocks.{i}."
            if i == 0:
                x = norm(x, "blocks.0.ln0")
            # time mix: the weighted mean of all values so far, written as the sum it is
            a, last = norm(x, b + "ln1"), m["att_last"]
            k, v, r = (
                w[f"{b}att.{long}.weight"]
                @ (a * w[f"{b}att.time_mix_{s}"] + last * (1 - w[f"{b}att.time_mix_{s}"]))
                for s, long in (("k", "key"), ("v", "value"), ("r", "receptance"))
            )
            m["att_last"] = a
            decay, bonus = torch.exp(w[b + "att.time_decay"]), w[b + "att.time_first"]
            exponents = [ki - (len(m["keys"]) - 1 - j) * decay for j, ki in enumerate(m["keys"])] + [
                bonus + k
            ]
            values = [*m["values"], v]
            m["keys"].append(k)
            m["values"].append(v)
            weight = torch.softmax(torch.stack(exponents), 0)
            mixed = (weight * torch.stack(values)).sum(0)
            x = x + lif(m, "v1", w[b + "att.output.weight"] @ (torch.sigmoid(r) * mixed))
            # channel mix
            c, last = norm(x, b + "ln2"), m["ffn_last"]
            ck = c * w[b + "ffn.time_mix_k"] + last * (1 - w[b + "ffn.time_mix_k"])
            cr = c * w[b + "ffn.time_mix_r"] + last * (1 - w[b + "ffn.time_mix_r"])
            m["ffn_last"] = c
            key = torch.relu(w[b + "ffn.key.weight"] @ ck) ** 2
            gate = torch.sigmoid(w[b + "ffn.receptance.weight"] @ cr)
            x = x + lif(m, "v2", gate * (w[b + "ffn.value.weight"] @ key))
        logits.append(w["head.weight"] @ norm(x, "ln_out"))
    return torch.stack(logits), torch.stack(spikes).mean()
