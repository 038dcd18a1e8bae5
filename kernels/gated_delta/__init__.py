"""The gated delta rule: a decaying matrix memory that replaces what it knows about a key.

Forms: reference.py (the equations), chunked.py (plain torch, matrix products within chunks), c.py and op.c
(CPUs). Equations and masks are written in reference.py. Sources: Yang et al. 2024 (Gated DeltaNet), https://arxiv.org/abs/2412.06464;
its parallel form, Yang et al. 2024, https://arxiv.org/abs/2406.06484. SpikingBrain 2.0,
https://arxiv.org/abs/2604.22575, builds its linear layers on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType

import torch
from torch import Tensor

from spikelm.errors import ShapeError
from spikelm.kernels.dispatch import AUTO, backend, choose
from spikelm.kernels.gated_delta import autograd, chunked, reference
from spikelm.kernels.gated_delta.decode import gated_delta_decode
from spikelm.kernels.gates import looks, refuse_decay, refuse_not_finite
from spikelm.kernels.masks import check_companions, check_masks

__all__ = ["gated_delta", "gated_delta_decode"]

_Form = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor | None, Tensor | None],
    tuple[Tensor, Tensor],
]
_FORMS: Mapping[str, _Form] = MappingProxyType(
    {"reference": reference.gated_delta, "torch": chunked.gated_delta, "c": autograd.gated_delta}
)


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule over T tokens, from a state to a state.

    Token t: S_t = exp(g_t) (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t and o_t = scale q_t S_t. Query
    head h reads key-value head h // (H / G); there is one state per key-value head. The result does not
    depend on where a sequence is split.

    Args:
        q: queries [B, T, H, K], any floating dtype; H a multiple of G.
        k: keys [B, T, G, K], normalised by the caller: the state stays bounded while beta |k|^2 <= 2.
        v: values [B, T, G, V].
        g: log decays [B, T, G], <= 0; -inf empties the state before the token writes.
        beta: write strengths [B, T, G], usually between 0 and 1 (up to 2: a reflection).
        state: S [B, G, K, V].
        scale: factor of the output, usually K^-1/2.
        reset: bool [B, T]; where true the state is emptied before the token.
        valid: bool [B, T]; where false the state stays (after a reset, if any) and o is 0.

    Returns:
        o [B, T, H, V] in v's dtype, and the state [B, G, K, V] in float32 (float64 where q, k or v is
        float64). Gradients reach q, k, v, g, beta and the incoming state, from both results.

    Raises:
        ShapeError: shapes or dtypes that do not fit.
        GateError: on CPUs, at a valid token, a decay that is NaN or above zero or a strength that is not
            finite. Not seen on GPUs, where a look at the values would stop the queue.
        KernelError: a back-end that was asked for and is not available.
    """
    _check(q, k, v, g, beta, state, reset, valid)
    name = choose(
        "gated_delta",
        k.device,
        kernel="sequence",
        dtype=str(q.dtype).removeprefix("torch."),
        K=k.shape[3],
        V=v.shape[3],
    )
    if name == "triton":
        from spikelm.kernels.gated_delta import triton

        if backend() != AUTO or triton.check(q, k, v, g, beta, state) is None:
            found: tuple[Tensor, Tensor] = triton.gated_delta(q, k, v, g, beta, state, scale, reset, valid)
            return found
        name = "torch"
    if name != "c" and looks(g, beta, valid):  # the C form sees it on its way
        refuse_decay("gated_delta", "g", g, valid)
        refuse_not_finite("gated_delta", "beta", beta, valid)
    form = _FORMS[name]
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    with _full_precision(k.device):
        o, last = form(
            q.to(dtype).unflatten(2, (k.shape[2], -1)),
            k.to(dtype),
            v.to(dtype),
            g.to(dtype),
            beta.to(dtype),
            state.to(dtype),
            scale,
            reset,
            valid,
        )
    return o.flatten(2, 3).to(v.dtype), last


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would round the operands of every product here, the state among them, to bfloat16."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> None:
    """Everything but values. Shapes are asked for once and compared number by number: slices cost most."""
    keys, queries, values = k.shape, q.shape, v.shape
    if len(keys) != 4 or not k.is_floating_point():
        raise ShapeError(f"gated_delta needs floating k [B, T, G, K], got {k.dtype} {list(k.shape)}")
    batch, steps, heads, features = keys
    fits = len(queries) == 4 and queries[0] == batch and queries[1] == steps and queries[3] == features
    if not fits or queries[2] % (heads or 1):
        raise ShapeError(
            f"gated_delta needs q [{batch}, {steps}, a multiple of {heads} heads, {features}] "
            f"for k {list(k.shape)}, got {list(q.shape)}"
        )
    if len(values) != 4 or values[0] != batch or values[1] != steps or values[2] != heads:
        raise ShapeError(f"gated_delta needs v [{batch}, {steps}, {heads}, V], got {list(v.shape)}")
    tokens = (batch, steps, heads)
    for name, x, shape in (
        ("g", g, tokens),
        ("beta", beta, tokens),
        ("state", state, (batch, heads, features, values[3])),
    ):
        if x.shape != shape:
            raise ShapeError(
                f"gated_delta needs {name} {list(shape)} for k {list(k.shape)} and v {list(v.shape)}, "
                f"got {list(x.shape)}"
            )
    check_companions("gated_delta", k, q=q, v=v, g=g, beta=beta, state=state)
    check_masks(k, reset, valid)
