"""The decoder of loops.py with the mixers and channels of hybrids."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .loops import Decoder, Vector, numbers

INPUTS = ("query", "key", "value")


class HybridDecoder(Decoder):
    """Also gla, gla_tied, gated_delta, swa, attention, parallel, ssa; mlp, moe."""

    def heads(self, x: Vector, size: int) -> list[Vector]:
        return [x[i : i + size] for i in range(0, len(x), size)]

    def linear(self, part: Any, path: str, x: Vector) -> tuple[Vector, Vector, Vector]:
        """Queries, keys and values after projection and convolution."""
        found = []
        for name in INPUTS:
            y = self.project(getattr(part, name), f"{path}.{name}", x)
            if part.convolved:
                y = self.convolve(getattr(part, f"{name}_convolution"), f"{path}.{name}_convolution", y)
            found.append(y)
        return found[0], found[1], found[2]

    def convolve(self, part: Any, path: str, x: Vector) -> Vector:
        m = self.m
        window = self.memory.setdefault(path, [[0.0] * len(x) for _ in range(part.kernel - 1)])
        window.append(x)
        m.kind = "convolution"
        weight, y = numbers(part.weight), []
        for i in range(len(x)):
            total = 0.0
            for back, past in enumerate(window):
                total = m.mac(weight[i][back], past[i], total)
            y.append(total)
        del window[0]
        return self.silu(y)

    def silu(self, x: Vector) -> Vector:
        self.m.kind = "activation"
        return [self.m.mul(value, self.m.sigmoid(value)) for value in x]

    def normed(self, norm: nn.Module | None, heads: list[Vector]) -> list[Vector]:
        return heads if norm is None else [self.norm(norm, head) for head in heads]

    def mapped(self, part: Any, heads: list[Vector]) -> list[Vector]:
        m = self.m
        m.kind = "activation"
        if part.feature_map == "relu":
            return [[m.max(value, 0.0) for value in head] for head in heads]
        return [[m.sigmoid(value) for value in head] for head in heads]

    def recur(
        self, path: str, q: list[Vector], k: list[Vector], v: list[Vector], gates: list[Vector]
    ) -> list[Vector]:
        """S <- diag(exp g) S + k^T v, o = K^-1/2 q S."""
        m, K = self.m, len(q[0])
        m.kind = "recurrence"
        states = self.memory.setdefault(path, [[[0.0] * K for _ in range(K)] for _ in k])
        for S, kk, vv, gg in zip(states, k, v, gates, strict=True):
            for i in range(K):
                decay = m.exp(gg[i])
                for j in range(K):
                    S[i][j] = m.mac(kk[i], vv[j], m.mul(decay, S[i][j]))
        return self.read(states, q)

    def read(self, states: Any, queries: list[Vector]) -> list[Vector]:
        m, K = self.m, len(queries[0])
        share, out = len(queries) // len(states), []
        for h, query in enumerate(queries):
            S, o = states[h // share], [0.0] * K
            for i in range(K):
                for j in range(K):
                    o[j] = m.mac(query[i], S[i][j], o[j])
            out.append([m.mul(K**-0.5, value) for value in o])
        return out

    def finish(self, part: Any, path: str, x: Vector, out: list[Vector]) -> Vector:
        flat = [value for head in self.normed(part.output_norm, out) for value in head]
        if part.output_gate is not None:
            flat = self.swish(self.project(part.output_gate, f"{path}.output_gate", x), flat)
        return self.project(part.output, f"{path}.output", flat)

    def GLA(self, part: Any, path: str, x: Vector) -> Vector:  # noqa: N802
        m, K = self.m, part.head_dim
        q, k, v = (self.heads(vector, K) for vector in self.linear(part, path, x))
        q, k = self.normed(part.query_norm, q), self.normed(part.key_norm, k)
        low = self.project(part.gate_low, f"{path}.gate_low", x)
        g = self.project(part.gate_high, f"{path}.gate_high", low)
        m.kind = "gate"
        gates = self.heads([m.mul(m.log_sigmoid(value), 1.0 / part.gate_divisor) for value in g], K)
        q, k = self.mapped(part, q), self.mapped(part, k)
        return self.finish(part, path, x, self.recur(path, *self.turned(part, q, k), v, gates))

    def TiedGLA(self, part: Any, path: str, x: Vector) -> Vector:  # noqa: N802
        m, K = self.m, part.head_dim
        q, k, v = (self.heads(vector, K) for vector in self.linear(part, path, x))
        q, k = self.normed(part.query_norm, q), self.normed(part.key_norm, k)
        m.kind = "gate"
        gates = [[m.log_sigmoid(-value) for value in head] for head in k]
        q, k = self.mapped(part, q), self.mapped(part, k)
        return self.finish(part, path, x, self.recur(path, *self.turned(part, q, k), v, gates))

    def GatedDelta(self, part: Any, path: str, x: Vector) -> Vector:  # noqa: N802
        m, K = self.m, part.head_dim
        found = self.linear(part, path, x)
        if not part.convolved:
            found = self.silu(found[0]), self.silu(found[1]), self.silu(found[2])
        q, k, v = (self.heads(vector, K) for vector in found)
        q, k = self.normed(part.query_norm, q), self.normed(part.key_norm, k)
        raw = self.project(part.decay, f"{path}.decay", x)
        m.kind = "gate"
        alphas = []
        for value, rate, bias in zip(raw, numbers(part.A_log), numbers(part.dt_bias), strict=True):
            z = m.add(value, bias)
            softplus = m.add(m.max(z, 0.0), m.log(m.add(1.0, m.exp(-abs(z)))))
            alphas.append(m.mul(-math.exp(rate), softplus))
        q, k = self.turned(part, q, k)
        raw = self.project(part.beta, f"{path}.beta", x)
        m.kind = "gate"
        betas = [m.sigmoid(value) for value in raw]
        if part.strongest != 1.0:
            betas = [m.mul(part.strongest, value) for value in betas]
        m.kind = "norm"
        q, k = [self.unit(head) for head in q], [self.unit(head) for head in k]
        m.kind = "recurrence"
        states = self.memory.setdefault(path, [[[0.0] * K for _ in range(K)] for _ in k])
        for S, kk, vv, g, beta in zip(states, k, v, alphas, betas, strict=True):
            decay = m.exp(g)
            for i in range(K):
                S[i] = [m.mul(decay, value) for value in S[i]]
            fresh = []
            for j in range(K):
                known = 0.0
                for i in range(K):
                    known = m.mac(kk[i], S[i][j], known)
                fresh.append(m.mul(beta, m.sub(vv[j], known)))
            for i in range(K):
                S[i] = [m.mac(kk[i], value, old) for value, old in zip(fresh, S[i], strict=True)]
        return self.finish(part, path, x, self.read(states, q))

    def unit(self, x: Vector) -> Vector:
        m, square = self.m, 0.0
        for value in x:
            square = m.mac(value, value, square)
        factor = m.div(1.0, m.root(m.add(square, 1e-6)))
        return [m.mul(value, factor) for value in x]

    def SlidingWindowAttention(self, part: Any, path: str, x: Vector) -> Vector:  # noqa: N802
        return self.attend(part, path, x, part.window)

    def Attention(self, part: Any, path: str, x: Vector) -> Vector:  # noqa: N802
        return self.attend(part, path, x, 10**6)

    def attend(self, part: Any, path: str, x: Vector, window: int) -> Vector:
        m, d = self.m, part.head_dim
        q, k, v = (self.heads(self.project(getattr(part, n), f"{path}.{n}", x), d) for n in INPUTS)
        q, k = self.normed(part.query_norm, q), self.normed(part.key_norm, k)
        queries, keys = self.turned(part, q, k)
        ring = self.memory.setdefault(path, [])
        ring.append((keys, v))
        del ring[:-window]
        m.kind = "attention"
        share, out = len(queries) // len(keys), []
        for h, query in enumerate(queries):
            scores = []
            for past, _ in ring:
                score = 0.0
                for a, b in zip(query, past[h // share], strict=True):
                    score = m.mac(a, b, score)
                scores.append(m.mul(score, d**-0.5))
            highest = -math.inf
            for score in scores:
                highest = m.max(highest, score)
            weights = [m.exp(m.sub(score, highest)) for score in scores]
            total, o = 0.0, [0.0] * d
            for weight, (_, past) in zip(weights, ring, strict=True):
                total = m.add(total, weight)
                for j, value in enumerate(past[h // share]):
                    o[j] = m.mac(weight, value, o[j])
            out += [m.div(value, total) for value in o]
        if part.output_gate is not None:
            out = self.gate(self.project(part.output_gate, f"{path}.output_gate", x), out)
        return self.project(part.output, f"{path}.output", out)

    def turned(self, part: Any, q: list[Vector], k: list[Vector]) -> tuple[list[Vector], list[Vector]]:
        if part.rope is None:
            return q, k
        m = self.m
        m.kind = "rotation"
        table = []
        for frequency in part.rope.frequencies:
            angle = m.mul(self.position, frequency)
            table.append((m.cos(angle), m.sin(angle)))
        return self.rotate(q, table), self.rotate(k, table)

    def rotate(self, heads: list[Vector], table: list[tuple[float, float]]) -> list[Vector]:
        m, pairs = self.m, len(table)
        turned = []
        for head in heads:
            first, second = [], []
            for (cos, sin), a, b in zip(table, head[:pairs], head[pairs : 2 * pairs], strict=True):
                first.append(m.mac(a, cos, -m.mul(b, sin)))
                second.append(m.mac(b, cos, m.mul(a, sin)))
            turned.append([*first, *second, *head[2 * pairs :]])
        return turned

    def Parallel(self, part: Any, path: str, x: Vector) -> Vector:  # noqa: N802
        m, total = self.m, None
        for index, (name, weight) in enumerate(zip(part.names, numbers(part.weight), strict=True)):
            branch = getattr(part, name)
            y = getattr(self, type(branch).__name__)(branch, f"{path}.{name}", x)
            y = self.norm(getattr(part, f"norm{index}"), y)
            m.kind = "residual"
            y = [m.mul(weight, value) for value in y]
            total = y if total is None else [m.add(a, b) for a, b in zip(total, y, strict=True)]
        assert total is not None
        return total

    def SSA(self, part: Any, path: str, x: Vector) -> Vector:  # noqa: N802
        """Without decay. A pair that could meet is counted as a slot (macs), one that does as an addition."""
        m, K = self.m, part.head_dim
        spikes = []
        mixed = self.shift(path, x, *(getattr(part, f"mix_{name}") for name in INPUTS))
        for name, own in zip(INPUTS, mixed, strict=True):
            y = self.norm(
                getattr(part, f"{name}_norm"), self.project(getattr(part, name), f"{path}.{name}", own)
            )
            spikes.append(
                self.heads(self.fire(getattr(part, f"{name}_neuron"), f"{path}.{name}_neuron", y), K)
            )
        memory = self.memory.setdefault(f"{path}.sums", [[[0.0] * K for _ in range(K)] for _ in spikes[0]])
        m.kind = "recurrence"
        seen = self.memory[f"{path}.count"] = [
            m.add(n, 1.0) for n in self.memory.get(f"{path}.count", [0.0] * len(memory))
        ]
        out = []
        for S, q, k, v, n in zip(memory, *spikes, seen, strict=True):
            o = [0.0] * K
            for i in range(K):
                for j in range(K):
                    m.count("macs")
                    if k[i] and v[j]:
                        m.accumulates[path] += 1
                        S[i][j] += 1.0
            for i in range(K):
                for j in range(K):
                    m.count("macs")
                    if q[i]:
                        m.accumulates[path] += 1
                        o[j] += S[i][j]
            out += [m.div(value, n) for value in o]
        return self.project(part.output, f"{path}.output", out)

    def MLP(self, part: Any, path: str, x: Vector) -> Vector:  # noqa: N802
        m = self.m
        h = self.norm(part.up_norm, self.project(part.up, f"{path}.up", x))
        m.kind = "activation"
        h = [m.mul(value, value) for value in (m.max(value, 0.0) for value in h)]
        return self.project(part.down, f"{path}.down", h)

    def MoE(self, part: Any, path: str, x: Vector) -> Vector:  # noqa: N802
        m = self.m
        logits = self.project(part.router, f"{path}.router", x)
        m.kind = "routing"
        highest = -math.inf
        for value in logits:
            highest = m.max(highest, value)
        powers, total = [m.exp(m.sub(value, highest)) for value in logits], 0.0
        for value in powers:
            total = m.add(total, value)
        scores, chosen = [m.div(value, total) for value in powers], []
        for _ in range(part.top_k):
            best, most = -1, -math.inf
            for index, score in enumerate(scores):
                if m.less(most, score) and index not in chosen:
                    best, most = index, score
            chosen.append(best)
        whole = 0.0
        for index in chosen:
            whole = m.add(whole, scores[index])
        weights = [m.div(scores[index], whole) for index in chosen]
        y = [0.0] * len(x)
        for index, weight in zip(chosen, weights, strict=True):
            own = self.SwiGLU(part.experts[index], f"{path}.experts.{index}", x)
            m.kind = "routing"
            y = [m.mac(weight, value, old) for value, old in zip(own, y, strict=True)]
        for index, expert in enumerate(part.shared):
            own = self.SwiGLU(expert, f"{path}.shared.{index}", x)
            m.kind = "routing"
            y = [m.add(a, b) for a, b in zip(y, own, strict=True)]
        return y
