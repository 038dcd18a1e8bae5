"""Inputs of gated linear attention with masks, and its results and gradients in any form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.gla import gla

# B, T, H, G, K, V
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 1, 6, 2, 5, 3),
    (2, 7, 4, 4, 3, 8),
    (1, 63, 6, 2, 5, 3),
    (2, 64, 2, 1, 8, 8),
    (1, 65, 3, 3, 4, 9),
    (2, 130, 6, 2, 7, 5),
]
GATES = ("channel", "head", "none")
NAMES = ("o", "state", "grad q", "grad k", "grad v", "grad g", "grad state")
SCALE = 0.4


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs (q, k, v, g, state) in fp64, masks, and the gradients that arrive at o and the last state."""

    inputs: tuple[Tensor | None, ...]
    reset: Tensor | None
    valid: Tensor | None
    grad_o: Tensor
    grad_state: Tensor


def make_case(
    batch: int,
    steps: int,
    heads: int,
    groups: int,
    key_dim: int,
    value_dim: int,
    gate: str = "channel",
    masks: str = "none",
    strength: float = 1.0,
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        # fp32 values in fp64: the fp32 forms see exactly the same inputs
        return torch.randn(*shape, generator=generator).double()

    width = {"channel": key_dim, "head": 1, "none": 0}[gate]
    g = strength * logsigmoid(normal(batch, steps, groups, width)) if width else None
    draw = torch.rand(2, batch, steps, generator=generator)
    return Case(
        inputs=(
            normal(batch, steps, heads, key_dim),
            normal(batch, steps, groups, key_dim),
            normal(batch, steps, groups, value_dim),
            None if g is None else g.float().double(),
            normal(batch, groups, key_dim, value_dim),
        ),
        reset=draw[0] < 0.1 if masks in ("reset", "both") else None,
        valid=draw[1] < 0.75 if masks in ("valid", "both") else None,
        grad_o=normal(batch, steps, heads, value_dim),
        grad_state=normal(batch, groups, key_dim, value_dim),
    )


def run(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    leaves = [None if x is None else x.to(dtype).requires_grad_() for x in case.inputs]
    q, k, v, g, state = leaves
    assert q is not None and k is not None and v is not None and state is not None
    o, last = gla(q, k, v, g, state, scale=SCALE, reset=case.reset, valid=case.valid)
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad([o, last], wanted, [case.grad_o.to(dtype), case.grad_state.to(dtype)])
    return [o.detach(), last.detach(), *grads]


def reference(case: Case) -> list[Tensor]:
    with use_backend("reference"):
        return run(case)


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    names = NAMES if len(got) == len(NAMES) else tuple(name for name in NAMES if name != "grad g")
    for name, a, b in zip(names, got, expected, strict=True):
        assert torch.isfinite(a).all(), name
        torch.testing.assert_close(
            a.double(), b.double(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
