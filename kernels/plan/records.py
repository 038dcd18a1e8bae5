"""The structures of machine.h, the library that runs them, and the numbers of the ops."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ctypes import CDLL, POINTER, Structure, c_double, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from types import MappingProxyType

from spikelm.kernels.compile import load

FOLDER = Path(__file__).parent
STATISTICS = ("calls", "silent", "magnitude", "bytes")
"""Columns of the statistics of a projection, in the order of the C enumeration."""


class Record(Structure):
    """One operation on all rows of a batch."""

    _fields_ = (
        ("op", c_int32),
        ("flags", c_int32),
        ("a", c_int64 * 12),
        ("f", c_double * 6),
        ("p", c_void_p * 10),
    )


class Limit(Structure):
    """A counter in the state that must stay below a capacity."""

    _fields_ = (("field", c_int64), ("capacity", c_int64))


class Plan(Structure):
    """All records and the memory they work on."""

    _fields_ = (
        *((name, c_int64) for name in ("records", "width", "state_bytes", "slots", "vocabulary")),
        *((name, c_int64) for name in ("limits", "outputs")),
        ("record", POINTER(Record)),
        ("limit", POINTER(Limit)),
        *((name, c_void_p) for name in ("workspace", "pool", "statistics", "scratch", "seen")),
        ("step", c_int64),
        ("rows", c_void_p),
        ("observing", c_int64),
    )


@cache
def ops() -> Mapping[str, int]:
    """Name of every op -> its number."""
    names = re.findall(r"^OP\((\w+)\)", (FOLDER / "ops.def").read_text(), re.MULTILINE)
    return MappingProxyType({name: number for number, name in enumerate(names)})


def library() -> CDLL:
    """The compiled interpreter.

    Raises:
        KernelError: there is no compiler, or it fails.
    """
    found = load(FOLDER / "op.c")
    found.plan_step.argtypes = [POINTER(Plan), c_int64, c_void_p, c_void_p, c_void_p, c_int]
    found.plan_int8_scratch.argtypes = [c_void_p, c_int64, c_int]
    found.plan_step.restype = c_int
    found.plan_int8_scratch.restype = c_int64
    return found
