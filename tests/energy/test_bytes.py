"""Bytes: what the kernels really read, what a batch shares, what stays on the chip."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from spikelm.config import ModelConfig
from spikelm.decoding import DecodePlan
from spikelm.energy.bytes import moved, sizes, traffic, weights
from spikelm.energy.census import census
from spikelm.energy.reading import Reading, read
from spikelm.mixers.swa import SlidingWindowAttention
from spikelm.model import SpikeLM
from spikelm.state import flatten
from spikelm.weights import Int8Linear, pack_model

from .test_loops import CASES, corpus_of, model_of

TOKENS = 24


def silent_model() -> SpikeLM:
    """Int8 weights; the dead zone silences most inputs, so that matrices are laid out event-driven."""
    options = dict(CASES["rwkv, adaptive, int8"])
    options["neuron"] = {"name": "adaptive", "k": 3.0, "dead_zone": 1.7}
    return model_of(options)


def test_event_driven_bytes_are_those_the_kernel_counts() -> None:
    model, corpus = silent_model(), corpus_of()
    reading = read(model, corpus)
    layouts = {entry.path: entry.layout for entry in reading.synapses}
    assert {"in_out", None} <= set(layouts.values())  # the head is float
    pack_model(model, reading.firing())
    assert {
        m.path for m in model.modules() if getattr(getattr(m, "linear", None), "layout", None) == "in_out"
    } == {path for path, layout in layouts.items() if layout == "in_out"}
    plan = DecodePlan(model, slots=1)
    for token in corpus.tokens[0][:-1]:
        plan.step(torch.tensor([int(token)]))
    counted = plan.statistics()
    for entry in reading.synapses:
        own = entry.spikes * entry.outputs if entry.event_driven else entry.weight_bytes
        assert own * TOKENS == pytest.approx(counted[entry.path]["bytes"]), entry.path
        assert (1 - entry.silent) * TOKENS * entry.inputs == pytest.approx(
            TOKENS * entry.inputs - counted[entry.path]["silent"]
        )
    total = weights(reading.synapses, 1)
    scales = sum(entry.scale_bytes for entry in reading.synapses)
    assert (total.dram - scales) * TOKENS == pytest.approx(sum(row["bytes"] for row in counted.values()))
    assert total.dram < total.dense_dram


def test_the_checkpoint_decides_the_layout_where_it_knows() -> None:
    model, corpus = silent_model(), corpus_of()
    silent = "blocks.0.mixer.key"
    assert next(entry for entry in read(model, corpus).synapses if entry.path == silent).event_driven
    model.firing = {silent: 0.3, "blocks.1.mixer.key": 0.9}  # as firing.json says
    layouts = {entry.path: entry.layout for entry in read(model, corpus).synapses}
    assert layouts[silent] == "out_in" and layouts["blocks.1.mixer.key"] == "in_out"
    assert layouts["blocks.0.mixer.value"] == "out_in"  # what it does not list is dense


def test_float_weights_are_never_skipped() -> None:
    model = model_of({**CASES["rwkv, adaptive"], "neuron": {"name": "adaptive", "dead_zone": 2.5}})
    total = weights(read(model, corpus_of()).synapses, 1)
    assert total.dram == total.dense_dram > 0
    assert all(entry.silent > 0.5 for entry in read(model, corpus_of()).synapses if entry.spiking)


def test_a_batch_needs_the_union_of_what_fired() -> None:
    model, corpus = silent_model(), corpus_of()
    N = 4
    reading = read(model, corpus, batch=N)
    seen: dict[str, torch.Tensor] = {}
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.register_forward_pre_hook(lambda m, x: seen.__setitem__(str(id(m)), x[0][0] != 0))
    with torch.no_grad():
        model(torch.from_numpy(corpus.tokens[0][:-1].astype(np.int64))[None])
    for entry in reading.synapses:
        if not entry.spiking:
            continue
        fired = seen[str(id(model.get_submodule(entry.path).linear))]
        together = sum(
            len({i for row in range(N) for i in fired[row * 6 + t].nonzero()[:, 0].tolist()})
            for t in range(6)
        )
        assert entry.union_inputs == pytest.approx(together / 6), entry.path
        assert entry.spikes <= entry.union_inputs <= min(entry.inputs, N * entry.spikes + 1e-9)
        assert entry.union_calls == 1.0


def test_what_stays_on_the_chip() -> None:
    model, corpus = silent_model(), corpus_of()
    reading = read(model, corpus, batch=2)
    of_model = sizes(model, reading, census(model, reading))
    assert of_model.held == sum(t.numel() * 4 for t in flatten(model.init_state(1)).values())
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    held = sum(m.weight.numel() + 4 * m.scales.numel() for m in model.modules() if isinstance(m, Int8Linear))
    assert of_model.resident == parameters + held
    all_of_it = of_model.resident + 2 * of_model.held
    everything = moved(of_model, reading.synapses, 2, all_of_it)
    assert everything["residency"] == "all" and everything["dram_per_token"] == 0
    states = moved(of_model, reading.synapses, 2, all_of_it - 1)
    assert states["residency"] == "state" and states["state"]["dram_per_token"] == 0
    assert states["dram_per_token"] == pytest.approx(
        weights(reading.synapses, 2).dram + of_model.vectors / 2 + of_model.embedding
    )
    nothing = moved(of_model, reading.synapses, 2, 2 * of_model.held - 1)
    assert nothing["residency"] == "nothing"
    assert nothing["state"]["dram_per_token"] == of_model.traffic.both > 0
    assert nothing["dram_per_token"] == pytest.approx(states["dram_per_token"] + of_model.traffic.both)
    for one in (everything, states, nothing):
        used = sum(
            one[key]["on_chip_per_token"]
            for key in ("weights", "state", "vectors", "embedding", "activations")
        )
        assert one["on_chip_per_token"] == pytest.approx(used + one["dram_per_token"])
        assert one["dram_per_token"] <= one["dense_dram_per_token"]


def test_state_traffic() -> None:
    model, corpus = model_of(CASES["hybrid, adaptive"]), corpus_of()
    reading: Reading = read(model, corpus)
    attention = model.blocks[1].mixer
    assert isinstance(attention, SlidingWindowAttention)
    # Window 5, 24 tokens: 0, 1, 2, 3 and then 4 earlier keys; one head of four features, keys and values.
    earlier = (0 + 1 + 2 + 3 + 20 * 4) / 24
    own = traffic(attention, reading.activity)
    assert own.read == pytest.approx(earlier * 2 * 4 * 4 + 8) and own.written == 2 * 4 * 4 + 8
    linear = traffic(model.blocks[0].mixer, reading.activity)
    assert linear.read == linear.written == 2 * 2 * 2 * 4


def test_spiking_attention_touches_the_rows_that_fired() -> None:
    torch.manual_seed(0)
    preset = ModelConfig.from_yaml("spikformer-lm-nano", vocab_size=11, num_hidden_layers=1)

    def mixer_of(decay: str | None) -> SpikeLM:
        mixer = {**preset.layer(0)["mixer"], "decay": decay}
        return SpikeLM(replace(preset, layers=({**preset.layer(0), "mixer": mixer},))).eval()

    model = mixer_of(None)
    reading = read(model, corpus_of())
    mixer = model.blocks[0].mixer
    own, pairs = traffic(mixer, reading.activity), reading.activity.pairs["blocks.0.mixer"]
    rest = 4 * mixer.num_heads * mixer.mean + 4 * preset.hidden_size * mixer.token_shift
    row = 4 * mixer.head_dim
    assert pairs.read > 0 and pairs.written > 0
    assert own.read == pytest.approx((pairs.read + pairs.written) * row + rest)
    assert own.written == pytest.approx(pairs.written * row + rest)
    whole = traffic(mixer_of("fixed").blocks[0].mixer, reading.activity)
    assert whole.read == whole.written == 4 * mixer.num_heads * mixer.head_dim**2 + rest > own.read
