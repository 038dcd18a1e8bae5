"""SpikeGPT's published weights (``.pth`` of ridgerchu/SpikeGPT, arXiv 2302.13939).

The model is our placement ``after``: LIF neurons (tau 2, threshold 1, hard reset, decaying input) on the
output of every time mix and channel mix. Training always used a binary embedding; the released inference
code applies it for one vocabulary only. Which of the two a checkpoint expects cannot be seen in its tensors,
so the caller says it.
"""

from __future__ import annotations

from pathlib import Path

from spikelm.formats.converted import Converted, rwkv_config
from spikelm.formats.names import read_sizes, rename
from spikelm.formats.pickled import read_pickled

KIND = "SpikeGPT"
DROPOUT = 0.03
LIF = {
    "name": "lif",
    "tau": 2.0,
    "threshold": 1.0,
    "reset": "hard",
    "decay_input": True,
    "surrogate": "atan",
    "alpha": 2.0,
}
BINARY = {"name": "heaviside", "threshold": 0.0, "surrogate": "atan", "alpha": 2.0}
DENSE = {"name": "none"}


def read_spikegpt(path: Path, *, binary_embedding: bool) -> Converted:
    """Read a published SpikeGPT checkpoint.

    Args:
        path: the ``.pth`` file.
        binary_embedding: whether the embedding goes through a Heaviside neuron (as in training).

    Raises:
        CheckpointError: if the file is no plain file of tensors, or a tensor is missing, unknown or has
            another shape than the published one.
    """
    tensors = read_pickled(path)
    sizes = read_sizes(tensors, KIND)
    config = rwkv_config(
        sizes,
        placement="after",
        neuron=LIF,
        embedding_neuron=BINARY if binary_embedding else DENSE,
        dropout=DROPOUT,
    )
    return Converted(config=config, weights=rename(tensors, sizes, KIND))
