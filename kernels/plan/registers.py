"""Registers and fields: what records work on, and where registers stand in the workspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from spikelm.errors import PlanError

FLOATS_PER_LINE = 16
"""Registers begin at lines of the cache."""


@dataclass(frozen=True, eq=False)
class Register:
    """Float32 values of every row of the batch, ``width`` of them; may hold other bytes between two ops."""

    width: int


@dataclass(frozen=True)
class Field:
    """A tensor of the state, at a byte offset in every slot of the pool.

    Attributes:
        name: dotted path in the model's state.
        offset: bytes, a multiple of 64.
        shape: without the batch dimension.
        dtype: of its elements.
    """

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


Fields: TypeAlias = "Mapping[str, Field | Fields]"
"""A part's state as it lies in the pool: the pytree of ``init_state`` with a field for every tensor."""

Operand: TypeAlias = "Register | Field | int"


@dataclass
class Draft:
    """A record whose registers have no places yet."""

    op: int
    flags: int
    operands: list[Operand]
    constants: Sequence[float]
    pointers: list[int]


def a_field(value: Field | Fields) -> Field:
    """The field that stands at a name of a state."""
    if not isinstance(value, Field):
        raise PlanError(f"expected a tensor of the state, got the names {', '.join(value) or 'of nothing'}")
    return value


def fields(value: Field | Fields) -> Fields:
    """The state of a child that stands at a name of a state."""
    if isinstance(value, Field):
        raise PlanError(f"expected the state of a part, got the tensor {value.name}")
    return value


def number_of(value: Operand, places: Mapping[Register, int]) -> int:
    """What stands in a record for an operand, once registers have their places."""
    if isinstance(value, Register):
        return places[value]
    return value.offset if isinstance(value, Field) else int(value)


def place_registers(drafts: Sequence[Draft], shared: set[Register]) -> tuple[dict[Register, int], int]:
    """Offset of every register, and the width of the workspace: a register is free after its last record."""
    last: dict[Register, int] = {}
    for index, draft in enumerate(drafts):
        for value in draft.operands:
            if isinstance(value, Register):
                last[value] = index
    places: dict[Register, int] = {}
    busy: list[tuple[int, int, int]] = []  # start, end, last record; sorted by start
    width = FLOATS_PER_LINE
    for value in sorted(shared & last.keys(), key=lambda register: last[register]):
        size = _lines(value.width)
        places[value] = width
        busy.append((width, width + size, len(drafts)))
        width += size
    for index, draft in enumerate(drafts):
        busy = [entry for entry in busy if entry[2] >= index]
        for value in draft.operands:
            if not isinstance(value, Register) or value in places:
                continue
            size = _lines(value.width)
            start = 0
            for first, end, _ in busy:
                if first - start >= size:
                    break
                start = max(start, end)
            places[value] = start
            busy = sorted([*busy, (start, start + size, last[value])])
            width = max(width, start + size)
    # Rows a power of two apart would share the same places of the cache.
    return places, width + FLOATS_PER_LINE if width % 1024 == 0 else width


def _lines(floats: int) -> int:
    return -(-max(floats, 1) // FLOATS_PER_LINE) * FLOATS_PER_LINE
