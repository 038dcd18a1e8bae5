"""Figures from a histogram are those of the events themselves, and those known of Gaussian activations."""

from __future__ import annotations

import pytest
import torch

from spikelm.codings import build_coding
from spikelm.codings.statistics import CountHistogram, ones, report
from spikelm.errors import CodingError
from spikelm.kernels.encode import adaptive_encode
from spikelm.registry import codings


def histogram(counts: torch.Tensor) -> CountHistogram:
    found = CountHistogram()
    for part in counts.chunk(3):
        found.add(part)
    return found


@pytest.mark.parametrize("limit", [None, 3, 7, 15, 127])
@pytest.mark.parametrize("name", ["ternary", "bidirectional", "twos_complement", "binary", "bitwise"])
def test_statistics_are_those_of_the_events(name: str, limit: int | None) -> None:
    counts = (6 * torch.randn(50, 40)).round()
    coding = build_coding(name)
    counts = counts if coding.signed else counts.abs()
    window = int(counts.abs().max()) if limit is None else limit
    events, _ = coding.expand(counts.clamp(-window, window), window)
    found = histogram(counts).statistics(coding, limit)
    assert found is not None
    assert found.steps == len(events) and found.limit == window
    assert found.events == int((events != 0).sum())
    assert found.sparsity == pytest.approx(float((events == 0).float().mean()), abs=1e-6)
    assert found.events_per_channel == pytest.approx(float((events != 0).sum(0).float().mean()), rel=1e-5)
    assert found.cut == pytest.approx(float((counts.abs() > window).float().mean()), abs=1e-7)


def test_gaussian_activations() -> None:
    """V = mean|x| / 3: figures of synthetic activations, beside those published for the 7B model.

    Published: 1.13 spikes per channel, 18.4% of channels silent, 94.1 to 95.1% of counts in [-7, 7], about
    1% beyond 16, and a sparsity of 69.15% "over a 3-step window". A mean |count| of 3 is the definition of
    the threshold, so that 1.13 can only be the one-bits of |count|. Channels of equal scale are silent too
    seldom; with scales that differ (log-normal) the figures come close. No figure here claims the published
    one.
    """
    noise = torch.randn(256, 4096)
    plain = histogram(adaptive_encode(noise, k=3.0)[0])
    assert plain.mean_magnitude == pytest.approx(3.0, abs=0.02)
    assert plain.silent == pytest.approx(0.106, abs=0.003)
    assert plain.ones_per_count == pytest.approx(1.30, abs=0.01)
    assert plain.within(7) == pytest.approx(0.954, abs=0.003)

    uneven = histogram(adaptive_encode(noise * (0.75 * torch.randn(4096)).exp(), k=3.0)[0])
    assert uneven.mean_magnitude == pytest.approx(3.0, abs=0.05)
    assert uneven.silent == pytest.approx(0.18, abs=0.015)
    assert uneven.ones_per_count == pytest.approx(1.18, abs=0.03)
    ternary, bits = build_coding("ternary"), build_coding("bidirectional")
    for coding, limit, steps, expected in (
        (ternary, 3, 3, 0.40),
        (bits, 7, 3, 0.58),
        (bits, 15, 4, 0.70),
    ):
        found = uneven.statistics(coding, limit)
        assert found is not None and found.steps == steps
        assert found.sparsity == pytest.approx(expected, abs=0.02)
        assert found.cut > 0.005  # the short windows are not exact, and say so


def test_report_names_every_coding() -> None:
    signed = report(histogram(torch.tensor([[-3.0, 0.0, 5.0]])))
    assert set(signed) == set(codings.names())
    for name in ("binary", "bitwise"):
        assert signed[name] == {"not_applicable": f"{name} has no code for negative counts"}
    assert signed["bidirectional"]["exact"]["events"] == 4  # 11, 0, 101
    assert signed["ternary"]["exact"]["steps"] == 5
    assert signed["ternary"]["windows"]["3"]["cut"] == pytest.approx(1 / 3)
    unsigned = report(histogram(torch.tensor([[3.0, 0.0, 5.0]])))
    assert all("exact" in entry for entry in unsigned.values())
    assert unsigned["binary"]["exact"]["sparsity"] == pytest.approx(1 - 8 / 15)


def test_shares_and_means() -> None:
    found = histogram(torch.tensor([[-127.0, 0.0, 0.0, 7.0]]))
    assert (found.total, found.needed, found.silent) == (4, 127, 0.5)
    assert found.within(7) == 0.75 and found.mean_magnitude == pytest.approx(33.5)
    assert found.ones_per_count == pytest.approx((7 + 3) / 4)
    assert ones(torch.tensor([-127, 128, 0, 5])).tolist() == [7, 1, 0, 2]
    assert found.merged(found).total == 8
    empty = CountHistogram()
    assert empty.silent == 0.0 and empty.needed == 1 and empty.mean_magnitude == 0.0
    for bad in (1e6, float("nan"), float("inf")):
        with pytest.raises(CodingError, match="at most 32768"):
            empty.add(torch.tensor([bad]))


def test_counts_beyond_int8_widen_the_histogram() -> None:
    counts = torch.tensor([[-1000.0, 0.0, 0.0, 300.0]])
    found = histogram(counts)
    assert found.needed == 1000 and found.total == 4 and found.silent == 0.5
    assert found.mean_magnitude == pytest.approx(325.0)
    both = found.merged(histogram(torch.tensor([[1.0, -1000.0, 2.0]])))
    assert both.total == 7 and both.needed == 1000
    assert int(both.bins[both.values == -1000]) == 2
