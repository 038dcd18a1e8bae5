"""One of several real ranks: compares sharded models with whole ones and writes what it found as JSON.

Run by test_tensor_parallel.py, which launches the ranks and judges the numbers.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spikelm.block import build_child
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError
from spikelm.model import SpikeLM
from spikelm.neurons.adaptive import Adaptive
from spikelm.projection import Projection
from spikelm.recurrence import Context, Part
from spikelm.tensor_parallel import shard

ADAPTIVE = {"name": "adaptive", "k": 3.0, "dead_zone": 0.5}
SWIGLU = {"name": "swiglu", "hidden": 96}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
GLA = {"mixer": {"name": "gla", **HEADS, "output_gate": "swish", "short_convolution": 3}, "channel": SWIGLU}
DELTA = {
    "mixer": {"name": "gated_delta", **HEADS, "allow_negative": True, "qk_norm": True},
    "channel": SWIGLU,
}
MANY = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 4}  # as many decays as features of a head
SWA = {"mixer": {"name": "swa", **HEADS, "window": 5, "qkv_bias": True, "qk_norm": True}, "channel": SWIGLU}
FULL = {"mixer": {"name": "attention", **HEADS, "output_bias": True}, "channel": SWIGLU}
MOE = {
    "mixer": {"name": "gla_tied", **HEADS},
    "channel": {"name": "moe", "hidden": 32, "experts": 4, "top_k": 2, "shared": 1},
}
RWKV = {"mixer": {"name": "wkv4"}, "channel": {"name": "rwkv"}}


def build(layers: list[Any], dtype: torch.dtype, **options: Any) -> SpikeLM:
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "vocab_size": 31,
        "hidden_size": 32,
        "num_hidden_layers": len(layers),
        "layers": layers,
        "neuron": ADAPTIVE,
        "norm": "rmsnorm",
        "initializer_range": 0.3,
        **options,
    }
    model = SpikeLM(ModelConfig(**given)).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "gain", "norm.weight")):  # none of them at its neutral value
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(1))


def by_step(model: SpikeLM, text: Tensor) -> Tensor:
    state, outputs = model.init_state(text.shape[0], max_len=text.shape[1]), []
    for t in range(text.shape[1]):
        logits, state = model(text[:, t], state)
        outputs.append(logits)
    return torch.stack(outputs, 1)


def slice_of(whole: Tensor, part: Tensor) -> Tensor:
    for dim in range(whole.dim()):
        if whole.shape[dim] != part.shape[dim]:
            return whole.chunk(dist.get_world_size(), dim)[dist.get_rank()]
    return whole


def gradients(model: SpikeLM, text: Tensor) -> dict[str, Tensor]:
    logits, _ = model(text)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def floats(layers: list[Any], **options: Any) -> dict[str, Any]:
    """Largest differences of a whole and a sharded model in float64, relative."""
    whole, text = build(layers, torch.float64, **options), tokens(3, 11)
    part = copy.deepcopy(whole)
    shard(part)
    sizes = [sum(p.numel() for m in x.blocks for p in m.parameters()) for x in (whole, part)]
    with torch.no_grad():
        expected = whole(text)[0]
        valid = torch.ones_like(text, dtype=torch.bool)
        valid[0, :3] = False
        masked = [model(text, None, Context(valid=valid))[0] for model in (whole, part)]
        found = {
            "logits": far(part(text)[0], expected),
            "steps": far(by_step(part, text), expected),
            "padded": far(masked[1], masked[0]),
            "share": sizes[1] / sizes[0],
        }
    want, got = gradients(whole, text), gradients(part, text)
    assert want.keys() == got.keys()
    found["gradients"] = max(far(value, slice_of(want[name], value)) for name, value in got.items())
    return found


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-3))


def naive(layers: list[Any]) -> float:
    """What comes out where every rank takes the mean of its own features."""
    whole, text = build(layers, torch.float64), tokens(3, 11)
    part = copy.deepcopy(whole)
    shard(part)
    for module in part.modules():
        if isinstance(module, Adaptive):
            module.whole_mean = None
    with torch.no_grad():
        return far(part(text)[0], whole(text)[0])


@torch.no_grad()
def integers(layers: list[Any], group: int | None, exact: bool, **options: Any) -> dict[str, Any]:
    """Int8 in float32: whether the bits are those of the whole model, and how far off they are."""
    whole = build(layers, torch.float32, weights={"name": "int8", "group_size": group}, **options)
    part, text = copy.deepcopy(whole), tokens(3, 11)
    shard(part, exact=exact)
    a, b = part(text)[0], whole(text)[0]
    return {"equal": torch.equal(a, b), "far": far(a, b)}


def swiglu_alone(float_weights: bool) -> dict[str, Any]:
    """The channel without a model, column-parallel gate and up, row-parallel down."""
    weights = {"name": "float"} if float_weights else {"name": "int8", "group_size": None}
    dtype = torch.float64 if float_weights else torch.float32
    config = ModelConfig(hidden_size=32, neuron=ADAPTIVE, weights=weights)
    torch.manual_seed(0)
    whole: Part = build_child(config, 0, "", "channel", "channel", SWIGLU).to(dtype)
    for module in whole.modules():
        if isinstance(module, Projection) and not float_weights:
            module.linear.load_float(torch.randn(module.out_features, module.in_features))  # type: ignore[operator]
    part = copy.deepcopy(whole)
    shard(part, exact=True)
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        a, b = part(x)[0], whole(x)[0]
    return {"equal": torch.equal(a, b), "far": far(a, b), "width": part.down.in_features}


def refusal(call: Callable[[], nn.Module]) -> str:
    try:
        call()
    except ConfigError as error:
        return str(error)
    return "not refused"


def refusals() -> dict[str, str]:
    grouped = {"name": "int8", "group_size": 32}
    three = {"mixer": {"name": "swa", "num_heads": 4, "num_kv_heads": 1, "head_dim": 8}, "channel": SWIGLU}
    odd = {"mixer": {"name": "wkv4"}, "channel": {"name": "swiglu", "hidden": 33}}
    target = {**ADAPTIVE, "rate_target": {"target": 0.2}}
    twice = build([RWKV], torch.float32)
    shard(twice)
    return {
        "groups": refusal(lambda: shard(build([GLA], torch.float32, weights=grouped))),
        "heads": refusal(lambda: shard(build([three], torch.float32))),
        "features": refusal(lambda: shard(build([odd], torch.float32))),
        "rate_target": refusal(lambda: shard(build([RWKV], torch.float32, neuron=target))),
        "twice": refusal(lambda: shard(twice)),
    }


def main(out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    hybrid = [GLA, SWA, FULL, MOE, RWKV]
    found = {
        "hybrid": floats([*hybrid, DELTA]),
        "plif": floats([GLA, RWKV], neuron={"name": "plif", "gain": 2.0}),
        "twin": floats([*hybrid, DELTA], neuron={"name": "none"}),
        "heads": floats([{"mixer": {"name": "gated_delta", **MANY}, "channel": SWIGLU}]),
        "naive": naive([GLA, SWA]),
        "swiglu": swiglu_alone(True),
        "swiglu int8": swiglu_alone(False),
        "int8": {str(i): integers([layer], None, True) for i, layer in enumerate(hybrid)},
        "int8 hybrid": integers(hybrid, None, True),
        # Float products inside the gated delta rule may round by how many heads they are taken for.
        "int8 delta": integers([DELTA], None, True),
        "int8 sums": integers(hybrid, None, False),
        "int8 groups": integers([GLA, RWKV], 16, False),
        "int8 weight-only": integers([GLA, RWKV], None, False, neuron={"name": "none"}),
        "refusals": refusals(),
    }
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
