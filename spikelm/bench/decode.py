"""How fast does one thread decode? Float32, dense int8 and event-driven int8, beside what memory can give.

All weights are random: which ones are read does not depend on their values. A candidate's inputs are made as
silent as asked by setting the dead zone of every adaptive neuron to the quantile of its own inputs. The
limit is how fast one thread reads, from huge pages and in the same run, as many bytes as the dense model
reads for every token. Peers read as many weights per token: llama.cpp a Llama in q8_0, the ``rwkv`` package
RWKV-4 of the same width and depth in float32.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikelm.bench.limits import read_bandwidth
from spikelm.bench.peer import run
from spikelm.config import ModelConfig
from spikelm.decoding import DecodePlan
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.neurons.adaptive import Adaptive
from spikelm.projection import Projection
from spikelm.recurrence import Context
from spikelm.weights import GROUP_SIZE, Int8Linear, pack_model

SILENT = (0.5, 0.8, 0.9)
"""Shares of silent inputs that the event-driven form is measured at."""
CALIBRATION_TOKENS = 256
GOALS: Mapping[str, float] = {
    "float32_share_of_limit": 0.75,
    "int8_share_of_limit": 0.80,
    "int8_times_llama_cpp": 2.2,
    "float32_times_rwkv": 3.0,
    "times_dense_at_0.5_silent": 1.0,
    "times_dense_at_0.8_silent": 1.5,
    "times_dense_at_0.9_silent": 2.5,
}
_BESIDE = (
    ("int8_times_llama_cpp", "int8", "llama_cpp"),
    ("int8_preset_event_times_llama_cpp", "int8_preset_event", "llama_cpp"),
    ("float32_times_rwkv", "float32", "rwkv"),
)


@dataclass
class Candidate:
    """A model ready to decode, its weight bytes per token if all are read, and its tokens/s so far."""

    plan: DecodePlan
    bytes_read: int
    silent: float | None
    layouts: dict[str, int]
    rates: list[float]


def silence(model: SpikeLM, share: float, passes: int = 3) -> None:
    """Set every adaptive neuron's dead zone so that this share of its inputs stays silent on random tokens.

    Repeated, because a layer's inputs change with the layers before it.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (1, CALIBRATION_TOKENS), generator=generator)
    neurons = [module for module in model.modules() if isinstance(module, Adaptive)]

    def measure(neuron: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0].abs()
        relative = (x / x.mean(-1, keepdim=True).clamp(min=1e-8)).flatten()
        # Below half a threshold a count rounds to zero anyway.
        neuron.dead_zone = float(relative.quantile(share))  # type: ignore[assignment]

    # A projection without gradients asks for int8 counts, one with a meter for floats.
    kept = [(neuron, name, getattr(neuron, name)) for neuron in neurons for name in ("encode", "encode_int8")]
    try:
        for neuron, name, encode in kept:

            def measured(
                x: Tensor, state: Any, ctx: Context, neuron: Adaptive = neuron, encode: Any = encode
            ) -> Any:
                measure(neuron, (x,))
                return encode(x, state, ctx)

            setattr(neuron, name, measured)
        with torch.no_grad():
            for _ in range(passes):
                model(tokens)
    finally:
        for neuron, name, _ in kept:
            delattr(neuron, name)


def dense_bytes(model: SpikeLM) -> int:
    """Bytes of weights and scales that one token reads where nothing is skipped."""
    total = 0
    for module in model.modules():
        if isinstance(module, Projection):
            linear = module.linear
            if isinstance(linear, Int8Linear):
                total += linear.in_features * linear.out_features + 4 * linear.scales.numel()
            elif isinstance(linear, nn.Linear):
                total += linear.weight.numel() * linear.weight.element_size()
    return total


def float_candidate(preset: str) -> Candidate:
    """The preset's continuous twin in float32."""
    torch.manual_seed(0)
    model = SpikeLM(ModelConfig.from_yaml(preset).twin()).eval()
    return Candidate(DecodePlan(model, slots=1, threads=1), dense_bytes(model), None, {}, [])


def int8_candidate(preset: str, silent: float | None, event_driven: bool) -> Candidate:
    """The preset in int8.

    Args:
        preset: with adaptive neurons before its projections.
        silent: share of silent inputs; None keeps the preset's dead zone.
        event_driven: let every projection choose its layout from the measured shares; else all are dense.
    """
    torch.manual_seed(0)
    config = ModelConfig.from_yaml(preset)
    model = SpikeLM(replace(config, weights={"name": "int8", "group_size": GROUP_SIZE})).eval()
    if silent is not None:
        silence(model, silent)
    shares = measured_silence(model)
    pack_model(model, shares if event_driven else {})
    layouts = Counter(str(module.layout) for module in model.modules() if isinstance(module, Int8Linear))
    sizes = {
        module.path: module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, Projection)
    }
    weighed = sum(share * sizes[path] for path, share in shares.items())
    mean = weighed / sum(sizes[path] for path in shares) if shares else None
    return Candidate(DecodePlan(model, slots=1, threads=1), dense_bytes(model), mean, dict(layouts), [])


def measured_silence(model: SpikeLM) -> dict[str, float]:
    """Share of silent inputs of every projection with spikes, on random tokens."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, model.config.vocab_size, (1, CALIBRATION_TOKENS), generator=generator)
    meter = Meter()
    with torch.no_grad():
        model(tokens, ctx=Context(meter=meter))
    found = meter.summary()["projections"]
    return {path: part["silent"] for path, part in found.items() if part["spiking"]}


def decode_rate(candidate: Candidate, tokens: int) -> float:
    """Tokens per second of one run: a step, the most likely token, the next step."""
    plan = candidate.plan
    token, slots = torch.tensor([1]), torch.tensor([0])
    start = time.perf_counter()
    for _ in range(tokens):
        token = plan.step(token, slots).argmax(-1)
    return tokens / (time.perf_counter() - start)


def measure(
    preset: str = "spikegpt-46m-sd",
    *,
    tokens: int = 200,
    repeats: int = 5,
    peer_python: Path | None = None,
) -> dict[str, Any]:
    """Tokens per second of every candidate, in turns, on one thread.

    Args:
        preset: model with adaptive neurons before its projections; its twin is the float32 candidate.
        tokens: of one timed run.
        repeats: timed runs of each.
        peer_python: interpreter of an environment with xllamacpp, gguf, rwkv and torch, or None.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        candidates = {"float32": float_candidate(preset), "int8": int8_candidate(preset, None, False)}
        candidates["int8_preset_event"] = int8_candidate(preset, None, True)
        for share in SILENT:
            candidates[f"int8_dense_{share}"] = int8_candidate(preset, share, False)
            candidates[f"int8_event_{share}"] = int8_candidate(preset, share, True)
        limits: dict[str, list[float]] = {name: [] for name in ("float32", "int8")}
        for candidate in candidates.values():
            decode_rate(candidate, 8)
        for _ in range(repeats):
            for name, found in limits.items():
                found.append(read_bandwidth(candidates[name].bytes_read, seconds=0.5))
            for candidate in candidates.values():
                candidate.rates.append(decode_rate(candidate, tokens))
        peers = {} if peer_python is None else _peers(preset, peer_python, tokens, repeats)
    finally:
        torch.set_num_threads(threads)
    return _figures(preset, tokens, candidates, limits, peers)


def _peers(preset: str, python: Path, tokens: int, repeats: int) -> dict[str, Any]:
    config = ModelConfig.from_yaml(preset)
    width, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        # 4 D^2 + 9 D^2 a layer, as much as RWKV-4's 5 D^2 + 8 D^2. Its tokenizer needs 259 ids, so that its
        # head is a little larger where the vocabulary is bytes (3 in a thousand of the 46M model).
        llama = [width, layers, 3 * width, max(vocabulary, 512), tokens, repeats, folder]
        rwkv = [width, layers, vocabulary, tokens, repeats, folder]
        return {
            "llama_cpp": run(python, "llamacpp", llama),
            "rwkv": run(python, "rwkv_package", rwkv),
        }


def _figures(
    preset: str,
    tokens: int,
    candidates: Mapping[str, Candidate],
    limits: Mapping[str, list[float]],
    peers: Mapping[str, Any],
) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    # The fastest reading seen in this run is the limit.
    limit = {name: max(found) for name, found in limits.items()}
    for name, candidate in candidates.items():
        rate = statistics.median(candidate.rates)
        bandwidth = limit["float32" if name == "float32" else "int8"]
        rows[name] = {
            "tokens_per_second": round(rate, 1),
            "all": [round(one, 1) for one in candidate.rates],
            "dense_bytes_per_token": candidate.bytes_read,
            "silent_share": candidate.silent,
            "layouts": candidate.layouts,
            "share_of_limit_if_dense": round(rate * candidate.bytes_read / bandwidth, 3),
        }
    ratios = {
        "float32_share_of_limit": rows["float32"]["share_of_limit_if_dense"],
        "int8_share_of_limit": rows["int8"]["share_of_limit_if_dense"],
        "times_dense_with_the_preset": _ratio(rows, "int8_preset_event", "int8"),
    }
    for share in SILENT:
        ratios[f"times_dense_at_{share}_silent"] = _ratio(rows, f"int8_event_{share}", f"int8_dense_{share}")
    for name, ours, peer in _BESIDE:
        if peer in peers:
            theirs = statistics.median(peers[peer]["tokens_per_second"])
            ratios[name] = round(rows[ours]["tokens_per_second"] / theirs, 2)
    return {
        "model": preset,
        "tokens": tokens,
        "read_bytes_per_second": {name: round(value) for name, value in limit.items()},
        "candidates": rows,
        "peers": dict(peers),
        "ratios": ratios,
        "goals": {name: goal for name, goal in GOALS.items() if name in ratios},
        "goals_reached": {name: ratios[name] >= goal for name, goal in GOALS.items() if name in ratios},
    }


def _ratio(rows: Mapping[str, Any], a: str, b: str) -> float:
    ratio: float = rows[a]["tokens_per_second"] / rows[b]["tokens_per_second"]
    return round(ratio, 2)


def lines(figures: dict[str, Any]) -> list[str]:
    """The result in plain lines."""
    limit = figures["read_bytes_per_second"]
    found = [
        f"{figures['model']}, one thread; reading from huge pages: {limit['int8'] / 1e9:.1f} GB/s "
        f"(int8 model's size), {limit['float32'] / 1e9:.1f} GB/s (float32 model's size)"
    ]
    for name, row in figures["candidates"].items():
        silent = "" if row["silent_share"] is None else f", {row['silent_share']:.0%} silent"
        found.append(
            f"  {name:<20} {row['tokens_per_second']:>8.1f} tokens/s, "
            f"{row['share_of_limit_if_dense']:.0%} of the limit of a dense model{silent}"
        )
    for name, row in figures["peers"].items():
        found.append(f"  {name:<20} {statistics.median(row['tokens_per_second']):>8.1f} tokens/s")
    for name, value in figures["ratios"].items():
        goal = figures["goals"].get(name)
        found.append(f"  {name}: {value:.2f}" + ("" if goal is None else f" (goal {goal:.2f})"))
    return found
