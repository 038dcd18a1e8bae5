"""One token of leaky integrate-and-fire for rows that keep their membranes in a pool of slots."""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.errors import ShapeError
from spikelm.kernels.dispatch import choose
from spikelm.kernels.gates import looks, refuse_not_finite, refuse_number
from spikelm.kernels.lif import reference
from spikelm.kernels.lif.neuron import Neuron
from spikelm.kernels.slots import check_slots


def lif_decode(
    x: Tensor,
    pool: Tensor,
    slots: Tensor,
    rate: Tensor,
    *,
    threshold: float = 1.0,
    v_reset: float = 0.0,
    soft_reset: bool = False,
    decay_input: bool = True,
) -> Tensor:
    """Spikes of one token; the membranes in the pool are updated in place. No gradient.

    Args:
        x: input current [B, C], any floating dtype.
        pool: membranes [S, C], float32 and contiguous.
        slots: int32 or int64 [B], each row's place in the pool, below S and different from the others'. A
            negative slot is a row that does nothing: its spikes are 0 and no membrane changes.
        rate: leak rate per channel [C]; this and the constants as in :func:`spikelm.kernels.lif.lif`.
        threshold: membrane at which a spike is fired.
        v_reset: resting membrane.
        soft_reset: subtract the threshold after a spike instead of returning to rest.
        decay_input: scale the input by the rate too.

    Returns:
        spikes [B, C] of 0 and 1 in x's dtype.

    Raises:
        ShapeError: shapes or dtypes that do not fit.
        GateError: on CPUs, a rate that is NaN or infinite; no membrane has changed then.
        KernelError: a threshold or v_reset that is NaN or infinite, or a back-end that was asked for and is
            not available.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ShapeError(f"lif_decode needs floating x [B, C], got {x.dtype} {list(x.shape)}")
    check_slots("lif_decode", x, pool, slots, (x.shape[1],))
    if rate.shape != x.shape[1:]:
        raise ShapeError(f"lif_decode needs rate [C] = {[x.shape[1]]}, got {list(rate.shape)}")
    refuse_number("lif_decode", threshold=threshold, v_reset=v_reset)
    spikes: Tensor = _lif_decode(x, pool, slots, rate, threshold, v_reset, soft_reset, decay_input)
    return spikes


@torch.library.custom_op("spikelm::lif_decode", mutates_args=("pool",))
def _lif_decode(
    x: Tensor,
    pool: Tensor,
    slots: Tensor,
    rate: Tensor,
    threshold: float,
    v_reset: float,
    soft_reset: bool,
    decay_input: bool,
) -> Tensor:
    neuron = Neuron(threshold=threshold, v_reset=v_reset, soft_reset=soft_reset, decay_input=decay_input)
    name = choose("lif", x.device, kernel="decode", dtype=x.dtype)
    if name == "triton" and x.dtype != torch.float64:
        from spikelm.kernels.lif import triton

        fired: Tensor = triton.lif_decode(x, pool, slots, rate, neuron)
        return fired
    if looks(rate):  # before any membrane changes
        refuse_not_finite("lif_decode", "rate", rate)
    used = slots >= 0
    places = slots[used].long()
    spikes = torch.zeros_like(x)
    fired, pool[places] = reference.step(x[used].to(pool.dtype), pool[places], rate.to(pool.dtype), neuron)
    spikes[used] = fired.to(x.dtype)
    return spikes


@_lif_decode.register_fake
def _(
    x: Tensor,
    pool: Tensor,
    slots: Tensor,
    rate: Tensor,
    threshold: float,
    v_reset: float,
    soft_reset: bool,
    decay_input: bool,
) -> Tensor:
    return torch.empty_like(x)
