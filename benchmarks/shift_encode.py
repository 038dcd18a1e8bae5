"""What would the fused op shift_encode save a model that reads a prompt?

    python benchmarks/shift_encode.py [--model spikegpt-46m-sd] [--repeats 15]

No model calls the op (docs/kernels.md says why). Measured on one thread: reading T tokens with the model in
int8, and beside it, in turns, what a block does between its residual stream and the counts of its mixer and
its channel (norm, token shift, mixing, encoding), as the model does it and by the op, which gives the same
bits. Writes results/shift_encode.json: milliseconds of each, and the share of the whole that all blocks
together would save.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _record import record
from torch import Tensor, nn

from spikelm.activations import lerp
from spikelm.bench.timing import alternate
from spikelm.block import Block
from spikelm.channels.rwkv import RWKVChannel
from spikelm.config import ModelConfig
from spikelm.kernels.encode import adaptive_encode_int8
from spikelm.kernels.shift_encode import shift_encode
from spikelm.mixers.wkv4 import WKV4
from spikelm.model import SpikeLM
from spikelm.neurons.adaptive import Adaptive
from spikelm.norms import LayerNorm
from spikelm.recurrence import EMPTY, token_shift
from spikelm.weights import Int8Linear, pack_model

LENGTHS = (16, 64, 256)
INT8 = {"name": "int8", "group_size": 128}


def int8_model(name: str) -> SpikeLM:
    """The preset with random int8 weights in blocks and head."""
    values = ModelConfig.from_yaml(name).to_dict()
    values |= {"weights": INT8, "weight_overrides": {"head": INT8}, "tie_word_embeddings": False}
    values["head_neuron"] = values["neuron"]
    torch.manual_seed(0)
    model = SpikeLM(ModelConfig.from_dict(values)).eval()
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.load_float(torch.randn(module.out_features, module.in_features))
    pack_model(model)
    return model


class Input:
    """What stands between the residual stream x [1, T, D] and the counts of some projections.

    Args:
        x: the residual stream.
        norm: the block's.
        mixes: [D] each, of the projections.
        neuron: theirs.
    """

    def __init__(self, x: Tensor, norm: LayerNorm, mixes: Sequence[Tensor], neuron: Adaptive) -> None:
        self.x, self.norm, self.mixes = x, norm, [mix.detach() for mix in mixes]
        self.last, self.stacked = torch.zeros(1, x.shape[-1]), torch.stack(self.mixes)
        self.options: dict[str, Any] = {"k": neuron.k, "dead_zone": neuron.dead_zone, "cap": neuron.cap}

    def apart(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Counts, thresholds and statistics, as the model makes them."""
        features = self.norm(self.x)
        previous, _ = token_shift(features, self.last, EMPTY)
        mixed = [lerp(previous, features, mix) for mix in self.mixes]
        return [adaptive_encode_int8(own, **self.options) for own in mixed]

    def fused(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same by the op, all projections at once."""
        norm = self.norm
        return shift_encode(
            *(self.x, norm.weight, norm.bias, norm.eps, "layernorm", self.last, self.stacked), **self.options
        )

    def check(self) -> None:
        """Both give the same bits."""
        counts, thresholds, *_ = self.fused()
        for m, (own, threshold, _) in enumerate(self.apart()):
            if not (torch.equal(own, counts[m]) and torch.equal(threshold, thresholds[m])):
                raise RuntimeError(f"the op's counts of projection {m} are not the model's")


def inputs(block: Block, x: Tensor) -> list[Input]:
    """Those of the mixer and of the channel."""
    mixer, channel = cast(WKV4, block.mixer), cast(RWKVChannel, block.channel)
    neuron = cast(Adaptive, mixer.key.neuron)
    norms = [cast(LayerNorm, cast(nn.Module, norm)) for norm in (block.mixer_norm, block.channel_norm)]
    return [
        Input(x, norms[0], (mixer.mix_k, mixer.mix_v, mixer.mix_r), neuron),
        Input(x, norms[1], (channel.mix_k, channel.mix_r), neuron),
    ]


@torch.no_grad()
def measure(model: SpikeLM, length: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a prompt and of what the op replaces, and what it would save."""
    config = model.config
    tokens = torch.randint(0, config.vocab_size, (1, length))
    state, x = model.init_state(1), torch.randn(1, length, config.hidden_size)
    found = inputs(cast(Block, model.blocks[0]), x)
    for given in found:
        given.check()
    calls = {
        "prompt": lambda: model(tokens, state, last_only=True),
        "apart": lambda: [given.apart() for given in found],
        "fused": lambda: [given.fused() for given in found],
    }
    times = {name: taken["median_ms"] for name, taken in alternate(calls, repeats).items()}
    saved = config.num_hidden_layers * (times["apart"] - times["fused"])
    return {
        "tokens": length,
        "prompt_ms": times["prompt"],
        "block_apart_ms": times["apart"],
        "block_fused_ms": times["fused"],
        "saved_share": round(saved / times["prompt"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="spikegpt-46m-sd", help="preset with rwkv layers")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = int8_model(arguments.model)
    rows = [measure(model, length, arguments.repeats) for length in LENGTHS]
    for row in rows:
        print(
            f"T={row['tokens']}: prompt {row['prompt_ms']:.2f} ms; a block {row['block_apart_ms']:.3f} ms, "
            f"by the op {row['block_fused_ms']:.3f} ms; it would save {row['saved_share']:.1%} of the prompt"
        )
    print(record("shift_encode", {"model": arguments.model, "threads": 1, "rows": rows}))


if __name__ == "__main__":
    main()
