"""Text to token blocks: sources, the tokenised store and the order of samples.

The names below are imported when first used, because the tokenizer needs only the leaves of this package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spikelm.data.blocks import IGNORE, Batch, TokenBlocks
    from spikelm.data.source import Source, open_source

__all__ = ["IGNORE", "Batch", "Source", "TokenBlocks", "open_source"]

_HOME = {
    "IGNORE": "blocks",
    "Batch": "blocks",
    "TokenBlocks": "blocks",
    "Source": "source",
    "open_source": "source",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
