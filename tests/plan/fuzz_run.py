"""Random decode plans in C: ``python tests/plan/fuzz_run.py SEED PLANS``, for test_sanitizers.py.

Every plan of fuzz.py runs twice: with the builder's own places for registers, and with a place and a margin
for each. Margins of registers and of fields of the state hold a number that nobody may touch; buffers are as
large as the builder says and not a byte more, so that the address sanitizer sees what lies beyond. Both runs,
and every row alone, must give the same bits.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from fuzz import OUTPUTS, VOCABULARY, Fuzz
from torch import Tensor

from spikelm.kernels.plan import builder as builders
from spikelm.kernels.plan.builder import Field, Register
from spikelm.kernels.plan.records import Plan, library, ops

CANARY = 12345.0
MARGIN = 16  # floats, a cache line
FINE, BAD_TOKEN, BAD_SLOT, SLOT_TWICE, FULL = range(5)


class Machine:
    """A plan with its memory."""

    def __init__(self, fuzz: Fuzz, *, apart: bool = False, observing: bool = False) -> None:
        self.fuzz, self.slots = fuzz, fuzz.slots
        self.gaps: list[tuple[int, int]] = []
        tables: dict[Register, int] = {}

        def places(drafts: Sequence[Any], shared: set[Register]) -> tuple[dict[Register, int], int]:
            found, width = own(drafts, shared)
            if apart:
                width = MARGIN
                self.gaps.append((0, MARGIN))
                for register in found:
                    found[register] = width
                    end = -(-(width + register.width) // MARGIN) * MARGIN + MARGIN
                    self.gaps.append((width + register.width, end))
                    width = end
            tables.update({register: found[register] for register in shared if register in found})
            return found, width

        own = builders.place_registers
        builders.place_registers = places  # type: ignore[assignment]
        try:
            self.records, self.limits, self.width = fuzz.plan.finish()
        finally:
            builders.place_registers = own
        rows = self.slots * (2 if fuzz.plan.gathers else 1)
        self.workspace = torch.full((rows, self.width), torch.nan)
        for start, end in self.gaps:
            self.workspace[:, start:end] = CANARY
        for register, place in tables.items():
            self.workspace[:, place : place + register.width] = 0
        self.pool = torch.full((self.slots, fuzz.state_bytes), 77, dtype=torch.uint8)
        for field, first in fuzz.fields:
            for slot in range(self.slots):
                self.view(slot, field).fill_(first)
        self.margins = torch.ones(fuzz.state_bytes, dtype=torch.bool)
        for field, _ in fuzz.fields:
            size = math.prod(field.shape) * field.dtype.itemsize
            self.margins[field.offset : field.offset + size] = False
        self.statistics = torch.zeros(len(fuzz.plan.projections), 4, dtype=torch.int64)
        self.scratch = torch.zeros(max(fuzz.plan.scratch, 1), dtype=torch.uint8)
        self.seen = torch.zeros(self.slots, dtype=torch.int64)
        self.rows = torch.zeros(5, max(self.slots, 2), dtype=torch.int64)
        self.plan = Plan(
            *(len(self.records), self.width, fuzz.state_bytes, self.slots, VOCABULARY),
            *(fuzz.plan.limits, OUTPUTS, self.records, self.limits),
            *(self.workspace.data_ptr(), self.pool.data_ptr(), self.statistics.data_ptr()),
            *(self.scratch.data_ptr(), self.seen.data_ptr(), 0, self.rows.data_ptr(), observing),
        )

    def view(self, slot: int, field: Field) -> Tensor:
        size = math.prod(field.shape) * field.dtype.itemsize
        return self.pool[slot, field.offset : field.offset + size].view(field.dtype)

    def step(self, tokens: Sequence[int], slots: Sequence[int], threads: int) -> tuple[int, Tensor]:
        """The problem and the logits; nothing outside registers and fields has changed."""
        given, places = torch.tensor(tokens), torch.tensor(slots)
        logits = torch.full((len(tokens), OUTPUTS), 5.0)
        before = self.pool.clone()
        problem = library().plan_step(
            ctypes.byref(self.plan),
            len(tokens),
            *(given.data_ptr(), places.data_ptr(), logits.data_ptr(), threads),
        )
        for start, end in self.gaps:
            assert (self.workspace[:, start:end] == CANARY).all(), f"a record wrote at {start} to {end}"
        assert (self.pool[:, self.margins] == 77).all(), "a record wrote beside a field"
        idle = [slot for slot in range(self.slots) if problem != FINE or slot not in slots]
        assert torch.equal(self.pool[idle], before[idle]), "a slot changed that took no part"
        return int(problem), logits


def check(seed: int) -> set[int]:
    """Builds and runs one plan; returns the numbers of the ops in it."""
    fuzz = Fuzz(seed)
    fuzz.build()
    chosen = fuzz.random
    together, apart, alone = Machine(fuzz, observing=True), Machine(fuzz, apart=True), Machine(fuzz)
    rows = 0
    for _ in range(6):
        order = chosen.sample(range(fuzz.slots), chosen.randint(1, fuzz.slots))
        slots = [slot if chosen.random() < 0.8 else -1 for slot in order]
        tokens = [chosen.randrange(VOCABULARY) for _ in slots]
        problem, logits = together.step(tokens, slots, chosen.randint(1, fuzz.plan.threads))
        assert problem in (FINE, FULL), problem
        again, same = apart.step(tokens, slots, chosen.randint(1, fuzz.plan.threads))
        assert problem == again
        if problem == FULL:
            break
        rows += sum(slot >= 0 for slot in slots)
        assert torch.equal(logits.nan_to_num(7.0), same.nan_to_num(7.0)), "registers share a place too early"
        for row, slot in enumerate(slots):
            _, own = alone.step(tokens[row : row + 1], [slot], 1)
            assert torch.equal(own[0].nan_to_num(7.0), logits[row].nan_to_num(7.0)), (
                "a row differs in a batch"
            )
            assert slot >= 0 or not own.any()
        assert torch.equal(together.pool, apart.pool) and torch.equal(together.pool, alone.pool)
    for seen in fuzz.plan.observations:
        tokens_seen, nonzero, at_cap, clipped = seen.numbers.tolist()
        assert tokens_seen == rows, "a plan that does not observe has counted, or one that does has not"
        assert max(at_cap, clipped) <= nonzero <= rows * seen.in_features
        assert seen.fired.any() == (nonzero > 0)
    for tokens, slots, wanted in (
        ([VOCABULARY], [0], BAD_TOKEN),
        ([-1], [0], BAD_TOKEN),
        ([0], [fuzz.slots], BAD_SLOT),
        ([0, 0], [0, 0], SLOT_TWICE),
    ):
        problem, _ = together.step(tokens, slots, 1)
        assert problem in (wanted, FULL), (tokens, slots, problem)
    return {record.op for record in together.records}


def main(seed: int, plans: int) -> None:
    """Plans of consecutive seeds; all ops must have been in one of them."""
    seen: set[int] = set()
    for number in range(seed, seed + plans):
        try:
            seen |= check(number)
        except AssertionError as error:
            raise AssertionError(f"plan {number}: {error}") from error
    missing = {name for name, op in ops().items() if op not in seen}
    assert not missing, f"never run: {missing}"
    print(f"{plans} plans, {len(seen)} ops")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
