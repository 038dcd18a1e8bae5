"""What parts write their records into: the records of a plan under construction.

Registers are virtual while a plan is built. :meth:`Builder.finish` gives each a place in the workspace from
its first to its last record, so that the workspace of a model is about as wide as its widest block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from spikelm.errors import PlanError
from spikelm.kernels.int8_linear.c import describe
from spikelm.kernels.plan.observation import Observation
from spikelm.kernels.plan.records import Limit, Record, library, ops
from spikelm.kernels.plan.registers import (
    Draft,
    Field,
    Fields,
    Operand,
    Register,
    a_field,
    fields,
    number_of,
    place_registers,
)

__all__ = [
    "DECAY_INPUT",
    "INT8_SPIKES",
    "SOFT_RESET",
    "SPIKES",
    "Branch",
    "Builder",
    "Field",
    "Fields",
    "Lowered",
    "Register",
    "a_field",
    "fields",
]

INT8_SPIKES, SOFT_RESET, DECAY_INPUT = 1, 2, 4
"""Flags of neurons, as in steps_neurons.h."""
SPIKES = 1
"""Flag of a product: its inputs are whole numbers, as in steps_linear.h."""
UNARY = ("exp", "sigmoid", "silu", "logsigmoid", "softplus")
"""Functions of the op ``unary``, in the order of the C enumeration."""

T = TypeVar("T")


class Lowered(Protocol):
    """What can write itself into a plan (``spikelm.recurrence.Part``)."""

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """The part's records; returns the register of its output."""


@dataclass
class Projected:
    """A projection that reports statistics, by its place in their table."""

    path: str
    in_features: int
    out_features: int


@dataclass
class Branch:
    """Records that only some rows of the batch run.

    Attributes:
        output: register of their result, to be set inside the ``with`` block.
    """

    output: Register | None = None


@dataclass
class Builder:
    """The records of a plan under construction.

    Attributes:
        slots: the largest batch.
        threads: that a record may use.
        projections: those that report statistics, in the order of their rows.
        observations: what is counted for a meter.
        scratch: bytes that the hungriest record needs besides registers.
        kept: everything whose address stands in a record.
        refusals: what raises the error of every limit.
        gathers: whether some records run on a part of the rows, which are gathered in a second workspace.
    """

    slots: int = 1
    threads: int = 1
    projections: list[Projected] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    scratch: int = 0
    kept: list[Any] = field(default_factory=list)
    _drafts: list[Draft] = field(default_factory=list)
    refusals: list[Callable[[], None]] = field(default_factory=list)
    gathers: bool = False
    _limits: list[tuple[Field, int]] = field(default_factory=list)
    _shared: dict[Hashable, Register] = field(default_factory=dict)
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def register(self, width: int) -> Register:
        """A new register of ``width`` floats."""
        return Register(width)

    def shared(self, key: Hashable, width: int) -> Register:
        """The register of a key, the same for all parts that name it; nothing else ever stands in its place.

        It is zero at first, and keeps its contents from token to token.
        """
        return self._shared.setdefault(key, Register(width))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns, made once per key: records whose result several parts read.

        The key names the input registers, which nobody changes in place, and everything else that the result
        depends on. What a branch makes stays inside it: other rows do not have it.
        """
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])

    def bytes_register(self, size: int) -> Register:
        """A new register with room for ``size`` bytes."""
        return Register(-(-size // 4))

    def record(
        self,
        op: str,
        *operands: Operand,
        f: Sequence[float] = (),
        p: Sequence[Tensor | int | None] = (),
        flags: int = 0,
    ) -> None:
        """Append one operation.

        Args:
            op: its name in ops.def.
            operands: a[0], a[1], ...: registers, fields of the state, numbers (at most 12).
            f: constants (at most 6).
            p: float32 tensors (contiguous, on the CPU), addresses, or None for a null pointer (at most 10).
            flags: a number the step knows.

        Raises:
            PlanError: an op that does not exist, or too many operands.
        """
        if op not in ops():
            raise PlanError(f"decode plans have no op {op!r}; known: {', '.join(ops())}")
        if len(operands) > 12 or len(f) > 6 or len(p) > 10:
            raise PlanError(f"a record of {op} holds 12 operands, 6 constants and 10 pointers at most")
        pointers = [value if isinstance(value, int) else self.vector(value) for value in p]
        self._drafts.append(Draft(ops()[op], flags, list(operands), tuple(f), pointers))

    def vector(self, tensor: Tensor | None) -> int:
        """Address of a float32 tensor, which lives as long as the plan; 0 for None."""
        if tensor is None:
            return 0
        tensor = tensor.detach()
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise PlanError(
                f"decode plans hold float32 on the CPU, got {tensor.dtype} on {tensor.device.type}"
            )
        tensor = tensor.contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def keep(self, thing: T) -> T:
        """Keep an object alive as long as the plan, and return it."""
        self.kept.append(thing)
        return thing

    def limit(self, counter: Field, capacity: int, refuse: Callable[[], None]) -> None:
        """Refuse a token, before anything has changed, where a counter is not below a capacity.

        Args:
            counter: int64 field of the state.
            capacity: its bound.
            refuse: raises the error.
        """
        self._limits.append((counter, capacity))
        self.refusals.append(refuse)

    @contextmanager
    def chosen(
        self, chosen: Register, top_k: int, choice: int, x: Register, found: Register
    ) -> Iterator[Branch]:
        """Records for the rows that chose something, one of several: what the block adds sees only those.

        Args:
            chosen: ``top_k`` int32 per row.
            top_k: choices of a row, all different.
            choice: the one that runs these records.
            x: their input; they may read no other register from outside.
            found: ``top_k`` outputs; the j-th becomes the block's output where the j-th choice is this one.
        """
        self.gathers = True
        draft = Draft(ops()["expert"], 0, [], (), [])
        self._drafts.append(draft)
        first, branch = len(self._drafts), Branch()
        outside, self._made = self._made, {}
        yield branch
        self._made = outside
        if branch.output is None:
            raise PlanError("records of a choice need an output")
        records = len(self._drafts) - first
        draft.operands += [chosen, top_k, choice, x, x.width, branch.output, found, records]

    def need_scratch(self, size: int) -> None:
        """Reserve bytes that a record may use while it runs."""
        self.scratch = max(self.scratch, size)

    def int8_rows(self, weight: Tensor, scales: Tensor, group: int | None) -> int:
        """Address of ``struct packed_int8`` for int8 weights [O, D] as torch holds them."""
        if scales.dtype != torch.float32 or weight.device.type != "cpu":
            raise PlanError(
                f"decode plans need int8 weights with float32 scales on the CPU, got {scales.dtype}"
            )
        weight, scales = weight.contiguous(), scales.contiguous()
        size = max(weight.shape[1] if group is None else group, 1)
        finite = bool(scales.isfinite().all())
        outputs, inputs = weight.shape
        struct = describe(outputs, inputs, size, "rows", finite, weight.data_ptr(), scales.data_ptr())
        self.kept += [weight, scales, struct]
        return ctypes.addressof(struct)

    def int8_scratch(self, weights: int) -> int:
        """Bytes of scratch of a product with ``struct packed_int8`` at an address."""
        return int(library().plan_int8_scratch(weights, self.slots, self.threads))

    def statistics(self, path: str, in_features: int, out_features: int) -> int:
        """Row of the statistics that belongs to one projection."""
        self.projections.append(Projected(path, in_features, out_features))
        return len(self.projections) - 1

    def observe(
        self,
        observation: Observation,
        spikes: Register,
        before: tuple[Register, Register] | None = None,
        flags: int = 0,
    ) -> None:
        """Count spikes for a meter, in steps that have one.

        Args:
            observation: where the sums go.
            spikes: the values, float32, or bytes where ``flags`` has INT8_SPIKES.
            before: x and threshold of counts round(x / threshold) that the cap may have made smaller.
            flags: INT8_SPIKES or 0.
        """
        self.observations.append(observation)
        sums = (observation.numbers, observation.magnitude, observation.fired)
        self.record(
            "observe",
            *(spikes, observation.in_features, *(before or (-1, -1))),
            f=(observation.cap or 0,),
            p=[value.data_ptr() for value in sums],
            flags=flags,
        )

    def child(self, part: nn.Module, x: Register, state: Field | Fields) -> Register:
        """The records of a part inside this one, given its share of the state.

        Raises:
            PlanError: the part cannot be lowered; the message begins with its path.
        """
        lower = getattr(part, "lower", None)
        if lower is None:
            raise PlanError(f"{type(part).__name__} has no lower(), so it cannot be in a decode plan")
        if part._forward_hooks or part._forward_pre_hooks:
            raise PlanError(
                f"{getattr(part, 'path', '') or type(part).__name__} has forward hooks, which a decode plan "
                "would not call"
            )
        return cast(Lowered, part).lower(self, x, cast(Fields, state))

    projection = child

    def norm(self, norm: nn.Module, x: Register, groups: int = 1) -> Register:
        """LayerNorm or RMSNorm of x, or of each of ``groups`` equal pieces of it (heads)."""
        width = x.width // groups
        y = self.register(x.width)
        if isinstance(norm, nn.LayerNorm) and norm.normalized_shape == (width,):
            self.record("layernorm", x, y, width, groups, f=(norm.eps,), p=(norm.weight, norm.bias))
        elif isinstance(norm, nn.RMSNorm) and tuple(norm.normalized_shape) == (width,):
            eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
            self.record("rmsnorm", x, y, width, groups, f=(eps,), p=(norm.weight,))
        else:
            raise PlanError(f"decode plans have no form of the norm {norm} over {width} features")
        return y

    def add(self, x: Register, z: Register) -> Register:
        """x + z."""
        return self._binary("add", x, z)

    def multiply(self, x: Register, z: Register) -> Register:
        """x * z, element by element."""
        return self._binary("multiply", x, z)

    def gate(self, x: Register, z: Register) -> Register:
        """sigmoid(x) * z."""
        return self._binary("gate", x, z)

    def swish(self, x: Register, z: Register) -> Register:
        """silu(x) * z."""
        return self._binary("swish", x, z)

    def unary(self, function: str, x: Register) -> Register:
        """exp, sigmoid, silu, logsigmoid or softplus of x."""
        y = self.register(x.width)
        self.record("unary", x, y, x.width, UNARY.index(function))
        return y

    def relu(self, x: Register) -> Register:
        """X where it is positive, else 0."""
        y = self.register(x.width)
        self.record("relu", x, y, x.width)
        return y

    def log_gate(self, x: Register, sign: float, divisor: float) -> Register:
        """log sigmoid(sign * x) / divisor."""
        y = self.register(x.width)
        self.record("log_gate", x, y, x.width, f=(sign, divisor))
        return y

    def relu_squared(self, x: Register) -> Register:
        """relu(x)^2."""
        y = self.register(x.width)
        self.record("relu_squared", x, y, x.width)
        return y

    def scale(self, x: Register, factor: Tensor | float) -> Register:
        """x times a vector of its width, or times a number."""
        y = self.register(x.width)
        if isinstance(factor, Tensor):
            self.record("scale", x, y, x.width, p=(factor,))
        else:
            self.record("scale", x, y, x.width, f=(factor,))
        return y

    def load(self, value: Field | Fields) -> Register:
        """A float32 field of the state."""
        found = a_field(value)
        width = torch.Size(found.shape).numel()
        y = self.register(width)
        self.record("load", found, y, width)
        return y

    def store(self, x: Register, value: Field | Fields) -> None:
        """Put x into a float32 field of the state."""
        self.record("store", x, a_field(value), x.width)

    def shift(self, x: Register, last: Field | Fields, mixes: Sequence[Tensor]) -> list[Register]:
        """Token shift: lerp(last, x, mix) for every mix, at most 8 of them; then last = x."""
        mixed = [self.register(x.width) for _ in mixes]
        self.record("shift", x, a_field(last), x.width, len(mixes), *mixed, p=list(mixes))
        return mixed

    def _binary(self, op: str, x: Register, z: Register) -> Register:
        y = self.register(x.width)
        self.record(op, x, z, y, x.width)
        return y

    def finish(self) -> tuple[Any, Any, int]:
        """Arrays of the records and of the limits, and the width of a row of the workspace in floats."""
        places, width = place_registers(self._drafts, set(self._shared.values()))
        records = (Record * len(self._drafts))()
        for record, draft in zip(records, self._drafts, strict=True):
            record.op, record.flags = draft.op, draft.flags
            record.a[:] = [*(number_of(value, places) for value in draft.operands), *[0] * 12][:12]
            record.f[:] = [*draft.constants, *[0.0] * 6][:6]
            record.p[:] = [*(value or None for value in draft.pointers), *[None] * 10][:10]
        limits = (Limit * max(len(self._limits), 1))()
        for limit, (counter, capacity) in zip(limits, self._limits, strict=False):
            limit.field, limit.capacity = counter.offset, capacity
        return records, limits, width

    @property
    def limits(self) -> int:
        """How many counters are watched."""
        return len(self._limits)
