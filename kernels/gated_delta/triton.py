"""The gated delta rule in Triton as torch ops: launches and autograd.

The kernels are in triton_forward.py, triton_backward.py and triton_decode.py, how they are cut in
triton_tiles.py. The forward pass keeps nothing but its inputs; the backward pass solves the systems of the
chunks and forms the states again. Products as in gated linear attention's kernels; the systems of bfloat16
inputs are solved in TF32. The same inputs give the same bits.
"""

from typing import Any

import torch
from torch import Tensor

from spikelm.errors import KernelError
from spikelm.kernels.gated_delta.triton_backward import gradients, reverse
from spikelm.kernels.gated_delta.triton_forward import forward, inverse
from spikelm.kernels.gated_delta.triton_tiles import tiles
from spikelm.kernels.gla.triton_tiles import Tiles, levels, products
from spikelm.kernels.triton_launch import (
    Device,
    both_masks,
    bytes_of,
    compact,
    copied,
    device_of,
    listed_dtype,
    on_device,
    refused,
    whole_tiles,
    widened,
)


def check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> str | None:
    """Why these inputs are not for the Triton kernels, or None."""
    return refused("Triton kernels", k, q, v, g, beta, state)


class _Call:
    """The inputs of one call and what its launches share."""

    def __init__(
        self,
        device: Device,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float,
        reset: Tensor | None,
        valid: Tensor | None,
    ) -> None:
        self.device, self.scale = device, scale
        self.q, self.k, self.v, self.g, self.beta = (compact(x) for x in (q, k, v, g, beta))
        self.masks = (bytes_of(reset), bytes_of(valid))
        self.how = products((q, k, v))
        self.batch, self.steps, self.groups, self.key_dim = k.shape
        self.heads, self.value_dim = q.shape[2] // self.groups, v.shape[3]
        self.chunk = self.tiles("forward").chunk
        self.chunks = -(-self.steps // self.chunk)

    def tiles(self, kernel: str) -> Tiles:
        return tiles(kernel, self.device.target, self.key_dim, self.value_dim, self.how.wide)

    def room(self, *shape: int) -> Tensor:
        """Uninitialised memory in the element type of products."""
        return self.k.new_empty(*shape, dtype=self.how.dtype)

    def launch(self, kernel: Any, cut: Tiles, grid: tuple[int, ...], *arguments: Any, **more: Any) -> None:
        """Start a kernel on a grid over (blocks of V or chunks, rows and heads, ..)."""
        reset, valid = self.masks
        constants = {
            "G": self.groups,
            "K": self.key_dim,
            "V": self.value_dim,
            "N": self.heads,
            "C": self.chunk,
            "BK": cut.keys,
            "BV": cut.values,
            "HAS_RESET": reset is not None,
            "HAS_VALID": valid is not None,
            "DOT": self.how.triton,
            "PRECISION": "ieee",
            **more,
        }
        self.device.launch(kernel, grid, arguments, constants, cut.warps, cut.stages)

    def sweep(self, kernel: Any, *arguments: Any, **more: Any) -> None:
        """Start a kernel that carries the state."""
        cut = self.tiles(kernel.__name__)
        grid = (-(-self.value_dim // cut.values), self.batch * self.groups)
        self.launch(kernel, cut, grid, *arguments, self.scale, self.steps, **more)

    def solve(self) -> Tensor:
        """Inverses of the chunks' systems [B G, chunks, C, C]."""
        solved = self.room(self.batch * self.groups, self.chunks, self.chunk, self.chunk)
        self.launch(
            inverse,
            self.tiles("inverse"),
            (self.chunks, self.batch * self.groups),
            self.k,
            self.g,
            self.beta,
            *self.masks,
            solved,
            self.steps,
            LEVELS=levels(self.chunk),
            SOLVE="ieee" if self.how.wide else "tf32",
        )
        return solved

    def forward(
        self,
        start: Tensor,
        solved: Tensor,
        o: Tensor | None,
        last: Tensor | None,
        written: Tensor | None,
        states: Tensor | None,
    ) -> None:
        inputs = (self.q, self.k, self.v, self.g, self.beta, *self.masks)
        heads = self.heads if o is not None else 1  # queries are read for outputs alone
        self.sweep(forward, *inputs, start, solved, o, last, written, states, N=heads, OUTPUT=o is not None)


@torch.library.custom_op("spikelm::gated_delta_triton", mutates_args=())
def gated_delta_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] in v's dtype and state [B, G, K, V] in float32."""
    return launch_forward(device_of(q.device), q, k, v, g, beta, state, scale, reset, valid)


def launch_forward(
    device: Device,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
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
    call = _Call(device, q, k, v, g, beta, scale, reset, valid)
    last = torch.empty_like(state)
    with on_device(q):
        call.forward(state, call.solve(), o, last, None, None)
    return o, last


@gated_delta_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(*q.shape[:3], v.shape[3]), state.new_empty(state.shape, dtype=torch.float32)


@torch.library.custom_op("spikelm::gated_delta_triton_backward", mutates_args=())
def gated_delta_backward(
    grad_o: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta in their dtypes and of the incoming state in float32."""
    device = device_of(q.device)
    return launch_backward(device, grad_o, grad_last, q, k, v, g, beta, state, scale, reset, valid)


def launch_backward(
    device: Device,
    grad_o: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernels of the backward pass on a device, or on paper."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if not (q.numel() and v.numel()):
        nothing = [torch.zeros_like(x) for x in (q, k, v, g, beta)]
        return (*nothing, grad_last.clone())  # type: ignore[return-value]
    call = _Call(device, q, k, v, g, beta, scale, reset, valid)
    grad_o, grad_last = compact(grad_o), compact(grad_last)
    grad_first = torch.empty_like(grad_last)
    pairs = call.batch * call.groups
    states, slopes = (call.room(pairs, call.chunks, call.key_dim, call.value_dim) for _ in range(2))
    written, wanted = (call.room(*v.shape) for _ in range(2))
    with on_device(q):
        solved = call.solve()
        call.forward(compact(state.float()), solved, None, None, written, states)
        call.sweep(
            reverse,
            grad_o,
            call.q,
            call.k,
            call.g,
            call.beta,
            *call.masks,
            grad_last,
            solved,
            wanted,
            slopes,
            dv,
            grad_first,
        )
        cut = call.tiles("gradients")
        blocks = -(-call.key_dim // cut.keys)
        dg, dbeta = (x.new_empty(blocks, *g.shape, dtype=torch.float32) for x in (g, beta))
        call.launch(
            gradients,
            cut,
            (call.chunks, pairs, blocks),
            grad_o,
            call.q,
            call.k,
            call.v,
            call.g,
            call.beta,
            *call.masks,
            states,
            slopes,
            written,
            wanted,
            dq,
            dk,
            dg,
            dbeta,
            scale,
            call.batch,
            call.steps,
        )
    return dq, dk, dv, dg.sum(0).to(g.dtype), dbeta.sum(0).to(beta.dtype), grad_first


@gated_delta_backward.register_fake
def _(
    grad_o: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dg, dbeta, first = (x.new_empty(x.shape) for x in (q, k, v, g, beta, grad_last))
    return dq, dk, dv, dg, dbeta, first


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, reset, valid = inputs
    ctx.save_for_backward(*tensors, reset, valid)
    ctx.scale = scale


def _backward(ctx: Any, grad_o: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, reset, valid = ctx.saved_tensors
    *grads, grad_state = gated_delta_backward(grad_o, grad_last, *tensors, ctx.scale, reset, valid)
    return (*grads, grad_state.to(tensors[-1].dtype), None, None, None)


gated_delta_forward.register_autograd(_backward, setup_context=_save)


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] in v's dtype and state [B, G, K, V] in float32; shapes as in the op.

    On a GPU inputs get the widths and dtypes that configurations are listed for, see
    :func:`gated_delta_in_tiles`.

    Raises:
        KernelError: float64, or more than 256 key channels.
    """
    problem = check(q, k, v, g, beta, state)
    if problem is not None:
        raise KernelError(problem)
    run = gated_delta_in_tiles if q.device.type == "cuda" else gated_delta_forward
    o, last = run(q, k, v, g, beta, state, scale, reset, valid)
    return o, last


def gated_delta_in_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op as its configurations are listed (triton_compilations.py), for any inputs.

    q, k and v become bfloat16 or float32, the rest float32, K 64, 128 or 256, V a multiple of 64: channels
    that are added hold zeros, and leave the others as they are. In float32 there are always both masks, and
    the query heads of a key head get a copy of it and of its state each.
    """
    K, V = whole_tiles(k.shape[3], v.shape[3])
    narrow = (dtype := listed_dtype(q, k, v)) == torch.bfloat16
    copies = 1 if narrow else q.shape[2] // k.shape[2]
    o, last = gated_delta_forward(
        widened(q.to(dtype), K),
        copied(widened(k.to(dtype), K), 2, copies),
        copied(widened(v.to(dtype), V), 2, copies),
        copied(g.float(), 2, copies),
        copied(beta.float(), 2, copies),
        copied(widened(state.float(), K, V), 1, copies),
        scale,
        *((reset, valid) if narrow else both_masks(q, reset, valid)),
    )
    return o[..., : v.shape[3]].to(v.dtype), last[:, ::copies, : k.shape[3], : v.shape[3]]
