"""Prices, estimated energy, the quantised network, the bit budget, and what is said about them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.energy import counters
from spikelm.energy.census import census
from spikelm.energy.counts import Operations
from spikelm.energy.estimate import bit_budget, compute, memory
from spikelm.energy.ledger import Question, ledger
from spikelm.energy.measured import measure
from spikelm.energy.prices import DEFAULT, load_prices
from spikelm.energy.reading import read
from spikelm.energy.verdict import YAN_RATE, sentences
from spikelm.errors import ConfigError

from .test_loops import CASES, corpus_of, model_of

TABLES = load_prices()[1]


def test_published_prices() -> None:
    horowitz = TABLES["horowitz-45nm"]
    assert horowitz.mac("float32") == pytest.approx(4.6) and horowitz.add("float32") == 0.9
    assert horowitz.mac("float16") == pytest.approx(1.5)
    assert horowitz.mac("int8") == pytest.approx(0.23) and horowitz.add("int8") == 0.03
    assert horowitz.on_chip(8192) == 1.25 and horowitz.on_chip(2**20) == 12.5
    assert horowitz.on_chip(8193) == 2.5 and horowitz.on_chip(2**24) == 12.5
    assert horowitz.dram == (162.5, 325.0)
    wide = TABLES["horowitz-45nm-int32-sums"]
    assert wide.mac("int8") == pytest.approx(0.3) and wide.add("int8") == 0.1
    assert TABLES["jouppi-7nm"].mac("int8") == pytest.approx(0.1)
    assert all(table.source for table in TABLES.values())


def test_a_multiplier_shrinks_with_the_bits() -> None:
    table = TABLES[DEFAULT]
    assert table.quantised_mac("int8", 8) == pytest.approx(table.mac("int8"))
    assert table.quantised_mac("int8", 4) == pytest.approx(0.1 + 0.03)
    assert table.quantised_mac("int8", 1) == pytest.approx(0.03)
    assert table.quantised_mac("float32", 3) == table.mac("float32")


def test_elementary_prices() -> None:
    table = TABLES[DEFAULT]
    assert table.elementary(
        Operations(multiplications=2, additions=1, comparisons=1, roundings=1)
    ) == pytest.approx(2 * 3.7 + 3 * 0.9)
    assert table.elementary(Operations(divisions=1)) == pytest.approx(7.1 * 3.7)
    assert table.elementary(Operations(exponentials=1)) == pytest.approx(9 * 4.6 + 2 * 3.7 + 4 * 0.9)
    free = table.model_copy(update={"division": None})
    assert free.elementary(Operations(divisions=5, roots=1)) == 0


def _estimated(case: str) -> tuple[Any, dict[str, Any], Any]:
    model = model_of(CASES[case]).float()
    reading = read(model, corpus_of())
    found = census(model, reading)
    return found, compute(found, TABLES[DEFAULT]), reading


def test_energy_of_int8_spikes_from_the_counters() -> None:
    found, energy, _ = _estimated("rwkv, adaptive, int8")
    table = TABLES[DEFAULT]
    head = next(entry for entry in found.synapses if entry.path == "head")
    inner = [entry for entry in found.synapses if entry.spiking]
    dense = sum(entry.dense_macs for entry in inner) * 0.23 + head.dense_macs * 4.6
    assert energy["dense"] - energy["other"]["dense"] == pytest.approx(dense)
    effective = sum(entry.operations().effective_macs for entry in inner) * 0.23
    head_left = head.operations().effective_macs * 4.6
    assert energy["effective"] - energy["other"]["effective"] == pytest.approx(effective + head_left)
    unary = sum(entry.operations().accumulates for entry in inner) * 0.03
    assert energy["spikes"]["ternary"] - energy["other"]["spikes"] == pytest.approx(unary + head_left)
    assert energy["spikes"]["binary"] is None and energy["spikes"]["bitwise"] is None
    planes = sum(
        entry.calls * entry.outputs * (entry.largest.bit_length() - 1) for entry in inner
    )  # one addition per plane but the first
    ones = sum(entry.histogram.ones_per_count * entry.inputs * entry.outputs for entry in inner)
    assert energy["spikes"]["bidirectional"] - energy["other"]["spikes"] == pytest.approx(
        (ones + planes) * 0.03 + head_left
    )
    quantised = 0.0
    for entry in inner:
        signed = not entry.path.endswith("channel.value")  # behind relu^2 no count is negative
        bits = math.ceil(math.log2(entry.largest + 1)) + signed
        assert entry.activation_bits == bits
        quantised += entry.operations().effective_macs * (0.2 * bits / 8 + 0.03)
    assert energy["quantised_effective"] - energy["other"]["quantised"] == pytest.approx(
        quantised + head_left
    )
    assert energy["quantised_int8"] == pytest.approx(energy["quantised_effective"])
    # The counts of adaptive are quantised activations: their encoding costs both networks the same.
    assert energy["other"]["quantised"] == pytest.approx(energy["other"]["effective"])
    rest = Operations()
    for kinds in found.parts.values():
        for own in kinds.values():
            rest += own
    assert energy["other"]["dense"] == pytest.approx(table.elementary(rest) + rest.dense_macs * 4.6)


def test_a_dense_network_has_no_spikes_to_price() -> None:
    found, energy, _ = _estimated("spikegpt")
    assert energy["spikes"] == {} and bit_budget(found) == {}
    assert energy["quantised_dense"] == pytest.approx(energy["dense"])


def test_binary_neurons_become_quantisers() -> None:
    found, energy, _ = _estimated("rwkv, lif before")
    table = TABLES[DEFAULT]
    change = 0.0
    for entry in found.synapses:
        neuron = found.parts[f"{entry.path}.neuron"]["neuron"]
        change -= table.elementary(neuron) + neuron.dense_macs * 4.6
        change += entry.inputs * (3.7 + 3 * 0.9)
        assert entry.activation_bits == 1
    assert energy["other"]["quantised"] - energy["other"]["effective"] == pytest.approx(change)
    sent = {name: value for name, value in energy["spikes"].items() if name != "twos_complement"}
    assert len(set(sent.values())) == 1  # a binary spike is one event in each of these codings


def test_memory_is_priced_by_level() -> None:
    moved = {
        "dram_per_token": 10.0,
        "on_chip_per_token": 4.0,
        "dense_dram_per_token": 20.0,
        "dense_on_chip_per_token": 8.0,
    }
    found = memory(moved, TABLES[DEFAULT], 8192)
    assert found["kernels"] == {"low": 10 * 162.5 + 4 * 1.25, "high": 10 * 325 + 4 * 1.25}
    assert found["dense"] == {"low": 20 * 162.5 + 8 * 1.25, "high": 20 * 325 + 8 * 1.25}


def test_bit_budget_is_steps_times_weight_bits_times_activation_bits() -> None:
    found, _, _ = _estimated("rwkv, adaptive, int8")
    budget = bit_budget(found)
    inner = [entry for entry in found.synapses if entry.spiking]
    weight = sum(entry.dense_macs for entry in inner)
    steps = sum(entry.dense_macs * entry.largest for entry in inner) / weight
    assert budget["binary"] is None
    assert budget["ternary"]["steps"] == pytest.approx(steps)
    assert budget["ternary"]["spiking"] == pytest.approx(steps * 8 * 2)
    bits = sum(entry.dense_macs * entry.activation_bits for entry in inner) / weight
    assert budget["ternary"]["quantised"] == pytest.approx(8 * bits)
    planes = sum(entry.dense_macs * entry.largest.bit_length() for entry in inner) / weight
    assert planes < bits < planes + 1  # some are signed
    assert budget["bidirectional"]["spiking"] == pytest.approx(8 * planes * 2)
    assert budget["twos_complement"]["spiking"] == pytest.approx(8 * (planes + 1))


def test_sparsity_of_every_coding_is_named() -> None:
    model = model_of(CASES["rwkv, adaptive"])
    operations = census(model, read(model, corpus_of())).to_dict()
    named = operations["codings"]
    assert set(named) == {"binary", "ternary", "bitwise", "bidirectional", "twos_complement"}
    assert "negative counts" in named["binary"]["not_applicable"]
    for path, one in operations["projections"].items():
        assert (set(one["codings"]) == set(named)) == one["spiking"], path
    key = operations["projections"]["blocks.0.mixer.key"]["codings"]["ternary"]
    # Unary: |count| events per input, of as many micro-steps as the largest count (the cap, 4).
    mean = operations["projections"]["blocks.0.mixer.key"]["spike_sum"] / 8
    assert key["micro_steps"] == 4 and key["events_per_input"] == pytest.approx(mean)
    assert key["sparsity"] == pytest.approx(1 - mean / 4)


def _verdict(events: float, steps: int) -> str:
    sent = {"events_per_input": events, "micro_steps": steps, "sparsity": 1 - events / steps}
    sent["plane_additions"] = 0.0
    compute_ = {"spikes": {"ternary": 1.0}, "dense": 4.0, "quantised_effective": 2.0, "quantised_int8": 2.0}
    model: dict[str, Any] = {
        "operations": {
            "projections_over_dense": 0.5,
            "effective_over_dense": 0.5,
            "total": {"spiking_share": 1.0},
            "codings": {"ternary": sent, "binary": {"not_applicable": "no"}},
            "projections": {"a": {"layout": None}},
        },
        "energy": {"table": {"compute": compute_, "total": {}, "memory": {}}},
        "bytes": {"batch_1": {"residency": "state", "weights": {"skipped": 0.0}}},
        "measured": {"seconds_per_token": None, "why": "nobody timed it"},
    }
    return " ".join(sentences(model, "table"))


@pytest.mark.parametrize(
    "events,yan,dampfhoffer,davidson",
    [
        (5 * YAN_RATE - 0.01, "may win", "between", "may win"),
        (0.1, "may win", "below", "may win"),
        (1.0, "lose", "between", "may win"),
        (1.5, "lose", "above", "may win"),
        (2.0, "lose", "above", "lose"),
    ],
)
def test_break_even_points(events: float, yan: str, dampfhoffer: str, davidson: str) -> None:
    words = _verdict(events, 5)
    rest = words[words.index("Yan") :]
    assert yan in rest[: rest.index("Dampfhoffer")]
    assert dampfhoffer in rest[rest.index("Dampfhoffer") : rest.index("Davidson")]
    assert davidson in rest[rest.index("Davidson") : rest.index("Estimated")]
    assert "spikes save 50%" in rest and "nobody timed it" in rest


def test_spikegpt_as_published_is_dense_and_the_report_says_why() -> None:
    shown, tables = load_prices()
    from spikelm.config import ModelConfig
    from spikelm.model import SpikeLM

    torch.manual_seed(0)
    config = ModelConfig.from_yaml("spikegpt-46m", num_hidden_layers=2, hidden_size=32, vocab_size=11)
    model = SpikeLM(config).eval()
    found = ledger(model, corpus_of(), Question(tables=tables, shown=shown, batch=2, timed=0))
    assert found["operations"]["projections_over_dense"] == 1.0
    assert found["operations"]["total"]["accumulates"] == 0
    assert "1.00x the dense" in found["verdict"][0] and "the input of none is spikes" in found["verdict"][0]
    # It does have spikes: outside its projections.
    assert found["operations"]["by_kind"]["neuron"]["comparisons"] > 0
    assert found["measured"]["seconds_per_token"] is None


def test_measured_on_this_machine() -> None:
    shown, tables = load_prices()
    model = model_of({**CASES["rwkv, adaptive, int8"], "neuron": {"name": "adaptive", "dead_zone": 1.7}})
    found = ledger(model, corpus_of(), Question(tables=tables, shown=shown, batch=1, timed=8, repeats=2))
    timed = found["measured"]
    event, dense = timed["event_driven"], timed["dense"]
    assert timed["how"] == "decode plan" and len(event["all"]) == len(dense["all"]) == 2
    assert timed["seconds_per_token"] == event["seconds_per_token"] > 0
    assert event["weight_bytes_per_token"] < dense["weight_bytes_per_token"]
    assert timed["joules_per_token"] is None or timed["joules_per_token"] > 0
    assert (timed["joules_per_token"] is None) == timed["counter"].startswith("no counter here: ")
    assert model.blocks[0].mixer.key.linear.packed is None  # the caller's weights are as they were


def test_without_a_decode_plan_the_models_own_step_is_timed() -> None:
    model = model_of(CASES["hybrid, adaptive"])  # float64, which plans do not run
    timed = measure(model, corpus_of(), {}, tokens=4, repeats=1)
    assert timed["how"] == "the model's own step" and timed["seconds_per_token"] > 0
    assert timed["event_driven"] is None and timed["why"].startswith("no decode plan: ")
    assert timed["dense"]["weight_bytes_per_token"] is None


def _zone(folder: Path, name: str, energy: str, readable: bool = True) -> Path:
    zone = folder / f"intel-rapl:{len(list(folder.iterdir()))}"
    zone.mkdir()
    (zone / "name").write_text(f"{name}\n")
    (zone / "max_energy_range_uj").write_text("1000000\n")
    (zone / "energy_uj").write_text(energy)
    if not readable:
        (zone / "energy_uj").unlink()
        (zone / "energy_uj").mkdir()
    return zone


def test_rapl_adds_packages_and_survives_their_wrapping(tmp_path: Path) -> None:
    first = _zone(tmp_path, "package-0", "250000\n")
    _zone(tmp_path, "package-1", "500000\n")
    _zone(tmp_path, "dram", "900000\n")  # no package: part of none that is added
    counter, name = counters.find(torch.device("cpu"), tmp_path)
    assert counter is not None and name == "RAPL (package-0, package-1)"
    start = counter.read()
    assert start == pytest.approx(0.75)
    (first / "energy_uj").write_text("450000\n")
    assert counter.between(start, counter.read()) == pytest.approx(0.2)
    assert counter.between(1.9, 0.1) == pytest.approx(0.1 - 1.9 + 1.0)


def test_no_counter_is_said_and_not_guessed(tmp_path: Path) -> None:
    counter, why = counters.find(torch.device("cpu"), tmp_path)
    assert counter is None and why.startswith("no counter here: no RAPL package in")
    _zone(tmp_path, "package-0", "1", readable=False)
    counter, why = counters.find(torch.device("cpu"), tmp_path)
    assert counter is None and why.startswith("no counter here: ")


class _Library:
    """What nvidia-ml-py offers, with a counter of millijoules."""

    millijoules = 1500

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # noqa: N802
        return b"a card"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        assert handle == 1
        return self.millijoules


def test_nvml_counts_millijoules() -> None:
    library = _Library()
    counter = counters.Nvml(library, 1)
    start = counter.read()
    library.millijoules = 4000
    assert counter.name == "NVML (a card)" and counter.between(start, counter.read()) == 2.5


TABLE = """
tables:
  mine:
    source: our chip
    operations: {int8: {multiply: 0.1, add: 0.01}, float32: {multiply: 1, add: 0.5}}
    accumulator: int8
    division: null
    sram: [[65536, 0.5]]
    dram: [10, 20]
"""


def test_a_price_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(TABLE)
    shown, tables = load_prices(str(path))
    assert shown == "mine" and set(tables) == {*TABLES, "mine"}
    assert tables["mine"].mac("int8") == pytest.approx(0.11)
    assert load_prices("jouppi-7nm")[0] == "jouppi-7nm"


@pytest.mark.parametrize(
    "text,sentence",
    [
        (TABLE.replace("multiply: 0.1", "multiply: -1"), "operations.int8.multiply"),
        (TABLE.replace("0.01", ".nan"), "finite"),
        (TABLE.replace("accumulator: int8", "accumulator: int32"), "lacks int32"),
        (TABLE.replace("[10, 20]", "[20, 10]"), "least, most"),
        (TABLE.replace("dram:", "drum:"), "dram: Field required"),
        ("tables: {}\n", "expected the key tables"),
        ("prices: 1\n", "expected the key tables"),
    ],
)
def test_bad_price_files_are_refused_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_prices(str(path))


def test_unknown_price_table() -> None:
    with pytest.raises(ConfigError, match="unknown price table 'jouppi'.*did you mean 'jouppi-7nm'"):
        load_prices("jouppi")
