"""Rotary positions: transformers' frequencies, float64 angles, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spikelm.errors import ConfigError, ShapeError
from spikelm.rope import resolve_rope, rotate

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.5},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    YARN,
    {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, "original_max_position_embeddings": 4096},
    {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.25},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s['rope_type']}-{len(s)}")
@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_scaled_frequencies_are_those_of_transformers(
    scaling: dict[str, Any], theta: float, partial: float
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={**scaling, "rope_theta": theta, "partial_rotary_factor": partial},
    )
    theirs, magnitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    ours = resolve_rope(128, theta=theta, scaling=scaling, partial_rotary_factor=partial)
    assert ours.features == int(128 * partial)
    torch.testing.assert_close(
        torch.tensor(ours.frequencies), theirs, rtol=2e-6, atol=0
    )  # theirs are float32
    assert ours.magnitude == pytest.approx(magnitude, rel=1e-12)


def test_rotation_is_that_of_llama() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=32, num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    q, k = torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 16)
    position = torch.randint(0, 50, (2, 7))
    cos, sin = LlamaRotaryEmbedding(config)(q, position)
    theirs = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    for x, expected in zip((q, k), theirs, strict=True):
        torch.testing.assert_close(rotate(x, position, theta=5e5), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", [0, 1_000_000, 2**31])
def test_only_the_difference_of_positions_counts(start: int) -> None:
    """Products of rotated float32 heads at a million are those of float64 heads at zero, to rounding."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 64, 1, 128), torch.randn(1, 64, 1, 128)
    position = torch.arange(64)[None]

    def products(q: torch.Tensor, k: torch.Tensor, first: int) -> torch.Tensor:
        q, k = rotate(q, position + first, theta=1e4), rotate(k, position + first, theta=1e4)
        return torch.einsum("bthd,bshd->bhts", q.double(), k.double())

    exact = products(q.double(), k.double(), 0)
    torch.testing.assert_close(products(q, k, start), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        products(q.double(), k.double(), start), exact, rtol=0, atol=1e-4 if start > 2**30 else 1e-8
    )


def test_a_float32_angle_would_not_do() -> None:
    """What this module is for: the error of float32 angles at a million is visible, ours is not."""
    x, position = torch.ones(1, 1, 64), torch.tensor([1_000_003])
    frequency = torch.tensor(resolve_rope(64).frequencies)
    angle = position.float() * frequency
    a, b = x.chunk(2, -1)
    careless = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    exact = rotate(x.double(), position)
    assert (careless - exact).abs().max() > 1e-3
    assert (rotate(x, position) - exact).abs().max() < 1e-6


def test_a_step_is_a_column_of_a_sequence_in_the_same_dtype() -> None:
    x, position = torch.randn(3, 5, 2, 8), torch.randint(0, 99, (3, 5))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        whole = rotate(x.to(dtype), position)
        assert whole.dtype == dtype
        assert torch.equal(whole[:, 2], rotate(x[:, 2].to(dtype), position[:, 2]))


def test_partial_rotation_leaves_the_rest() -> None:
    x, position = torch.randn(2, 4, 1, 16), torch.arange(8).view(2, 4)
    y = rotate(x, position, partial_rotary_factor=0.5)
    assert torch.equal(y[..., 8:], x[..., 8:])
    assert torch.equal(y[..., :8], rotate(x[..., :8], position))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": {"rope_type": "dynamic", "factor": 2.0}}, "unknown rope_type in rope_scaling 'dynamic'"),
        ({"scaling": {"type": "yarm"}}, "did you mean 'yarn'"),
        ({"scaling": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"scaling": {"rope_type": "linear", "factr": 2.0}}, "did you mean 'factor'"),
        (
            {"scaling": {"rope_type": "linear", "factor": -1}},
            "factor in rope_scaling is -1; expected a positive",
        ),
        ({"scaling": {"factor": 2.0}}, "unknown rope_type in rope_scaling 'None'"),
        ({"scaling": {**SCALINGS[1], "high_freq_factor": 0.5}}, "expected high > low"),
        ({"scaling": {**YARN, "truncate": 1}}, "truncate in rope_scaling is 1"),
        ({"scaling": "yarn"}, "expected a mapping with rope_type"),
        ({"theta": 0.0}, "rope_theta is 0.0"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ({"partial_rotary_factor": 0.4}, "3 of 8 features"),
    ],
)
def test_what_is_no_rotation_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_rope(8, **options)


def test_the_old_name_of_the_kind_and_default() -> None:
    assert resolve_rope(8, scaling={"type": "linear", "factor": 2.0}) == resolve_rope(
        8, scaling={"rope_type": "linear", "factor": 2.0}
    )
    assert resolve_rope(8, scaling={"rope_type": "default"}) == resolve_rope(8)


def test_a_model_is_built_on_the_meta_device() -> None:
    expected = resolve_rope(8, scaling=YARN)
    with torch.device("meta"):
        assert resolve_rope(8, scaling=YARN) == expected


def test_positions_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"rotary positions \(2, 3\)"):
        rotate(torch.zeros(2, 4, 1, 8), torch.zeros(2, 3, dtype=torch.int64))
