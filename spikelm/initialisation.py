"""Initial weights, all in one function.

RWKV-4's scheme, which SpikeGPT uses (D features, block l of L, feature i of D):

| parameter | value |
| --- | --- |
| embedding | orthogonal, elements about 1e-4 |
| head | orthogonal, gain 0.5 * sqrt(out / in) where out > in |
| mixer key, receptance, output; channel value, receptance | zero |
| other projections | orthogonal, gain sqrt(out / in) where out > in |
| time_decay | -5 + 8 (i / (D - 1))^(0.7 + 1.3 l / (L - 1)) |
| time_first | log 0.3 + 0.5 ((i + 1) mod 3 - 1) |
| mix_k, mix_v, mix_r of wkv4 | (i/D)^(1 - l/L), the same + 0.3 l/(L - 1), (i/D)^(0.5 (1 - l/L)) |
| mix_k, mix_r of rwkv | (i/D)^(1 - l/L) |
| sinks | normal, 0.02 |

With ``initializer_range`` (Llama, Qwen, SpikingBrain) the embedding, the head, the sinks and every projection
are normal with that standard deviation; the token-shift mixtures and decays of the table stay.

Int8 weights are those of the table, rounded.

Norms, biases and neuron parameters keep what their constructors set. A part of another package sets its own
parameters in its constructor; its projections get the row "other projections".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spikelm.channels.rwkv import RWKVChannel
from spikelm.mixers.wkv4 import WKV4
from spikelm.projection import Projection
from spikelm.weights import Int8Linear

if TYPE_CHECKING:
    from spikelm.model import SpikeLM


@torch.no_grad()
def initialise(model: SpikeLM) -> None:
    """Set every weight of a model in place, drawing from torch's global generator."""
    if model.embedding.weight.is_meta:
        return
    spread = model.config.initializer_range
    if model.sinks is not None:
        model.sinks.weight.normal_(std=0.02 if spread is None else spread)
    zero: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, WKV4):
            _wkv4(module)
            zero |= {module.key, module.receptance, module.output}
        elif isinstance(module, RWKVChannel):
            ratio = torch.arange(module.hidden_size) / module.hidden_size
            module.mix_k.copy_(ratio**module.depth_left)
            module.mix_r.copy_(ratio**module.depth_left)
            zero |= {module.value, module.receptance}
    for module in model.modules():
        if isinstance(module, Projection) and isinstance(module.linear, (nn.Linear, Int8Linear)):
            weight = _matrix(module.linear)
            if spread is not None:
                weight.normal_(std=spread)
            elif module in zero:
                weight.zero_()
            elif module is not model.head:
                _orthogonal(weight, 1.0)
            else:
                continue
            _store(module.linear, weight)
    if spread is not None:
        model.embedding.weight.normal_(std=spread)
        return
    vocabulary, features = model.embedding.weight.shape
    nn.init.orthogonal_(model.embedding.weight, gain=1e-4 * math.sqrt(max(vocabulary, features)))
    head = model.head
    if head is None or model.config.tie_word_embeddings:
        return
    if isinstance(head.linear, (nn.Linear, Int8Linear)):
        weight = _matrix(head.linear)
        _orthogonal(weight, 0.5)
        _store(head.linear, weight)


def _matrix(linear: nn.Linear | Int8Linear) -> Tensor:
    """The weights to draw: those of the layer, or a float matrix of the size of int8 ones."""
    if isinstance(linear, nn.Linear):
        return linear.weight
    return torch.empty(linear.weight.shape, device=linear.weight.device)


def _store(linear: nn.Linear | Int8Linear, weight: Tensor) -> None:
    if isinstance(linear, Int8Linear):
        linear.load_float(weight)


def _orthogonal(weight: Tensor, scale: float) -> None:
    outputs, inputs = weight.shape
    nn.init.orthogonal_(weight, gain=scale * math.sqrt(max(outputs / inputs, 1.0)))


def _wkv4(mixer: WKV4) -> None:
    D = mixer.hidden_size
    i = torch.arange(D)
    depth = mixer.layer_fraction
    mixer.time_decay.copy_(-5.0 + 8.0 * (i / max(D - 1, 1)) ** (0.7 + 1.3 * depth))
    mixer.time_first.copy_(math.log(0.3) + 0.5 * ((i + 1) % 3 - 1))
    ratio = i / D
    mixer.mix_k.copy_(ratio**mixer.depth_left)
    mixer.mix_v.copy_(ratio**mixer.depth_left + 0.3 * depth)
    mixer.mix_r.copy_(ratio ** (0.5 * mixer.depth_left))
