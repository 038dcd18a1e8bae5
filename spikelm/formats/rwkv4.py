"""RWKV-4 weights: ``.pth`` files as the ``rwkv`` package reads them, and float files of rwkv.cpp.

The model is our continuous one: no neuron anywhere, dense embedding.
"""

from __future__ import annotations

from pathlib import Path

from spikelm.errors import CheckpointError
from spikelm.formats.converted import Converted, rwkv_config
from spikelm.formats.names import read_sizes, rename
from spikelm.formats.pickled import read_pickled
from spikelm.formats.rwkv_cpp import is_rwkv_cpp, read_rwkv_cpp

KIND = "RWKV-4"
NEWER = {"ln_x": 5, "gate.weight": 5, "time_maa": 6, "time_faaaa": 5, ".x_r": 7}
"""Parts of tensor names that only later versions of RWKV have."""


def read_rwkv4(path: Path) -> Converted:
    """Read RWKV-4 weights of either kind; the file's first bytes tell which it is.

    Raises:
        CheckpointError: if the file is of neither kind, of another version of RWKV, or damaged.
    """
    tensors = read_rwkv_cpp(path) if is_rwkv_cpp(path) else read_pickled(path)
    for name in tensors:
        for part, version in NEWER.items():
            if part in name:
                raise CheckpointError(
                    f"{str(path)!r} holds {name!r}, which RWKV has since version {version}; expected RWKV-4"
                )
    sizes = read_sizes(tensors, KIND)
    off = {"name": "none"}
    config = rwkv_config(sizes, placement="before", neuron=off, embedding_neuron=off)
    return Converted(config=config, weights=rename(tensors, sizes, KIND))
