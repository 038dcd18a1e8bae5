"""What neurons make of an input: their own one from the model, or noise that resembles it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from spikelm.errors import DataError
from spikelm.plots.reading import Given, Site, neuron_name
from spikelm.plots.spectrum import Powers, merged, powers, spectrum


def noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """White Gaussian noise [T, D] with the mean and the standard deviation of every channel of x [T, D]."""
    drawn = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.device, x.dtype)
    return x.mean(0) + x.std(0, correction=0) * drawn


@torch.inference_mode()
def spectra(
    sites: Sequence[Site], given: Mapping[str, Given], *, length: int, seed: int | None = None
) -> dict[str, Any]:
    """Spectra of the neurons at some places; see :mod:`spikelm.plots.spectrum` for what they mean.

    Args:
        sites: the places.
        given: path -> input [T, D] and first state; places without one are left out.
        length: tokens of a segment.
        seed: drive the neurons with noise of this seed in place of the input; None for the input itself.

    Returns:
        JSON values: ``signal`` (what drove them), ``segment``, ``neurons``: name -> the spectrum over all
        places of that neuron, with ``places``: path -> high_level in decibels.

    Raises:
        DataError: no place saw every token in turn.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    found: dict[str, dict[str, Powers]] = {}
    for site in sites:
        if site.path not in given:
            continue
        x, state = given[site.path].x, given[site.path].state
        if seed is not None:
            x = noise_like(x, generator)
        y = cast(Tensor, site.neuron(x[None], state or None)[0])[0]
        before, after = (values.double().cpu().numpy() for values in (x, y))
        found.setdefault(neuron_name(site), {})[site.path] = powers(before, after, length)
    if not found:
        raise DataError("none of the chosen neurons sees every token in turn; choose another --projection")
    return {
        "signal": "the model's own input" if seed is None else f"white noise (seed {seed})",
        "segment": length,
        "neurons": {
            name: spectrum(merged(list(places.values())))
            | {"places": {path: spectrum(entry)["high_level"] for path, entry in places.items()}}
            for name, places in found.items()
        },
    }
