"""Every registered part has a formula of its own, and spiking attention counts what really meets."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from spikelm.block import Block
from spikelm.channels.rwkv import RWKVChannel
from spikelm.config import ModelConfig
from spikelm.energy.activity import Activity, Pairs
from spikelm.energy.census import census
from spikelm.energy.counts import KINDS, Operations, macs
from spikelm.energy.operations import counted, operations
from spikelm.energy.reading import read
from spikelm.errors import ConfigError
from spikelm.mixers.softmax import SoftmaxMixer
from spikelm.mixers.spiking_attention import SpikingAttention
from spikelm.mixers.wkv4 import WKV4
from spikelm.model import SpikeLM
from spikelm.neurons.heaviside import Heaviside
from spikelm.norms import LayerNorm
from spikelm.presets import names
from spikelm.projection import Projection
from spikelm.recurrence import Part
from spikelm.registry import channels, mixers, neurons
from tests.contracts.parts import cases

from .test_loops import corpus_of

SEEN = Activity(contexts=np.arange(1, 9))
MET = Pairs(written=1.0, read=1.0, added=1.0, gathered=1.0)


def named(part: Part) -> Part:
    for path, module in part.named_modules():
        if isinstance(module, Part):
            module.path = path
    return part


@pytest.mark.parametrize("name,make", [pytest.param(name, make, id=name) for name, make in cases()])
def test_every_part_has_a_formula(name: str, make: Callable[[], Part]) -> None:
    part = named(make())
    paths = [path for path, module in part.named_modules() if isinstance(module, SpikingAttention)]
    seen = Activity(contexts=SEEN.contexts, pairs=dict.fromkeys(paths, MET))
    for module in part.modules():
        if isinstance(module, Part):
            for kind, own in counted(module, seen).items():
                assert kind in KINDS
                assert all(value >= 0 for value in own.to_dict().values())
                assert own.effective_macs <= own.dense_macs + 1e-9


def test_the_cases_are_all_that_is_registered() -> None:
    tested = {name for name, _ in cases()}
    for registry in (neurons, mixers, channels):
        for name in registry.names():
            assert any(case == name or case.startswith(f"{name}-") for case in tested), name


class Strange(Part):
    """A part that nobody wrote a formula for."""

    def step(self, x: torch.Tensor, state: Any, ctx: Any) -> Any:
        return x, state


class OtherStep(WKV4):
    """Its step is not that of the formula it would inherit."""

    def step(self, x: torch.Tensor, state: Any, ctx: Any) -> Any:
        return super().step(2 * x, state, ctx)


class Foreign(Strange):
    """A part of another package."""


class Renamed(Heaviside):
    """Nothing is different: the inherited formula holds."""


def test_a_part_without_a_formula_is_named() -> None:
    part = Strange()
    part.path = "blocks.0.mixer"
    with pytest.raises(ConfigError, match=r"blocks\.0\.mixer \(Strange\) has no formula.*register one"):
        counted(part, SEEN)


def test_an_inherited_formula_is_refused_where_the_step_is_another() -> None:
    config = ModelConfig(hidden_size=8, num_hidden_layers=1)
    mixer = Block(config, 0).mixer
    mixer.__class__ = OtherStep
    with pytest.raises(ConfigError, match=r"own step\(\) and inherits the formula of WKV4"):
        counted(mixer, SEEN)
    assert counted(Renamed(8), SEEN) == counted(Heaviside(8), SEEN)


def test_another_package_registers_its_own() -> None:
    @operations.register
    def _(part: Foreign, activity: Activity) -> dict[str, Operations]:
        return {"recurrence": macs(5)}

    assert counted(Foreign(), SEEN)["recurrence"].dense_macs == 5


class EMA(Strange):
    """Stands for the example of CONTRIBUTING.md, whose formula docs/energy.md has."""

    features = 6


def test_the_example_of_the_docs_works() -> None:
    text = (Path(__file__).parents[2] / "docs" / "energy.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    exec(code, {"EMA": EMA})
    own = counted(EMA(), SEEN)
    assert own["recurrence"].dense_macs == own["gate"].exponentials == 6


def test_base_classes_have_no_formula_that_subclasses_would_inherit() -> None:
    for base in (SpikingAttention, SoftmaxMixer):
        assert base not in operations.registry


def test_norms_inside_parts_are_not_forgotten() -> None:
    """Every norm of every preset is applied in some formula: without its features a figure changes."""
    for preset in names("models"):
        config = ModelConfig.from_yaml(preset)
        with torch.device("meta"):
            model = SpikeLM(config)
        paths = [path for path, module in model.named_modules() if isinstance(module, SpikingAttention)]
        seen = Activity(contexts=SEEN.contexts, pairs=dict.fromkeys(paths, MET))
        norms = {id(module) for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.RMSNorm))}
        asked: set[int] = set()
        from spikelm.energy.formulas import attention, channels, elementary, linear_attention, structure

        real = elementary.norm

        def spy(module: Any, times: float = 1.0, real: Any = real, asked: set[int] = asked) -> Operations:
            asked.add(id(module))
            return real(module, times)

        with pytest.MonkeyPatch.context() as patch:
            for place in (attention, channels, linear_attention, structure):
                patch.setattr(place, "norm", spy)
            for module in model.modules():
                if isinstance(module, (Part, SpikeLM)):
                    counted(module, seen)
        assert norms <= asked, preset


def test_a_layer_norm_in_numbers() -> None:
    from spikelm.energy.formulas.elementary import norm

    own = norm(LayerNorm(10), 2)
    assert (own.dense_macs, own.additions, own.roots, own.divisions) == (40, 42, 2, 2)


def test_spiking_attention_counts_pairs_that_fired() -> None:
    torch.manual_seed(0)
    common: dict[str, Any] = {"num_heads": 2, "neuron": {"name": "heaviside", "threshold": 0.1}}
    layers = [
        {"mixer": {"name": "ssa", **common}, "channel": {"name": "mlp", "expand": 2}},
        {"mixer": {"name": "sdsa", "version": 1, **common}, "channel": {"name": "mlp", "expand": 2}},
    ]
    config = ModelConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=2,
        layers=layers,
        neuron={"name": "lif", "threshold": 0.2},
    )
    model = SpikeLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.6 * torch.randn_like(parameter))
    corpus = corpus_of(40)
    spikes: dict[str, torch.Tensor] = {}
    for layer in (0, 1):
        for name in ("query", "key", "value"):
            path = f"blocks.{layer}.mixer.{name}_neuron"

            def keep(module: Any, inputs: Any, output: Any, path: str = path) -> None:
                spikes[path] = output[0][0]

            model.get_submodule(path).register_forward_hook(keep)
    reading = read(model, corpus, chunk=1000)
    found = census(model, reading)
    added = gathered = masked = 0
    for t in range(40):
        q, k, v = (spikes[f"blocks.0.mixer.{name}_neuron"][t].tolist() for name in ("query", "key", "value"))
        for head in (0, 4):
            for i in range(head, head + 4):
                added += sum(k[i] * v[j] for j in range(head, head + 4))
                gathered += 4 * q[i]
        k, v = (spikes[f"blocks.1.mixer.{name}_neuron"][t].tolist() for name in ("key", "value"))
        masked += sum(a * b for a, b in zip(k, v, strict=True))
    assert added > 0 and masked > 0
    first = found.parts["blocks.0.mixer"]["recurrence"]
    assert first.accumulates * 40 == pytest.approx(added + gathered)
    assert first.dense_macs == 2 * 2 * 4 * 4 and first.macs_without_spikes == 0
    second = found.parts["blocks.1.mixer"]["recurrence"]
    assert second.accumulates * 40 == pytest.approx(masked)


def test_the_twin_of_spiking_attention_multiplies() -> None:
    config = ModelConfig.from_yaml("spikformer-lm-nano-twin", num_hidden_layers=1, vocab_size=11)
    torch.manual_seed(0)
    model = SpikeLM(config).eval()
    found = census(model, read(model, corpus_of()))
    own = found.parts["blocks.0.mixer"]["recurrence"]
    assert own.accumulates == 0 and own.macs_without_spikes == own.dense_macs > 0


def test_experts_count_the_tokens_they_are_given() -> None:
    torch.manual_seed(0)
    layers = [
        {
            "mixer": {"name": "wkv4"},
            "channel": {"name": "moe", "experts": 4, "top_k": 2, "hidden": 6, "shared": 1},
        }
    ]
    config = ModelConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, layers=layers)
    model = SpikeLM(config).eval()
    reading = read(model, corpus_of(), batch=3)
    routed = [entry for entry in reading.synapses if ".experts." in entry.path]
    for name in ("gate", "up", "down"):
        assert sum(entry.calls for entry in routed if entry.path.endswith(name)) == pytest.approx(2)
    found = census(model, reading)
    experts = [kinds for path, kinds in found.parts.items() if ".experts." in path]
    gates = sum(kinds["gate"].multiplications for kinds in experts if "gate" in kinds)
    assert gates == pytest.approx(2 * 6 * 2)  # two experts of a token, six features, two products each
    # A batch of three reads an expert if any of its tokens chose it.
    tokens = torch.from_numpy(corpus_of().tokens[0][:-1].astype("int64"))[None]
    chosen: list[torch.Tensor] = []
    moe = model.blocks[0].channel
    moe.router.register_forward_hook(lambda m, i, o: chosen.append(o[0][0].topk(2).indices))
    with torch.no_grad():
        model(tokens)
    groups = chosen[0].view(3, 8, 2)
    for index in range(4):
        share = (groups == index).any(-1).any(0).float().mean()
        entry = next(one for one in routed if one.path == f"blocks.0.channel.experts.{index}.gate")
        assert entry.union_calls == pytest.approx(float(share))


def test_kinds_of_a_plain_channel() -> None:
    channel = Block(ModelConfig(hidden_size=8, num_hidden_layers=1), 0).channel
    assert isinstance(channel, RWKVChannel)
    own = counted(channel, SEEN)
    assert set(own) == {"shift", "activation", "gate"}
    assert own["activation"].multiplications == 32
    assert isinstance(channel.key, Projection)
