"""Int8 weights packed for the C kernels: the same module in every respect, with one copy of its weights."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spikelm.checkpoint import load_model, save_checkpoint
from spikelm.codings import build_coding
from spikelm.config import ModelConfig
from spikelm.errors import CheckpointError, KernelError, ShapeError
from spikelm.firing import read_firing
from spikelm.kernels.dispatch import available, use_backend
from spikelm.kernels.int8_linear.packing import PackedInt8
from spikelm.model import SpikeLM
from spikelm.recurrence import Context
from spikelm.weights import EVENT_DRIVEN_FROM, Int8Linear, choose_layout, pack_model, quantise

pytestmark = pytest.mark.skipif(
    available()["int8_linear"]["c"] is not True, reason="packed weights need the C kernels"
)
LAYOUTS = ("out_in", "in_out")


def linear(group: int | None = 32) -> Int8Linear:
    return Int8Linear.from_float(torch.randn(70, 100), group)


def counts(*shape: int) -> Tensor:
    return torch.randn(*shape).mul(3).round()


def small_model(**changes: object) -> SpikeLM:
    spec = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
    spec |= {"weights": {"name": "int8", "group_size": 16}, **changes}
    torch.manual_seed(0)
    return SpikeLM(ModelConfig.from_dict(spec)).eval()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [32, None])
def test_a_packed_module_is_the_same_module(layout: str, group: int | None) -> None:
    plain = linear(group)
    packed = copy.deepcopy(plain).pack_(layout)
    assert packed.layout == layout and plain.layout is None
    assert torch.equal(packed.weight, plain.weight) and torch.equal(packed.scales, plain.scales)
    assert torch.equal(packed.dequantised(), plain.dequantised())
    x = counts(3, 4, 100)
    assert torch.equal(packed(x), plain(x)) and torch.equal(packed(x[0, 0]), plain(x[0, 0]))
    assert torch.equal(packed.integer_sums(x), plain.integer_sums(x))
    assert torch.equal(packed.weight_only(x), plain.weight_only(x))
    before, after = plain.state_dict(), packed.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ShapeError, match="magnitude 128"):
        packed(torch.full((1, 100), 128.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_copy_is_resident(layout: str) -> None:
    packed = linear().pack_(layout)
    assert not list(packed.buffers())
    tensors = [value for value in vars(packed).values() if isinstance(value, Tensor)]
    assert not tensors
    assert packed.packed is not None
    held = [value for value in vars(packed.packed).values() if isinstance(value, Tensor)]
    assert len(held) == 1 and held[0].numel() == packed.packed.nbytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_are_independent(layout: str) -> None:
    packed = linear().pack_(layout)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert other.layout == layout and torch.equal(other.weight, packed.weight)
        assert other.packed.pointer != packed.packed.pointer
        assert other.packed.memory.data_ptr() != packed.packed.memory.data_ptr()
        other.load_float(torch.zeros(70, 100))
        assert packed.weight.any() and not other.weight.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loading_and_moving_pack_again(layout: str) -> None:
    packed, other = linear().pack_(layout), linear()
    packed.load_state_dict(other.state_dict())
    assert packed.layout == layout and torch.equal(packed.weight, other.weight)
    third = linear()
    packed.load_state_dict(third.state_dict(), assign=True)
    assert packed.layout == layout and torch.equal(packed.scales, third.scales)
    with pytest.raises(RuntimeError, match="Missing key"):
        packed.load_state_dict({})
    assert packed.layout == layout and torch.equal(packed.weight, third.weight)
    x = counts(2, 100)
    expected = third(x)
    packed = packed.to(torch.bfloat16)
    assert packed.layout == layout and packed.scales.dtype == torch.float32
    assert torch.equal(packed(x), expected)
    double = copy.deepcopy(packed).double()
    assert double.layout is None and double(x).dtype == torch.float64
    meta = copy.deepcopy(packed).to("meta")
    assert meta.layout is None and meta.weight.is_meta
    packed.weight = torch.zeros(70, 100, dtype=torch.int8)
    assert packed.layout is None and not packed(x).any()


def test_gradients_and_other_back_ends_use_the_original_weights() -> None:
    plain = linear()
    packed = copy.deepcopy(plain).pack_("in_out")
    x = counts(5, 100)
    for module in (plain, packed):
        leaf = x.clone().requires_grad_()
        module(leaf).sum().backward()
        torch.testing.assert_close(leaf.grad, plain.dequantised().sum(0).expand(5, -1), rtol=1e-5, atol=1e-5)
    for name in ("reference", "torch"):
        with use_backend(name):
            assert torch.equal(packed(x), plain(x))


def test_bad_requests_are_refused() -> None:
    with pytest.raises(KernelError, match="layout of int8 weights 'in-out'"):
        linear().pack_("in-out")
    with pytest.raises(ShapeError, match=r"scales are float32 \[70, 4\]"):
        PackedInt8(linear().weight, torch.ones(70, 3), 32)
    with pytest.raises(KernelError, match="on the CPU"):
        linear().to("meta").pack_()
    with pytest.raises(KernelError, match="projection"):
        pack_model(small_model(), {"blocks.0.mixer.kez": 0.9})


@pytest.mark.parametrize("name", ["adaptive", "lif"])
def test_a_packed_model_gives_the_same_bits(name: str) -> None:
    plain = small_model(neuron={"name": name})
    packed = copy.deepcopy(plain)
    silent = {"blocks.0.mixer.key": 0.9, "blocks.1.channel.value": 0.2}
    projections = sum(isinstance(module, Int8Linear) for module in plain.modules())
    assert pack_model(packed, silent) == projections
    assert packed.blocks[0].mixer.key.linear.layout == "in_out"  # type: ignore[union-attr]
    assert packed.blocks[1].channel.value.linear.layout == "out_in"  # type: ignore[union-attr]
    assert packed.num_parameters() == plain.num_parameters()
    assert packed.fp32_parameters() == plain.fp32_parameters()
    arenas = {
        module.packed.memory.untyped_storage().data_ptr()
        for module in packed.modules()
        if isinstance(module, Int8Linear) and module.packed is not None
    }
    assert len(arenas) == projections and max(arenas) - min(arenas) < 1 << 20  # one allocation
    tokens = torch.randint(50, (2, 9))
    with torch.no_grad():
        assert torch.equal(packed(tokens)[0], plain(tokens)[0])
        if name == "adaptive":
            ctx = Context(coding=build_coding("ternary"))
            assert torch.equal(packed(tokens, ctx=ctx)[0], plain(tokens, ctx=ctx)[0])
    assert pack_model(packed, silent) == projections  # again, from the packed form
    assert torch.equal(packed(tokens)[0], plain(tokens)[0])


def test_weights_without_counts_stay() -> None:
    model = small_model(neuron={"name": "none"})
    assert pack_model(model) == 0


def test_the_checkpoint_says_what_fires(tmp_path: Path) -> None:
    model = small_model()
    assert choose_layout(None) == choose_layout(0.5) == "out_in"
    assert choose_layout(EVENT_DRIVEN_FROM) == choose_layout(1.0) == "in_out"
    model.firing = {"blocks.0.mixer.key": 0.95, "blocks.0.mixer.value": 0.1}
    pack_model(model)
    save_checkpoint(tmp_path / "a", model)
    loaded = load_model(tmp_path / "a")
    assert loaded.firing == model.firing == read_firing(tmp_path / "a")
    pack_model(loaded)
    assert loaded.blocks[0].mixer.key.linear.layout == "in_out"  # type: ignore[union-attr]
    assert loaded.blocks[0].mixer.value.linear.layout == "out_in"  # type: ignore[union-attr]
    expected, got = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    for text in ("[", json.dumps({"blocks.0.mixer.key": 2}), json.dumps([1]), json.dumps({"x": True})):
        (tmp_path / "a" / "firing.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"firing\.json"):
            load_model(tmp_path / "a")
    (tmp_path / "a" / "firing.json").unlink()
    assert load_model(tmp_path / "a").firing == {}


def test_values_of_all_bytes_survive() -> None:
    weight = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).repeat(3, 1)
    for layout in LAYOUTS:
        packed = PackedInt8(weight, torch.ones(3, 1), None, layout)
        assert torch.equal(packed.weight(), weight)
    values, scales = quantise(torch.randn(3, 256), None)
    assert torch.equal(PackedInt8(values, scales).scales(), scales)
