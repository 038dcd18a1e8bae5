"""Spectrum: how much of each frequency along the sequence a neuron lets through.

Computed is the ratio of two power spectra along the token axis, of a neuron's output y (its spikes times
their threshold, what the weights are multiplied with) and of its input x:

    ratio(f) = mean over channels and segments of |Y(f)|^2  /  the same of |X(f)|^2

Spectra are Welch's averaged periodograms (Welch 1967, IEEE Trans. Audio Electroacoust. 15, 70-73): segments
of L tokens that overlap by half, the mean of every segment and channel taken away, a periodic Hann window
w, |sum_t w_t x_t e^(-2 pi i f t)|^2 / sum_t w_t^2, averaged. Frequencies are in cycles per token, from 1/L
to 1/2 (changes at every token); zero is left out, because the mean was.

``coherent(f)`` = |mean of conj(X) Y|^2 / (mean of |X|^2)^2 is the part of the ratio that follows the input
linearly (the H1 estimate of a transfer function, averaged over channels before squaring). The rest is what
the neuron adds: rounding, harmonics of the threshold, spikes.

Limits. A neuron is not linear, so no curve here is a transfer function: with another input it is another
curve. Power of loud channels weighs more. Means over few segments are noisy: 2 / sqrt(segments x channels)
is a rough relative error where channels are independent. Levels in decibels are relative to the lowest
frequencies (up to 1/16), since spikes and inputs have different units; so a level says how a neuron tilts a
spectrum, not how much it weakens it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spikelm.errors import DataError
from spikelm.plots import canvas
from spikelm.plots.canvas import LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
LOW, HIGH = 1 / 16, 3 / 8
"""The lowest frequencies end here; the highest begin here (and end at 1/2)."""
SHORTEST = 32
"""Tokens of the shortest segment that still tells low from high frequencies."""


@dataclass(frozen=True, kw_only=True)
class Powers:
    """Mean powers of input and output, float64 [L // 2], and of their product, complex128 [L // 2]."""

    frequency: Floats
    x: Floats
    y: Floats
    cross: NDArray[np.complex128]
    segments: int
    channels: int


def segment_length(tokens: int, wanted: int) -> int:
    """The wanted length of a segment, or the largest power of two that fits into the text.

    Raises:
        DataError: the text, or what was wanted, is too short.
    """
    if min(tokens, wanted) < SHORTEST:
        raise DataError(
            f"a spectrum over {min(tokens, wanted)} tokens says nothing; expected at least {SHORTEST}: "
            "give more text, or a larger --tokens or --segment"
        )
    return wanted if wanted <= tokens else 1 << int(math.log2(tokens))


def powers(x: Floats, y: Floats, length: int) -> Powers:
    """Welch's spectra of an input and an output, averaged over segments and channels.

    Args:
        x: [T, D].
        y: [T, D].
        length: L, tokens of a segment, at most T.
    """
    starts = range(0, len(x) - length + 1, max(1, length // 2))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    weight = float((window**2).sum())
    sums: list[Any] = [0.0, 0.0, 0.0]
    for start in starts:
        pieces = (x[start : start + length], y[start : start + length])
        fx, fy = (np.fft.rfft(window[:, None] * (p - p.mean(0)), axis=0)[1:] for p in pieces)
        for index, product in enumerate((np.abs(fx) ** 2, np.abs(fy) ** 2, np.conj(fx) * fy)):
            sums[index] = sums[index] + product.mean(1) / weight
    n = len(starts)
    return Powers(
        frequency=np.asarray(np.fft.rfftfreq(length)[1:], dtype=np.float64),
        x=sums[0] / n,
        y=sums[1] / n,
        cross=np.asarray(sums[2] / n, dtype=np.complex128),
        segments=n,
        channels=x.shape[1],
    )


def merged(parts: list[Powers]) -> Powers:
    """The mean over several places of one neuron kind, each weighted by its channels."""
    total = sum(part.channels for part in parts)
    share = [part.channels / total for part in parts]
    return Powers(
        frequency=parts[0].frequency,
        x=np.sum([s * part.x for s, part in zip(share, parts, strict=True)], 0),
        y=np.sum([s * part.y for s, part in zip(share, parts, strict=True)], 0),
        cross=np.sum([s * part.cross for s, part in zip(share, parts, strict=True)], 0),
        segments=parts[0].segments,
        channels=total,
    )


def spectrum(found: Powers) -> dict[str, Any]:
    """The ratio of powers and what is drawn of it.

    Returns:
        JSON values, lists over frequencies: frequency (cycles per token), input and output power, ratio,
        coherent, level and coherent_level (decibels relative to the lowest frequencies; None where there is
        no power), and high_level: mean ratio at the highest frequencies over that at the lowest, in
        decibels; below zero means that high frequencies are suppressed.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = found.y / found.x
        coherent = np.abs(found.cross) ** 2 / found.x**2
        low = (found.frequency <= LOW) if (found.frequency <= LOW).any() else found.frequency <= 0.25
        base = found.y[low].sum() / found.x[low].sum()
        level, coherent_level = 10 * np.log10(ratio / base), 10 * np.log10(coherent / base)
        high = found.frequency >= HIGH
        high_level = 10 * np.log10(found.y[high].sum() / found.x[high].sum() / base)
    return {
        "frequency": _plain(found.frequency),
        "input": _plain(found.x),
        "output": _plain(found.y),
        "ratio": _plain(ratio),
        "coherent": _plain(coherent),
        "level": _plain(level),
        "coherent_level": _plain(coherent_level),
        "high_level": float(high_level) if np.isfinite(high_level) else None,
        "segments": found.segments,
        "channels": found.channels,
    }


def _plain(values: Floats) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def draw(numbers: Mapping[str, Any], *, title: str = "spectrum", theme: Theme = LIGHT) -> Figure:
    """Levels of every neuron kind; dashed what follows the input linearly.

    Args:
        numbers: ``neurons``: name -> :func:`spectrum`; ``signal``: what drove them.
        title: above the picture.
        theme: colours.
    """
    with canvas.on(theme):
        figure = canvas.blank(7.0, 4.2)
        axes = figure.subplots()
        for index, (name, entry) in enumerate(numbers["neurons"].items()):
            colour = canvas.COLOURS[index % len(canvas.COLOURS)]
            axes.plot(entry["frequency"], _gaps(entry["level"]), color=colour, label=canvas.plain(name))
            axes.plot(
                entry["frequency"],
                _gaps(entry["coherent_level"]),
                color=colour,
                linestyle="--",
                linewidth=0.9,
            )
        axes.axhline(0.0, color=theme.faint, linewidth=0.8)
        axes.set_xlim(0.0, 0.5)
        axes.set_xlabel("frequency along the sequence (cycles per token)")
        axes.set_ylabel("output / input power (dB)")
        axes.set_title(
            f"{canvas.plain(title, 60)}, driven by {canvas.plain(numbers['signal'])}\n"
            "0 dB: the lowest frequencies; dashed: what follows the input linearly",
            fontsize=10,
        )
        axes.grid(alpha=0.4)
        axes.legend(fontsize=9)
    return figure


def _gaps(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
