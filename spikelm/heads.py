"""Sizes of the heads of an attention-like mixer."""

from __future__ import annotations

from dataclasses import dataclass

from spikelm.build import Build
from spikelm.errors import ConfigError

PREFERRED = (64, 32, 16, 8, 4, 2, 1)
"""Sizes of a head that are tried, in this order, where the configuration names none."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Heads of a mixer.

    Attributes:
        num: query heads.
        kv: key and value heads, each shared by ``num // kv`` query heads.
        dim: features of a head.
    """

    num: int
    kv: int
    dim: int


def resolve_heads(
    build: Build, num_heads: int | None = None, num_kv_heads: int | None = None, head_dim: int | None = None
) -> Heads:
    """The sizes a configuration asks for, with those it leaves out.

    Args:
        build: place in the model.
        num_heads: query heads; None for hidden_size // head_dim.
        num_kv_heads: key and value heads; None for num_heads.
        head_dim: features of a head; None for hidden_size // num_heads, or, where that is not given either,
            the first of 64, 32, 16, 8, 4, 2, 1 that divides hidden_size.

    Raises:
        ConfigError: a size is not positive, or num_kv_heads does not divide num_heads.
    """
    D = build.hidden_size
    for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; expected a positive whole number")
    if head_dim is None and num_heads is not None:
        if D % num_heads:
            raise ConfigError(f"num_heads {num_heads} does not divide hidden_size {D}; give head_dim as well")
        head_dim = D // num_heads
    dim = head_dim or next(size for size in PREFERRED if D % size == 0)
    num = num_heads or max(D // dim, 1)
    kv = num_kv_heads or num
    if num % kv:
        raise ConfigError(f"num_kv_heads {kv} does not divide num_heads {num}; choose a divisor")
    return Heads(num=num, kv=kv, dim=dim)
