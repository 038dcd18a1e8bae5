"""shift_encode: the fused op against the parts it replaces, masks, chunks, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikelm.errors import KernelError, ShapeError
from spikelm.kernels.dispatch import OPS, use_backend
from spikelm.kernels.encode import adaptive_encode_int8
from spikelm.kernels.shift_encode import shift_encode
from spikelm.recurrence import Context, token_shift

AMBIGUOUS = 1e-4
OPTIONS: list[dict[str, Any]] = [
    {"k": 3.0},
    {"k": [3.0, 2.1, 5.3], "dead_zone": [0.0, 1.4, 0.7], "cap": [127, 4, 2]},
]


@pytest.fixture(params=[name for name in OPS["shift_encode"] if name not in ("triton", "reference")])
def any_form(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def make(B: int, T: int, D: int, M: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    return {
        "x": 2 * normal(B, T, D) + normal(B, T, 1),
        "norm_weight": 1 + normal(D) / 4,
        "norm_bias": normal(D) / 4,
        "last": normal(B, D),
        "mixes": torch.rand(M, D, generator=generator).double(),
    }


def masks(B: int, T: int, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "reset": torch.rand(B, T, generator=generator) < 0.2,
        "valid": torch.rand(B, T, generator=generator) < 0.7,
    }


def run(
    inputs: dict[str, Tensor], kind: str, dtype: torch.dtype = torch.float64, **options: Any
) -> list[Tensor]:
    cast = {name: value.to(dtype) for name, value in inputs.items()}
    bias = cast["norm_bias"] if kind == "layernorm" else None
    results = shift_encode(
        cast["x"], cast["norm_weight"], bias, 1e-5, kind, cast["last"], cast["mixes"], **options
    )
    return list(results)


def mixed_inputs(inputs: dict[str, Tensor], kind: str, reset: Any = None, valid: Any = None) -> list[Tensor]:
    """What each projection would read, from the model's own parts, in float64."""
    D = inputs["x"].shape[-1]
    norm = nn.LayerNorm(D, 1e-5).double() if kind == "layernorm" else nn.RMSNorm(D, 1e-5).double()
    norm.weight.data = inputs["norm_weight"]
    if kind == "layernorm":
        norm.bias.data = inputs["norm_bias"]
    with torch.no_grad():
        z = norm(inputs["x"])
    previous, last = token_shift(z, inputs["last"], Context(reset=reset, valid=valid))
    mixed = previous + inputs["mixes"][:, None, None] * (z - previous)
    if valid is not None:
        mixed = torch.where(valid[..., None], mixed, 0.0)
    return [mixed, last]


def each(options: dict[str, Any], m: int) -> dict[str, Any]:
    return {name: value[m] if isinstance(value, list) else value for name, value in options.items()}


def clear(mixed: Tensor, options: dict[str, Any]) -> Tensor:
    """True where x / V is well away from a half and |x| from the edge of the dead zone."""
    mean = mixed.abs().mean(-1, keepdim=True)
    steps = mixed.abs() / (mean / options["k"]).clamp(min=1e-8)
    from_half = (steps - steps.floor() - 0.5).abs()
    dead_zone = options.get("dead_zone", 0.0)
    from_edge = (mixed.abs() / mean.clamp(min=1e-30) - dead_zone).abs()
    return (from_half > AMBIGUOUS) & ((from_edge > AMBIGUOUS) | (dead_zone == 0.0))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=["shared", "each"])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (3, 17, 65), (2, 70, 130), (1, 2, 1000)], ids=str)
def test_equals_the_parts_it_replaces(
    any_form: str,
    shape: tuple[int, int, int],
    kind: str,
    options: dict[str, Any],
    masked: bool,
    poisoned: None,
) -> None:
    inputs = make(*shape)
    given = masks(*shape[:2]) if masked else {}
    mixed, last = mixed_inputs(inputs, kind, **given)
    for dtype in (torch.float64, torch.float32):
        counts, thresholds, new_last, statistics = run(inputs, kind, dtype, **options, **given)
        assert counts.dtype == torch.int8 and statistics.dtype == torch.int64 and thresholds.dtype == dtype
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(new_last.double(), last, rtol=tolerance, atol=tolerance)
        for m in range(3):
            own = each(options, m)
            expected, threshold, _ = adaptive_encode_int8(mixed[m], **own)
            torch.testing.assert_close(thresholds[m].double(), threshold, rtol=tolerance, atol=tolerance)
            sure = clear(mixed[m], own) if dtype == torch.float32 else torch.ones_like(expected).bool()
            if shape[-1] > 1:  # with one channel every layernorm is its bias
                assert torch.equal(counts[m][sure], expected[sure])
        clipped = statistics[..., 2]
        recounted = counts.long().abs()
        figures = [(counts == 0).sum(-1), recounted.sum(-1), clipped, recounted.amax(-1)]
        wanted = torch.stack(figures, -1)
        if masked:
            wanted = wanted * given["valid"][..., None]
            assert not counts[:, ~given["valid"]].any()
            assert (thresholds[:, ~given["valid"]] == torch.tensor(1e-8, dtype=dtype)).all()
        assert torch.equal(statistics, wanted)


def test_clipped_counts_are_counted(any_form: str) -> None:
    inputs = make(2, 9, 70)
    mixed, _ = mixed_inputs(inputs, "layernorm")
    _, thresholds, _, statistics = run(inputs, "layernorm", k=4.0, cap=6)
    cut = torch.round(mixed / thresholds).abs() > 6
    assert cut.any() and torch.equal(statistics[..., 2], cut.sum(-1))


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_a_split_anywhere_changes_nothing(any_form: str, kind: str) -> None:
    inputs, given = make(2, 14, 33), masks(2, 14)
    whole = run(inputs, kind, **OPTIONS[1], **given)
    for cut in (0, 1, 5, 13, 14):
        head = {**inputs, "x": inputs["x"][:, :cut]}
        first = run(head, kind, **OPTIONS[1], **{name: m[:, :cut] for name, m in given.items()})
        tail = {**inputs, "x": inputs["x"][:, cut:], "last": first[2]}
        second = run(tail, kind, **OPTIONS[1], **{name: m[:, cut:] for name, m in given.items()})
        for i in (0, 1, 3):
            torch.testing.assert_close(torch.cat([first[i], second[i]], 2), whole[i], rtol=1e-12, atol=0)
        torch.testing.assert_close(second[2], whole[2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_bits_depend_on_neither_split_nor_batch_nor_threads(c_form: None, kind: str) -> None:
    inputs, given = make(3, 131, 90), masks(3, 131)
    options = {**OPTIONS[1], **given}
    whole = run(inputs, kind, torch.float32, **options)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for a, b in zip(run(inputs, kind, torch.float32, **options), whole, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)
    for cut in (1, 32, 50):
        head = {**inputs, "x": inputs["x"][:, :cut]}
        first = run(head, kind, torch.float32, **OPTIONS[1], **{n: m[:, :cut] for n, m in given.items()})
        tail = {**inputs, "x": inputs["x"][:, cut:], "last": first[2]}
        second = run(tail, kind, torch.float32, **OPTIONS[1], **{n: m[:, cut:] for n, m in given.items()})
        for i in (0, 1, 3):
            assert torch.equal(torch.cat([first[i], second[i]], 2), whole[i])
        assert torch.equal(second[2], whole[2])
    alone = {**inputs, "x": inputs["x"][1:2], "last": inputs["last"][1:2]}
    row = run(alone, kind, torch.float32, **OPTIONS[1], **{n: m[1:2] for n, m in given.items()})
    for i in (0, 1, 3):
        assert torch.equal(row[i], whole[i][:, 1:2])


def test_the_counts_are_those_of_the_encoder(c_form: None) -> None:
    """With a mix of one the projections read the features themselves."""
    inputs = make(2, 9, 70)
    inputs["mixes"] = torch.ones(1, 70).double()
    features = mixed_inputs(inputs, "layernorm")[0][0]
    counts, thresholds, _, statistics = run(inputs, "layernorm", k=3.0, dead_zone=0.5, cap=6)
    expected = adaptive_encode_int8(features, k=3.0, dead_zone=0.5, cap=6)
    assert torch.equal(counts[0], expected[0]) and torch.equal(statistics[0], expected[2])
    torch.testing.assert_close(thresholds[0], expected[1])


def test_a_reset_is_a_new_sequence(any_form: str) -> None:
    inputs = make(1, 12, 40)
    reset = torch.zeros(1, 12, dtype=torch.bool)
    reset[0, 5] = True
    whole = run(inputs, "layernorm", k=3.0, reset=reset)
    fresh = {**inputs, "x": inputs["x"][:, 5:], "last": torch.zeros_like(inputs["last"])}
    alone = run(fresh, "layernorm", k=3.0)
    assert torch.equal(whole[0][:, :, 5:], alone[0]) and torch.equal(whole[2], alone[2])


def test_nan_at_an_invalid_token_reaches_nothing(any_form: str) -> None:
    inputs, given = make(2, 9, 20), masks(2, 9)
    clean = run(inputs, "layernorm", k=3.0, **given)
    inputs["x"][~given["valid"]] = math.nan
    for a, b in zip(run(inputs, "layernorm", k=3.0, **given), clean, strict=True):
        assert torch.equal(a, b)


def test_nan_at_a_valid_token_shows_in_its_thresholds_and_the_next(any_form: str) -> None:
    inputs = make(1, 6, 20)
    inputs["x"][0, 2, 7] = math.nan
    counts, thresholds, _, _ = run(inputs, "layernorm", k=3.0)
    assert thresholds.isnan()[:, 0, :, 0].all(0).tolist() == [False, False, True, True, False, False]
    assert not counts[:, 0, 2:4].any()


def test_any_memory_layout_and_low_precision(any_form: str) -> None:
    inputs = make(3, 7, 40)
    expected = run(inputs, "rmsnorm", torch.float32, k=3.0)
    other = {**inputs, "x": inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)}
    other["mixes"] = inputs["mixes"].mT.contiguous().mT
    for a, b in zip(run(other, "rmsnorm", torch.float32, k=3.0), expected, strict=True):
        torch.testing.assert_close(a, b)
    low = {name: value.bfloat16() for name, value in inputs.items()}
    wide = {name: value.float() for name, value in low.items()}
    bias = low["norm_bias"]
    got = shift_encode(
        low["x"], low["norm_weight"], bias, 1e-5, "layernorm", low["last"], low["mixes"], k=3.0
    )
    for a, b in zip(got, run(wide, "layernorm", torch.float32, k=3.0), strict=True):
        assert torch.equal(a, b)


def test_nothing_to_do(any_form: str) -> None:
    for B, T, D, M in ((0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 4, 0)):
        inputs = make(B, T, D, M)
        counts, thresholds, last, statistics = run(inputs, "layernorm", k=3.0)
        assert counts.shape == (M, B, T, D) and thresholds.shape == (M, B, T, 1)
        assert statistics.shape == (M, B, T, 4) and last.shape == (B, D)
    inputs = make(2, 0, 4)
    assert torch.equal(run(inputs, "layernorm", k=3.0)[2], inputs["last"])


def test_wrong_inputs_are_refused() -> None:
    inputs = make(2, 3, 4)

    def call(kind: str = "layernorm", k: Any = 3.0, cap: Any = 127, **changed: Any) -> None:
        given = {**inputs, **changed}
        last, mixes = given["last"], given["mixes"]
        shift_encode(
            given["x"], given["norm_weight"], given["norm_bias"], 1e-5, kind, last, mixes, k=k, cap=cap
        )

    with pytest.raises(ShapeError, match=r"floating x \[B, T, D\], got torch.int64 \[2, 3, 4\]"):
        call(x=inputs["x"].long())
    with pytest.raises(ShapeError, match=r"floating last \[2, 4\] on cpu for x \[2, 3, 4\], got .* \[3, 4\]"):
        call(last=torch.zeros(3, 4))
    with pytest.raises(ShapeError, match=r"floating mixes \[3, 4\] on cpu .* got torch.float64 \[3, 5\]"):
        call(mixes=torch.zeros(3, 5).double())
    with pytest.raises(ShapeError, match=r"floating norm_weight \[4\]"):
        call(norm_weight=torch.zeros(5))
    with pytest.raises(ShapeError, match=r"floating norm_bias \[4\] on cpu .* on meta"):
        call(norm_bias=torch.zeros(4, device="meta"))
    with pytest.raises(KernelError, match="unknown norm 'layer'; did you mean 'layernorm'"):
        call(kind="layer")
    with pytest.raises(KernelError, match="a bias for rmsnorm, which has none"):
        call(kind="rmsnorm")
    with pytest.raises(KernelError, match="cap 128; int8 counts need one from 1 to 127"):
        call(cap=128)
    with pytest.raises(ShapeError, match="got 2 values of k for 3 mixes"):
        call(k=[1.0, 2.0])
