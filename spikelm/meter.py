"""Counts spikes: what really entered the weights, and what neurons elsewhere sent out.

A meter is handed to a model in its context; every projection reports its input once per call, and so does
every neuron that stands outside a projection (on the embedding, or on the output of mixers and channels: its
spikes enter the residual stream and save no operation). Sums are kept on the device and read when
:meth:`Meter.summary` is asked for.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(kw_only=True)
class ProjectionCount:
    """Running sums of one projection's input."""

    spiking: bool
    in_features: int
    out_features: int
    tokens: Tensor
    nonzero: Tensor
    magnitude: Tensor
    at_cap: Tensor
    clipped: Tensor
    fired: Tensor
    """bool [in_features]: channels that fired at least once."""


@dataclass
class Meter:
    """Spike statistics per projection.

    Args:
        raster: paths of projections whose counts [B, T, D] are kept whole (for plots).
    """

    raster: Collection[str] = ()
    counts: dict[str, ProjectionCount] = field(default_factory=dict)
    rasters: dict[str, list[Tensor]] = field(default_factory=dict)
    outside: set[str] = field(default_factory=set)
    """Paths of neurons outside projections."""

    @torch.no_grad()
    def record(
        self, path: str, x: Tensor, *, spiking: bool, out_features: int, valid: Tensor | None, cap: int | None
    ) -> None:
        """Add one call of a projection.

        Args:
            path: dotted name of the projection.
            x: what is multiplied with the weights, [B, T, D] or [B, D]; integers if spiking.
            spiking: whether x consists of spikes.
            out_features: rows of the weight matrix.
            valid: bool [B, T]; tokens that are not padding, or None.
            cap: largest possible |count|, or None.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if valid is not None and x.dim() == 3:
            rows = rows[valid.reshape(-1)]
        nonzero = rows != 0
        magnitude = rows.abs()
        self.add(
            path,
            spiking=spiking,
            in_features=x.shape[-1],
            out_features=out_features,
            tokens=rows.shape[0],
            nonzero=nonzero.sum(),
            magnitude=magnitude.sum(dtype=torch.float64),
            at_cap=0 if cap is None else (magnitude >= cap).sum(),
            clipped=0,
            fired=nonzero.any(0),
        )
        if path in self.raster:
            self.rasters.setdefault(path, []).append(x.detach().to("cpu", torch.float32))

    def add(
        self,
        path: str,
        *,
        spiking: bool,
        in_features: int,
        out_features: int,
        tokens: int,
        nonzero: Tensor | int,
        magnitude: Tensor | float,
        at_cap: Tensor | int,
        clipped: Tensor | int,
        fired: Tensor,
    ) -> None:
        """Add what was counted elsewhere; the fields are those of :class:`ProjectionCount`.

        Args:
            path: of a projection, or with ``out_features`` 0 of a neuron outside projections.
            spiking: whether the input consists of spikes.
            in_features: values of a token.
            out_features: rows of the weight matrix.
            tokens: how many came by.
            nonzero: values that were not zero.
            magnitude: sum of their absolute values.
            at_cap: values at the cap.
            clipped: values that the cap made smaller.
            fired: bool [in_features].
        """
        if not out_features:
            self.outside.add(path)
        if path not in self.counts:
            zero = torch.zeros((), dtype=torch.float64, device=fired.device)
            self.counts[path] = ProjectionCount(
                spiking=spiking,
                in_features=in_features,
                out_features=out_features,
                tokens=zero,
                nonzero=zero,
                magnitude=zero,
                at_cap=zero,
                clipped=zero,
                fired=torch.zeros_like(fired),
            )
        entry = self.counts[path]
        # Not in place: a tensor made in inference mode could not be updated outside it.
        entry.tokens = entry.tokens + tokens
        entry.nonzero = entry.nonzero + nonzero
        entry.magnitude = entry.magnitude + magnitude
        entry.at_cap = entry.at_cap + at_cap
        entry.clipped = entry.clipped + clipped
        entry.fired = entry.fired | fired

    @torch.no_grad()
    def record_clipped(self, path: str, clipped: Tensor, *, valid: Tensor | None) -> None:
        """Add what the cap cut off in the call of a projection that was just recorded.

        Args:
            path: dotted name of the projection.
            clipped: bool [B, T, D] or [B, D], counts that the cap made smaller.
            valid: bool [B, T]; tokens that are not padding, or None.
        """
        if valid is not None and clipped.dim() == 3:
            clipped = clipped & valid[..., None]
        entry = self.counts[path]
        entry.clipped = entry.clipped + clipped.sum()

    def record_neuron(self, path: str, y: Tensor, *, spiking: bool, valid: Tensor | None) -> None:
        """Add one call of a neuron outside projections, with its output y [B, T, D] or [B, D]."""
        if spiking:
            self.record(path, y, spiking=True, out_features=0, valid=valid, cap=None)

    def summary(self) -> dict[str, Any]:
        """Shares and means.

        Returns:
            ``projections``: path -> {spiking, in_features, out_features, tokens, firing_rate (share of inputs
            that are not zero), silent, mean_count (mean |x|), at_cap (share of inputs at the cap), clipped
            (share of inputs whose count the cap cut off), never_fired (share of channels)}; ``total``:
            firing_rate, silent and mean_count weighted by the multiply-accumulates that were done,
            ``spiking_share`` (share of those whose input is spikes) and ``dense_macs`` per token of the
            model: a projection that sees a part of the tokens only (an expert, a head that is asked for the
            last token) counts with that part; ``neurons``: path ->
            {features, tokens, firing_rate, silent, mean_count, never_fired} of spiking neurons outside
            projections.
        """
        neurons: dict[str, dict[str, Any]] = {}
        projections: dict[str, dict[str, Any]] = {}
        macs = silent = mean = spiking = 0.0
        inside = [entry.tokens for path, entry in self.counts.items() if path not in self.outside]
        most = max((float(tokens) for tokens in inside), default=0.0)
        for path, entry in self.counts.items():
            tokens = float(entry.tokens)
            inputs = max(tokens * entry.in_features, 1.0)
            rate = float(entry.nonzero) / inputs
            activity = {
                "tokens": int(tokens),
                "firing_rate": rate,
                "silent": 1.0 - rate,
                "mean_count": float(entry.magnitude) / inputs,
                "never_fired": 1.0 - float(entry.fired.float().mean()),
            }
            if path in self.outside:
                neurons[path] = {"features": entry.in_features, **activity}
                continue
            projections[path] = {
                "spiking": entry.spiking,
                "in_features": entry.in_features,
                "out_features": entry.out_features,
                **activity,
                "at_cap": float(entry.at_cap) / inputs,
                "clipped": float(entry.clipped) / inputs,
            }
            weight = entry.in_features * entry.out_features * (tokens / most if most else 0.0)
            macs += weight
            silent += weight * (1.0 - rate)
            if entry.spiking:
                spiking += weight
                mean += weight * projections[path]["mean_count"]
        total = {
            "firing_rate": 1.0 - silent / macs if macs else 0.0,
            "silent": silent / macs if macs else 0.0,
            "mean_count": mean / spiking if spiking else 0.0,
            "spiking_share": spiking / macs if macs else 0.0,
            "dense_macs": macs,
        }
        return {"total": total, "projections": projections, "neurons": neurons}
