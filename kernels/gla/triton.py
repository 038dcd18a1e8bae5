"""Gated linear attention in Triton as torch ops: launches and autograd.

The kernels are in triton_forward.py, triton_sweep.py, triton_strong.py, triton_backward.py, triton_values.py
and triton_decode.py; how they divide the work is written there, how they are cut in triton_tiles.py. The
forward pass keeps nothing but its inputs; the backward pass forms the states before each chunk again. Inputs
in bfloat16 are multiplied in bfloat16, others in full float32 (float16 lacks the range that gates need);
states and sums are float32 always. The same inputs give the same bits: no atomics, and the order of every sum
is fixed.
"""

from typing import Any

import torch
from torch import Tensor

from spikelm.errors import KernelError
from spikelm.kernels.gla.triton_backward import keys as backward_keys
from spikelm.kernels.gla.triton_call import Call
from spikelm.kernels.gla.triton_forward import forward
from spikelm.kernels.gla.triton_strong import strong_backward, strong_forward
from spikelm.kernels.gla.triton_tiles import CHANNEL, HEAD, gate_kind, parts
from spikelm.kernels.gla.triton_values import values as backward_values
from spikelm.kernels.triton_launch import (
    Device,
    both_masks,
    compact,
    copied,
    device_of,
    listed_dtype,
    on_device,
    refused,
    whole_tiles,
    widened,
)


def check(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> str | None:
    """Why these inputs are not for the Triton kernels, or None."""
    return refused("Triton kernels", k, q, v, g, state)


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
    call = Call(device, q, k, v, g, scale, reset, valid)
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
    return launch_backward(device_of(q.device), grad_o, grad_last, q, k, v, g, state, scale, reset, valid)


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
    call = Call(device, q, k, v, g, scale, reset, valid)
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

    q, k and v become bfloat16 or float32, gates float32, K 64, 128 or 256, V a multiple of 64: channels that
    are added hold zeros, and leave the others as they are. Where there is no gate it is zero for every head.
    In float32 there are always both masks. In float32, and with gates per head, the query heads of a key head
    get a copy of it and of its state each.
    """
    heads, K, V = q.shape[2] // k.shape[2], *whole_tiles(k.shape[3], v.shape[3])
    dtype, kind = listed_dtype(q, k, v), gate_kind(g, k.shape[3])
    g = k.new_zeros(*k.shape[:3], 1, dtype=torch.float32) if g is None else g.float()
    copies = 1 if dtype == torch.bfloat16 and kind == CHANNEL else heads
    masks = (reset, valid) if dtype == torch.bfloat16 else both_masks(q, reset, valid)
    o, last = gla_forward(
        widened(q.to(dtype), K),
        copied(widened(k.to(dtype), K), 2, copies),
        copied(widened(v.to(dtype), V), 2, copies),
        copied(widened(g, K) if kind == CHANNEL else g, 2, copies),
        copied(widened(state.float(), K, V), 1, copies),
        scale,
        *masks,
    )
    return o[..., : v.shape[3]].to(v.dtype), last[:, ::copies, : k.shape[3], : v.shape[3]]
