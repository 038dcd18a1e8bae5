"""What benchmarks/gpu.py measures: inputs, our calls, peers, and the least bytes and operations of each op.

Least bytes: every input read once, every output written once, fp32 states where a recomputation needs them,
and nothing else; e is the size of an element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CHUNK = 64  # steps between the states that a recomputing backward keeps
Inputs = dict[str, Tensor]
Call = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """B sequences of T tokens; C = H * K channels; V = K."""

    B: int
    T: int
    H: int
    K: int

    @property
    def C(self) -> int:
        """Channels."""
        return self.H * self.K

    def __str__(self) -> str:
        return f"B={self.B} T={self.T} C={self.C} H={self.H} K={self.K}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape.

    Args:
        op: its name in dispatch; also the one under which a wrong configuration is reported.
        name: of the row.
        make: () -> inputs by name; those of ``leaves`` get gradients.
        call: our op on the inputs.
        bytes: least bytes of forward.
        flops: operations of forward that need the peak named ``peak``.
        backward_bytes: least bytes of backward; 0 where there is none.
        backward_flops: as ``flops``.
        peak: ``bf16`` or ``int8`` where the op is a matrix product, else None.
        leaves: inputs with gradients.
        peers: name -> the same call by others.
        compare: with the reference: ``close``, ``share`` (of spikes and counts that differ: sums of a row
            and fused products may round another way) or ``bits``.
    """

    op: str
    name: str
    make: Callable[[], Inputs]
    call: Call
    bytes: int
    flops: int = 0
    backward_bytes: int = 0
    backward_flops: int = 0
    peak: str | None = None
    leaves: tuple[str, ...] = ()
    peers: Mapping[str, Call] = field(default_factory=dict)
    compare: str = "close"


def sequences(s: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Ops over whole sequences, forward and backward."""
    from spikelm.kernels.encode import adaptive_encode, adaptive_encode_int8
    from spikelm.kernels.gated_delta import gated_delta
    from spikelm.kernels.gla import gla
    from spikelm.kernels.lif import lif
    from spikelm.kernels.planes import expand_planes
    from spikelm.kernels.shift_encode import shift_encode
    from spikelm.kernels.wkv4 import initial_state, wkv4

    e, n, nk, nt = dtype.itemsize, s.B * s.T * s.C, s.B * s.T * s.C, s.B * s.T * s.H
    states = 12 * s.B * -(-s.T // CHUNK) * s.C
    fla = flash_linear_attention()

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    def heads() -> Inputs:
        size = (s.B, s.T, s.H, s.K)
        gates = torch.nn.functional.logsigmoid(torch.randn(*size, device=device)) / 16
        return {"q": normal(*size), "k": normal(*size), "v": normal(*size), "g": gates.to(dtype)}

    def empty() -> Tensor:
        return torch.zeros(s.B, s.H, s.K, s.K, device=device)

    yield Case(
        op="lif",
        name=f"lif {s}",
        make=lambda: {"x": normal(s.B, s.T, s.C), "v0": torch.zeros(s.B, s.C, device=device)},
        call=lambda x, v0: lif(x, v0, torch.full((s.C,), 0.5, device=device))[0],
        bytes=2 * e * n,
        backward_bytes=3 * e * n,
        leaves=("x",),
        compare="share",
    )
    yield Case(
        op="wkv4",
        name=f"wkv4 {s}",
        make=lambda: {
            "w": torch.randn(s.C, device=device),
            "u": torch.randn(s.C, device=device) * 0.3,
            "k": normal(s.B, s.T, s.C),
            "v": normal(s.B, s.T, s.C),
        },
        call=lambda w, u, k, v: wkv4(w, u, k, v, initial_state(s.B, s.C, device=device))[0],
        bytes=3 * e * n + states,
        backward_bytes=5 * e * n + states,
        leaves=("w", "u", "k", "v"),
        peers={
            name: (lambda w, u, k, v, f=f: f(w, u, k, v, _fla_wkv_state(s, device))[0])
            for name, f in fla.items()
            if name == "fla.fused_recurrent_rwkv4"
        },
    )
    yield Case(
        op="encode",
        name=f"encode {s}",
        make=lambda: {"x": normal(s.B, s.T, s.C)},
        call=lambda x: adaptive_encode(x, k=2.0)[0],
        bytes=e * n + 4 * n + 4 * s.B * s.T,
        backward_bytes=3 * e * n,
        leaves=("x",),
        compare="share",
    )
    yield Case(
        op="encode",
        name=f"encode_int8 {s}",
        make=lambda: {"x": normal(s.B, s.T, s.C)},
        call=lambda x: adaptive_encode_int8(x, k=2.0)[0],
        bytes=e * n + n + 36 * s.B * s.T,
        compare="share",
    )
    yield Case(
        op="shift_encode",
        name=f"shift_encode M=3 {s}",
        make=lambda: {
            "x": normal(s.B, s.T, s.C),
            "norm": torch.rand(s.C, device=device),
            "last": torch.zeros(s.B, s.C, device=device),
            "mixes": torch.rand(3, s.C, device=device),
        },
        call=lambda x, norm, last, mixes: shift_encode(
            x, norm, torch.zeros_like(norm), 1e-5, "layernorm", last, mixes, k=2.0
        )[0],
        bytes=e * n + 3 * n + 3 * 36 * s.B * s.T,
        compare="share",
    )
    yield Case(
        op="planes",
        name=f"expand_planes planes=3 {s}",
        make=lambda: {
            "counts": torch.randint(-7, 8, (s.B, s.T, s.C), device=device).to(torch.int8),
        },
        call=lambda counts: expand_planes(counts, 3),
        bytes=n + 4 * n // 8,
        compare="bits",
    )
    yield Case(
        op="gla",
        name=f"gla {s}",
        make=heads,
        call=lambda q, k, v, g: gla(q, k, v, g, empty(), scale=s.K**-0.5)[0],
        bytes=e * 5 * nk,
        flops=nk * (4 * s.K + 4 * CHUNK),
        backward_bytes=e * 9 * nk,
        backward_flops=nk * (10 * s.K + 10 * CHUNK),
        peak="bf16",
        leaves=("q", "k", "v", "g"),
        peers={
            name: (lambda q, k, v, g, f=f: f(q, k, v, g, scale=s.K**-0.5)[0])
            for name, f in fla.items()
            if name == "fla.chunk_gla"
        },
    )
    yield Case(
        op="gated_delta",
        name=f"gated_delta {s}",
        make=lambda: _delta_inputs(heads(), device),
        call=lambda q, k, v, g, beta: gated_delta(q, k, v, g, beta, empty(), scale=s.K**-0.5)[0],
        bytes=e * (4 * nk + 2 * nt),
        flops=nk * (6 * s.K + 6 * CHUNK),
        backward_bytes=e * (7 * nk + 4 * nt),
        backward_flops=nk * (15 * s.K + 15 * CHUNK),
        peak="bf16",
        leaves=("q", "k", "v", "g", "beta"),
        peers={
            name: (lambda q, k, v, g, beta, f=f: f(q, k, v, g, beta, scale=s.K**-0.5)[0])
            for name, f in fla.items()
            if name == "fla.chunk_gated_delta_rule"
        },
    )


def _delta_inputs(found: Inputs, device: torch.device) -> Inputs:
    """Normalised keys, one gate and one write strength per head."""
    found["k"] = torch.nn.functional.normalize(found["k"].float(), dim=-1).to(found["v"].dtype)
    found["g"] = found["g"][..., 0].contiguous()
    found["beta"] = torch.rand(found["g"].shape, device=device).to(found["v"].dtype)
    return found


def decoding(s: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """One token of every sequence, states in a pool, updated in place."""
    from spikelm.kernels import gated_delta, gla, lif, wkv4

    e, slots = dtype.itemsize, torch.arange(s.B, device=device)
    state, vectors = s.B * s.C * s.K, s.B * s.C

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    def token() -> Inputs:
        size = (s.B, s.H, s.K)
        gates = torch.nn.functional.logsigmoid(torch.randn(*size, device=device)) / 16
        pool = torch.randn(s.B, s.H, s.K, s.K, device=device)
        return {
            "q": normal(*size),
            "k": normal(*size),
            "v": normal(*size),
            "g": gates.to(dtype),
            "pool": pool,
        }

    def delta() -> Inputs:
        found = _delta_inputs(token(), device)
        return found

    if hasattr(lif, "lif_decode"):
        yield Case(
            op="lif",
            name=f"lif_decode {s}",
            make=lambda: {"x": normal(s.B, s.C), "pool": torch.zeros(s.B, s.C, device=device)},
            call=lambda x, pool: lif.lif_decode(
                x,
                pool,
                slots,
                torch.full((s.C,), 0.5, device=device),
                threshold=1.0,
                v_reset=0.0,
                soft_reset=False,
                decay_input=True,
            ),
            bytes=(2 * e + 8) * vectors,
            compare="share",
        )
    if hasattr(wkv4, "wkv4_decode"):
        yield Case(
            op="wkv4",
            name=f"wkv4_decode {s}",
            make=lambda: {
                "w": -torch.rand(s.C, device=device),
                "u": torch.randn(s.C, device=device) * 0.3,
                "k": normal(s.B, s.C),
                "v": normal(s.B, s.C),
                "pool": wkv4.initial_state(s.B, s.C, device=device),
            },
            call=lambda w, u, k, v, pool: wkv4.wkv4_decode(w, u, k, v, pool, slots),
            bytes=(3 * e + 24) * vectors + 8 * s.C,
        )
    if hasattr(gla, "gla_decode"):
        yield Case(
            op="gla",
            name=f"gla_decode {s}",
            make=token,
            call=lambda q, k, v, g, pool: gla.gla_decode(q, k, v, g, pool, slots, scale=s.K**-0.5),
            bytes=8 * state + e * 5 * vectors,
        )
    if hasattr(gated_delta, "gated_delta_decode"):
        yield Case(
            op="gated_delta",
            name=f"gated_delta_decode {s}",
            make=delta,
            call=lambda q, k, v, g, beta, pool: gated_delta.gated_delta_decode(
                q, k, v, g, beta, pool, slots, scale=s.K**-0.5
            ),
            bytes=8 * state + e * 4 * vectors,
        )


def products(width: int, group: int, rows: tuple[int, ...], device: torch.device) -> Iterator[Case]:
    """Int8 products of whole batches, beside the bfloat16 product of the same size."""
    from spikelm.kernels.int8_linear import int8_linear

    scales = torch.rand(width, width // group, device=device) * 1e-2
    weight = torch.randint(-127, 128, (width, width), device=device, dtype=torch.int8)
    dense = weight.to(torch.bfloat16)
    for n in rows:
        yield Case(
            op="int8_linear",
            name=f"int8_linear N={n} D=O={width} group={group}",
            make=lambda n=n: {"counts": torch.randint(-7, 8, (n, width), device=device).to(torch.int8)},
            call=lambda counts: int8_linear(counts, weight, scales, group),
            bytes=width * width + n * width * 5 + 4 * scales.numel(),
            flops=2 * n * width * width,
            peak="int8",
            peers={"torch bf16 matmul": lambda counts: counts.to(torch.bfloat16) @ dense.t()},
            compare="bits",
        )


def events(width: int, group: int, silent: tuple[float, ...], device: torch.device) -> Iterator[Case]:
    """One token with silent channels, beside the dense bfloat16 product with the same weights."""
    from spikelm.kernels.event_linear import event_linear
    from spikelm.kernels.int8_linear import in_out, int8_linear

    scales = torch.rand(width, width // group, device=device) * 1e-2
    whole = torch.randint(-127, 128, (width, width), device=device, dtype=torch.int8)
    stored, wt = in_out(whole), torch.randn(width, width, device=device).to(torch.bfloat16)
    for share in silent:
        keep = (torch.rand(1, width, device=device) >= share).to(torch.int8)
        counts = torch.randint(1, 8, (1, width), device=device, dtype=torch.int8) * keep
        fired = int(keep.sum())
        yield Case(
            op="int8_linear",
            name=f"int8_linear in_out N=1 D=O={width} silent={share}",
            make=lambda counts=counts: {"counts": counts},
            call=lambda counts: int8_linear(counts, stored, scales, group),
            bytes=width * fired + 5 * width + 4 * scales.numel(),
            peers={"torch bf16 matmul": lambda counts: counts.to(torch.bfloat16) @ wt},
            compare="bits",
        )
        yield Case(
            op="event_linear",
            name=f"event_linear N=1 D=O={width} silent={share}",
            make=lambda counts=counts: {"x": counts.to(torch.bfloat16), "wt": wt},
            call=event_linear,
            bytes=2 * (width * fired + 2 * width),
            peers={"torch bf16 matmul": lambda x, wt: x @ wt},
        )


def flash_linear_attention() -> dict[str, Call]:
    """Its calls by name, where the package can be imported and has them."""
    found: dict[str, Call] = {}
    for module, name in (
        ("fla.ops.gla", "chunk_gla"),
        ("fla.ops.rwkv4", "fused_recurrent_rwkv4"),
        ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    ):
        try:
            found[f"fla.{name}"] = getattr(__import__(module, fromlist=[name]), name)
        except Exception:  # noqa: BLE001  (a peer that does not import is left out, whatever its reason)
            continue
    return found


def _fla_wkv_state(s: Shape, device: torch.device) -> Tensor:
    state = torch.zeros(s.B, 3, 1, s.C, device=device)
    state[:, 2] = -1e30
    return state
