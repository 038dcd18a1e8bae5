"""Watches gradients as they arrive, before anything averages them: which micro-batch of this rank went bad.

After the gradients of all ranks are averaged, one NaN is everywhere and nobody knows where it came from. So a
hook on every parameter takes the norm of what backward brings, on the device and without waiting for it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spikelm.train.optim import BadGradient


class GradientWatch:
    """Norms of the gradients of every micro-batch of a step.

    Args:
        parameters: names and parameters to watch.
    """

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        self._now: dict[str, Tensor] = {}
        self._before: list[tuple[tuple[str, ...], Tensor]] = []
        for name, parameter in parameters:
            parameter.register_hook(functools.partial(self._see, name))

    def _see(self, name: str, gradient: Tensor) -> None:
        # The norm, not isfinite: it is one pass, and it also overflows where the sum of squares does.
        low = torch.finfo(gradient.dtype).bits < 32
        norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32 if low else None)
        before = self._now.get(name)
        self._now[name] = norm if before is None else before + norm

    def end_micro_batch(self) -> None:
        """What follows belongs to the next micro-batch."""
        if self._now:
            self._before.append((tuple(self._now), torch.stack(list(self._now.values()))))
        else:
            self._before.append(((), torch.empty(0)))
        self._now = {}

    def finite(self) -> bool:
        """Whether every gradient of the step so far is finite (waits for the device)."""
        return not self._before or bool(torch.cat([norms for _, norms in self._before]).isfinite().all())

    def take(self) -> tuple[BadGradient, ...]:
        """The bad ones of the step that ends here (waits for the device), and a fresh start."""
        found = []
        for index, (names, norms) in enumerate(self._before):
            bad = [name for name, good in zip(names, norms.isfinite().tolist(), strict=True) if not good]
            if bad:
                found.append(BadGradient(micro_batch=index, parameters=tuple(bad)))
        self.forget()
        return tuple(found)

    def forget(self) -> None:
        """Start anew without looking."""
        self._now, self._before = {}, []
