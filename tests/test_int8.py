"""int8 weights: quantisation, projections, the clipped share, files, logits with the same bits anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikelm.config import ModelConfig
from spikelm.errors import ConfigError, ShapeError
from spikelm.kernels.int8_linear import dequantised
from spikelm.meter import Meter
from spikelm.neurons.base import build_neuron
from spikelm.projection import Projection
from spikelm.recurrence import Context
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
