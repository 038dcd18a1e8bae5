"""The gated delta rule in Triton as torch ops: launches, configurations, autograd.

The kernels are in triton_forward.py, triton_backward.py and triton_decode.py. The forward pass keeps
nothing but its inputs; the backward pass solves the systems of the chunks and forms the states again.
Products as in gated linear attention's kernels; the systems of 16-bit inputs are solved in TF32. The same
inputs give the same bits.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from spikelm.errors import KernelError
from spikelm.kernels.ahead import Compilation
from spikelm.kernels.gated_delta.triton_backward import gradients, reverse
from spikelm.kernels.gated_delta.triton_forward import forward, inverse
from spikelm.kernels.gla.triton import (
    LARGEST_KEY,
    Products,
    Tiles,
    device_target,
    levels,
    on_device,
    power_of_2,
    products,
)


def tiles(kernel: str, target: str, key_block: int, value_dim: int, wide: bool) -> Tiles:
    """Configuration of a kernel (inverse, forward, reverse or gradients); arguments as for gla's."""
    small = target not in ("sm_80", "sm_90", "sm_100")
    value_block = power_of_2(value_dim)
    # The sweeps hold whole rows of K, so that longer chunks of wide keys do not fit in registers.
    chunk = 16 if wide or key_block > 128 else 32 if small or key_block > 64 else 64
    if kernel == "inverse":
        return Tiles(chunk=chunk, values=16, keys=min(key_block, 64), warps=4, stages=1)
    if kernel == "gradients":
        return Tiles(chunk=chunk, values=min(value_block, 32), keys=min(key_block, 32), warps=8, stages=1)
    if key_block <= 64 and not wide:
        return Tiles(chunk=chunk, values=min(value_block, 32), keys=key_block, warps=4, stages=1)
    # Columns enough for the products to take their operands from shared memory, not from copies per warp.
    values = min(value_block, 16 if wide else 32 if small else 64)
    if kernel == "reverse" and key_block > 128:
        values = min(values, 32)
    return Tiles(chunk=chunk, values=values, keys=key_block, warps=8, stages=1)


def check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> str | None:
    """Why these inputs are not for the Triton kernels, or None."""
    if torch.float64 in {x.dtype for x in (q, k, v, g, beta, state)}:
        return "Triton kernels compute in float32 and an input is float64; use auto or torch"
    if k.shape[-1] > LARGEST_KEY:
        return f"Triton kernels hold up to {LARGEST_KEY} key channels, got {k.shape[-1]}; use auto or torch"
    return None


class _Call:
    """The contiguous inputs of one call and what its launches share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float,
        reset: Tensor | None,
        valid: Tensor | None,
    ) -> None:
        self.q, self.k, self.v, self.g, self.beta = (x.contiguous() for x in (q, k, v, g, beta))
        self.reset, self.valid = (
            None if x is None else x.contiguous().view(torch.uint8) for x in (reset, valid)
        )
        self.scale = scale
        self.how: Products = products((q, k, v))
        self.target, _ = device_target(q.device)
        self.batch, self.steps, self.groups, self.key_dim = k.shape
        self.heads, self.value_dim = q.shape[2] // self.groups, v.shape[3]
        self.chunk = self.tiles("forward").chunk
        self.chunks = -(-self.steps // self.chunk)

    def tiles(self, kernel: str) -> Tiles:
        wide = self.how.dtype == torch.float32
        return tiles(kernel, self.target, power_of_2(self.key_dim), self.value_dim, wide)

    def constants(self, cut: Tiles, **more: Any) -> dict[str, Any]:
        return {
            "G": self.groups,
            "K": self.key_dim,
            "C": self.chunk,
            "BK": cut.keys,
            "HAS_RESET": self.reset is not None,
            "HAS_VALID": self.valid is not None,
            "DOT": self.how.triton,
            "PRECISION": self.how.precision,
            "num_warps": cut.warps,
            "num_stages": cut.stages,
            **more,
        }

    def room(self, *shape: int) -> Tensor:
        """Uninitialised memory in the element type of products."""
        return self.k.new_empty(*shape, dtype=self.how.dtype)

    def solve(self) -> Tensor:
        """Inverses of the chunks' systems [B G, chunks, C, C]."""
        solved = self.room(self.batch * self.groups, self.chunks, self.chunk, self.chunk)
        cut = self.tiles("inverse")
        inverse[(self.chunks, self.batch * self.groups)](
            self.k,
            self.g,
            self.beta,
            self.reset,
            self.valid,
            solved,
            self.steps,
            LEVELS=levels(self.chunk),
            SOLVE=solve_precision(self.how),
            **self.constants(cut),
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
        cut = self.tiles("forward")
        forward[(-(-self.value_dim // cut.values), self.batch * self.groups)](
            self.q,
            self.k,
            self.v,
            self.g,
            self.beta,
            self.reset,
            self.valid,
            start,
            solved,
            o,
            last,
            written,
            states,
            self.scale,
            self.steps,
            OUTPUT=o is not None,
            **self.constants(cut, V=self.value_dim, N=self.heads, BV=cut.values),
        )


def solve_precision(how: Products) -> str:
    """How the systems are solved: in full float32 where products are, else in TF32."""
    exact = how.dtype == torch.float32 and how.precision == "ieee"
    return "ieee" if exact else "tf32"


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
    state = state.float().contiguous()
    o = v.new_empty(*q.shape[:3], v.shape[3])
    if o.numel() == 0:
        return o, state.clone()
    call = _Call(q, k, v, g, beta, scale, reset, valid)
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
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if not (q.numel() and v.numel()):
        nothing = [torch.zeros_like(x) for x in (q, k, v, g, beta)]
        return (*nothing, grad_last.clone())  # type: ignore[return-value]
    call = _Call(q, k, v, g, beta, scale, reset, valid)
    grad_o, grad_last = grad_o.contiguous(), grad_last.contiguous()
    grad_first = torch.empty_like(grad_last)
    states, slopes = (
        call.room(call.batch * call.groups, call.chunks, call.key_dim, call.value_dim) for _ in range(2)
    )
    written, wanted = (call.room(*v.shape) for _ in range(2))
    masks = (call.reset, call.valid)
    with on_device(q):
        solved = call.solve()
        call.forward(state.float().contiguous(), solved, None, None, written, states)
        cut = call.tiles("reverse")
        reverse[(-(-call.value_dim // cut.values), call.batch * call.groups)](
            grad_o,
            call.q,
            call.k,
            call.g,
            call.beta,
            *masks,
            grad_last,
            solved,
            wanted,
            slopes,
            dv,
            grad_first,
            scale,
            call.steps,
            **call.constants(cut, V=call.value_dim, N=call.heads, BV=cut.values),
        )
        cut = call.tiles("gradients")
        blocks = -(-call.key_dim // cut.keys)
        dg, dbeta = (x.new_empty(blocks, *g.shape, dtype=torch.float32) for x in (g, beta))
        gradients[(call.chunks, call.batch * call.groups, blocks)](
            grad_o,
            call.q,
            call.k,
            call.v,
            call.g,
            call.beta,
            *masks,
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
            **call.constants(cut, V=call.value_dim, N=call.heads, BV=cut.values),
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

    Raises:
        KernelError: float64, or more than 256 key channels.
    """
    problem = check(q, k, v, g, beta, state)
    if problem is not None:
        raise KernelError(problem)
    o, last = gated_delta_forward(q, k, v, g, beta, state, scale, reset, valid)
    return o, last


_SHIPPED = ((64, 64), (128, 128), (256, 256))


def compilations(target: str) -> list[Compilation]:
    """Every shipped configuration: K and V, bfloat16 and float32."""
    found = []
    for key_dim, value_dim in _SHIPPED:
        for dtype, x in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
            wide = dtype == torch.float32
            how = Products(dtype=dtype, precision="ieee")
            names = (
                "q",
                "k",
                "v",
                "g",
                "beta",
                "o",
                "grad_o",
                "solved",
                "written",
                "wanted",
                "states",
                "slopes",
            )
            given = dict.fromkeys((*names, "dq", "dk", "dv"), x)
            given |= dict.fromkeys(("start", "last", "grad_last", "grad_first", "dg", "dbeta"), "*fp32")
            given |= {"reset": "*u8", "valid": "*u8", "T": "i32", "B": "i32", "scale": "fp32"}
            for kernel in (inverse, forward, reverse, gradients):
                cut = tiles(kernel.__name__, target, power_of_2(key_dim), value_dim, wide)
                constants = {
                    "G": 16,
                    "K": key_dim,
                    "V": value_dim,
                    "N": 1,
                    "C": cut.chunk,
                    "BK": cut.keys,
                    "BV": cut.values,
                    "LEVELS": levels(cut.chunk),
                    "HAS_RESET": True,
                    "HAS_VALID": True,
                    "OUTPUT": True,
                    "DOT": tl.float32 if wide else tl.bfloat16,
                    "PRECISION": "ieee",
                    "SOLVE": solve_precision(how),
                    "written": None,
                    "states": None,
                }
                if kernel is gradients:
                    del constants["written"], constants["states"]
                label = f"[K={key_dim},V={value_dim},{x[1:]}]"
                found.append(
                    Compilation(
                        kernel=kernel,
                        name=f"gated_delta_{kernel.__name__}{label}",
                        signature={
                            name: kind
                            for name, kind in given.items()
                            if name in kernel.arg_names and name not in constants
                        },
                        constants={name: it for name, it in constants.items() if name in kernel.arg_names},
                        num_warps=cut.warps,
                        num_stages=cut.stages,
                    )
                )
    return found
