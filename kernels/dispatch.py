"""The one place that chooses which back-end runs a kernel op.

Back-ends:
    reference: a loop like the paper's equation, torch, any dtype and device; slow, the specification.
    torch: the fastest form in plain torch, any device, no compiler needed.
    c: plain C for CPUs, compiled once (see compile.py).
    triton: GPU kernels; on CPU tensors only when asked for, with TRITON_INTERPRET=1 (tests).
    auto: ``c`` for CPU tensors where the op has a C form and a compiler is found, ``triton`` for CUDA (and
        ROCm) tensors where the op has a Triton form and Triton is installed, else ``torch``.

The choice is ``with use_backend("reference")`` if given, else the environment variable SPIKELM_KERNELS, else
auto. An explicit choice that is unavailable raises :class:`KernelError`; it is never silently replaced. Auto
logs its choice once per op, and warns once when the C kernels are missing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch

from spikelm.errors import KernelError, nearest
from spikelm.kernels import compile as compiler
from spikelm.kernels.triton_excluded import PROVISIONAL, why_excluded

AUTO = "auto"
BACKENDS = ("reference", "torch", "c", "triton")
ENVIRONMENT = "SPIKELM_KERNELS"

# op -> back-ends that exist for it
OPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "encode": ("reference", "torch", "c", "triton"),
        "event_linear": ("reference", "torch", "triton"),
        "gated_delta": ("reference", "torch", "c", "triton"),
        "gla": ("reference", "torch", "c", "triton"),
        "int8_linear": ("reference", "torch", "c", "triton"),
        "lif": ("reference", "torch", "c", "triton"),
        "planes": ("reference", "torch", "c", "triton"),
        "rowwise": ("reference", "torch", "c"),
        "shift_encode": ("reference", "torch", "c", "triton"),
        "wkv4": ("reference", "torch", "c", "triton"),
    }
)

_FAST: Mapping[str, str] = MappingProxyType({"cpu": "c", "cuda": "triton"})
_REASONS: Mapping[str, str] = MappingProxyType(
    {"c": "compiled for this CPU", "triton": "Triton is installed"}
)
_SPOKEN: Mapping[str, str] = MappingProxyType({"c": "C", "triton": "Triton"})

logger = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., object])
_chosen: ContextVar[str | None] = ContextVar("spikelm_kernel_backend", default=None)


def backend() -> str:
    """Name of the back-end asked for: auto, reference, torch, c or triton.

    Raises:
        KernelError: SPIKELM_KERNELS holds another name.
    """
    name: str = _backend()
    return name


def _asked_once_when_traced(function: _Function) -> _Function:
    """What ``torch.compiler.assume_constant_result`` does, which would import all of Dynamo here."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# A ContextVar cannot be traced.
@_asked_once_when_traced
def _backend() -> str:
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    return _known(os.environ.get(ENVIRONMENT) or AUTO)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op runs on this back-end (in this thread or task only).

    Args:
        name: auto, reference, torch, c or triton.

    Raises:
        KernelError: the name is unknown. An op that lacks the back-end raises when it is called.
    """
    token = _chosen.set(_known(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def choose(op: str, device: torch.device, **configuration: object) -> str:
    """Back-end that runs ``op`` on tensors of ``device``: reference, torch, c or triton.

    Args:
        op: a name of OPS.
        device: where the tensors are.
        configuration: what tells one Triton configuration of the op from another (``dtype=torch.bfloat16``
            or its name, ``K=128``); those that are known to be wrong are not run (see triton_excluded.py).

    Raises:
        KernelError: the op is unknown, or the back-end asked for is not available.
    """
    name: str = _choose(op, device, **configuration)
    return name


@_asked_once_when_traced
def _choose(op: str, device: torch.device, **configuration: object) -> str:
    if op not in OPS:
        raise KernelError(nearest("kernel op", op, OPS))
    wanted = backend()
    if wanted == AUTO:
        chosen = _automatic(op, device.type)
        if chosen == "triton" and (why := why_excluded(op, device, _named(configuration))) is not None:
            _warn_excluded(op, why)
            return "torch"
        return chosen
    problem = _problem(op, wanted, device.type)
    if problem is None and wanted == "triton":
        problem = why_excluded(op, device, _named(configuration))
    if problem is not None:
        raise KernelError(f"{op} on {device.type} cannot use the {wanted!r} back-end: {problem}")
    return wanted


def _named(configuration: Mapping[str, object]) -> dict[str, object]:
    """The configuration with dtypes by their names, as entries of triton_excluded.py have them."""
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in configuration.items()
    }


def available() -> dict[str, dict[str, bool | str]]:
    """For every op and back-end True, or the sentence that says why it is not available.

    Compiles the C kernels that are not in the cache yet.
    """
    table: dict[str, dict[str, bool | str]] = {}
    for op in OPS:
        problems = {name: _problem(op, name, "cpu" if name != "triton" else "cuda") for name in BACKENDS}
        table[op] = {name: True if problem is None else problem for name, problem in problems.items()}
    return table


@cache
def c_source(op: str) -> Path:
    """Path of an op's C file."""
    return Path(__file__).parent / op / "op.c"


def _known(name: str) -> str:
    if name != AUTO and name not in BACKENDS:
        raise KernelError(nearest("kernel back-end", name, (AUTO, *BACKENDS)))
    return name


def _automatic(op: str, device_type: str) -> str:
    fast = _FAST.get(device_type)
    if fast is None or fast not in OPS[op]:
        chosen, reason = "torch", f"no {device_type} kernel of it exists"
    elif fast == "triton" and op in PROVISIONAL:
        chosen, reason = "torch", f"its Triton form is provisional: {PROVISIONAL[op]}"
    else:
        problem = _problem(op, fast, device_type)
        if problem is not None:
            _warn_slow(fast, problem)
        chosen, reason = (fast, _REASONS[fast]) if problem is None else ("torch", problem)
    _announce(op, device_type, chosen, reason)
    return chosen


def _problem(op: str, name: str, device_type: str) -> str | None:
    """Why this back-end cannot run the op on this type of device, or None."""
    if name not in OPS[op]:
        return f"there is no {name} version of {op} yet; use auto"
    if name == "c":
        if device_type != "cpu":
            return f"C kernels run on CPU tensors, these are on {device_type}; use auto"
        try:
            compiler.load(c_source(op))
        except KernelError as error:
            return str(error)
    if name == "triton":
        return _triton_problem(device_type, os.environ.get("TRITON_INTERPRET") == "1")
    return None


@cache
def _triton_problem(device_type: str, interpreted: bool) -> str | None:
    if device_type != "cuda" and not (device_type == "cpu" and interpreted):
        return f"Triton kernels run on CUDA and ROCm tensors, these are on {device_type}; use auto"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton"
    return None


@cache
def _announce(op: str, device_type: str, chosen: str, reason: str) -> None:
    logger.info("kernel %s on %s: %s (%s)", op, device_type, chosen, reason)


@cache
def _warn_slow(fast: str, problem: str) -> None:
    logger.warning("no %s kernels, slower torch forms are used: %s", _SPOKEN[fast], problem)


@cache
def _warn_excluded(op: str, why: str) -> None:
    logger.warning("kernel %s runs in torch: its Triton form is %s", op, why)
