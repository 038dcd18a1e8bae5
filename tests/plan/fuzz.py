"""Decode plans of random records: any kind, at random sizes, in any order (run by fuzz_run.py)."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from spikelm.kernels.int8_linear.packing import LAYOUTS, PackedInt8
from spikelm.kernels.plan.builder import (
    DECAY_INPUT,
    INT8_SPIKES,
    SOFT_RESET,
    SPIKES,
    UNARY,
    Builder,
    Field,
    Register,
)
from spikelm.kernels.plan.observation import Observation

VOCABULARY, OUTPUTS = 11, 13
WIDTHS = (1, 2, 7, 8, 15, 16, 17, 33, 64, 65, 130)


class Exact:
    """Memory for packed weights that ends where they end."""

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)


class Fuzz:
    """One plan under construction: what stands in registers, and the fields of the state."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.slots = self.random.randint(1, 6)
        self.plan = Builder(slots=self.slots, threads=self.random.choice([1, 2]))
        self.fields: list[tuple[Field, float]] = []
        self.state_bytes = 64
        self.floats: list[Register] = []
        self.wild = self.random.random() < 0.2

    # --- operands -------------------------------------------------------------------------------------------

    def width(self) -> int:
        return self.random.choice(WIDTHS)

    def x(self, width: int | None = None) -> Register:
        """A register with floats, an old one or a new one."""
        width = self.width() if width is None else width
        old = [x for x in self.floats if x.width == width]
        if old and self.random.random() < 0.7:
            return self.random.choice(old)
        y = self.plan.register(width)
        self.plan.record("embed", y, width, p=(self.embeddings(width),))
        return self.made(y)

    def embeddings(self, width: int) -> Tensor:
        """Floats for every token; in some plans one of them is no number or very large."""
        found = torch.randn(VOCABULARY, width)
        if self.wild:
            place = self.random.randrange(found.numel())
            found.view(-1)[place] = self.random.choice([math.nan, math.inf, -math.inf, 3e38])
        return found

    def made(self, y: Register) -> Register:
        self.floats.append(y)
        return y

    def y(self, *inputs: Register) -> Register:
        """A place for a result: a new register, or one of the inputs."""
        if self.random.random() < 0.3:
            return self.random.choice(inputs)
        return self.made(self.plan.register(inputs[0].width))

    def field(self, *shape: int, dtype: torch.dtype = torch.float32, first: float = 0.0) -> Field:
        size = math.prod(shape) * dtype.itemsize
        found = Field(f"field{len(self.fields)}", self.state_bytes, shape, dtype)
        self.fields.append((found, first))
        self.state_bytes += -(-size // 64) * 64 + 64
        return found

    def maybe(self, tensor: Tensor) -> Tensor | None:
        return tensor if self.random.random() < 0.5 else None

    def heads(self) -> tuple[int, int, int]:
        """Query heads, groups, size of a head."""
        groups = self.random.choice([1, 2, 3])
        return groups * self.random.choice([1, 2, 3]), groups, self.random.choice([1, 3, 8, 17, 32])

    # --- records --------------------------------------------------------------------------------------------

    def embed(self) -> None:
        width = self.width()
        y = self.made(self.plan.register(width))
        self.plan.record("embed", y, width, p=(self.embeddings(width),))

    def binary(self) -> None:
        x = self.x()
        z = self.x(x.width)
        name = self.random.choice(["add", "multiply", "gate", "swish"])
        self.plan.record(name, x, z, self.y(x, z), x.width)

    def alone(self) -> None:
        x = self.x()
        kind = self.random.choice(["copy", "relu", "relu_squared", "log_gate", "unary", "rate_gate", "scale"])
        width, p = x.width, (-torch.rand(x.width), torch.randn(x.width))
        if kind == "unary":
            self.plan.record(kind, x, self.y(x), width, self.random.randrange(len(UNARY)))
        elif kind == "scale":
            self.plan.record(kind, x, self.y(x), width, f=(0.5,), p=(self.maybe(torch.randn(width)),))
        else:
            y = self.made(self.plan.register(width)) if kind == "copy" else self.y(x)
            self.plan.record(kind, x, y, width, f=(-1.0, 16.0), p=p if kind == "rate_gate" else ())

    def lerp(self) -> None:
        x = self.x()
        self.plan.record("lerp", x, self.x(x.width), self.y(x), x.width, p=(torch.rand(x.width),))

    def norm(self) -> None:
        width, groups = self.width(), self.random.choice([1, 1, 2, 5])
        x = self.x(width * groups)
        name = self.random.choice(["layernorm", "rmsnorm", "unit"])
        p = {"layernorm": 2, "rmsnorm": 1, "unit": 0}[name]
        vectors = [self.maybe(torch.randn(width)) for _ in range(p)]
        self.plan.record(name, x, self.y(x), width, groups, f=(1e-5,), p=vectors)

    def load_and_store(self) -> None:
        x = self.x()
        field = self.field(x.width)
        self.made(self.plan.load(field))
        self.plan.store(x, field)

    def shift(self) -> None:
        x = self.x()
        mixes = [torch.rand(x.width) for _ in range(self.random.randint(1, 8))]
        self.floats += self.plan.shift(x, self.field(x.width), mixes)

    def scale_row(self) -> None:
        x = self.x()
        self.plan.record("scale_row", x, self.x(1), self.y(x), x.width)

    def linear(self) -> None:
        x, outputs = self.x(), self.width()
        y, scale = self.plan.register(outputs), -1 if self.random.random() < 0.5 else self.x(1)
        row = self.plan.statistics("p", x.width, outputs)
        weights = (torch.randn(outputs, x.width) / x.width**0.5, self.maybe(torch.randn(outputs)))
        self.plan.record("linear", x, y, x.width, outputs, scale, row, p=weights)
        self.made(y)

    def spikes(self, x: Register, integer: bool) -> tuple[Register, Register | None]:
        """The three neurons."""
        width, flags = x.width, INT8_SPIKES if integer else 0
        y = self.plan.bytes_register(width) if integer else self.made(self.plan.register(width))
        gain = self.maybe(torch.randn(width))
        kind = self.random.choice(["encode", "lif", "heaviside"])
        cap = 127 if kind == "encode" else None
        seen = Observation(path="p", spiking=True, in_features=width, out_features=0, cap=cap)
        if kind == "encode":
            scale = self.made(self.plan.register(1))
            f = (self.random.choice([0.5, 3.0, 300.0]), self.random.choice([0.0, 1.0]), 127.0)
            self.plan.record("encode", x, y, scale, width, f=f, flags=flags)
            self.plan.observe(seen, y, (x, scale), flags=flags)
            return y, scale
        if kind == "lif":
            flags |= self.random.choice([0, SOFT_RESET]) | self.random.choice([0, DECAY_INPUT])
            f = (0.5, self.random.choice([0.0, -0.5]))
            self.plan.record(
                kind, x, self.field(width), y, width, f=f, p=(torch.rand(width), gain), flags=flags
            )
        else:
            self.plan.record(kind, x, y, width, f=(0.1,), p=(gain,), flags=flags)
        self.plan.observe(seen, y, flags=flags & INT8_SPIKES)
        return y, None

    def neuron_and_linear(self) -> None:
        x, outputs = self.x(), self.width()
        counts, scale = self.spikes(x, integer=False)
        y = self.plan.register(outputs)
        operands = (
            x.width,
            outputs,
            -1 if scale is None else scale,
            self.plan.statistics("p", x.width, outputs),
        )
        self.plan.record(
            "linear", counts, y, *operands, p=(torch.randn(outputs, x.width), None), flags=SPIKES
        )
        self.made(y)

    def matrix(self, outputs: int, inputs: int, rows: bool) -> int:
        """Int8 weights in one of the layouts."""
        group = self.random.choice([None, 1, 5, 16, 100])
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        scales = torch.rand(outputs, -(-inputs // (group or inputs))) / 1000
        layout = self.random.choice(["rows", *LAYOUTS])
        if rows or layout == "rows":
            return self.plan.int8_rows(weight, scales, group)
        packed: Any = PackedInt8(weight, scales, group, layout, arena=Exact())  # type: ignore[arg-type]
        return int(self.plan.keep(packed).pointer)

    def neuron_and_int8(self) -> None:
        x, outputs = self.x(), self.random.choice([*WIDTHS, 200])
        weights = self.matrix(outputs, x.width, rows=False)
        self.plan.need_scratch(self.plan.int8_scratch(weights))
        counts, scale = self.spikes(x, integer=True)
        y = self.plan.register(outputs)
        row = self.plan.statistics("p", x.width, outputs)
        bias = self.maybe(torch.randn(outputs))
        self.plan.record("linear_int8", counts, y, -1 if scale is None else scale, row, p=(weights, bias))
        self.made(y)

    def int8_of_floats(self) -> None:
        x, outputs = self.x(), self.width()
        y, row = self.plan.register(outputs), self.plan.statistics("p", x.width, outputs)
        p = (self.matrix(outputs, x.width, rows=True), self.maybe(torch.randn(outputs)))
        self.plan.record("linear_int8_float", x, y, row, p=p)
        self.made(y)

    def wkv4(self) -> None:
        k = self.x()
        v, y, n = self.x(k.width), self.plan.register(k.width), k.width
        p = (-torch.rand(n) * self.random.choice([0.1, 50.0]), torch.randn(n))
        self.plan.record("wkv4", k, v, y, self.field(3, n), n, p=p)
        self.made(y)

    def attend(self) -> None:
        heads, groups, size = self.heads()
        q, k, v = self.x(heads * size), self.x(groups * size), self.x(groups * size)
        room, sinks = self.random.choice([1, 3, 5, 70]), self.random.choice([0, 0, 2, 5])
        keys, values = self.field(room, groups, size), self.field(room, groups, size)
        position = self.field(dtype=torch.int64)
        pinned = [self.field(sinks, groups, size, first=0.5) for _ in range(2)] if sinks else [-1, -1]
        if self.random.random() < 0.4:
            self.plan.limit(position, room, lambda: None)
        shape = self.plan.keep(torch.tensor([heads, groups, size, room, sinks]))
        o, running = self.plan.register(heads * size), self.plan.register(2 * heads)
        operands = (q, k, v, o, running, keys, values, position, *pinned)
        self.plan.record("attend", *operands, f=(size**-0.5,), p=(shape.data_ptr(),))
        self.made(o)

    def rope(self) -> None:
        heads, groups, size = self.heads()
        q, k, pairs = self.x(heads * size), self.x(groups * size), self.random.randint(0, size // 2)
        if q is k:
            return
        position = self.field(dtype=torch.int64)
        frequencies = self.plan.keep(torch.rand(max(pairs, 1), dtype=torch.float64))
        table = self.plan.shared(("rope", len(self.plan.kept)), 2 + 2 * pairs)
        operands = (q, heads, k, groups, size, pairs, table, position, self.random.choice([0, 4]))
        self.plan.record("rope", *operands, f=(1.25,), p=(frequencies.data_ptr(),), flags=1)

    def convolve(self) -> None:
        x, past = self.x(), self.random.randint(1, 4)
        y = self.plan.register(x.width)
        p = (torch.randn(past + 1, x.width), self.maybe(torch.randn(x.width)))
        flags = self.random.choice([0, 1])
        self.plan.record("convolve", x, y, x.width, past, self.field(past, x.width), p=p, flags=flags)
        self.made(y)

    def linear_attention(self) -> None:
        heads, groups, size = self.heads()
        values = self.random.choice([1, 5, 64, 70])
        q, k, v = self.x(heads * size), self.x(groups * size), self.x(groups * values)
        o, memory = self.plan.register(heads * values), self.field(groups, size, values)
        if self.random.random() < 0.5:
            gate = self.plan.log_gate(self.x(groups * size), 1.0, 16.0)
            self.plan.record("gla", q, k, v, gate, o, heads, groups, size, values, memory, f=(0.5,))
        else:
            unit = self.plan.register(k.width)
            self.plan.record("unit", k, unit, size, groups, f=(1e-6,))
            gate = self.plan.log_gate(self.x(groups), 1.0, 1.0)
            beta = self.plan.unary("sigmoid", self.x(groups))
            sizes = (heads, groups, size, values, memory)
            self.plan.record("gated_delta", q, unit, v, gate, beta, o, *sizes, f=(0.5,))
        self.made(o)

    def spiking(self) -> None:
        heads, _, size = self.heads()
        values, summed = self.random.choice([1, 9, 16]), self.random.random() < 0.3
        size = 1 if summed else size
        q, k = (-1, -1) if summed else (self.x(heads * size), self.x(heads * size))
        v, o = self.x(heads * values), self.plan.register(heads * values)
        count = self.field(heads) if self.random.random() < 0.5 else -1
        memory, kept = self.field(heads, size, values), self.maybe(torch.rand(heads))
        self.plan.record("spiking", q, k, v, o, heads, size, values, memory, count, f=(0.3,), p=(kept,))
        self.made(o)

    def experts(self) -> None:
        x, count = self.x(), self.random.randint(1, 5)
        top_k = self.random.randint(1, count)
        logits = self.plan.register(count)
        row = self.plan.statistics("router", x.width, count)
        self.plan.record("linear", x, logits, x.width, count, -1, row, p=(torch.randn(count, x.width), None))
        chosen, weights = self.plan.register(top_k), self.plan.register(top_k)
        taken, found = self.plan.register(count), self.plan.register(top_k * x.width)
        bias, flags = self.maybe(torch.randn(count)), self.random.randrange(4)
        sizes = (taken, count, top_k)
        self.plan.record("route", logits, chosen, weights, *sizes, f=(2.0,), p=(bias,), flags=flags)
        outside = self.floats
        for index in range(count):
            with self.plan.chosen(chosen, top_k, index, x, found) as own:
                self.floats = [x]
                hidden = self.plan.register(self.width())
                place = self.plan.statistics("expert", x.width, hidden.width)
                first = (torch.randn(hidden.width, x.width), None)
                self.plan.record("linear", x, hidden, x.width, hidden.width, -1, place, p=first)
                own.output = self.plan.register(x.width)
                second = (torch.randn(x.width, hidden.width), None)
                operands = (hidden, own.output, hidden.width, x.width, -1, place)
                self.plan.record("linear", *operands, p=second)
        self.floats = outside
        y = self.plan.register(x.width)
        self.plan.record("combine", found, weights, y, x.width, top_k)
        self.made(y)

    def build(self) -> None:
        """Some kinds of records, in any order, and logits of the last register."""
        kinds = [getattr(self, name) for name in KINDS]
        for _ in range(self.random.randint(3, 14)):
            self.random.choice(kinds)()
        x, y = self.floats[-1], self.plan.register(OUTPUTS)
        row = self.plan.statistics("head", x.width, OUTPUTS)
        self.plan.record("linear", x, y, x.width, OUTPUTS, -1, row, p=(torch.randn(OUTPUTS, x.width), None))
        self.plan.record("output", y, OUTPUTS)


KINDS = (
    *("embed", "binary", "alone", "lerp", "norm", "load_and_store", "shift", "scale_row", "linear"),
    *("neuron_and_linear", "neuron_and_int8", "int8_of_floats", "wkv4", "attend", "rope", "convolve"),
    *("linear_attention", "spiking", "experts"),
)
