"""What do the checks before an op cost? Shapes, dtypes, devices, masks and constants of small inputs.

The cost does not depend on sizes. Values are looked at inside the C forms, after these checks.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from spikelm.kernels import (
    encode,
    event_linear,
    gated_delta,
    gla,
    int8_linear,
    lif,
    planes,
    rowwise,
    shift_encode,
    wkv4,
)

GOAL_US = 5.0
"""Microseconds that the checks of a call may take."""
CALLS, ROUNDS = 200, 40


def checks() -> dict[str, Callable[[], object]]:
    """Public function -> its checks, with every mask and option it takes."""
    rows, steps, heads, size, width = 2, 3, 2, 16, 40
    tokens = (rows, steps)
    mask = torch.ones(tokens, dtype=torch.bool)
    x, last, vector = torch.randn(*tokens, width), torch.zeros(rows, width), torch.ones(width)
    head, state = torch.randn(*tokens, heads, size), torch.zeros(rows, heads, size, size)
    strength, sums = torch.rand(*tokens, heads), torch.zeros(rows, 3, width)
    counts, threshold = torch.ones(*tokens, width, dtype=torch.int8), torch.rand(*tokens, 1)
    weight, scales, bias = torch.ones(24, width, dtype=torch.int8), torch.rand(24, 1), torch.rand(24)
    packed = torch.ones(4, *tokens, 5, dtype=torch.uint8)
    mixes, matrix = torch.rand(3, width), torch.randn(width, 24)

    def of_shift_encode() -> None:
        shift_encode._check(x, vector, vector, "layernorm", last, mixes, mask, mask)
        shift_encode._options(3, 3.0, 1.0, 127)

    def of_lif() -> None:
        lif._check(x, last, vector, mask, mask)
        lif.refuse_number("lif", threshold=1.0, v_reset=0.0, alpha=2.0)

    return {
        "lif": of_lif,
        "wkv4": lambda: wkv4._check(vector, vector, x, x, sums, mask, mask),
        "gla": lambda: gla._check(head, head, head, head, state, mask, mask),
        "gated_delta": lambda: gated_delta._check(head, head, head, strength, strength, state, mask, mask),
        "adaptive_encode": lambda: encode._check("adaptive_encode", x, threshold, 3.0, 1.0, 127),
        "decode_counts": lambda: encode._check_decode(counts, threshold),
        "expand_planes": lambda: planes._check_expand(counts, 3),
        "collapse_planes": lambda: planes._check_collapse(packed, width),
        "shift_encode": of_shift_encode,
        "int8_linear": lambda: int8_linear._check(counts, weight, scales, width, threshold, bias),
        "event_linear": lambda: event_linear._check(x, matrix),
        "rowwise.norm": lambda: rowwise._check("norm", x, weight=vector, bias=vector),
    }


def measure_checks() -> dict[str, float]:
    """Microseconds of one call, the best of ROUNDS rounds of CALLS calls."""
    found = {}
    for name, check in checks().items():
        best = min(_seconds(check) for _ in range(ROUNDS))
        found[name] = round(1e6 * best / CALLS, 2)
    return found


def line(check_us: dict[str, float]) -> str:
    """The result in one plain line."""
    each = ", ".join(f"{name} {microseconds:.1f}" for name, microseconds in check_us.items())
    return f"checks before a call, in microseconds (goal: at most {GOAL_US:g}): {each}"


def _seconds(check: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        check()
    return time.perf_counter() - start
