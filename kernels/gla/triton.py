"""Gated linear attention in Triton as torch ops: launches and autograd.

The kernels are in triton_forward.py, triton_sweep.py, triton_strong.py, triton_backward.py, triton_values.py
and triton_decode.py; how they divide the work is written there, how they are cut in triton_tiles.py. The
forward pass keeps nothing but its inputs; the backward pass forms the states before each chunk again. Inputs
in bfloat16 are multiplied in bfloat16, others in full float32 (float16 lacks the range that gates need); states
and sums are float32 always. The same inputs give the same bits: no atomics, and the order of every sum is
fixed.
"""

from typing import Any

import torch
from torch import Tensor

from spikelm.errors import KernelError
from spikelm.kernels.gla.triton_backward import keys as backward_keys
from spikelm.kernels.gla.triton_forward import forward
from spikelm.kernels.gla.triton_strong import strong_backward, strong_forward
from spikelm.kernels.gla.triton_sweep import combine, sweep
from spikelm.kernels.gla.triton_tiles import (
    CHANNEL,
    HEAD,
    LARGEST_KEY,
    Tiles,
    gate_kind,
    levels,
    parts,
    products,
    tiles,
)
from spikelm.kernels.gla.triton_values import values as backward_values
from spikelm.kernels.triton_launch import (
    Device,
    bytes_of,
    compact,
    device_of,
    listed_dtype,
    listed_masks,
    on_device,
    whole_tiles,
    widened,
)

COMBINE_BLOCK = 1024
SHORTEST_SEGMENT = 4  # chunks; shorter ones cost more in states than they gain in programs


def segment_count(programs: int, chunks: int, processors: int) -> int:
    """Segments of a text for which there is work for every processor; 1 where there is anyway."""
    if 4 * programs >= 3 * processors:
        return 1
    return max(1, min(-(-processors // programs), chunks // SHORTEST_SEGMENT))


def check(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> str | None:
    """Why these inputs are not for the Triton kernels, or None."""
    if any(x is not None and x.dtype == torch.float64 for x in (q, k, v, g, state)):
        return "Triton kernels compute in float32 and an input is float64; use auto or torch"
    if k.shape[-1] > LARGEST_KEY:
        return f"Triton kernels hold up to {LARGEST_KEY} key channels, got {k.shape[-1]}; use auto or torch"
    return None


class _Call:
    """The inputs of one call and what its launches share."""

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
        return tiles(kernel, self.device.target, self.key_dim, self.value_dim, self.how.wide, self.gate)

    def plan(self, kernel: str) -> tuple[Tiles, int, int, int]:
        """Tiles, blocks of V, segments, chunks of each segment."""
        cut = self.tiles(kernel)
        blocks = -(-self.value_dim // cut.values)
        chunks = -(-self.steps // cut.chunk)
        segments = segment_count(self.batch * self.groups * blocks, chunks, self.device.processors)
        each = -(-chunks // segments)
        return cut, blocks, -(-chunks // each), each

    def launch(self, kernel: Any, cut: Tiles, grid: tuple[int, int, int], *arguments: Any, **more: Any) -> None:
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


@torch.library.custom_op("spikelm::gla_triton", mutates_args=())
def gla_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] in v's dtype and state [B, G, K, V] in float32."""
    return launch_forward(device_of(q.device), q, k, v, g, state, scale, reset, valid)


def launch_forward(
    device: Device,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The kernels of the forward pass on a device, or on paper."""
    o = v.new_empty(*q.shape[:3], v.shape[3])
    if o.numel() == 0:
        return o, state.to(torch.float32, copy=True)
    state = compact(state.float())
    call = _Call(device, q, k, v, g, scale, reset, valid)
    cut, blocks, segments, each = call.plan("forward")
    last = torch.empty_like(state)
    with on_device(q):
        weights, flags = call.scratch(cut)
        if flags is not None:
            call.strong(strong_forward, cut, call.q, call.k, call.g, *call.masks, weights, flags)
        starts = call.starts(call.v, call.k, state, cut.chunk, segments, each, False)
        call.launch(
            forward,
            cut,
            (blocks, call.batch * call.groups, segments),
            call.q,
            call.k,
            call.v,
            call.g,
            *call.masks,
            starts,
            weights,
            flags,
            o,
            last,
            scale,
            call.steps,
            each,
            PARTS=parts(cut, call.key_dim),
        )
    return o, last


@gla_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(*q.shape[:3], v.shape[3]), state.new_empty(state.shape, dtype=torch.float32)


@torch.library.custom_op("spikelm::gla_triton_backward", mutates_args=())
def gla_backward(
    grad_o: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g (empty without gates) and the incoming state, each in its tensor's dtype."""
    return launch_backward(
        device_of(q.device), grad_o, grad_last, q, k, v, g, state, scale, reset, valid
    )


def launch_backward(
    device: Device,
    grad_o: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernels of the backward pass on a device, or on paper."""
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    grad_first = torch.empty_like(grad_last, memory_format=torch.contiguous_format)
    no_gate = q.new_empty(0)
    if not (q.numel() and v.numel()):
        dg = no_gate if g is None else torch.zeros_like(g)
        return torch.zeros_like(q), torch.zeros_like(k), dv, dg, grad_last.clone()
    call = _Call(device, q, k, v, g, scale, reset, valid)
    grad_o, grad_last = compact(grad_o), compact(grad_last)
    cut, blocks, segments, each = call.plan("keys")
    cut_values = call.tiles("values")
    key_blocks, pairs = -(-call.key_dim // cut.keys), call.batch * call.groups
    chunks = -(-call.steps // cut.chunk)
    states = call.room(pairs, chunks, call.value_dim, call.key_dim)
    sums = [
        _sums(call.q, blocks),
        _sums(call.k, blocks),
        _sums(call.g, blocks * (key_blocks if call.gate == HEAD else 1)),
    ]
    dq, dk, dg = sums
    weights, flags = call.scratch(cut_values)
    with on_device(q):
        inputs = (grad_o, call.q, call.k, call.v, call.g, *call.masks)
        if flags is not None:
            call.strong(strong_backward, cut_values, *inputs, weights, flags, dq, dk, dg)
        first = compact(state.float())
        starts = call.starts(call.v, call.k, first, cut.chunk, segments, each, False)
        call.sweep(call.v, call.k, starts, states, None, None, cut.chunk, segments, each, False)
        grad_ends = call.starts(grad_o, call.q, grad_last, cut.chunk, segments, each, True)
        call.launch(
            backward_keys,
            cut,
            (blocks * key_blocks, pairs, segments),
            *inputs,
            states,
            grad_ends,
            flags,
            dq,
            dk,
            dg,
            grad_first,
            scale,
            call.batch,
            call.steps,
            each,
            KEY_BLOCKS=key_blocks,
            PARTS=parts(cut_values, call.key_dim),
            PART=cut_values.keys,
        )
        call.launch(
            backward_values,
            cut_values,
            (-(-call.value_dim // cut_values.values), pairs, segments),
            grad_o,
            call.q,
            call.k,
            call.g,
            *call.masks,
            grad_ends,
            weights,
            flags,
            dv,
            scale,
            call.steps,
            each,
            PARTS=parts(cut_values, call.key_dim),
        )
    dq, dk, dg = (
        part if x is None or part.shape == x.shape else part.sum(0).to(x.dtype)
        for x, part in zip((q, k, g), sums, strict=True)
    )
    return dq, dk, dv, no_gate if dg is None else dg, grad_first


def _sums(x: Tensor | None, blocks: int) -> Tensor | None:
    """Where a gradient goes: for several blocks in float32, a part for each."""
    if x is None:
        return None
    return torch.empty_like(x) if blocks == 1 else x.new_empty(blocks, *x.shape, dtype=torch.float32)


@gla_backward.register_fake
def _(
    grad_o: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg = q.new_empty(0) if g is None else g.new_empty(g.shape)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        dg,
        grad_last.new_empty(grad_last.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, g, state, scale, reset, valid = inputs
    ctx.save_for_backward(q, k, v, g, state, reset, valid)
    ctx.scale = scale


def _backward(ctx: Any, grad_o: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, g, state, reset, valid = ctx.saved_tensors
    dq, dk, dv, dg, grad_state = gla_backward(grad_o, grad_last, q, k, v, g, state, ctx.scale, reset, valid)
    return dq, dk, dv, None if g is None else dg, grad_state.to(state.dtype), None, None, None


gla_forward.register_autograd(_backward, setup_context=_save)


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] in v's dtype and state [B, G, K, V] in float32; shapes as in the op.

    On a GPU inputs get the widths and dtypes that configurations are listed for, see :func:`gla_in_tiles`.

    Raises:
        KernelError: float64, or more than 256 key channels.
    """
    problem = check(q, k, v, g, state)
    if problem is not None:
        raise KernelError(problem)
    run = gla_in_tiles if q.device.type == "cuda" else gla_forward
    o, last = run(q, k, v, g, state, scale, reset, valid)
    return o, last


def gla_in_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op as its configurations are listed (triton_compilations.py), for any inputs.

    q, k and v become bfloat16 or float32, gates float32, K 64, 128 or 256, V a multiple of 64: channels that are
    added hold zeros, and leave the others as they are. Where there is no gate it is zero for every head.
    """
    heads, K, V = q.shape[2] // k.shape[2], *whole_tiles(k.shape[3], v.shape[3])
    dtype, kind = listed_dtype(q, k, v), gate_kind(g, k.shape[3])
    g = k.new_zeros(*k.shape[:3], 1, dtype=torch.float32) if g is None else g.float()
    o, last = gla_forward(
        widened(q.to(dtype), K),
        widened(k.to(dtype), K),
        widened(v.to(dtype), V),
        widened(g, K) if kind == CHANNEL else g,
        widened(state.float(), K, V),
        scale,
        *listed_masks(q, dtype, heads, reset, valid),
    )
    return o[..., : v.shape[3]].to(v.dtype), last[..., : k.shape[3], : v.shape[3]]
