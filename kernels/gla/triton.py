"""Gated linear attention in Triton as torch ops: launches, configurations, autograd.

The kernels are in triton_forward.py, triton_backward.py and triton_decode.py; how they divide the work is
written there. The forward pass keeps nothing but its inputs; the backward pass forms the states before each
chunk again. Inputs in bfloat16 are multiplied in bfloat16, float16 in TF32 (which holds every float16, and
the range that gates need), float32 in full float32; states and sums are float32 always. The same inputs give
the same bits: no atomics, and the order of every sum is fixed.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from spikelm.errors import KernelError
from spikelm.kernels.ahead import Compilation
from spikelm.kernels.gla.triton_backward import keys as backward_keys
from spikelm.kernels.gla.triton_backward import values as backward_values
from spikelm.kernels.gla.triton_forward import combine, forward, sweep
from spikelm.kernels.gla.triton_strong import strong_backward, strong_forward

LARGEST_KEY = 256
COMBINE_BLOCK = 1024
SHORTEST_SEGMENT = 4  # chunks; shorter ones cost more in states than they gain in programs


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one kernel is cut: tokens of a chunk, columns of V and channels of K at a time, warps, stages."""

    chunk: int
    values: int
    keys: int
    warps: int
    stages: int


def tiles(kernel: str, target: str, key_block: int, value_dim: int, wide: bool) -> Tiles:
    """Configuration of a kernel.

    Args:
        kernel: forward, sweep, strong, keys or values (the last two of the backward pass).
        target: sm_80, sm_90, sm_100, or anything else for the least shared memory (64 KB).
        key_block: K rounded up to a power of 2.
        value_dim: V.
        wide: whether products are of float32.
    """
    small = target not in ("sm_80", "sm_90", "sm_100")
    value_block = power_of_2(value_dim)
    if wide:
        # Full float32 products run outside the tensor cores and hold their operands in registers.
        return _wide(kernel, key_block, value_block)
    chunk = 32 if key_block > 128 or small else 64
    if kernel == "sweep":
        return Tiles(chunk=chunk, values=min(value_block, 64), keys=min(key_block, 64), warps=4, stages=2)
    parts = 2 if key_block > 64 else 1
    keys = key_block // parts
    if kernel == "strong":
        return Tiles(chunk=chunk, values=min(value_block, 32), keys=16, warps=8, stages=1)
    if kernel == "keys":
        values = min(value_block, 32 if small else 64 if key_block > 128 else 128)
        keys = 16 if key_block > 128 or small else min(key_block, 32)
        return Tiles(chunk=chunk, values=values, keys=keys, warps=8, stages=1)
    if kernel == "values":
        values = min(value_block, 64 if keys < 128 else 16)
        return Tiles(chunk=chunk, values=values, keys=keys, warps=8, stages=1)
    area = 64 * 64 if small else 128 * 128
    values = max(16, min(value_block, 128, area // key_block))
    warps = 8 if key_block * values > 64 * 64 or key_block > 128 else 4
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


@cache
def device_target(device: torch.device) -> tuple[str, int]:
    """Target of a device and its processors; the interpreter counts as one large GPU."""
    if device.type != "cuda":
        return "sm_90", 1
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx942", properties.multi_processor_count
    names = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    target = names.get((properties.major, properties.minor), "small")
    return target, properties.multi_processor_count


@dataclass(frozen=True, kw_only=True)
class Products:
    """Element type of the operands of products, and Triton's name for how float32 ones are multiplied."""

    dtype: torch.dtype
    precision: str

    @property
    def triton(self) -> Any:
        """Triton's name of the element type."""
        return tl.bfloat16 if self.dtype == torch.bfloat16 else tl.float32


def products(inputs: Sequence[Tensor]) -> Products:
    """How products of these inputs are formed. The interpreter multiplies in float32 only."""
    found = {x.dtype for x in inputs}
    if inputs[0].device.type != "cuda" or torch.float32 in found:
        return Products(dtype=torch.float32, precision="ieee")
    if found == {torch.bfloat16}:
        return Products(dtype=torch.bfloat16, precision="ieee")
    return Products(dtype=torch.float32, precision="tf32")


def gate_kind(g: Tensor | None, key_dim: int) -> int:
    """0: none, 1: one per head, 2: one per key channel."""
    if g is None:
        return 0
    return 2 if g.shape[-1] == key_dim and key_dim > 1 else 1


def bound(how: Products) -> float:
    """Largest -sum of log2 gates of a chunk that is formed as one product.

    Products hold factors of 2^bound, which float32 and bfloat16 do up to 2^126; the sums err by their last
    bit, which for exact inputs must stay near one float32 rounding.
    """
    return 64.0 if how.dtype == torch.bfloat16 else 8.0


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


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What every launch of one call shares."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
    scale: float
    how: Products
    target: str
    processors: int

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, T, G, n, K, V."""
        q, k, v = self.inputs[:3]
        return (*k.shape[:3], q.shape[2] // k.shape[2], k.shape[3], v.shape[3])

    @property
    def flags(self) -> dict[str, Any]:
        _, k, _, g, reset, valid = self.inputs
        return {
            "GATE": gate_kind(g, k.shape[3]),
            "HAS_RESET": reset is not None,
            "HAS_VALID": valid is not None,
            "DOT": self.how.triton,
            "PRECISION": self.how.precision,
        }

    def tiles(self, kernel: str) -> Tiles:
        _, _, _, _, key_dim, value_dim = self.sizes
        wide = self.how.dtype == torch.float32
        return tiles(kernel, self.target, power_of_2(key_dim), value_dim, wide)

    def plan(self, kernel: str) -> tuple[Tiles, int, int, int]:
        """Tiles, blocks of V, segments, chunks of each segment."""
        batch, steps, groups, _, _, value_dim = self.sizes
        cut = self.tiles(kernel)
        blocks = -(-value_dim // cut.values)
        chunks = -(-steps // cut.chunk)
        segments = segment_count(batch * groups * blocks, chunks, self.processors)
        each = -(-chunks // segments)
        return cut, blocks, -(-chunks // each), each


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    reset: Tensor | None,
    valid: Tensor | None,
) -> _Call:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    g = None if g is None else g.contiguous()
    masks = [None if x is None else x.contiguous().view(torch.uint8) for x in (reset, valid)]
    target, processors = device_target(q.device)
    return _Call(
        inputs=(q, k, v, g, *masks),
        scale=scale,
        how=products((q, k, v)),
        target=target,
        processors=processors,
    )


def parts(cut: Tiles, key_dim: int) -> int:
    """Parts that the key channels are taken in."""
    return power_of_2(key_dim) // cut.keys


def _scratch(call: _Call, cut: Tiles) -> tuple[Tensor | None, Tensor | None]:
    """Room for the weights of strong chunks (written for those alone) and for which they are."""
    batch, steps, groups, heads, key_dim, _ = call.sizes
    q, _, _, g = call.inputs[:4]
    if gate_kind(g, key_dim) < 2:
        return None, None
    shape = (batch * groups, heads, -(-steps // cut.chunk), parts(cut, key_dim))
    weights = q.new_empty(*shape, cut.chunk, cut.chunk, dtype=call.how.dtype)
    return weights, q.new_empty(shape[0], *shape[2:], dtype=torch.uint8)


def _strong(call: _Call, cut: Tiles) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and constants of the kernels for strong chunks."""
    batch, steps, groups, heads, key_dim, _ = call.sizes
    own = call.tiles("strong")
    flags = {key: x for key, x in call.flags.items() if key != "GATE"}
    constants = {
        "G": groups,
        "K": key_dim,
        "N": heads,
        "C": cut.chunk,
        "BK": cut.keys,
        "SUB": own.keys,
        "LEVELS": levels(cut.chunk),
    }
    launch = {"BOUND": bound(call.how), "num_warps": own.warps, "num_stages": own.stages}
    return (-(-steps // cut.chunk), batch * groups, parts(cut, key_dim)), constants | launch | flags


def levels(chunk: int) -> int:
    """Rounds of doubling from one token to a chunk."""
    return chunk.bit_length() - 1


def _sweep(
    call: _Call,
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
    batch, steps, groups, heads, key_dim, value_dim = call.sizes
    _, _, _, g, reset, valid = call.inputs
    cut = call.tiles("sweep")
    key_blocks = -(-key_dim // cut.keys)
    grid = (key_blocks * -(-value_dim // cut.values), batch * groups, segments)
    sweep[grid](
        rows,
        keys,
        g,
        reset,
        valid,
        starts,
        states,
        ends,
        decays,
        call.scale if reverse else 1.0,
        steps,
        each,
        G=groups,
        K=key_dim,
        V=value_dim,
        N=heads if reverse else 1,
        C=chunk,
        BK=cut.keys,
        BV=cut.values,
        KEY_BLOCKS=key_blocks,
        REVERSE=reverse,
        STORE=states is not None,
        END=ends is not None,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **call.flags,
    )


def _starts(
    call: _Call,
    rows: Tensor,
    keys: Tensor,
    first: Tensor,
    chunk: int,
    segments: int,
    each: int,
    reverse: bool,
) -> Tensor:
    """States before each segment [B, G, segments, K, V] (in reverse: gradients of those after it)."""
    if segments == 1:
        return first
    batch, _, groups, _, key_dim, value_dim = call.sizes
    ends = first.new_empty(batch, groups, segments, key_dim, value_dim)
    decays = first.new_ones(batch, groups, segments, key_dim)
    starts = torch.empty_like(ends)
    _sweep(call, rows, keys, None, None, ends, decays, chunk, segments, each, reverse)
    grid = (-(-key_dim * value_dim // COMBINE_BLOCK), batch * groups)
    combine[grid](
        ends, decays, first, starts, segments, K=key_dim, V=value_dim, REVERSE=reverse, BLOCK=COMBINE_BLOCK
    )
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
    state = state.float().contiguous()
    o = v.new_empty(*q.shape[:3], v.shape[3])
    if o.numel() == 0:
        return o, state.clone()
    call = _call(q, k, v, g, scale, reset, valid)
    q, k, v, g, reset, valid = call.inputs
    batch, steps, groups, heads, key_dim, value_dim = call.sizes
    cut, blocks, segments, each = call.plan("forward")
    last = torch.empty_like(state)
    with on_device(q):
        weights, flags = _scratch(call, cut)
        if flags is not None:
            launch, more = _strong(call, cut)
            strong_forward[launch](q, k, g, reset, valid, weights, flags, scale, steps, **more)
        starts = _starts(call, v, k, state, cut.chunk, segments, each, False)
        forward[(blocks, batch * groups, segments)](
            q,
            k,
            v,
            g,
            reset,
            valid,
            starts,
            weights,
            flags,
            o,
            last,
            scale,
            steps,
            each,
            G=groups,
            K=key_dim,
            V=value_dim,
            N=heads,
            C=cut.chunk,
            BK=cut.keys,
            BV=cut.values,
            PARTS=parts(cut, key_dim),
            num_warps=cut.warps,
            num_stages=cut.stages,
            **call.flags,
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
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    grad_first = torch.empty_like(grad_last, memory_format=torch.contiguous_format)
    no_gate = q.new_empty(0)
    if not (q.numel() and v.numel()):
        dg = no_gate if g is None else torch.zeros_like(g)
        return torch.zeros_like(q), torch.zeros_like(k), dv, dg, grad_last.clone()
    call = _call(q, k, v, g, scale, reset, valid)
    q, k, v, g, reset, valid = call.inputs
    grad_o, grad_last = grad_o.contiguous(), grad_last.contiguous()
    batch, steps, groups, heads, key_dim, value_dim = call.sizes
    cut, blocks, segments, each = call.plan("keys")
    cut_values = call.tiles("values")
    key_blocks = -(-key_dim // cut.keys)
    chunks = -(-steps // cut.chunk)
    states = k.new_empty(batch * groups, chunks, value_dim, key_dim, dtype=call.how.dtype)
    sums = [
        _sums(q, blocks),
        _sums(k, blocks),
        _sums(g, blocks * (key_blocks if call.flags["GATE"] == 1 else 1)),
    ]
    dq, dk, dg = sums
    weights, flags = _scratch(call, cut_values)
    both = {"G": groups, "K": key_dim, "V": value_dim, "N": heads, "C": cut.chunk, **call.flags}
    both["PARTS"] = parts(cut_values, key_dim)
    with on_device(q):
        if flags is not None:
            launch, more = _strong(call, cut_values)
            strong_backward[launch](
                grad_o,
                q,
                k,
                v,
                g,
                reset,
                valid,
                weights,
                flags,
                dq,
                dk,
                dg,
                scale,
                steps,
                V=value_dim,
                BV=call.tiles("strong").values,
                **more,
            )
        starts = _starts(call, v, k, state.float().contiguous(), cut.chunk, segments, each, False)
        _sweep(call, v, k, starts, states, None, None, cut.chunk, segments, each, False)
        grad_ends = _starts(call, grad_o, q, grad_last, cut.chunk, segments, each, True)
        backward_keys[(blocks * key_blocks, batch * groups, segments)](
            grad_o,
            q,
            k,
            v,
            g,
            reset,
            valid,
            states,
            grad_ends,
            flags,
            dq,
            dk,
            dg,
            grad_first,
            scale,
            batch,
            steps,
            each,
            BK=cut.keys,
            BV=cut.values,
            KEY_BLOCKS=key_blocks,
            PART=cut_values.keys,
            num_warps=cut.warps,
            num_stages=cut.stages,
            **both,
        )
        backward_values[(-(-value_dim // cut_values.values), batch * groups, segments)](
            grad_o,
            q,
            k,
            g,
            reset,
            valid,
            grad_ends,
            weights,
            flags,
            dv,
            scale,
            steps,
            each,
            BK=cut_values.keys,
            BV=cut_values.values,
            num_warps=cut_values.warps,
            num_stages=cut_values.stages,
            **both,
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

    Raises:
        KernelError: float64, or more than 256 key channels.
    """
    problem = check(q, k, v, g, state)
    if problem is not None:
        raise KernelError(problem)
    o, last = gla_forward(q, k, v, g, state, scale, reset, valid)
    return o, last


_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_SHIPPED = ((64, 64), (128, 128), (256, 256))


def compilations(target: str) -> list[Compilation]:
    """Every shipped configuration: K and V, bfloat16 and float32, kinds of gates, with and without masks."""
    found = []
    for key_dim, value_dim in _SHIPPED:
        for dtype in (torch.bfloat16, torch.float32):
            for gate in (0, 1, 2):
                found += _compilations(target, key_dim, value_dim, dtype, gate)
    ends = {"ends": "*fp32", "decays": "*fp32", "first": "*fp32", "starts": "*fp32"}
    found.append(
        Compilation(
            kernel=combine,
            name="gla_combine",
            signature={**ends, "segments": "i32"},
            constants={"K": 128, "V": 128, "REVERSE": False, "BLOCK": COMBINE_BLOCK},
        )
    )
    return found


def _compilations(
    target: str, key_dim: int, value_dim: int, dtype: torch.dtype, gate: int
) -> list[Compilation]:
    wide = dtype == torch.float32
    x = _POINTERS[dtype]
    masks = gate == 2  # the kernels with masks take the most
    label = f"[K={key_dim},V={value_dim},{x[1:]},{('no gate', 'head gates', 'channel gates')[gate]}]"
    integers = dict.fromkeys(("T", "chunks"), "i32")
    absent = {"g": None} if gate == 0 else {}
    inputs = dict.fromkeys(("q", "k", "v", "g"), x)
    if masks:
        inputs |= {"reset": "*u8", "valid": "*u8"}
    else:
        absent |= {"reset": None, "valid": None}
    how = {
        "GATE": gate,
        "HAS_RESET": masks,
        "HAS_VALID": masks,
        "DOT": tl.float32 if wide else tl.bfloat16,
        "PRECISION": "ieee",
        "BOUND": 8.0 if wide else 64.0,
    }
    both = {"G": 32, "K": key_dim, "V": value_dim, "N": 1} | how
    found = []

    def add(kernel: Any, name: str, cut: Tiles, signature: dict[str, str], constants: dict[str, Any]) -> None:
        constants = {k: x for k, x in (constants | absent).items() if k in kernel.arg_names}
        signature = {k: x for k, x in signature.items() if k in kernel.arg_names and k not in constants}
        found.append(
            Compilation(
                kernel=kernel,
                name=f"gla_{name}{label}",
                signature=signature,
                constants=constants,
                num_warps=cut.warps,
                num_stages=cut.stages,
            )
        )

    def cut_of(name: str) -> Tiles:
        return tiles(name, target, power_of_2(key_dim), value_dim, wide)

    if gate == 0:
        absent["dg"] = None
    if gate < 2:
        absent |= {"weights": None, "flags": None}
    part = x if value_dim <= cut_of("keys").values else "*fp32"
    floats = dict.fromkeys(("starts", "last", "grad_ends", "grad_first"), "*fp32")
    given = inputs | integers | floats | {"scale": "fp32", "B": "i32", "weights": x, "flags": "*u8"}
    given |= {"o": x, "grad_o": x, "states": x, "dq": part, "dk": part, "dv": x, "dg": part}
    for name, kernel in (("forward", forward), ("keys", backward_keys), ("values", backward_values)):
        cut = cut_of(name)
        sizes = {"C": cut.chunk, "BK": cut.keys, "BV": cut.values, "PARTS": parts(cut_of("values"), key_dim)}
        sizes |= {"KEY_BLOCKS": -(-key_dim // cut.keys), "PART": cut_of("values").keys}
        add(kernel, name, cut, given, both | sizes)
        if gate == 2 and name != "keys":
            kernel = strong_forward if name == "forward" else strong_backward
            own = cut_of("strong")
            sizes |= {"LEVELS": levels(cut.chunk), "BV": own.values, "BK": cut.keys, "SUB": own.keys}
            add(kernel, kernel.__name__, own, given, both | sizes)
    chunk, cut = cut.chunk, cut_of("sweep")
    sizes = {"C": chunk, "BK": cut.keys, "BV": cut.values, "KEY_BLOCKS": -(-key_dim // cut.keys)}
    given |= {"rows": x, "keys": x, "ends": "*fp32", "decays": "*fp32"}
    for reverse in (False, True):
        flags = {"REVERSE": reverse, "STORE": not reverse, "END": reverse}
        flags |= {"starts": None, "states": None} if reverse else {"ends": None, "decays": None}
        add(sweep, "sweep_reverse" if reverse else "sweep", cut, given, both | flags | sizes)
    return found
