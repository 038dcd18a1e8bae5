"""SpikeLM: pretrain, convert, evaluate and serve spiking language models.

Nothing heavy happens at import: the names below are loaded when they are first used, so that
``import spikelm`` needs no library at all and the kernels and parts need torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from spikelm.checkpoint import load_model, load_tokenizer, save_checkpoint
    from spikelm.config import ModelConfig
    from spikelm.model import SpikeLM
    from spikelm.tokenizer import Tokenizer

__all__ = [
    "ModelConfig",
    "SpikeLM",
    "Tokenizer",
    "__version__",
    "load_model",
    "load_tokenizer",
    "save_checkpoint",
]

_HOMES = {
    "ModelConfig": "spikelm.config",
    "SpikeLM": "spikelm.model",
    "Tokenizer": "spikelm.tokenizer",
    "load_model": "spikelm.checkpoint",
    "load_tokenizer": "spikelm.checkpoint",
    "save_checkpoint": "spikelm.checkpoint",
}


def __getattr__(name: str) -> object:
    """Load a public name when it is first used."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'spikelm' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
