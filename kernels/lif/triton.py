"""Leaky integrate-and-fire in Triton: launches, torch ops with gradients, and the configurations shipped.

x is read and spikes are written in x's own dtype (float32, bfloat16 or float16); membranes are float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikelm.errors import KernelError
from spikelm.kernels import triton_scan
from spikelm.kernels.ahead import Compilation
from spikelm.kernels.lif.c import SURROGATES
from spikelm.kernels.lif.neuron import Neuron
from spikelm.kernels.lif.triton_backward import lif_backward_kernel
from spikelm.kernels.lif.triton_forward import lif_decode_kernel, lif_forward_kernel
from spikelm.kernels.triton_scan import GROUP, TYPES, alignment, pack_masks

DECODE_BLOCK = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXACT = {"enable_fp_fusion": False}  # products are not contracted: membranes equal the reference's


class Config(NamedTuple):
    """Channels of a program, its warps, and groups of steps in flight, forward and backward."""

    block: int
    num_warps: int
    forward_stages: int
    backward_stages: int


def config(hip: bool, dtype: torch.dtype, align: int) -> Config:
    """Configuration for a device (ROCm or CUDA), an element type, and the alignment of rows in elements.

    One warp per program, as the most programs hide the most latency; on CUDA with 128 bytes of each row.
    Rows of an odd number of half-precision elements cannot be copied asynchronously: the registers that
    then hold the loads allow one channel per lane.
    """
    if hip:
        return Config(64, 1, 2, 2)
    if dtype != torch.float32 and align == 1:
        return Config(32, 1, 1, 1)
    return Config(32 if dtype == torch.float32 else 64, 1, 4, 3)


def lif(
    x: Tensor, v: Tensor, rate: Tensor, neuron: Neuron, reset: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Spikes [B, T, C] in x's dtype and last membrane fp32 [B, C] of x [B, T, C], v [B, C], rate [C].

    Raises:
        KernelError: a dtype or a surrogate that the Triton form lacks.
    """
    if x.dtype not in DTYPES:
        raise KernelError(
            f"lif in Triton takes float32, bfloat16 and float16, not {x.dtype}; use auto or torch"
        )
    if neuron.surrogate not in SURROGATES:
        raise KernelError(
            f"lif in Triton knows the surrogates {', '.join(SURROGATES)}, not {neuron.surrogate!r}; "
            "use the torch back-end for your own"
        )
    save = torch.is_grad_enabled() and (x.requires_grad or v.requires_grad or rate.requires_grad)
    spikes, last, _ = lif_triton_forward(
        x,
        v.float(),
        rate.float(),
        reset,
        valid,
        neuron.threshold,
        neuron.v_reset,
        neuron.soft_reset,
        neuron.decay_input,
        neuron.detach_reset,
        str(neuron.surrogate),
        neuron.alpha,
        save,
    )
    return spikes, last


@torch.library.custom_op("spikelm::lif_triton_forward", mutates_args=())
def lif_triton_forward(
    x: Tensor,
    v: Tensor,
    rate: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
    threshold: float,
    v_reset: float,
    soft_reset: bool,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes [B, T, C], last membrane [B, C], and checkpoints [B, ceil(T / GROUP), C] ([0] without save)."""
    x, v, rate = x.contiguous(), v.contiguous(), rate.contiguous()
    rows, steps, channels = x.shape
    spikes, last = torch.empty_like(x), torch.empty_like(v)
    checkpoints = v.new_empty((rows, -(-steps // GROUP), channels) if save else (0,))
    chosen = config(torch.version.hip is not None, x.dtype, alignment(channels))
    if v.numel():
        with torch.cuda.device_of(x):
            lif_forward_kernel[(-(-channels // chosen.block), rows)](
                x,
                v,
                rate,
                pack_masks(reset, valid),
                spikes,
                last,
                checkpoints if save else None,
                threshold,
                v_reset,
                steps,
                channels,
                BLOCK=chosen.block,
                GROUP=GROUP,
                STAGES=chosen.forward_stages,
                EVEN=steps % GROUP == 0,
                ALIGN=alignment(channels),
                SOFT=soft_reset,
                DECAY_INPUT=decay_input,
                num_warps=chosen.num_warps,
                **EXACT,
            )
    return spikes, last, checkpoints


@lif_triton_forward.register_fake
def _(
    x: Tensor,
    v: Tensor,
    rate: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
    threshold: float,
    v_reset: float,
    soft_reset: bool,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, steps, channels = x.shape
    shape = (rows, (steps + GROUP - 1) // GROUP, channels) if save else (0,)
    return x.new_empty(x.shape), v.new_empty(v.shape), v.new_empty(shape)


@torch.library.custom_op("spikelm::lif_triton_backward", mutates_args=())
def lif_triton_backward(
    grad_spikes: Tensor,
    grad_last: Tensor,
    x: Tensor,
    rate: Tensor,
    checkpoints: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
    threshold: float,
    v_reset: float,
    soft_reset: bool,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [B, T, C] (x's dtype), of the first membrane [B, C], and of the rate [C]."""
    grad_spikes, grad_last = grad_spikes.contiguous(), grad_last.contiguous()
    x, rate, checkpoints = x.contiguous(), rate.contiguous(), checkpoints.contiguous()
    rows, steps, channels = x.shape
    grad_x, grad_first, rate_rows = (
        torch.empty_like(x),
        *torch.empty_like(grad_last).new_empty(2, rows, channels),
    )
    chosen = config(torch.version.hip is not None, x.dtype, alignment(channels))
    if grad_first.numel():
        with torch.cuda.device_of(x):
            lif_backward_kernel[(-(-channels // chosen.block), rows)](
                grad_spikes,
                grad_last,
                x,
                rate,
                pack_masks(reset, valid),
                checkpoints,
                grad_x,
                grad_first,
                rate_rows,
                threshold,
                v_reset,
                alpha,
                steps,
                channels,
                BLOCK=chosen.block,
                GROUP=GROUP,
                STAGES=chosen.backward_stages,
                EVEN=steps % GROUP == 0,
                ALIGN=alignment(channels),
                SOFT=soft_reset,
                DECAY_INPUT=decay_input,
                DETACH=detach_reset,
                SURROGATE=SURROGATES.index(surrogate),
                num_warps=chosen.num_warps,
                **EXACT,
            )
    return grad_x, grad_first, rate_rows.sum(0)


@lif_triton_backward.register_fake
def _(
    grad_spikes: Tensor,
    grad_last: Tensor,
    x: Tensor,
    rate: Tensor,
    checkpoints: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
    threshold: float,
    v_reset: float,
    soft_reset: bool,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), grad_last.new_empty(grad_last.shape), rate.new_empty(rate.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, rate, reset, valid, *constants, save = inputs
    if not save:
        raise KernelError("lif_triton_forward was called without save, and now a gradient is asked for")
    ctx.save_for_backward(x, rate, output[2], reset, valid)
    ctx.mark_non_differentiable(output[2])
    ctx.constants = constants


def _backward(
    ctx: Any, grad_spikes: Tensor, grad_last: Tensor, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, rate, checkpoints, reset, valid = ctx.saved_tensors
    grads = lif_triton_backward(grad_spikes, grad_last, x, rate, checkpoints, reset, valid, *ctx.constants)
    return *grads, *[None] * (len(ctx.constants) + 3)


lif_triton_forward.register_autograd(_backward, setup_context=_setup)


def lif_decode(x: Tensor, pool: Tensor, slots: Tensor, rate: Tensor, neuron: Neuron) -> Tensor:
    """Spikes [B, C] of one token; updates pool fp32 [S, C] in place at the rows' slots [B]."""
    x, slots, rate = x.contiguous(), slots.contiguous(), rate.float().contiguous()
    rows, channels = x.shape
    spikes = torch.empty_like(x)
    if spikes.numel():
        with torch.cuda.device_of(x):
            lif_decode_kernel[(-(-channels // DECODE_BLOCK), rows)](
                x,
                pool,
                slots,
                rate,
                spikes,
                neuron.threshold,
                neuron.v_reset,
                channels,
                BLOCK=DECODE_BLOCK,
                SOFT=neuron.soft_reset,
                DECAY_INPUT=neuron.decay_input,
                num_warps=2,
                **EXACT,
            )
    return spikes


# Argument -> type; "x" stands for the dtype of the activations.
_FORWARD = {
    "x_ptr": "x",
    "v_ptr": "*fp32",
    "rate_ptr": "*fp32",
    "words_ptr": "*i32",
    "spikes_ptr": "x",
    "last_ptr": "*fp32",
    "checkpoints_ptr": "*fp32",
    "threshold": "fp32",
    "v_reset": "fp32",
    "steps": "i32",
    "channels": "i32",
}
_BACKWARD = {
    "grad_spikes_ptr": "x",
    "grad_last_ptr": "*fp32",
    "x_ptr": "x",
    "rate_ptr": "*fp32",
    "words_ptr": "*i32",
    "checkpoints_ptr": "*fp32",
    "grad_x_ptr": "x",
    "grad_first_ptr": "*fp32",
    "rate_rows_ptr": "*fp32",
    "threshold": "fp32",
    "v_reset": "fp32",
    "alpha": "fp32",
    "steps": "i32",
    "channels": "i32",
}
_DECODE = {
    "x_ptr": "x",
    "pool_ptr": "*fp32",
    "slots_ptr": "*i64",
    "rate_ptr": "*fp32",
    "spikes_ptr": "x",
    "threshold": "fp32",
    "v_reset": "fp32",
    "channels": "i32",
}
# (soft reset, decayed input, surrogate, masks, rows aligned to so many elements and whole groups)
_VARIANTS = (
    (False, True, 0, False, 16),
    (False, True, 0, True, 16),
    (True, False, 1, True, 16),
    (True, True, 2, False, 1),
    (False, False, 3, True, 1),
)


def compilations(target: str) -> list[Compilation]:
    """The shipped configurations: both dtypes, every branch of the neuron in one of the variants."""
    found = triton_scan.compilations()
    for dtype in (torch.float32, torch.bfloat16):
        name = TYPES[dtype]
        for soft, decay, surrogate, masked, align in _VARIANTS:
            chosen = config(target.startswith("gfx"), dtype, align)
            shared = {"BLOCK": chosen.block, "GROUP": GROUP, "ALIGN": align, "EVEN": align == 16}
            shared.update(SOFT=soft, DECAY_INPUT=decay)
            missing = {} if masked else {"words_ptr": None}
            label = f"{SURROGATES[surrogate]},{'soft' if soft else 'hard'}" + ",masks" * masked
            label += f",decay={int(decay)},align={align},{name}"
            forward = {**shared, **missing, "STAGES": chosen.forward_stages}
            backward = {**shared, **missing, "STAGES": chosen.backward_stages}
            backward.update(DETACH=surrogate == 3, SURROGATE=surrogate)
            for kernel, types, constants in (
                (lif_forward_kernel, _FORWARD, forward),
                (lif_backward_kernel, _BACKWARD, backward),
            ):
                found.append(
                    Compilation(
                        kernel=kernel,
                        name=f"{kernel.__name__.removesuffix('_kernel')}[{label}]",
                        signature=_typed(types, name, constants),
                        constants=constants,
                        num_warps=chosen.num_warps,
                        options=EXACT,
                    )
                )
        constants = {"BLOCK": DECODE_BLOCK, "SOFT": False, "DECAY_INPUT": True}
        found.append(
            Compilation(
                kernel=lif_decode_kernel,
                name=f"lif_decode[{name}]",
                signature=_typed(_DECODE, name, constants),
                constants=constants,
                num_warps=2,
                options=EXACT,
            )
        )
    return found


def _typed(types: dict[str, str], dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    return {key: f"*{dtype}" if kind == "x" else kind for key, kind in types.items() if key not in constants}
