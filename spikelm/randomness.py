"""Random numbers that depend on where they are used, not on when.

A value is a pure function of (seed, part, stream, position, channel), so a sequence processed in one piece,
in chunks or token by token draws the same numbers, and a batch row draws the same numbers in any batch.
"""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 63) - 1


def _mix(x: Tensor) -> Tensor:
    """Finaliser of a 64-bit hash on int64 tensors (wrapping multiplication, logical shifts)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & (_MASK >> (shift - 1)))) * factor
    return x ^ ((x >> 31) & (_MASK >> 30))


@dataclass(frozen=True, kw_only=True)
class CounterRandom:
    """Counter-based random source.

    Args:
        seed: seed of the run (for training: mixed with the step, so that every step differs).
        stream: int64 [B], the identity of every row, for example its global sample index.
        position: int64 [B, T] or, for a single step, [B]: position of every token in its stream.
    """

    seed: int
    stream: Tensor
    position: Tensor

    def uniform(self, part: str, channels: int) -> Tensor:
        """Uniform numbers in [0, 1), float32 [B, T, channels] (or [B, channels] for a single step)."""
        device = self.position.device
        # Every part of the key is mixed before the next is added: seeds, parts and streams share no numbers.
        key = _mix(torch.tensor(self.seed & _MASK, device=device)) + zlib.crc32(part.encode())
        stream = self.stream.to(device).view(-1, *([1] * (self.position.dim() - 1)))
        row = _mix(_mix(stream ^ _mix(key)) + self.position)
        # One hash serves two channels: 24 bits, all that a float32 in [0, 1) can show, for each.
        index = torch.arange((channels + 1) // 2, device=device, dtype=torch.int64)
        bits = _mix(row.unsqueeze(-1) * 0x2545F491 + index * 0x9E3779B1)
        pair = torch.stack([bits & 0xFFFFFF, (bits >> 40) & 0xFFFFFF], -1).to(torch.float32)
        return pair.flatten(-2)[..., :channels] * (1.0 / (1 << 24))

    def at(self, t: int) -> CounterRandom:
        """The source of the single step at column ``t``."""
        return dataclasses.replace(self, position=self.position[:, t])
