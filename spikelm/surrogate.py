"""The spike function for neurons written in torch: a step forward, a surrogate derivative backward.

Neftci, Mostafa and Zenke 2019 (arXiv 1901.09948). The derivatives live beside the kernels, so that the C
and Triton forms and this one share a table.
"""

from __future__ import annotations

from spikelm.errors import ConfigError
from spikelm.kernels.lif.surrogates import derivative, spike

__all__ = ["check_surrogate", "spike"]


def check_surrogate(surrogate: str, alpha: float) -> None:
    """Raise for an unknown surrogate (KernelError) or a sharpness that is not positive (ConfigError)."""
    derivative(surrogate)
    if not alpha > 0:
        raise ConfigError(f"surrogate sharpness alpha is {alpha}; expected a positive number")
