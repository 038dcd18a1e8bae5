"""Inputs of the gated delta rule with masks, and its results and gradients in any form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.gated_delta import gated_delta

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
NAMES = ("o", "state", "grad q", "grad k", "grad v", "grad g", "grad beta", "grad state")
SCALE = 0.4


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs (q, k, v, g, beta, state) in fp64, masks, and the gradients that arrive at o and the state."""

    inputs: tuple[Tensor, ...]
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
    masks: str = "none",
    decay: str = "mild",
    strongest: float = 1.0,
) -> Case:
    """Normalised keys; ``strongest`` is the largest beta; ``mixed`` decays lie between none and complete."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        # fp32 values in fp64: the fp32 forms see exactly the same inputs
        return torch.randn(*shape, generator=generator).double()

    g = logsigmoid(2 * normal(batch, steps, groups) + 2)
    if decay == "mixed":
        strength = torch.tensor([0.0, 1e-3, 1.0, 80.0, 1e5, torch.inf]).double()
        drawn = strength[torch.randint(6, (batch, steps, groups), generator=generator)]
        g = torch.where(drawn == 0, 0.0, g * drawn)
    draw = torch.rand(2, batch, steps, generator=generator)
    beta = strongest * torch.sigmoid(2 * normal(batch, steps, groups))
    choice = torch.randint(8, (batch, steps, groups), generator=generator)
    beta = torch.where(choice == 0, 0.0, torch.where(choice == 1, strongest, beta))
    inputs = (
        normal(batch, steps, heads, key_dim),
        normalize(normal(batch, steps, groups, key_dim), dim=-1),
        normal(batch, steps, groups, value_dim),
        g,
        beta,
        normal(batch, groups, key_dim, value_dim),
    )
    return Case(
        inputs=tuple(x.float().double() for x in inputs),
        reset=draw[0] < 0.1 if masks in ("reset", "both") else None,
        valid=draw[1] < 0.75 if masks in ("valid", "both") else None,
        grad_o=normal(batch, steps, heads, value_dim),
        grad_state=normal(batch, groups, key_dim, value_dim),
    )


def call(
    inputs: tuple[Tensor, ...] | list[Tensor], reset: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return gated_delta(*inputs, scale=SCALE, reset=reset, valid=valid)


def run(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    inputs = [x.to(dtype).requires_grad_() for x in case.inputs]
    o, last = call(inputs, case.reset, case.valid)
    grads = torch.autograd.grad([o, last], inputs, [case.grad_o.to(dtype), case.grad_state.to(dtype)])
    return [o.detach(), last.detach(), *grads]


def reference(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    with use_backend("reference"):
        return run(case, dtype)


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert torch.isfinite(a).all(), name
        torch.testing.assert_close(
            a.double(), b.double(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
