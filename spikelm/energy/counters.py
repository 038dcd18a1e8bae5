"""Counters of energy that a machine may have: RAPL of the processor, NVML of an NVIDIA device.

Neither is guessed at: a machine without one says so. RAPL counts the whole package and NVML the whole device,
whoever uses them.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")


class Counter(Protocol):
    """Something that counts joules."""

    name: str

    def read(self) -> float:
        """Joules since some moment in the past."""

    def between(self, start: float, end: float) -> float:
        """Joules from one reading to a later one."""


class Rapl:
    """The packages of a processor, through Linux's powercap.

    Args:
        zones: their folders.
    """

    def __init__(self, zones: list[Path]) -> None:
        self.zones = zones
        self.name = f"RAPL ({', '.join((zone / 'name').read_text().strip() for zone in zones)})"
        self._range = sum(int((zone / "max_energy_range_uj").read_text()) for zone in zones) / 1e6

    def read(self) -> float:
        """The sum of all packages."""
        return sum(int((zone / "energy_uj").read_text()) for zone in self.zones) / 1e6

    def between(self, start: float, end: float) -> float:
        """A counter that began again at zero in between is taken to have done so once."""
        return end - start if end >= start else end - start + self._range / len(self.zones)


class Nvml:
    """An NVIDIA device, by the driver's total energy counter.

    Args:
        nvml: the module pynvml, initialised.
        index: of the device.
    """

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml, self._handle = nvml, nvml.nvmlDeviceGetHandleByIndex(index)
        name = nvml.nvmlDeviceGetName(self._handle)
        self.name = f"NVML ({name.decode() if isinstance(name, bytes) else name})"
        self.read()

    def read(self) -> float:
        """Joules since the driver was loaded."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def between(self, start: float, end: float) -> float:
        """The difference: the counter does not begin again."""
        return end - start


def find(device: torch.device, powercap: Path = POWERCAP) -> tuple[Counter | None, str]:
    """The counter of a device, and its name or why there is none.

    Args:
        device: ``cpu`` or ``cuda``.
        powercap: Linux's folder of RAPL zones.
    """
    counter, why = _nvml(device) if device.type == "cuda" else _rapl(powercap)
    return counter, counter.name if counter is not None else f"no counter here: {why}"


def _rapl(powercap: Path) -> tuple[Counter | None, str]:
    zones = [
        path
        for path in sorted(powercap.glob("*:*"))
        if (path / "name").is_file() and (path / "name").read_text().startswith("package")
    ]
    if not zones:
        return None, f"no RAPL package in {powercap} (virtual machines have none)"
    try:
        counter = Rapl(zones)
        counter.read()
    except PermissionError:
        return None, f"{zones[0] / 'energy_uj'} may be read by root alone"
    except (OSError, ValueError) as error:
        return None, f"{zones[0]} cannot be read ({error})"
    return counter, ""


def _nvml(device: torch.device) -> tuple[Counter | None, str]:
    try:
        pynvml: Any = import_module("pynvml")
    except ImportError:
        return None, "NVML needs the package nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        return Nvml(pynvml, device.index or 0), ""
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"
