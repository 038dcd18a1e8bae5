"""Codings are exact for every count they claim, and refuse the others in one sentence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikelm.codings import Coding, build_coding, needed_limit
from spikelm.errors import CodingError, ConfigError
from spikelm.registry import codings

OURS = ["binary", "bidirectional", "bitwise", "ternary", "twos_complement"]
LIMITS = [1, 2, 3, 4, 5, 7, 8, 15, 16, 31, 100, 127]
DTYPES = [torch.int8, torch.int32, torch.int64, torch.bfloat16, torch.float32, torch.float64]


def counts_of(coding: Coding, limit: int) -> torch.Tensor:
    return torch.arange(-limit if coding.signed else 0, limit + 1)


def test_registry() -> None:
    assert set(OURS) <= set(codings.names())
    with pytest.raises(ConfigError, match="did you mean 'ternary'"):
        build_coding("ternery")


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", OURS)
def test_every_count_comes_back(name: str, limit: int) -> None:
    coding = build_coding(name)
    counts = counts_of(coding, limit)
    for dtype in DTYPES:
        sent = counts.to(dtype)
        events, weights = coding.expand(sent, limit)
        assert events.dtype == dtype and weights.dtype == torch.int64
        assert events.shape == (coding.steps(limit), *sent.shape) and len(weights) == coding.steps(limit)
        assert set(events.to(torch.int64).unique().tolist()) <= set(coding.alphabet)
        # Independent of collapse: the definition.
        assert torch.equal((events.to(torch.int64) * weights[:, None]).sum(0), counts)
        assert torch.equal(coding.collapse(events, weights), sent)


@pytest.mark.parametrize("limit", LIMITS)
def test_steps_are_those_of_the_table(limit: int) -> None:
    import math

    planes = math.ceil(math.log2(limit + 1))
    expected = [limit, planes, planes, limit, planes + 1]
    assert [build_coding(name).steps(limit) for name in OURS] == expected
    assert build_coding("twos_complement").weights(limit)[-1] == -(2**planes)


def test_what_is_sent() -> None:
    """Small examples written out by hand."""
    counts = torch.tensor([-5, 3, 0])
    rows = {name: build_coding(name).expand(counts, 7)[0].T.tolist() for name in OURS if name[:2] != "bi"}
    assert rows["ternary"] == [[-1] * 5 + [0] * 2, [1] * 3 + [0] * 4, [0] * 7]
    assert rows["twos_complement"] == [[1, 1, 0, 1], [1, 1, 0, 0], [0] * 4]
    assert build_coding("bidirectional").expand(counts, 7)[0].T.tolist() == [[-1, 0, -1], [1, 1, 0], [0] * 3]
    assert build_coding("bitwise").expand(counts.abs(), 7)[0].T.tolist() == [[1, 0, 1], [1, 1, 0], [0] * 3]
    assert build_coding("binary").expand(counts.abs(), 5)[0].T.tolist() == [[1] * 5, [1, 1, 1, 0, 0], [0] * 5]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(OURS),
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=4),
    limit=st.integers(1, 127),
    seed=st.integers(0, 1000),
)
def test_any_shape(name: str, shape: list[int], limit: int, seed: int) -> None:
    coding = build_coding(name)
    generator = torch.Generator().manual_seed(seed)
    low = -limit if coding.signed else 0
    counts = torch.randint(low, limit + 1, shape, generator=generator).float()
    events, weights = coding.expand(counts, limit)
    assert torch.equal(coding.collapse(events, weights), counts)
    planes = list(coding.planes(counts, limit))
    assert torch.equal(torch.stack([plane for plane, _ in planes]), events)
    assert [weight for _, weight in planes] == weights.tolist()
    # The smallest window is enough, too.
    events, weights = coding.expand(counts, needed_limit(counts))
    assert torch.equal(coding.collapse(events, weights), counts)


@pytest.mark.parametrize("name", OURS)
def test_bad_counts(name: str) -> None:
    coding = build_coding(name)
    for bad, words in (
        (torch.tensor([1.5]), "whole numbers"),
        (torch.tensor([float("nan")]), "whole numbers"),
        (torch.tensor([8.0, 1.0]), r"count 8 with limit 7"),
        (torch.tensor([float("inf")]), "limit 7"),
        (torch.tensor([True]), "torch.bool"),
    ):
        with pytest.raises(CodingError, match=words) as caught:
            coding.expand(bad, 7)
        assert "\n" not in str(caught.value)
    for limit in (0, -3, 2.0, True, 2**16):
        with pytest.raises(CodingError, match="limit of a coding"):
            coding.expand(torch.tensor([0]), limit)  # type: ignore[arg-type]
    with pytest.raises(CodingError, match=r"\[S, .., D\]"):
        coding.collapse(torch.zeros(3, 2), torch.ones(2))


@pytest.mark.parametrize("name", ["binary", "bitwise"])
def test_negative_counts_name_the_codings_that_can(name: str) -> None:
    with pytest.raises(CodingError, match="count -3.*choose ternary, bidirectional or twos_complement"):
        build_coding(name).expand(torch.tensor([1, -3]), 7)
