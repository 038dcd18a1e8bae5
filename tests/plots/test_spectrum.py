"""Spectra against the sums of their definition, against filters whose answer is known; real neurons."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from spikelm.checkpoint import load_model
from spikelm.errors import DataError
from spikelm.neurons.base import build_neuron
from spikelm.plots import canvas
from spikelm.plots.reading import Given, Site, read, sites
from spikelm.plots.responses import noise_like, spectra
from spikelm.plots.spectrum import draw, merged, powers, segment_length, spectrum


def by_definition(x: np.ndarray, y: np.ndarray, length: int) -> tuple[list[float], list[complex]]:
    """Power of x and conj(X) Y by the sums of the docstring, one at a time."""
    window = [0.5 - 0.5 * math.cos(2 * math.pi * t / length) for t in range(length)]
    power, cross = [0.0] * (length // 2), [0j] * (length // 2)
    pieces = [(start, d) for start in range(0, len(x) - length + 1, length // 2) for d in range(x.shape[1])]
    for start, d in pieces:
        values = []
        for signal in (x, y):
            piece = [float(v) for v in signal[start : start + length, d]]
            mean = sum(piece) / length
            values.append([w * (v - mean) for w, v in zip(window, piece, strict=True)])
        for k in range(1, length // 2 + 1):
            turn = [cmath.exp(-2j * math.pi * k * t / length) for t in range(length)]
            fx, fy = (sum(v * w for v, w in zip(signal, turn, strict=True)) for signal in values)
            weight = sum(w * w for w in window) * len(pieces)
            power[k - 1] += abs(fx) ** 2 / weight
            cross[k - 1] += fx.conjugate() * fy / weight
    return power, cross


def test_powers_by_definition() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 45, 3))
    found = powers(x, y, 16)
    power, cross = by_definition(x, y, 16)
    assert found.segments == 4 and found.channels == 3
    assert found.frequency.tolist() == [k / 16 for k in range(1, 9)]
    np.testing.assert_allclose(found.x, power, rtol=1e-12)
    np.testing.assert_allclose(found.cross, cross, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.y, by_definition(y, x, 16)[0], rtol=1e-12)


def test_a_wave_stands_at_its_frequency() -> None:
    t = np.arange(64)[:, None]
    found = powers(3 * np.cos(2 * np.pi * 8 * t / 64), np.zeros((64, 1)), 64)
    # Amplitude A on a Hann window of mean 1/2 and mean square 3/8: A^2/4 (L/2)^2 / (3L/8) = A^2 L / 6.
    assert found.x[7] == pytest.approx(9 * 64 / 6)
    assert found.x[6] == pytest.approx(9 * 64 / 24) and found.x[8] == pytest.approx(9 * 64 / 24)
    assert np.delete(found.x, [6, 7, 8]).max() < 1e-20


def test_a_leak_has_the_response_of_its_equation() -> None:
    """v <- v + (x - v) / tau is a filter: |H|^2 = a^2 / (1 - 2 b cos 2 pi f + b^2), a = 1/tau, b = 1-a."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4096, 16))
    a, v, y = 0.5, np.zeros(16), np.empty((4096, 16))
    for t in range(4096):
        v = v + (x[t] - v) * a
        y[t] = v
    found = spectrum(powers(x, y, 256))
    f = np.array(found["frequency"])
    expected = a**2 / (1 - 2 * (1 - a) * np.cos(2 * np.pi * f) + (1 - a) ** 2)
    # 31 half-overlapping segments of 16 channels; the filter is linear, so the noise cancels in the ratio.
    np.testing.assert_allclose(found["ratio"], expected, rtol=0.08)
    np.testing.assert_allclose(found["coherent"], expected, rtol=0.08)
    low, high = expected[f <= 1 / 16].mean(), expected[f >= 3 / 8].mean()
    assert found["high_level"] == pytest.approx(10 * math.log10(high / low), abs=0.3)
    assert found["high_level"] < -8


def test_noise_that_a_neuron_adds_is_not_coherent() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(4096, 16))
    found = spectrum(powers(x, x + rng.normal(size=x.shape), 256))
    assert np.mean(found["ratio"]) == pytest.approx(2.0, rel=0.05)
    assert np.mean(found["coherent"]) == pytest.approx(1.0, rel=0.05)


def test_places_are_weighted_by_their_channels() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 64, 6))
    whole = powers(x, y, 32)
    parts = merged([powers(x[:, :2], y[:, :2], 32), powers(x[:, 2:], y[:, 2:], 32)])
    np.testing.assert_allclose(parts.x, whole.x)
    np.testing.assert_allclose(parts.y, whole.y)
    np.testing.assert_allclose(parts.cross, whole.cross)
    assert parts.channels == 6


def test_silence_is_null_in_json_and_a_gap_in_the_picture() -> None:
    x = np.random.default_rng(4).normal(size=(64, 2))
    found = spectrum(powers(x, np.zeros_like(x), 32))
    assert set(found["level"]) == {None} and found["high_level"] is None and set(found["ratio"]) == {0.0}
    assert set(spectrum(powers(np.zeros_like(x), x, 32))["ratio"]) == {None}
    figure = draw({"neurons": {"$silent$": found}, "signal": "nothing"})
    assert canvas.rendered(figure, "png")


def site(name: str, features: int = 8, **options: object) -> Site:
    neuron = build_neuron({"name": name, **options}, features).eval()
    return Site(path=name, module=neuron, neuron=neuron, layer=None, kind=name)


def test_real_neurons_driven_by_noise() -> None:
    """No neuron changes nothing; a leaky one follows low frequencies better than high ones."""
    x = torch.randn(4096, 8)
    places = [site("none"), site("lif", threshold=0.5, tau=4.0), site("adaptive", k=8.0)]
    given = {place.path: Given(x=x, state={}) for place in places}
    found = spectra(places, given, length=128, seed=5)
    none, lif, adaptive = (found["neurons"][name] for name in ("none", "lif", "adaptive"))
    assert set(none["ratio"]) == {1.0} and none["high_level"] == 0.0
    # Counts in eighths of the mean magnitude are close to the input.
    np.testing.assert_allclose(adaptive["ratio"], 1.0, atol=0.05)
    coherent = np.array(lif["coherent"])
    assert coherent[:8].mean() > 3 * coherent[-16:].mean()
    assert found["signal"] == "white noise (seed 5)"
    assert found == spectra(places, given, length=128, seed=5) != spectra(places, given, length=128, seed=6)


def test_noise_has_the_moments_of_the_input() -> None:
    x = torch.randn(5000, 3) * torch.tensor([1.0, 5.0, 0.0]) + torch.tensor([0.0, -3.0, 2.0])
    noise = noise_like(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(noise.mean(0), x.mean(0), atol=0.3, rtol=0)
    torch.testing.assert_close(noise.std(0), x.std(0), atol=0.01, rtol=0.05)


def test_a_models_own_input(checkpoints: Callable[[str], Path]) -> None:
    """What the model gives a neuron and what it makes of it, from outside by a hook on the neuron itself."""
    model = load_model(checkpoints("lif"))
    place = sites(model)["blocks.1.channel.key"]
    tokens = [(7 * i * i + i) % 251 for i in range(96)]
    seen: list[torch.Tensor] = []

    def keep(module: object, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
        seen.extend([args[0][0], output[0][0]])

    handle = place.neuron.register_forward_hook(keep)
    given = read(model, tokens, inputs=[place])
    handle.remove()
    found = spectra([place], given, length=32)
    expected = spectrum(powers(*(values.double().numpy() for values in seen), 32))
    for key in ("input", "output", "ratio"):
        assert found["neurons"]["lif"][key] == pytest.approx(expected[key], rel=1e-6)
    assert found["neurons"]["lif"]["places"] == {place.path: pytest.approx(expected["high_level"], rel=1e-6)}


def test_too_little_text() -> None:
    assert segment_length(1000, 256) == 256 and segment_length(200, 256) == 128
    for tokens, wanted in ((31, 256), (1000, 16)):
        with pytest.raises(DataError, match="says nothing; expected at least 32"):
            segment_length(tokens, wanted)
    with pytest.raises(DataError, match="none of the chosen neurons"):
        spectra([site("lif")], {}, length=32)
