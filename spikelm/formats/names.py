"""The names SpikeGPT and RWKV-4 publish their weights under, and ours.

Both families share one naming (``blocks.3.att.time_mix_k``). This module says which published tensor becomes
which of ours, which shape it must have, and reads the model's sizes off the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spikelm.errors import CheckpointError

# published suffix, our suffix, shape in the letters of `Sizes.length`
BLOCK = (
    ("ln1.weight", "mixer_norm.weight", "D"),
    ("ln1.bias", "mixer_norm.bias", "D"),
    ("ln2.weight", "channel_norm.weight", "D"),
    ("ln2.bias", "channel_norm.bias", "D"),
    ("att.time_decay", "mixer.time_decay", "D"),
    ("att.time_first", "mixer.time_first", "D"),
    ("att.time_mix_k", "mixer.mix_k", "D"),
    ("att.time_mix_v", "mixer.mix_v", "D"),
    ("att.time_mix_r", "mixer.mix_r", "D"),
    ("att.key.weight", "mixer.key.linear.weight", "DD"),
    ("att.value.weight", "mixer.value.linear.weight", "DD"),
    ("att.receptance.weight", "mixer.receptance.linear.weight", "DD"),
    ("att.output.weight", "mixer.output.linear.weight", "DD"),
    ("ffn.time_mix_k", "channel.mix_k", "D"),
    ("ffn.time_mix_r", "channel.mix_r", "D"),
    ("ffn.key.weight", "channel.key.linear.weight", "FD"),
    ("ffn.receptance.weight", "channel.receptance.linear.weight", "DD"),
    ("ffn.value.weight", "channel.value.linear.weight", "DF"),
)
OUTER = (
    ("emb.weight", "embedding.weight", "VD"),
    ("blocks.0.ln0.weight", "embedding_norm.weight", "D"),
    ("blocks.0.ln0.bias", "embedding_norm.bias", "D"),
    ("ln_out.weight", "norm.weight", "D"),
    ("ln_out.bias", "norm.bias", "D"),
    ("head.weight", "head.linear.weight", "VD"),
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes read off a published checkpoint.

    Args:
        vocab: number of tokens (rows of the embedding).
        hidden: width of the residual stream.
        layers: number of blocks.
        channel: width inside the channel mix (4 x hidden as published).
    """

    vocab: int
    hidden: int
    layers: int
    channel: int

    def shape(self, letters: str) -> tuple[int, ...]:
        """Shape for letters V (vocabulary), D (hidden), F (inside the channel mix)."""
        length = {"V": self.vocab, "D": self.hidden, "F": self.channel}
        return tuple(length[letter] for letter in letters)


def read_sizes(tensors: Mapping[str, Tensor], kind: str) -> Sizes:
    """Sizes of a published checkpoint.

    Raises:
        CheckpointError: if a tensor that tells a size is missing or has the wrong number of dimensions.
    """
    embedding = _matrix(tensors, "emb.weight", "[vocabulary, hidden]", kind)
    channel = _matrix(tensors, "blocks.0.ffn.key.weight", "[channel width, hidden]", kind)
    indices = {int(match.group(1)) for name in tensors if (match := re.match(r"blocks\.(\d{1,6})\.", name))}
    absent = next(i for i in range(len(indices) + 1) if i not in indices)
    if absent <= max(indices):
        raise CheckpointError(
            f"the {kind} checkpoint has tensors of block {max(indices)} but none of block {absent}; "
            f"it is incomplete"
        )
    return Sizes(
        vocab=embedding.shape[0], hidden=embedding.shape[1], layers=max(indices) + 1, channel=channel.shape[0]
    )


def rename(tensors: Mapping[str, Tensor], sizes: Sizes, kind: str) -> dict[str, Tensor]:
    """Our name -> float32 tensor for every published tensor.

    Vectors may be stored with dimensions of length 1 around them (``[1, 1, D]``); they become ``[D]``.

    Args:
        tensors: published name -> tensor of any floating dtype.
        sizes: what :func:`read_sizes` returned.
        kind: name of the format, for messages.

    Raises:
        CheckpointError: if a tensor is missing, unknown, of another shape, not floating or not finite.
    """
    table = {published: (ours, letters) for published, ours, letters in OUTER}
    for i in range(sizes.layers):
        table |= {f"blocks.{i}.{a}": (f"blocks.{i}.{b}", letters) for a, b, letters in BLOCK}
    # Unknown names first: a foreign model is better described by what it has than by what it lacks.
    for name in tensors:
        if name not in table:
            raise CheckpointError(
                f"unknown tensor {name!r} {list(tensors[name].shape)} in a {kind} checkpoint of "
                f"{sizes.layers} layers; expected only the published names, such as 'blocks.0.att.key.weight'"
            )
    result = {}
    for name, (ours, letters) in table.items():
        expected = sizes.shape(letters)
        if name not in tensors:
            raise CheckpointError(
                f"the tensor {name!r} is missing from the {kind} checkpoint; expected shape {list(expected)}"
            )
        tensor = tensors[name]
        fits = tuple(tensor.shape) == expected
        if len(expected) == 1 and not fits:
            fits = tensor.numel() == expected[0] and max(tensor.shape, default=1) == expected[0]
        if not fits:
            raise CheckpointError(
                f"the tensor {name!r} has shape {list(tensor.shape)}; "
                f"expected {list(expected)} in a {kind} checkpoint"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"the tensor {name!r} is {tensor.dtype}; expected a floating dtype")
        value = tensor.detach().reshape(expected).to(torch.float32).contiguous()
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"the tensor {name!r} holds values that are not finite; expected finite weights"
            )
        result[ours] = value
    return result


def _matrix(tensors: Mapping[str, Tensor], name: str, meaning: str, kind: str) -> Tensor:
    if name not in tensors:
        found = ", ".join(sorted(tensors)[:3])
        raise CheckpointError(
            f"the tensor {name!r} {meaning} is missing, so this is no {kind} checkpoint; "
            f"it begins with {found}"
        )
    tensor = tensors[name]
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise CheckpointError(f"the tensor {name!r} has shape {list(tensor.shape)}; expected {meaning}")
    return tensor
