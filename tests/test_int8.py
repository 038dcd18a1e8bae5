"""int8 weights: quantisation, projections, the clipped share, files, logits with the same bits anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from spikelm.checkpoint import load_model, save_checkpoint
from spikelm.cli import main
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError, ShapeError
from spikelm.generation import generate
from spikelm.kernels.dispatch import available
from spikelm.kernels.int8_linear import dequantised
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.neurons.base import build_neuron
from spikelm.projection import Projection
from spikelm.recurrence import Context
from spikelm.tokenizer import Tokenizer
from spikelm.weights import CLIP_RATIOS, Int8Linear, build_weights, dequantise, quantise

ADAPTIVE = {"name": "adaptive", "k": 3.0}


def matrix(outputs: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("width", "group"), [(64, None), (64, 16), (300, 128), (7, 128), (5, 1)])
def test_quantisation_is_symmetric_and_within_half_a_step(width: int, group: int | None) -> None:
    weight = matrix(9, width)
    weight[3] = 0.0
    values, scales = quantise(weight, group)
    groups = 1 if group is None else -(-width // group)
    assert values.shape == (9, width) and values.dtype == torch.int8
    assert scales.shape == (9, groups) and scales.dtype == torch.float32
    assert values.min() >= -127 and (values[3] == 0).all() and (scales[3] == 1).all()
    size = width if group is None else group
    steps = scales.repeat_interleave(size, 1)[:, :width]
    assert ((dequantise(values, scales, group) - weight).abs() <= 0.5 * steps * (1 + 1e-5)).all()
    for j in range(groups):  # the largest of every group is 127
        assert (values[[0, 8], j * size : (j + 1) * size].abs().amax(1) == 127).all()
    negated, same = quantise(-weight, group)
    assert torch.equal(negated, -values) and torch.equal(same, scales)


def test_rounding_is_half_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    values, scales = quantise(weight, None)
    assert scales.item() == 1.0 and values.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_clipping_cuts_off_and_the_search_finds_the_smallest_error() -> None:
    weight = matrix(6, 4096)
    half, scales = quantise(weight, None, clip=0.5)
    assert torch.equal(scales, 0.5 * quantise(weight, None)[1]) and (half.abs() == 127).sum() > 60

    def errors(clip: float | str) -> Tensor:
        values, found = quantise(weight, None, clip=clip)
        return ((dequantise(values, found, None) - weight) ** 2).sum(-1)

    tried = torch.stack([errors(ratio) for ratio in CLIP_RATIOS])
    torch.testing.assert_close(errors("mse"), tried.amin(0))
    assert (tried.argmin(0) > 0).any()
    # Where only the largest weight's input matters nothing of it is cut off.
    importance = (torch.arange(4096) == weight[0].abs().argmax()).float()
    found = quantise(weight[:1], None, clip="mse", importance=importance)
    assert torch.equal(found[1], quantise(weight[:1], None)[1])


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"floating matrix \[O, D\], got torch.float32 \[3\]"):
        quantise(torch.ones(3))
    with pytest.raises(ShapeError, match="NaN or infinity"):
        quantise(torch.tensor([[1.0, float("nan")]]))
    for clip in (0.0, 1.5, "best"):
        with pytest.raises(ConfigError, match="expected a number above 0 and up to 1, or 'mse'"):
            quantise(torch.ones(2, 2), clip=clip)


def test_build_weights() -> None:
    assert isinstance(build_weights({"name": "float"}, 4, 3), nn.Linear)
    linear = build_weights({"name": "int8"}, 300, 3)
    assert isinstance(linear, Int8Linear) and linear.group_size == 128 and linear.scales.shape == (3, 3)
    linear = build_weights({"name": "int8", "group_size": None}, 300, 3)
    assert set(linear.state_dict()) == {"weight", "scales"} and linear.scales.shape == (3, 1)
    with pytest.raises(ConfigError, match="unknown kind of weights 'int4'; did you mean 'int8'"):
        build_weights({"name": "int4"}, 4, 3)
    with pytest.raises(ConfigError, match="option of int8 weights 'groupsize'; did you mean 'group_size'"):
        build_weights({"name": "int8", "groupsize": 3}, 4, 3)
    for size in (0, -1, 1.5, True, "128"):
        with pytest.raises(ConfigError, match="group_size of int8 weights"):
            build_weights({"name": "int8", "group_size": size}, 4, 3)


def test_conversions_leave_weights_and_scales_alone() -> None:
    linear = Int8Linear.from_float(matrix(5, 40), 16)
    weight, scales = linear.weight.clone(), linear.scales.clone()
    for convert in (nn.Module.half, nn.Module.bfloat16, nn.Module.float):
        convert(linear)
        assert linear.weight.dtype == torch.int8 and linear.scales.dtype == torch.float32
        assert torch.equal(linear.weight, weight) and torch.equal(linear.scales, scales)
    assert linear.double().scales.dtype == torch.float64
    empty = Int8Linear(40, 5).to("meta").to_empty(device="cpu")
    assert empty.weight.dtype == torch.int8 and empty.scales.dtype == torch.float32


def projection(neuron: dict[str, Any], group: int | None = 16, bias: bool = True) -> Projection:
    spec = {"name": "int8", "group_size": group}
    made = Projection(40, 12, build_neuron(neuron, 40), bias, spec)
    made.linear.load_float(matrix(12, 40))  # type: ignore[operator]
    if made.bias is not None:
        nn.init.normal_(made.bias)
    made.path = "p"
    return made.eval()


NEURONS: list[dict[str, Any]] = [
    ADAPTIVE,
    {"name": "lif", "threshold": 0.5},
    {"name": "plif"},
    {"name": "if"},
]


@pytest.mark.parametrize("neuron", [*NEURONS, {"name": "heaviside"}, {"name": "none"}], ids=str)
@torch.no_grad()
def test_a_projection_is_the_product_with_what_the_weights_stand_for(neuron: dict[str, Any]) -> None:
    made = projection(neuron)
    x = torch.randn(3, 6, 40, generator=torch.Generator().manual_seed(1))
    y, _ = made(x)
    spikes, scale, _ = made.neuron.encode(x, made.neuron.init_state(3), Context())
    linear = made.linear
    assert isinstance(linear, Int8Linear)
    wide = dequantised(linear.weight, linear.scales.double(), 16)
    expected = spikes.double() @ wide.t()
    expected = (expected if scale is None else expected * scale) + made.bias
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert y.dtype == torch.float32 and made(x.bfloat16())[0].dtype == torch.bfloat16
    state = made.init_state(3)
    for t in range(6):  # a step has the bits of the sequence where the product is one of integers
        out, state = made(x[:, t], state)
        assert torch.equal(out, y[:, t]) or neuron["name"] == "none"


def test_outliers_are_cut_off_on_int8_paths_and_their_share_is_reported() -> None:
    x = torch.ones(2, 3, 40)
    x[0, 1, 7], x[1, 2, 3], x[1, 0, 5] = 1e4, -1e4, 1e4
    free = {"name": "adaptive", "k": 6.0, "cap": None}
    valid = torch.ones(2, 3, dtype=torch.bool)
    valid[1, 0] = False
    meter = Meter()
    made = projection(free)
    assert made.neuron.cap == 127
    made(x, ctx=Context(meter=meter, valid=valid))
    entry = meter.summary()["projections"]["p"]
    assert entry["clipped"] == pytest.approx(2 / (5 * 40)) == entry["at_cap"]

    unlimited = Projection(40, 12, build_neuron(free, 40))
    counts, _, _ = unlimited.neuron.encode(x, {}, Context())
    assert counts.max() > 200
    meter = Meter()
    unlimited(x, ctx=Context(meter=meter))
    assert meter.summary()["projections"][""]["clipped"] == 0.0


def test_a_count_that_just_reaches_the_cap_is_not_cut_off() -> None:
    made = projection({"name": "adaptive", "k": 1.0, "cap": 2})
    x = torch.zeros(1, 40)
    x[0, :4] = torch.tensor([2.4, -2.4, 2.6, 40 - 7.4])  # mean 1: counts 2, -2, 3 and 33
    meter = Meter()
    made(x, ctx=Context(meter=meter))
    entry = meter.summary()["projections"]["p"]
    assert entry["at_cap"] == 4 / 40 and entry["clipped"] == 2 / 40


def test_an_int8_head_cannot_be_tied() -> None:
    ModelConfig(tie_word_embeddings=True, weights={"name": "int8"})  # the head stays float
    with pytest.raises(ConfigError, match="makes the head int8; the embedding is float, so untie"):
        ModelConfig(tie_word_embeddings=True, weight_overrides={"*": {"name": "int8"}})


def skip_without_c() -> None:
    """The torch form of wkv4 sums over chunks, whose place depends on where a text is split."""
    problem = available()["wkv4"]["c"]
    if problem is not True:
        pytest.skip(f"no C kernels: {problem}")


INT8: dict[str, Any] = {"name": "int8", "group_size": 128}


def spiking(hidden: int = 192, **options: Any) -> SpikeLM:
    """A small model of the shape of spikegpt-nano-sd with int8 weights in blocks and head."""
    group = options.pop("group_size", 128)
    weights = {"name": "int8", "group_size": group}
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "neuron": {"name": "adaptive", "k": 3.0, "dead_zone": 1.4},
        "head_neuron": ADAPTIVE,
        "weights": weights,
        "weight_overrides": {"head": weights},
        "initializer_range": 0.3,  # every projection does something
        **options,
    }
    return SpikeLM(ModelConfig(**given)).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(3))


VARIANTS: list[dict[str, Any]] = [
    {"hidden": 192},
    {"hidden": 192, "group_size": None, "norm": "rmsnorm"},
    {"hidden": 101},  # no multiple of any vector's width
    {"hidden": 64, "neuron": {"name": "plif"}, "head_neuron": {"name": "lif"}},
    {
        "hidden": 64,
        "layers": [
            {"mixer": {"name": "wkv4"}, "channel": {"name": "moe", "experts": 4}},
            {"mixer": {"name": "ssa"}, "channel": {"name": "swiglu"}},
        ],
    },
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@torch.no_grad()
def test_logits_have_the_same_bits_wherever_a_text_stands(options: dict[str, Any]) -> None:
    """Alone, among others, with padding, after another document, in chunks, by token, on two threads."""
    skip_without_c()
    model, text = spiking(**options), tokens(5, 21)
    alone = model(text[2:3])[0]
    assert alone.std() > 0.1 and not torch.equal(alone[:, 3], alone[:, 4])

    def same(logits: Tensor) -> None:
        assert torch.equal(logits, alone)

    same(model(text)[0][2:3])
    same(model(text.flip(0)[:3])[0][2:3])
    for left, right in ((7, 0), (0, 9), (4, 3)):
        padded = nn.functional.pad(text, (left, right))
        valid = nn.functional.pad(torch.ones_like(text, dtype=torch.bool), (left, right))
        valid[0, : left + 2] = False
        same(model(padded, None, Context(valid=valid))[0][2:3, left : left + 21])
    packed, reset = torch.cat([text[:1], text[2:3]], 1), torch.zeros(1, 42, dtype=torch.bool)
    reset[0, 21] = True
    same(model(packed, None, Context(reset=reset))[0][:, 21:])
    for cuts in ([1, 20], [16, 5], [5, 5, 11], [1] * 21):
        for rows in (text[2:3], text):
            state, pieces = None, []
            for piece in rows.split(cuts, 1):
                logits, state = model(piece, state)
                pieces.append(logits)
            same(torch.cat(pieces, 1)[-3 if len(rows) > 1 else 0 :][:1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        same(model(text)[0][2:3])
        same(model(text.repeat(4, 1))[0][2:3])
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_float_weights_do_not_have_the_same_bits() -> None:
    """What the test above shows is no property of any model."""
    skip_without_c()
    model, text = spiking(weights={"name": "float"}, weight_overrides={}), tokens(64, 5)
    state, pieces = None, []
    for t in range(5):
        logits, state = model(text[2:3, t : t + 1], state)
        pieces.append(logits)
    assert not torch.equal(model(text)[0][2:3], torch.cat(pieces, 1))


@torch.no_grad()
def test_generated_text_goes_on_with_the_bits_of_the_prompt() -> None:
    skip_without_c()
    model, words, seen = spiking(vocab_size=256), Tokenizer.bytes(), []

    def greedy(logits: Tensor, histories: Any) -> Tensor:
        seen.append(logits.clone())
        return logits.argmax(-1)

    pieces = list(generate(model, words, "spikes", 8, cast(Any, greedy), ignore_eos=True))
    ids = torch.tensor([[*words.encode("spikes"), *(piece.token for piece in pieces)]])
    assert torch.equal(torch.cat(seen), model(ids)[0][0, 5:-1])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_a_checkpoint_holds_int8_and_loads_in_any_dtype(dtype: torch.dtype | None, tmp_path: Path) -> None:
    model = spiking(64)
    save_checkpoint(tmp_path / "int8", model)
    loaded = load_model(tmp_path / "int8", dtype=dtype)
    expected, got = model.state_dict(), loaded.state_dict()
    for name, value in expected.items():
        if name.endswith((".linear.weight", ".linear.scales")):
            assert value.dtype == (torch.int8 if name.endswith("weight") else torch.float32)
            wanted = torch.float64 if dtype == torch.float64 and name.endswith("scales") else value.dtype
            assert got[name].dtype == wanted and torch.equal(got[name].to(value.dtype), value), name
    assert loaded.embedding.weight.dtype == (dtype or torch.float32)
    with torch.no_grad():
        logits = loaded(tokens(2, 9))[0]
        if dtype is None:
            assert torch.equal(logits, model(tokens(2, 9))[0])
        assert logits.isfinite().all()


def test_a_file_is_half_of_that_in_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = spiking(256, weights={"name": "float"}, weight_overrides={}, vocab_size=64)
    save_checkpoint(tmp_path / "bf16", model.bfloat16())
    small = spiking(256, vocab_size=64)
    for made in (small.embedding, *(block.mixer_norm for block in small.blocks)):
        made.bfloat16()  # type: ignore[operator]
    save_checkpoint(tmp_path / "int8", small)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("bf16", "int8")]
    # 2 bytes against 1 and a scale of 4 bytes for 128 of them; embedding and vectors are not int8.
    assert 1.85 < sizes[0] / sizes[1] < 2.0

    assert main(["inspect", str(tmp_path / "int8"), "--json", "-"]) == 0
    shown = json.loads(capsys.readouterr().out)
    matrices = sum(m.weight.numel() for m in small.modules() if isinstance(m, Int8Linear))
    assert shown["weights"]["dtypes"]["I8"] == matrices and shown["weights"]["bytes"] == sizes[1]
    assert shown["parameters"] == small.num_parameters() == model.num_parameters()
    assert shown["layers"][0]["projections"]["mixer.key"].startswith("256 x 256, int8(group_size=128), adap")
    assert shown["weight_bytes"] == matrices * (1 + 4 / 128) + 4 * (shown["parameters"] - matrices)
    assert main(["inspect", str(tmp_path / "int8")]) == 0
    assert "I8" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_transformers_loads_runs_and_saves_it(dtype: Any, tmp_path: Path) -> None:
    hf = pytest.importorskip("spikelm.hf")
    model = spiking(64)
    save_checkpoint(tmp_path / "a", model)
    loaded = hf.SpikeLMForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype).eval()
    loaded.save_pretrained(tmp_path / "b")
    again = load_model(tmp_path / "b")
    for name, value in model.state_dict().items():
        if name.endswith((".linear.weight", ".linear.scales")):
            for other in (loaded.model, again):
                found = other.state_dict()[name]
                assert found.dtype == value.dtype and torch.equal(found, value), name
    text = tokens(2, 7)
    with torch.no_grad():
        assert torch.equal(loaded(text).logits, again(text)[0])
        if dtype == "auto":
            assert torch.equal(loaded(text).logits, model(text)[0])
    made = loaded.generate(text, max_new_tokens=6, do_sample=False)
    assert made.shape == (2, 13)
    loaded.train()
    with pytest.raises(ConfigError, match="int8 weights, which cannot be trained"):
        loaded(text, labels=text)
    with pytest.raises(ConfigError, match="cannot grow or shrink"):
        loaded.resize_token_embeddings(120)
    assert loaded.eval()(text, labels=text).loss.isfinite()


def test_training_refuses_int8(tmp_path: Path) -> None:
    from spikelm.train.config import TrainConfig
    from spikelm.train.setup import build_model

    (tmp_path / "t.txt").write_text("spikes " * 500)
    data = {"train": str(tmp_path / "t.txt"), "tokenizer": "bytes", "block_length": 16}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 256}
    values: dict[str, Any] = {"data": data, "out": str(tmp_path / "run"), "steps": 1}
    config = TrainConfig.from_dict({**values, "model": {**small, "weights": INT8}})
    with pytest.raises(ConfigError, match="the model has int8 weights, which cannot be trained"):
        build_model(config, Tokenizer.bytes())
    save_checkpoint(tmp_path / "int8", SpikeLM(ModelConfig(**small, weights=INT8)), Tokenizer.bytes())
    config = TrainConfig.from_dict({**values, "init_from": str(tmp_path / "int8"), "model": {}})
    with pytest.raises(ConfigError, match="init_from .*int8 has int8 weights.*train the float checkpoint"):
        build_model(config, Tokenizer.bytes())
