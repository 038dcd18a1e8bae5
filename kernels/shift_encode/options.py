"""Constants of a fused norm, token shift and encode, handed from the public op to its forms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

NORMS = ("layernorm", "rmsnorm")


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm over the last dimension.

    Attributes:
        kind: layernorm or rmsnorm.
        weight: [D].
        bias: [D] or None.
        eps: added to the variance or the mean square.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float


@dataclass(frozen=True, kw_only=True)
class Options:
    """How each of the M projections encodes.

    Attributes:
        k: counts of an element of mean magnitude.
        dead_zone: edge of the dead zone in mean magnitudes.
        cap: largest |count|.
    """

    k: tuple[float, ...]
    dead_zone: tuple[float, ...]
    cap: tuple[int, ...]
