"""How the GLA kernels are cut: a plain function of kernel, architecture, width, precision and gate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

NONE, HEAD, CHANNEL = range(3)
"""Kinds of gates."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one kernel is cut: tokens of a chunk, columns of V and channels of K at a time, warps, stages."""

    chunk: int
    values: int
    keys: int
    warps: int
    stages: int


def tiles(kernel: str, target: str, key_dim: int, value_dim: int, wide: bool, gate: int) -> Tiles:
    """Configuration of a kernel.

    Columns are at most 64 at a time: then every V that is a multiple of 64 has the same tiles, and products
    of 64 rows and columns fill a warp group of Hopper.

    Args:
        kernel: forward, sweep, strong, keys or values (the last two of the backward pass).
        target: sm_80, sm_90, sm_100 or gfx942.
        key_dim: K.
        value_dim: V.
        wide: whether products are of float32.
        gate: NONE, HEAD or CHANNEL.
    """
    small = target not in ("sm_90", "sm_100")  # others hold operands of products in registers
    key_block, value_block = power_of_2(key_dim), min(power_of_2(value_dim), 64)
    if wide:
        # Full float32 products run outside the tensor cores and hold their operands in registers.
        return _wide(kernel, key_block, value_block)
    chunk = 32 if key_block > 128 or small else 64
    if kernel == "sweep":
        return Tiles(chunk=chunk, values=value_block, keys=min(key_block, 64), warps=4, stages=2)
    keys = key_block // 2 if key_block > 64 else key_block
    if kernel == "strong":
        few = chunk == 32 and target in ("sm_80", "sm_100")  # more would spill with several query heads
        values = min(value_block, 16 if few else 32)
        return Tiles(chunk=chunk, values=values, keys=16, warps=8, stages=1)
    if kernel == "keys":
        values = min(value_block, 32 if small else 64)
        keys = 16 if key_block > 128 or small else min(key_block, 32)
        return Tiles(chunk=chunk, values=values, keys=keys, warps=8, stages=1)
    if kernel == "values":
        few = keys >= 128 or (target == "sm_80" and key_block > 64 and gate == CHANNEL)
        values = min(value_block, 16 if few else 64)
        # Four of gfx942's wavefronts have twice the registers of eight.
        warps = 4 if target == "gfx942" and key_block > 64 else 8
        return Tiles(chunk=chunk, values=values, keys=keys, warps=warps, stages=1)
    area = 64 * 64 if small else 128 * 128
    values = max(16, min(value_block, area // key_block))
    warps = 8 if key_block * values > 64 * 64 or key_block > 128 else 4
    if target == "sm_100" and key_block > 128:
        values = min(values, 32)
        # With gates per head the decays of all pairs [C, C] are alive too; four warps spill nothing.
        warps = 8 if gate == CHANNEL else 4
    return Tiles(chunk=chunk, values=values, keys=keys, warps=warps, stages=1)


def _wide(kernel: str, key_block: int, value_block: int) -> Tiles:
    """Configurations for products of float32."""
    values = min(value_block, 32)
    if kernel in ("sweep", "strong", "keys"):
        keys = min(key_block, 16 if kernel == "strong" else 32)
        return Tiles(chunk=16, values=values, keys=keys, warps=8, stages=1)
    keys = key_block // 2 if key_block > 64 else key_block
    return Tiles(chunk=16, values=16 if key_block > 64 else values, keys=keys, warps=8, stages=1)


def power_of_2(n: int) -> int:
    """Smallest power of 2 that is at least n and 16, the least side of a product on tensor cores."""
    return max(16, 1 << (n - 1).bit_length())


def parts(cut: Tiles, key_dim: int) -> int:
    """Parts that the key channels are taken in."""
    return power_of_2(key_dim) // cut.keys


def levels(chunk: int) -> int:
    """Rounds of doubling from one token to a chunk."""
    return chunk.bit_length() - 1


@dataclass(frozen=True, kw_only=True)
class Products:
    """Element type of the operands of products: bfloat16, or float32 (in full, never TF32).

    Args:
        dtype: that type.
    """

    dtype: torch.dtype

    @property
    def triton(self) -> Any:
        """Triton's name of the element type."""
        return tl.bfloat16 if self.dtype == torch.bfloat16 else tl.float32

    @property
    def wide(self) -> bool:
        """Whether operands are float32."""
        return self.dtype == torch.float32

    @property
    def bound(self) -> float:
        """Largest -sum of log2 gates of a chunk that is formed as one product.

        Products hold factors of 2^bound, which float32 and bfloat16 do up to 2^126; the sums err by their
        last bit, which for exact inputs must stay near one float32 rounding.
        """
        return 8.0 if self.wide else 64.0


def products(inputs: Sequence[Tensor]) -> Products:
    """How products of these inputs are formed. The interpreter multiplies in float32 only."""
    narrow = inputs[0].device.type != "cpu" and {x.dtype for x in inputs} == {torch.bfloat16}
    return Products(dtype=torch.bfloat16 if narrow else torch.float32)


def gate_kind(g: Tensor | None, key_dim: int) -> int:
    """NONE, HEAD (one per head) or CHANNEL (one per key channel)."""
    if g is None:
        return NONE
    return CHANNEL if g.shape[-1] == key_dim and key_dim > 1 else HEAD


def decode_tiles(key_dim: int) -> tuple[int, int, int]:
    """Channels of K, columns of V, and warps of a program of a decode kernel, which holds 16 KB of state."""
    block = power_of_2(key_dim)
    return block, max(16, 4096 // block), 4
