"""Names of the GPU architectures that kernels are configured and compiled for."""

from __future__ import annotations

from functools import cache

import torch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def target_of(device: torch.device) -> str:
    """The target whose configurations run on a device: the newest one that is not newer than it.

    The interpreter (CPU tensors) takes those of sm_90.
    """
    return "sm_90" if device.type != "cuda" else _target(device.index or torch.cuda.current_device())


@cache
def _target(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    # 12.x (desktop Blackwell) has the shared memory of Ampere's desktop cards, and so has 8.9.
    if major == 10:
        return "sm_100"
    return "sm_90" if major == 9 else "sm_80"
