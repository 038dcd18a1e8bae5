"""gla and gla_tied: the published equations with repeated heads, sizes of states, extreme gates, training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spikelm import state as states
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError
from spikelm.kernels.dispatch import use_backend
from spikelm.mixers.gla import GLA, TiedGLA
from spikelm.model import SpikeLM

TINY = {
    "vocab_size": 17,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "norm": "rmsnorm",
    "neuron": {"name": "none"},
}
RELEASE = {"num_heads": 28, "num_kv_heads": 4, "head_dim": 128, "qkv_bias": True}
EVERYTHING = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "qkv_bias": True,
    "qk_norm": True,
    "rope": True,
    "short_convolution": 4,
    "output_gate": "swish",
}


def model_with(mixer: dict[str, Any], **values: Any) -> SpikeLM:
    torch.manual_seed(3)
    layers = [{"mixer": mixer, "channel": {"name": "rwkv"}}]
    return SpikeLM(ModelConfig.from_dict({**TINY, "layers": layers, **values}))


def mixer_with(mixer: dict[str, Any], **values: Any) -> GLA | TiedGLA:
    part = model_with(mixer, **values).double().blocks[1].mixer
    assert isinstance(part, (GLA, TiedGLA))
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return part


def straight_line(part: GLA | TiedGLA, x: Tensor, heads: int, groups: int) -> tuple[Tensor, Tensor]:
    """The layer as it is published: keys, values and gates repeated, one state for each query head."""
    W = dict(part.named_parameters())
    B, T, _ = x.shape

    def project(name: str) -> Tensor:
        y = x @ W[f"{name}.linear.weight"].T
        return y + W[f"{name}.bias"] if f"{name}.bias" in W else y

    def split(y: Tensor, count: int) -> Tensor:
        return y.view(B, T, count, -1).repeat_interleave(heads // count, 2)

    q, k, v = split(project("query"), heads), split(project("key"), groups), split(project("value"), groups)
    if isinstance(part, TiedGLA):
        q, k = 1 / (1 + torch.exp(-q)), 1 / (1 + torch.exp(-k))
        alpha = 1 - k
    else:
        low = x @ W["gate_low.linear.weight"].T
        z = split(low @ W["gate_high.linear.weight"].T + W["gate_high.bias"], groups)
        alpha = (1 / (1 + torch.exp(-z))) ** (1 / 16)
        q, k = q.clamp(min=0), k.clamp(min=0)
    S = x.new_zeros(B, heads, part.head_dim, part.head_dim)
    outputs = []
    for t in range(T):
        S = alpha[:, t, :, :, None] * S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) / math.sqrt(part.head_dim))
    o = torch.stack(outputs, 1)
    o = o * torch.rsqrt((o * o).mean(-1, keepdim=True) + 1e-5) * W["output_norm.weight"]
    return o.flatten(2) @ W["output.linear.weight"].T, S


@pytest.mark.parametrize("name", ["gla", "gla_tied"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_is_the_published_layer_with_one_state_for_a_group(name: str, backend: str) -> None:
    spec = {"name": name, "num_heads": 6, "num_kv_heads": 2, "head_dim": 4, "qkv_bias": True}
    part = mixer_with(spec)
    x = torch.randn(2, 70, 16, dtype=torch.float64)
    with use_backend(backend):
        y, state = part(x)
    expected, repeated = straight_line(part, x, 6, 2)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    memory = state["memory"]
    assert isinstance(memory, Tensor) and memory.shape == (2, 2, 4, 4)
    torch.testing.assert_close(memory.repeat_interleave(3, 1), repeated, rtol=1e-10, atol=1e-10)


def test_state_of_the_7b_layer_is_a_seventh_of_the_releases() -> None:
    """The figures of the module's docstring and of docs/linear-attention.md; nothing is allocated."""
    with torch.device("meta"):
        model_with({"name": "gla", **EVERYTHING})
        part = model_with({"name": "gla", **RELEASE}, hidden_size=3584).blocks[0].mixer
    ours = states.state_bytes(part.init_state(1, "meta"))
    release = 4 * 28 * 128 * 128
    assert (ours, release, release / ours) == (256 * 2**10, 1.75 * 2**20, 7)
    assert states.state_bytes(part.init_state(1, "meta", max_len=1_000_000)) == ours
    # q, k, v with biases, o, the norm of a head, and the gate: what the layer adds to Qwen2.5 is small.
    gate = 3584 * 16 + 16 * 512 + 512
    base = 2 * 3584 * 3584 + 3584 + 2 * (3584 * 512 + 512)
    assert sum(p.numel() for p in part.parameters()) == base + gate + 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e6])
def test_tied_gates_are_sound_for_any_key(size: float, dtype: torch.dtype) -> None:
    """Keys of exactly 0 and 1, where log(1 - k) and its gradient are infinite or not a number."""
    part = mixer_with({"name": "gla_tied", "num_heads": 2, "head_dim": 8}).to(dtype)
    x = (size * torch.randn(2, 70, 16)).to(dtype).requires_grad_()
    y, state = part(x)
    found = torch.autograd.grad(y.sum(), [x, *part.parameters()])
    assert all(torch.isfinite(value).all() for value in (y, state["memory"], *found))


def test_tied_gate_is_log_of_one_minus_key() -> None:
    part = mixer_with({"name": "gla_tied", "num_heads": 2, "head_dim": 8})
    z = torch.linspace(-6, 6, 32, dtype=torch.float64).view(2, 2, 8)
    g, _ = part.gate(z, z, {}, None)  # type: ignore[arg-type]
    assert g is not None
    torch.testing.assert_close(g, torch.log(1 - torch.sigmoid(z)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("neuron", [{"name": "none"}, {"name": "adaptive", "dead_zone": 1.0}])
@pytest.mark.parametrize(
    "mixer", [{"name": "gla"}, {"name": "gla", **EVERYTHING}, {"name": "gla_tied", **EVERYTHING}]
)
def test_decoding_a_model_is_its_forward(mixer: dict[str, Any], neuron: dict[str, Any]) -> None:
    """Token by token, in chunks and whole: equal logits and states, over more than one chunk of the op."""
    model = model_with(mixer, neuron=neuron).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ids = torch.randint(0, 17, (2, 75))
    whole, end = model(ids)
    logits, state = [], None
    for t in range(ids.shape[1]):
        one, state = model(ids[:, t], state)
        logits.append(one)
    torch.testing.assert_close(torch.stack(logits, 1), whole, rtol=1e-10, atol=1e-10)
    head, middle = model(ids[:, :31])
    tail, last = model(ids[:, 31:], middle)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=1e-10, atol=1e-10)
    for other in (state, last):
        assert other is not None
        for name, value in states.flatten(end).items():
            torch.testing.assert_close(states.flatten(other)[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("mixer", "neuron"),
    [
        ({"name": "gla"}, {"name": "none"}),
        ({"name": "gla", **EVERYTHING}, {"name": "adaptive"}),
        ({"name": "gla_tied"}, {"name": "adaptive"}),
    ],
)
def test_a_small_model_learns(mixer: dict[str, Any], neuron: dict[str, Any]) -> None:
    """A symbol somewhere among the first 8 tokens is named up to 24 tokens later; a channel alone cannot."""
    model = model_with(mixer, hidden_size=32, initializer_range=0.1, neuron=neuron)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        symbol, place = torch.randint(1, 17, (16, 1)), torch.randint(0, 8, (16, 1))
        ids = torch.zeros(16, 24, dtype=torch.int64).scatter(1, place, symbol)
        logits, _ = model(ids)
        loss = F.cross_entropy(logits[:, 8:].flatten(0, 1), symbol.expand(-1, 16).flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    first, last = losses[0], sum(losses[-5:]) / 5
    assert last < 0.5 * first, f"from {first:.2f} to {last:.2f}, chance is {math.log(16):.2f}"


@pytest.mark.parametrize("name", ["gla", "gla_tied"])
def test_heads_can_be_split_over_ranks(name: str) -> None:
    """With every parameter cut as its ``shard`` says, two halves add up to the whole (tensor parallelism)."""
    whole = mixer_with({"name": name, **EVERYTHING})
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    expected, _ = whole(x)
    total = torch.zeros_like(expected)
    for rank in range(2):
        half = mixer_with({"name": name, **EVERYTHING, "num_heads": 2, "num_kv_heads": 1})
        own = dict(half.named_parameters())
        for path, parameter in whole.named_parameters():
            part = whole.get_submodule(path.split(".")[0])
            dim = {"column": 0, "row": 1, None: None}[getattr(part, "shard", None)]
            with torch.no_grad():
                own[path].copy_(parameter if dim is None else parameter.chunk(2, dim)[rank])
        total = total + half(x)[0]
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-11)


def test_recomputing_blocks_and_low_precision() -> None:
    """Blocks computed again in backward give the same gradients; in bfloat16 the memory stays float32."""
    ids = torch.randint(0, 17, (2, 70))
    gradients = []
    for recompute in (False, True):
        model = model_with({"name": "gla", **EVERYTHING}, neuron={"name": "adaptive"})
        model.gradient_checkpointing = recompute
        with torch.autocast("cpu", torch.bfloat16):
            logits, state = model(ids)
        assert states.flatten(state)["block1.mixer.memory"].dtype == torch.float32
        logits.float().square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    low = model_with({"name": "gla_tied", **EVERYTHING}).bfloat16()
    logits, state = low(ids)
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()
    assert states.flatten(state)["block1.mixer.memory"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": "rely"}, "did you mean 'relu'"),
        ({"output_gate": True}, "expected 'swish', or false"),
        ({"output_gate": "silu"}, "expected 'swish', or false"),
        ({"gate_rank": 0}, "gate_rank is 0"),
        ({"gate_divisor": 0.0}, "gate_divisor is 0.0"),
        ({"short_convolution": 1}, "expected at least 2 tokens"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads 3"),
        ({"head_dim": 1, "rope": True}, "rotated"),
        ({"gate": 1}, "option of mixer"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_with({"name": "gla", **options})
    if "gate_rank" in options or "feature_map" in options:
        with pytest.raises(ConfigError, match="option of mixer"):
            model_with({"name": "gla_tied", **options})
