"""wkv4 in Triton: outputs, final state and every gradient against the fp64 loop, in one piece and in chunks.

Interpreted in float32 without a GPU. Tolerances: float32 sums of up to a few hundred terms of order one,
1e-4; bfloat16 rounds y and the gradients of k and v to 8 bits, 2^-8 of their size.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from spikelm.errors import KernelError, ShapeError
from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.wkv4 import initial_state, wkv4, wkv4_decode

pytest.importorskip("triton")

NAMES = ("y", "state", "grad w", "grad u", "grad k", "grad v", "grad state")
# (B, T, C), chunks (0: chosen), masks: around the edges of groups (16 steps) and chunks
CASES = [
    ((1, 1, 1), 0, False),
    ((2, 2, 17), 1, True),
    ((1, 31, 33), 1, False),
    ((1, 67, 5), 1, True),
    ((1, 67, 5), 2, False),
    ((2, 48, 9), 3, True),
    ((1, 130, 3), 4, True),
    ((1, 130, 3), 0, False),
]


class Case(NamedTuple):
    """w, u, k, v and state, masks, and the gradients that arrive; on the CPU, in fp32."""

    inputs: tuple[Tensor, ...]
    masks: tuple[Tensor | None, Tensor | None]
    grad_y: Tensor
    grad_state: Tensor


def make_case(shape: tuple[int, int, int], masks: bool, dtype: torch.dtype, scale: float = 2.0) -> Case:
    batch, steps, channels = shape
    state = torch.randn(batch, 3, channels)
    state[:, 1] = state[:, 1].abs() + 0.5
    grad_state = torch.randn(batch, 3, channels)
    grad_state[:, 2] = 0  # max is a scale, not a variable
    k, v = (scale * torch.randn(shape)).to(dtype).float(), torch.randn(shape).to(dtype).float()
    return Case(
        inputs=(2 * torch.randn(channels) - 1, torch.randn(channels), k, v, state),
        masks=(torch.rand(batch, steps) < 0.06, torch.rand(batch, steps) < 0.75) if masks else (None, None),
        grad_y=torch.randn(shape).to(dtype).float(),
        grad_state=grad_state,
    )


def run(
    case: Case, device: torch.device, dtype: torch.dtype, memory: torch.dtype, chunks: int | None = None
) -> list[Tensor]:
    """Through the public op, or with a given number of chunks through the Triton form."""
    types = (memory, memory, dtype, dtype, memory)
    inputs = [x.to(device, d).requires_grad_() for x, d in zip(case.inputs, types, strict=True)]
    masks = [None if mask is None else mask.to(device) for mask in case.masks]
    if chunks is None:
        y, state = wkv4(*inputs, *masks)
    else:
        from spikelm.kernels.wkv4 import triton

        y, state = triton.wkv4(-torch.exp(inputs[0]), *inputs[1:], *masks, chunks)
    arriving = [case.grad_y.to(device, dtype), case.grad_state.to(device, memory)]
    grads = torch.autograd.grad([y, state], inputs, arriving)
    return [t.detach().cpu() for t in (y, state, *grads)]


def reference(case: Case) -> list[Tensor]:
    with use_backend("reference"):
        return run(case, torch.device("cpu"), torch.float64, torch.float64)


def assert_close(got: list[Tensor], expected: list[Tensor], dtype: torch.dtype, tolerance: float) -> None:
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert torch.isfinite(a).all(), name
        if name == "state":  # the scale may differ: compare the sums it stands for
            shift = torch.exp((a[:, 2].double() - b[:, 2]).clamp(-80, 80))[:, None]
            a, b = a[:, :2] * shift, b[:, :2]
        loose = tolerance
        if dtype == torch.bfloat16 and name in ("y", "grad k", "grad v"):
            assert a.dtype == dtype
            loose = 2.0**-8
        torch.testing.assert_close(
            a.double(), b, rtol=loose, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("shape", "chunks", "masks"), CASES, ids=str)
def test_equals_the_fp64_loop(
    shape: tuple[int, int, int],
    chunks: int,
    masks: bool,
    device: torch.device,
    dtype: torch.dtype,
    poisoned: None,
) -> None:
    case = make_case(shape, masks, dtype)
    assert_close(run(case, device, dtype, torch.float32, chunks), reference(case), dtype, 1e-4)


@pytest.mark.parametrize("chunks", [1, 3])
def test_large_keys_and_every_decay(chunks: int, device: torch.device, dtype: torch.dtype) -> None:
    """|k| up to 60, from nearly no decay to a complete one: finite, and as exact as the loop in float32."""
    case = make_case((1, 49, 14), chunks == 3, dtype)
    w, u, k, v, state = case.inputs
    k = (60 * torch.tanh(2 * k)).to(dtype).float()
    case = case._replace(inputs=(torch.linspace(-9, 4, 14), u, k, v, state))
    exact, got = reference(case), run(case, device, dtype, torch.float32, chunks)
    with use_backend("reference"):
        loop = run(case, torch.device("cpu"), torch.float32, torch.float32)
    for name, a, b, true in zip(NAMES, got, loop, exact, strict=True):
        assert torch.isfinite(a).all(), name
        if name == "state":
            continue
        rounding = 2.0**-8 if a.dtype == torch.bfloat16 else 0.0
        scale = true.abs().max().clamp(min=1)
        error, error_loop = (a - true).abs().max() / scale, (b - true).abs().max() / scale
        assert error < 2 * error_loop + 1e-5 + rounding, (
            f"{name}: {error:.1e}, the fp32 loop {error_loop:.1e}"
        )


@pytest.mark.gpu
@pytest.mark.parametrize("chunks", [0, 1, 7])
def test_a_long_sequence_of_many_channels(chunks: int, device: torch.device, dtype: torch.dtype) -> None:
    case = make_case((3, 1031, 515), True, dtype)
    assert_close(run(case, device, dtype, torch.float32, chunks), reference(case), dtype, 1e-3)
    case = make_case((2, 2048, 1024), False, dtype)
    assert_close(run(case, device, dtype, torch.float32, chunks), reference(case), dtype, 1e-3)


def test_chunks_fill_the_device_and_no_more() -> None:
    from spikelm.kernels.wkv4.triton import choose_chunks

    assert choose_chunks(8, 4096, 4096, 64, 132) == 1  # one program per scheduler as it is
    assert choose_chunks(1, 16384, 4096, 64, 132) == 8
    assert choose_chunks(1, 256, 64, 64, 132) == 4  # never shorter than 64 steps
    assert choose_chunks(1, 1, 1, 64, 132) == choose_chunks(0, 0, 0, 64, 132) == 1


def test_nan_at_an_invalid_token_reaches_nothing(device: torch.device) -> None:
    case = make_case((1, 20, 3), True, torch.float32)
    assert case.masks[1] is not None
    case.masks[1][:, 4] = False
    dirty = [t.clone() for t in (*case.inputs, case.grad_y)]
    for i in (2, 3, 5):
        dirty[i][:, 4] = torch.nan
    changed = case._replace(inputs=tuple(dirty[:5]), grad_y=dirty[5])
    clean, got = (run(c, device, torch.float32, torch.float32, 1) for c in (case, changed))
    for a, b in zip(clean, got, strict=True):
        assert torch.equal(a, b)


def test_any_memory_layout_and_determinism(triton_form: torch.device) -> None:
    k, v = torch.randn(2, 5, 3, 20, device=triton_form).permute(0, 2, 3, 1)
    w, u = torch.randn(2, 10, device=triton_form)[:, ::2]
    state = torch.rand(5, 3, 3, device=triton_form).transpose(0, 2)  # den is a sum of exponentials: positive
    reset = (torch.rand(20, 3, device=triton_form) < 0.2).T
    inputs = [w, u, k, v, state]
    first = wkv4(*inputs, reset)
    again = wkv4(*(x.contiguous() for x in inputs), reset.contiguous())
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_gradients_are_the_same_bits_every_time(device: torch.device) -> None:
    case = make_case((1, 17, 5), True, torch.float32)
    first, again = (run(case, device, torch.float32, torch.float32, 2) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_operators_are_registered_well(device: torch.device) -> None:
    from spikelm.kernels.wkv4.triton import wkv4_triton_forward

    case = make_case((1, 3, 2), False, torch.float32)
    decay, u, k, v, state = (x.to(device).requires_grad_() for x in case.inputs)
    valid = torch.tensor([[True, False, True]], device=device)
    decay = (-decay.detach().abs()).requires_grad_()
    torch.library.opcheck(wkv4_triton_forward, (decay, u, k, v, state, None, valid, 0, True))


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    from spikelm.kernels.wkv4 import triton

    w, u, k, v, state = (x.to(device) for x in make_case((1, 4, 3), False, torch.float32).inputs)
    k.requires_grad_()

    def layer(k: Tensor) -> Tensor:
        return triton.wkv4(-torch.exp(w), u, k, v, state, None, None)[0] * 2

    got, plain = torch.compile(layer, fullgraph=True, backend="aot_eager")(k), layer(k)
    assert torch.equal(got, plain)
    assert torch.equal(*(torch.autograd.grad(y.sum(), k)[0] for y in (got, plain)))


@pytest.mark.parametrize("slots", [torch.int32, torch.int64], ids=str)
def test_decode_updates_the_pool_in_place(
    slots: torch.dtype, device: torch.device, dtype: torch.dtype
) -> None:
    places = torch.tensor([3, -1, 0], dtype=slots)
    w, u = torch.randn(2, 5)
    k, v = (5 * torch.randn(2, 3, 5)).to(dtype)
    pool = torch.randn(4, 3, 5)
    pool[:, 1] = pool[:, 1].abs() + 0.5
    pool[0] = initial_state(1, 5)[0]
    expected, got = pool.clone(), pool.clone().to(device)
    with use_backend("reference"):
        y = wkv4_decode(w, u, k, v, expected, places)
        whole, last = wkv4(w, u, k[:1, None], v[:1, None], pool[3:])
    with use_backend("triton"):
        out = wkv4_decode(*(x.to(device) for x in (w, u, k, v)), got, places.to(device))
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-5  # a few roundings of float32
    assert out.dtype == dtype and not out[1].any()
    torch.testing.assert_close(out.cpu(), y, rtol=rounding, atol=1e-5)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y[0], whole[0, 0])
    torch.testing.assert_close(expected[3], last[0])
    assert torch.equal(got[1:3].cpu(), pool[1:3]), "slots that no row holds"


def test_decode_is_registered_well(device: torch.device) -> None:
    w, u, k, v, pool = (x.to(device) for x in make_case((2, 1, 3), False, torch.float32).inputs)
    arguments = (-w.abs(), u, k[:, 0], v[:, 0], pool, torch.tensor([1, -1], device=device))
    with use_backend("triton"):
        torch.library.opcheck(torch.ops.spikelm.wkv4_decode.default, arguments)


def test_wrong_inputs_are_refused(triton_form: torch.device) -> None:
    w, u, k, v, state = (x.to(triton_form) for x in make_case((2, 1, 3), False, torch.float32).inputs)
    with pytest.raises(KernelError, match="float32, bfloat16 and float16, not k torch.float64"):
        wkv4(w, u, k.double(), v, state)
    with pytest.raises(ShapeError, match=r"contiguous torch.float32 pool \[S, 3, 3\]"):
        wkv4_decode(w, u, k[:, 0], v[:, 0], state[:, :2], torch.tensor([0, 1]))
    with pytest.raises(ShapeError, match=r"needs u \[C\] = \[3\]"):
        wkv4_decode(w, u[:2], k[:, 0], v[:, 0], state, torch.tensor([0, 1]))
