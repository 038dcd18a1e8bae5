"""Refusal of gates that are none: a decay that is NaN or grows, a rate that is no number.

The C forms tell after a call whether they met one; the plain forms ask before. What an invalid token holds
does not matter. Nothing is looked at on GPUs, where a look at the values would stop the queue, nor where
torch traces or transforms the plain forms: there NaN shows in the results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikelm.errors import GateError, KernelError
from spikelm.kernels.pointers import is_untouched

DECAY = "at most 0 (-inf closes a gate)"
FINITE = "a finite number"


def refuse_decay(op: str, name: str, decay: Tensor, valid: Tensor | None = None) -> None:
    """Refuses log decays that are NaN or above zero; minus infinity is a full reset.

    Args:
        op: what the message calls the op.
        name: what it calls the tensor.
        decay: of any shape; [B, T, ..] with ``valid``.
        valid: bool [B, T]; what stands where it is false does not matter.

    Raises:
        GateError: naming the first one and its place.
    """
    _refuse(op, name, decay, ~(decay <= 0), valid, DECAY)


def refuse_not_finite(op: str, name: str, x: Tensor, valid: Tensor | None = None) -> None:
    """Refuses numbers that are NaN or infinite; arguments and error as of :func:`refuse_decay`."""
    _refuse(op, name, x, ~x.isfinite(), valid, FINITE)


def looks(*tensors: Tensor | None) -> bool:
    """Whether a plain form may look at the values of these tensors: on a CPU and not traced."""
    return is_untouched(*tensors) and all(x is None or x.device.type == "cpu" for x in tensors)


def _refuse(op: str, name: str, x: Tensor, wrong: Tensor, valid: Tensor | None, wanted: str) -> None:
    if valid is not None:
        wrong = wrong & valid.view(*valid.shape, *[1] * (x.dim() - 2))
    if not bool(wrong.any()):
        return
    place = wrong.nonzero()[0].tolist()
    value = x[tuple(place)].item()
    raise GateError(
        f"{op} got {value:g} at {name}{place}; expected {wanted}: "
        "look for NaN in the weights and in what came in, or for a gate without its logarithm"
    )


def refuse_number(op: str, **constants: float) -> None:
    """Refuses Python numbers that are NaN or infinite.

    Raises:
        KernelError: naming the first one.
    """
    for name, value in constants.items():
        if not -torch.inf < value < torch.inf:
            raise KernelError(f"{op} got {name}={value}; expected {FINITE}")
