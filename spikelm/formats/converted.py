"""A foreign checkpoint turned into ours: a configuration and the weights under our names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spikelm.config import ModelConfig
from spikelm.errors import CheckpointError
from spikelm.formats.names import Sizes
from spikelm.model import SpikeLM


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a format reader returns.

    Args:
        config: the model the weights belong to.
        weights: our parameter name -> float32 tensor.
    """

    config: ModelConfig
    weights: Mapping[str, Tensor]

    def model(self) -> SpikeLM:
        """The core model with these weights, in evaluation mode.

        Raises:
            CheckpointError: if the weights do not fit the configuration (a fault of the reader).
        """
        with torch.device("meta"):
            model = SpikeLM(self.config)
        try:
            model.load_state_dict(dict(self.weights), assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"the converted weights do not fit the model: {error}") from error
        model.requires_grad_(True)
        return model.eval()


def rwkv_config(sizes: Sizes, **fields: Any) -> ModelConfig:
    """The configuration of ``wkv4`` and ``rwkv`` blocks with these sizes; other fields as given."""
    # The channel multiplies and truncates, so the next float up is taken where the quotient rounded down.
    expand = sizes.channel / sizes.hidden
    if int(sizes.hidden * expand) != sizes.channel:
        expand = math.nextafter(expand, math.inf)
    channel: dict[str, Any] = {"name": "rwkv"}
    if sizes.channel != 4 * sizes.hidden:
        channel["expand"] = expand
    return ModelConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        layers=({"mixer": {"name": "wkv4"}, "channel": channel},),
        **fields,
    )
