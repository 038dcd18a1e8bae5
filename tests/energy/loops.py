"""An event-driven decoder in plain Python loops that counts every operation and every weight it reads.

Written from the equations, with floats and lists alone; the weights are taken from a model. Its logits must
be the model's, so that what it counts is what the model computes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from spikelm.model import SpikeLM
from spikelm.projection import Projection
from spikelm.weights import Int8Linear

Vector = list[float]
OPERATIONS = "macs multiplications additions comparisons roundings divisions roots exponentials".split()


class Machine:
    """Arithmetic that counts.

    Attributes:
        kinds: kind -> operation -> how often.
        dense: path -> multiply-accumulates that a dense product would do.
        effective: path -> products of an input that is not zero with a weight.
        accumulates: path -> additions if a count c is |c| unit events; projections with spikes alone.
        weights: path -> weights that were read.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(OPERATIONS, 0))
        self.kind = ""
        self.dense: dict[str, int] = defaultdict(int)
        self.effective: dict[str, int] = defaultdict(int)
        self.accumulates: dict[str, int] = defaultdict(int)
        self.weights: dict[str, int] = defaultdict(int)

    def count(self, operation: str) -> None:
        self.kinds[self.kind][operation] += 1

    def mac(self, a: float, b: float, c: float) -> float:
        self.count("macs")
        return a * b + c

    def mul(self, a: float, b: float) -> float:
        self.count("multiplications")
        return a * b

    def add(self, a: float, b: float) -> float:
        self.count("additions")
        return a + b

    def sub(self, a: float, b: float) -> float:
        self.count("additions")
        return a - b

    def max(self, a: float, b: float) -> float:
        self.count("comparisons")
        return max(a, b)

    def less(self, a: float, b: float) -> bool:
        self.count("comparisons")
        return a < b

    def div(self, a: float, b: float) -> float:
        self.count("divisions")
        return a / b

    def root(self, a: float) -> float:
        self.count("roots")
        return math.sqrt(a)

    def exp(self, a: float) -> float:
        self.count("exponentials")
        return math.exp(a)

    def log(self, a: float) -> float:
        self.count("exponentials")
        return math.log(a)

    def sin(self, a: float) -> float:
        self.count("exponentials")
        return math.sin(a)

    def cos(self, a: float) -> float:
        self.count("exponentials")
        return math.cos(a)

    def round(self, a: float) -> float:
        self.count("roundings")
        return float(round(a))  # half to even, as torch

    def sigmoid(self, a: float) -> float:
        return self.div(1.0, self.add(1.0, self.exp(-a)))

    def log_sigmoid(self, a: float) -> float:
        negative = -self.max(-a, 0.0)
        return self.sub(negative, self.log(self.add(1.0, self.exp(-abs(a)))))


def numbers(tensor: Tensor) -> Any:
    return tensor.detach().to(torch.float64).tolist()


class Decoder:
    """The state of one sequence and a step for one token.

    Args:
        model: mixers wkv4, gla, swa; channels rwkv, swiglu; neurons adaptive, lif, none.
    """

    def __init__(self, model: SpikeLM) -> None:
        self.model, self.m = model, Machine()
        self.membranes: dict[str, Vector] = {}
        self.shifts: dict[str, Vector] = {}
        self.memory: dict[str, Any] = {}
        self.position = 0

    def step(self, token: int) -> Vector:
        model, m = self.model, self.m
        x: Vector = numbers(model.embedding.weight[token])
        x = self.fire(model.embedding_neuron, "embedding_neuron", x)
        if model.embedding_norm is not None:
            x = self.norm(model.embedding_norm, x)
        for layer, block in enumerate(model.blocks):
            for name in ("mixer", "channel"):
                part, path = getattr(block, name), f"blocks.{layer}.{name}"
                y = getattr(self, type(part).__name__)(
                    part, path, self.norm(getattr(block, f"{name}_norm"), x)
                )
                y = self.fire(getattr(block, f"{name}_neuron"), f"{path}_neuron", y)
                m.kind = "residual"
                x = [m.add(a, b) for a, b in zip(x, y, strict=True)]
        logits = self.project(model.head, "head", self.norm(model.norm, x))
        self.position += 1
        return logits

    def norm(self, norm: nn.Module, x: Vector) -> Vector:
        m, n, eps = self.m, len(x), norm.eps
        m.kind = "norm"
        gain = numbers(norm.weight)
        if isinstance(norm, nn.LayerNorm):
            mean = 0.0
            for value in x:
                mean = m.add(mean, value)
            mean = m.mul(mean, 1.0 / n)
            x = [m.sub(value, mean) for value in x]
        square = 0.0
        for value in x:
            square = m.mac(value, value, square)
        factor = m.div(1.0, m.root(m.add(m.mul(square, 1.0 / n), eps)))
        x = [m.mul(value, factor) for value in x]
        if isinstance(norm, nn.LayerNorm):
            return [m.mac(v, g, b) for v, g, b in zip(x, gain, numbers(norm.bias), strict=True)]
        return [m.mul(v, g) for v, g in zip(x, gain, strict=True)]

    def encode(self, neuron: nn.Module, path: str, x: Vector) -> tuple[Vector, float | None]:
        m, kind = self.m, type(neuron).__name__
        if kind == "Identity":
            return x, None
        m.kind = "neuron"
        if kind == "Adaptive":
            total = 0.0
            for value in x:
                total = m.add(total, abs(value))
            mean = m.mul(total, 1.0 / len(x))
            V = m.max(m.mul(mean, 1.0 / neuron.k), 1e-8)
            quiet = m.mul(neuron.dead_zone, mean) if neuron.dead_zone else 0.0
            counts = []
            for value in x:
                n = m.round(m.div(value, V))
                if neuron.dead_zone and m.less(abs(value), quiet):
                    n = 0.0
                if neuron.cap is not None:
                    n = n if m.less(n, neuron.cap) else float(neuron.cap)
                    n = n if m.less(-neuron.cap, n) else float(-neuron.cap)
                counts.append(n)
            return counts, V
        assert kind == "LIF" and neuron.v_reset == 0.0 and neuron.decay_input and not neuron.soft_reset
        v = self.membranes.get(path, [0.0] * len(x))
        spikes = []
        for i, value in enumerate(x):
            h = m.mac(m.sub(value, v[i]), 1.0 / neuron.tau, v[i])
            fired = not m.less(h, neuron.threshold)
            v[i] = 0.0 if fired else h
            spikes.append(float(fired))
        self.membranes[path] = v
        return spikes, None

    def fire(self, neuron: nn.Module, path: str, x: Vector) -> Vector:
        return self.encode(neuron, path, x)[0]

    def project(self, part: Projection, path: str, x: Vector) -> Vector:
        m, linear = self.m, part.linear
        spikes, scale = self.encode(part.neuron, f"{path}.neuron", x)
        m.kind = "head" if path == "head" else "projection"
        W = numbers(linear.weight)
        D, O = part.in_features, part.out_features  # noqa: E741
        m.dense[path] += D * O
        size = D
        if isinstance(linear, Int8Linear):
            size = linear.group_size or D
        y = [0.0] * O
        for group, first in enumerate(range(0, D, size)):
            sums = [0.0] * O
            for i in range(first, min(first + size, D)):
                if spikes[i] == 0:  # no event: none of this input's weights is read
                    continue
                for o in range(O):
                    m.effective[path] += 1
                    m.weights[path] += 1
                    if part.neuron.spiking:
                        sign = 1.0 if spikes[i] > 0 else -1.0
                        for _ in range(abs(int(spikes[i]))):
                            m.accumulates[path] += 1
                            sums[o] += sign * W[o][i]
                    else:
                        sums[o] += spikes[i] * W[o][i]
            if isinstance(linear, Int8Linear):
                scales = numbers(linear.scales)
                y = [
                    m.add(a, m.mul(scales[o][group], b)) for o, (a, b) in enumerate(zip(y, sums, strict=True))
                ]
            else:
                y = sums
        if scale is not None:
            y = [m.mul(value, scale) for value in y]
        if part.bias is not None:
            y = [m.add(value, b) for value, b in zip(y, numbers(part.bias), strict=True)]
        return y

    def shift(self, path: str, x: Vector, *mixes: Tensor) -> list[Vector]:
        m = self.m
        m.kind = "shift"
        last = self.shifts.get(path, [0.0] * len(x))
        mixed = [
            [m.mac(w, m.sub(b, a), a) for a, b, w in zip(last, x, numbers(mix), strict=True)] for mix in mixes
        ]
        self.shifts[path] = x
        return mixed

    def gate(self, r: Vector, y: Vector) -> Vector:
        self.m.kind = "gate"
        return [self.m.mul(self.m.sigmoid(a), b) for a, b in zip(r, y, strict=True)]

    def swish(self, r: Vector, y: Vector) -> Vector:
        m = self.m
        m.kind = "gate"
        return [m.mul(m.mul(a, m.sigmoid(a)), b) for a, b in zip(r, y, strict=True)]

    def WKV4(self, part: Any, path: str, x: Vector) -> Vector:  # noqa: N802
        m = self.m
        to_k, to_v, to_r = self.shift(path, x, part.mix_k, part.mix_v, part.mix_r)
        k = self.project(part.key, f"{path}.key", to_k)
        v = self.project(part.value, f"{path}.value", to_v)
        r = self.project(part.receptance, f"{path}.receptance", to_r)
        m.kind = "recurrence"
        state = self.memory.setdefault(path, [[0.0, 0.0, -1e38] for _ in k])
        decays, bonuses = numbers(part.time_decay), numbers(part.time_first)
        y = []
        for i, (a, b, p) in enumerate(state):
            w, u = -math.exp(decays[i]), bonuses[i]
            past, now, _ = self.weigh(p, m.add(u, k[i]))
            y.append(m.div(m.mac(now, v[i], m.mul(past, a)), m.mac(past, b, now)))
            past, now, q = self.weigh(m.add(p, w), k[i])
            state[i] = [m.mac(now, v[i], m.mul(past, a)), m.mac(past, b, now), q]
        return self.project(part.output, f"{path}.output", self.gate(r, y))

    def weigh(self, p: float, q: float) -> tuple[float, float, float]:
        """exp(p - max), exp(q - max), max: of the two exponentials one is 1."""
        m = self.m
        highest = m.max(p, q)
        before, now = m.sub(p, highest), m.sub(q, highest)
        small = m.exp(max(min(before, now), -700.0))
        return (1.0, small, highest) if before == 0.0 else (small, 1.0, highest)

    def RWKVChannel(self, part: Any, path: str, x: Vector) -> Vector:  # noqa: N802
        m = self.m
        to_k, to_r = self.shift(path, x, part.mix_k, part.mix_r)
        k = self.project(part.key, f"{path}.key", to_k)
        m.kind = "activation"
        k = [m.mul(value, value) for value in (m.max(value, 0.0) for value in k)]
        v = self.project(part.value, f"{path}.value", k)
        return self.gate(self.project(part.receptance, f"{path}.receptance", to_r), v)

    def SwiGLU(self, part: Any, path: str, x: Vector) -> Vector:  # noqa: N802
        gate = self.project(part.gate, f"{path}.gate", x)
        up = self.project(part.up, f"{path}.up", x)
        return self.project(part.down, f"{path}.down", self.swish(gate, up))
