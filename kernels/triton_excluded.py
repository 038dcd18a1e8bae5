"""Triton kernels that were found wrong, or do not run, on some devices with some versions of Triton.

``auto`` runs the torch form there and says so once; asking for ``triton`` by name raises with the reason. An
entry is added with what ``make gpu`` showed, and goes when a version of Triton mends it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType

import torch

from spikelm.kernels.triton_targets import target_of


@dataclass(frozen=True, kw_only=True)
class Excluded:
    """One configuration that is not run.

    Args:
        op: name of the op.
        configuration: what distinguishes it, in the words of the op's call of ``choose``, for example
            ``{"dtype": "bfloat16", "K": 256}``; empty for the whole op. A call that does not tell a value
            counts as having it.
        targets: architectures, for example ``("sm_90",)``.
        since: first version of Triton that is wrong.
        mended: first later version that is right again, or None.
        reason: what was seen, with the test that shows it.
    """

    op: str
    configuration: Mapping[str, object] = field(default_factory=dict)
    targets: tuple[str, ...]
    since: str = "0"
    mended: str | None = None
    reason: str


EXCLUDED: tuple[Excluded, ...] = ()

PROVISIONAL: Mapping[str, tuple[str, ...]] = MappingProxyType({})
"""Op -> architectures for which not all of its configurations have been compiled ahead of time.

``auto`` does not take its Triton form there yet; asked for by name it runs.
"""


def why_provisional(op: str, device: torch.device) -> str | None:
    """The reason why ``auto`` does not take an op's Triton form on a device yet, or None."""
    targets = PROVISIONAL.get(op, ())
    if not targets or (target := target_of(device)) not in targets:
        return None
    return (
        f"provisional on {target}, for which not all of its configurations were compiled ahead of time; "
        "use_backend('triton') runs it"
    )


def why_excluded(op: str, device: torch.device, configuration: Mapping[str, object]) -> str | None:
    """The reason why an op's Triton form is not run here, or None.

    Args:
        op: name of the op.
        device: of the tensors; the interpreter (CPU tensors) runs everything.
        configuration: what the call tells of itself.
    """
    entries = [entry for entry in EXCLUDED if entry.op == op]
    if not entries or device.type != "cuda":
        return None
    target, version = target_of(device), _version(_installed())
    for entry in entries:
        fits = all(configuration.get(name, value) == value for name, value in entry.configuration.items())
        wrong = _version(entry.since) <= version and (
            entry.mended is None or version < _version(entry.mended)
        )
        if fits and wrong and target in entry.targets:
            told = ", ".join(f"{name}={value}" for name, value in entry.configuration.items())
            return f"excluded on {target} with Triton {_installed()}{told and f' for {told}'}: {entry.reason}"
    return None


@cache
def _installed() -> str:
    import triton

    version: str = triton.__version__
    return version


def _version(text: str) -> tuple[int, ...]:
    """Leading numbers of a version: 3.7.1+rocm6 -> (3, 7, 1)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(number) for number in found[0].split(".")) if found else (0,)
