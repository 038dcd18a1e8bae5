"""The ledger's counters equal those of event-driven loops in plain Python that really decode."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from spikelm.config import ModelConfig
from spikelm.energy.census import Census, census
from spikelm.energy.reading import Reading, read
from spikelm.evaluation.corpus import Corpus
from spikelm.model import SpikeLM
from spikelm.weights import Int8Linear

from .loops import OPERATIONS, Decoder
from .loops_hybrid import HybridDecoder

TOKENS, VOCABULARY = 24, 11
HYBRID = [
    {
        "mixer": {
            "name": "gla",
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 2,
            "gate_rank": 3,
            "qkv_bias": True,
        },
        "channel": {"name": "swiglu", "hidden": 10},
    },
    {
        "mixer": {"name": "swa", "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "window": 5},
        "channel": {"name": "swiglu", "hidden": 10},
    },
]
DELTA = [
    {
        "mixer": {
            "name": "gated_delta",
            "num_heads": 4,
            "num_kv_heads": 2,
            "allow_negative": True,
            "qk_norm": True,
            "short_convolution": 3,
        },
        "channel": {"name": "mlp", "expand": 2, "activation": "relu2"},
    },
    {
        "mixer": {
            "name": "attention",
            "num_heads": 4,
            "num_kv_heads": 2,
            "qk_norm": True,
            "output_gate": True,
            "partial_rotary_factor": 1.0,
        },
        "channel": {"name": "moe", "experts": 3, "top_k": 2, "hidden": 6, "shared": 1},
    },
]
PARALLEL = [
    {
        "mixer": {
            "name": "parallel",
            "branches": [
                {
                    "name": "gla_tied",
                    "num_heads": 2,
                    "rope": True,
                    "short_convolution": 2,
                    "output_gate": "swish",
                },
                {
                    "name": "gated_delta",
                    "num_heads": 2,
                    "rope": True,
                    "short_convolution": 0,
                    "output_gate": False,
                },
            ],
        },
        "channel": {"name": "swiglu", "hidden": 10},
    },
    {
        "mixer": {
            "name": "ssa",
            "num_heads": 2,
            "token_shift": True,
            "neuron": {"name": "lif", "threshold": 0.1},
        },
        "channel": {"name": "rwkv", "expand": 2},
    },
]
RWKV = [{"mixer": {"name": "wkv4"}, "channel": {"name": "rwkv", "expand": 2}}]
ADAPTIVE = {"name": "adaptive", "k": 3.0, "dead_zone": 1.2, "cap": 4}
LIF = {"name": "lif", "threshold": 0.3}
CASES: dict[str, dict[str, Any]] = {
    "rwkv, adaptive": {"layers": RWKV, "neuron": ADAPTIVE},
    "rwkv, adaptive, int8": {
        "layers": RWKV,
        "neuron": {**ADAPTIVE, "cap": 127},
        "weights": {"name": "int8", "group_size": 6},
    },
    "rwkv, lif before": {"layers": RWKV, "neuron": LIF, "head_neuron": LIF},
    "spikegpt": {
        "layers": RWKV,
        "neuron": LIF,
        "placement": "after",
    },
    "rwkv, twin": {"layers": RWKV, "neuron": {"name": "none"}},
    "hybrid, adaptive": {
        "layers": HYBRID,
        "neuron": {"name": "adaptive", "k": 2.0},
        "norm": "rmsnorm",
        "embedding_norm": False,
    },
}


CASES["gated delta, attention, experts"] = {
    "layers": DELTA,
    "neuron": {"name": "adaptive", "k": 2.0, "dead_zone": 0.8},
    "norm": "rmsnorm",
}
CASES["parallel branches, spiking attention"] = {"layers": PARALLEL, "neuron": LIF, "norm": "layernorm"}


def model_of(options: dict[str, Any]) -> SpikeLM:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2}
    model = SpikeLM(ModelConfig(**sizes, **options)).eval()
    if not model.config.has_int8:
        model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.load_float(torch.randn(module.out_features, module.in_features))
    return model


def corpus_of(tokens: int = TOKENS) -> Corpus:
    ids = np.random.default_rng(1).integers(0, VOCABULARY, tokens + 1).astype(np.int32)
    lengths = [np.ones(tokens + 1)]
    return Corpus(
        name="random",
        sha256="",
        bytes=tokens,
        start_token=None,
        tokens=[ids],
        byte_lengths=lengths,
        rescaled=0,
    )


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[SpikeLM, Reading, Census, Decoder]:
    model, corpus = model_of(CASES[request.param]), corpus_of()
    reading = read(model, corpus, chunk=7)
    decoder = HybridDecoder(model)
    logits = torch.tensor([decoder.step(int(token)) for token in corpus.tokens[0][:-1]], dtype=torch.float64)
    with torch.no_grad():
        expected, _ = model(torch.from_numpy(corpus.tokens[0][:-1].astype(np.int64))[None])
    tolerance = 1e-3 if model.config.has_int8 else 1e-9
    torch.testing.assert_close(logits, expected[0].double(), rtol=tolerance, atol=tolerance)
    return model, reading, census(model, reading), decoder


def test_products_of_every_projection(case: tuple[SpikeLM, Reading, Census, Decoder]) -> None:
    _, reading, _, decoder = case
    machine = decoder.m
    assert {entry.path for entry in reading.synapses} == set(machine.dense)
    for entry in reading.synapses:
        own = entry.operations()
        assert own.dense_macs * TOKENS == pytest.approx(machine.dense[entry.path])
        assert own.effective_macs * TOKENS == pytest.approx(machine.effective[entry.path])
        assert own.accumulates * TOKENS == pytest.approx(machine.accumulates[entry.path])
        left = 0 if entry.spiking else machine.effective[entry.path]
        assert own.macs_without_spikes * TOKENS == pytest.approx(left)
        assert entry.spikes * entry.outputs * TOKENS == pytest.approx(machine.weights[entry.path])


def test_everything_else_by_kind(case: tuple[SpikeLM, Reading, Census, Decoder]) -> None:
    _, _, found, decoder = case
    counted: dict[str, dict[str, float]] = {}
    for kinds in found.parts.values():
        for kind, own in kinds.items():
            row = counted.setdefault(kind, dict.fromkeys(OPERATIONS, 0.0))
            for name in OPERATIONS:
                row[name] += getattr(own, "dense_macs" if name == "macs" else name) * TOKENS
    done = {kind: dict(row) for kind, row in decoder.m.kinds.items() if any(row.values())}
    assert {kind for kind, row in counted.items() if any(row.values())} == set(done)
    for kind, row in done.items():
        assert counted[kind] == pytest.approx(row), kind


def test_spikes_are_what_the_loops_saw(case: tuple[SpikeLM, Reading, Census, Decoder]) -> None:
    model, _, found, decoder = case
    total = found.total()
    spiking = model.config.placement == "before" and model.config.neuron["name"] != "none"
    assert (total.accumulates > 0) == spiking
    assert total.accumulates * TOKENS == pytest.approx(sum(decoder.m.accumulates.values()))
    if not spiking:
        assert found.projections_over_dense() == 1.0
