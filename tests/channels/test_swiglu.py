"""SwiGLU against its equation, and its width."""

from __future__ import annotations

import pytest
import torch

from spikelm.channels.swiglu import SwiGLU, hidden_width
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError
from spikelm.model import SpikeLM


def made(**options: object) -> SwiGLU:
    layers = ({"mixer": {"name": "wkv4"}, "channel": {"name": "swiglu", **options}},)
    config = ModelConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, layers=layers, neuron={"name": "none"}
    )
    channel = SpikeLM(config).double().blocks[0].channel
    assert isinstance(channel, SwiGLU)
    return channel


def test_equation() -> None:
    channel = made(hidden=12)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    gate, up, down = (getattr(channel, name).linear.weight for name in ("gate", "up", "down"))
    assert gate.shape == up.shape == (12, 8) and down.shape == (8, 12)
    left = x @ gate.T
    expected = (left / (1 + torch.exp(-left)) * (x @ up.T)) @ down.T
    torch.testing.assert_close(channel(x)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("features", "hidden", "expand", "multiple_of", "width"),
    [
        (768, None, 8 / 3, 64, 2048),
        (512, None, 8 / 3, 64, 1408),
        (512, None, 8 / 3, 1, 1366),
        (8, None, 8 / 3, 64, 64),
        (8, 21, 8 / 3, 64, 21),
        (3584, 18944, 8 / 3, 64, 18944),
    ],
)
def test_width(features: int, hidden: int | None, expand: float, multiple_of: int, width: int) -> None:
    assert hidden_width("x", features, hidden, expand, multiple_of) == width


@pytest.mark.parametrize("options", [{"hidden": 0}, {"expand": -1.0}, {"multiple_of": 0}, {"width": 3}])
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        made(**options)
