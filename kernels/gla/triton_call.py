"""One call of gated linear attention in Triton: its inputs, and how its kernels are started."""

from typing import Any

import torch
from torch import Tensor

from spikelm.kernels.gla.triton_sweep import combine, sweep
from spikelm.kernels.gla.triton_tiles import CHANNEL, Tiles, gate_kind, levels, parts, products, tiles
from spikelm.kernels.triton_launch import Device, bytes_of, compact

COMBINE_BLOCK = 1024
SHORTEST_SEGMENT = 4  # chunks; shorter ones cost more in states than they gain in programs


def segment_count(programs: int, chunks: int, processors: int) -> int:
    """Segments of a text for which there is work for every processor; 1 where there is anyway."""
    if 4 * programs >= 3 * processors:
        return 1
    return max(1, min(-(-processors // programs), chunks // SHORTEST_SEGMENT))


class Call:
    """The inputs of one call and what its launches share; arguments as in :func:`launch_forward`."""

    def __init__(
        self,
        device: Device,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        scale: float,
        reset: Tensor | None,
        valid: Tensor | None,
    ) -> None:
        self.device, self.scale = device, scale
        self.q, self.k, self.v = (compact(x) for x in (q, k, v))
        self.g = None if g is None else compact(g)
        self.masks = (bytes_of(reset), bytes_of(valid))
        self.how = products((q, k, v))
        self.batch, self.steps, self.groups, self.key_dim = k.shape
        self.heads, self.value_dim = q.shape[2] // self.groups, v.shape[3]
        self.gate = gate_kind(g, self.key_dim)

    def tiles(self, kernel: str) -> Tiles:
        """How a kernel is cut."""
        return tiles(kernel, self.device.target, self.key_dim, self.value_dim, self.how.wide, self.gate)

    def plan(self, kernel: str) -> tuple[Tiles, int, int, int]:
        """Tiles, blocks of V, segments, chunks of each segment."""
        cut = self.tiles(kernel)
        blocks = -(-self.value_dim // cut.values)
        chunks = -(-self.steps // cut.chunk)
        segments = segment_count(self.batch * self.groups * blocks, chunks, self.device.processors)
        each = -(-chunks // segments)
        return cut, blocks, -(-chunks // each), each

    def launch(
        self, kernel: Any, cut: Tiles, grid: tuple[int, int, int], *arguments: Any, **more: Any
    ) -> None:
        """Start a kernel on a grid over (blocks or chunks, rows and heads, segments or parts)."""
        reset, valid = self.masks
        constants = {
            "G": self.groups,
            "K": self.key_dim,
            "V": self.value_dim,
            "N": self.heads,
            "C": cut.chunk,
            "BK": cut.keys,
            "BV": cut.values,
            "GATE": self.gate,
            "HAS_RESET": reset is not None,
            "HAS_VALID": valid is not None,
            "DOT": self.how.triton,
            "PRECISION": "ieee",
            **more,
        }
        self.device.launch(kernel, grid, arguments, constants, cut.warps, cut.stages)

    def scratch(self, cut: Tiles) -> tuple[Tensor | None, Tensor | None]:
        """Room for the weights of strong chunks (written for those alone) and for which they are."""
        if self.gate < CHANNEL:
            return None, None
        chunks, pieces = -(-self.steps // cut.chunk), parts(cut, self.key_dim)
        pairs = self.batch * self.groups
        weights = self.room(pairs, self.heads, chunks, pieces, cut.chunk, cut.chunk)
        return weights, self.q.new_empty(pairs, chunks, pieces, dtype=torch.uint8)

    def room(self, *shape: int) -> Tensor:
        """Uninitialised memory in the element type of products."""
        return self.q.new_empty(*shape, dtype=self.how.dtype)

    def strong(self, kernel: Any, cut: Tiles, *arguments: Any) -> None:
        """Start a kernel for strong chunks of these tiles."""
        own = self.tiles("strong")
        grid = (-(-self.steps // cut.chunk), self.batch * self.groups, parts(cut, self.key_dim))
        sides = {"C": cut.chunk, "BK": cut.keys, "SUB": own.keys, "LEVELS": levels(cut.chunk)}
        self.launch(kernel, own, grid, *arguments, self.scale, self.steps, BOUND=self.how.bound, **sides)

    def sweep(
        self,
        rows: Tensor,
        keys: Tensor,
        starts: Tensor | None,
        states: Tensor | None,
        ends: Tensor | None,
        decays: Tensor | None,
        chunk: int,
        segments: int,
        each: int,
        reverse: bool,
    ) -> None:
        """States from ``rows`` and ``keys``: where to is told by what is not None, see the kernel."""
        cut = self.tiles("sweep")
        key_blocks = -(-self.key_dim // cut.keys)
        self.launch(
            sweep,
            cut,
            (key_blocks * -(-self.value_dim // cut.values), self.batch * self.groups, segments),
            rows,
            keys,
            self.g,
            *self.masks,
            starts,
            states,
            ends,
            decays,
            self.scale if reverse else 1.0,
            self.steps,
            each,
            N=self.heads if reverse else 1,
            C=chunk,
            KEY_BLOCKS=key_blocks,
            REVERSE=reverse,
            STORE=states is not None,
            END=ends is not None,
        )

    def starts(
        self, rows: Tensor, keys: Tensor, first: Tensor, chunk: int, segments: int, each: int, reverse: bool
    ) -> Tensor:
        """States before each segment [B, G, segments, K, V] (in reverse: gradients of those after it)."""
        if segments == 1:
            return first
        ends = first.new_empty(self.batch, self.groups, segments, self.key_dim, self.value_dim)
        decays = first.new_ones(self.batch, self.groups, segments, self.key_dim)
        starts = torch.empty_like(ends)
        self.sweep(rows, keys, None, None, ends, decays, chunk, segments, each, reverse)
        grid = (-(-self.key_dim * self.value_dim // COMBINE_BLOCK), self.batch * self.groups)
        sizes = {"K": self.key_dim, "V": self.value_dim, "REVERSE": reverse, "BLOCK": COMBINE_BLOCK}
        self.device.launch(combine, grid, (ends, decays, first, starts, segments), sizes, 4, 1)
        return starts
