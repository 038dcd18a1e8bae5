"""Versions that decide numbers, for logs."""

from __future__ import annotations

import importlib.metadata
import platform

import spikelm


def versions() -> dict[str, str]:
    """Name -> version of Python, spikelm and the libraries that compute."""
    found = {
        "python": platform.python_version(),
        "spikelm": spikelm.__version__,
        "machine": platform.machine(),
    }
    for name in ("torch", "numpy", "safetensors", "tokenizers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
