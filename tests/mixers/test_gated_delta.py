"""gated_delta: Qwen3-Next as an independent implementation, initial values, states, spikes, training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from spikelm import state as states
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError
from spikelm.kernels.dispatch import use_backend
from spikelm.meter import Meter
from spikelm.mixers.gated_delta import LARGEST_A, STEPS, GatedDelta
from spikelm.model import SpikeLM
from spikelm.recurrence import Context

TINY = {
    "vocab_size": 17,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "norm": "rmsnorm",
    "neuron": {"name": "none"},
}
ADAPTIVE = {"name": "adaptive", "k": 3.0}
EVERYTHING = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "qkv_bias": True,
    "qk_norm": True,
    "rope": True,
    "allow_negative": True,
}
PROJECTIONS = ("query", "key", "value", "decay", "beta", "output_gate", "output")


def model_with(mixer: dict[str, Any] | None = None, **values: Any) -> SpikeLM:
    torch.manual_seed(3)
    layers = [{"mixer": {"name": "gated_delta", **(mixer or {})}, "channel": {"name": "rwkv"}}]
    return SpikeLM(ModelConfig.from_dict({**TINY, "layers": layers, **values}))


def mixer_with(mixer: dict[str, Any] | None = None, **values: Any) -> GatedDelta:
    part = model_with(mixer, **values).blocks[1].mixer
    assert isinstance(part, GatedDelta)
    return part


def randomise(module: torch.nn.Module, share: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(share * torch.randn_like(parameter))


def qwen3_next_with_weights_of(part: GatedDelta, heads: int, size: int, epsilon: float) -> Any:
    """Transformers' layer with our weights in its order: by head [query, key, value, gate], [beta, decay]."""
    config = Qwen3NextConfig(
        hidden_size=16,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=size,
        linear_value_head_dim=size,
        linear_conv_kernel_dim=4,
        rms_norm_eps=epsilon,
    )
    peer = Qwen3NextGatedDeltaNet(config, 0)
    W = {name: parameter.detach() for name, parameter in part.named_parameters()}
    four = [
        W[f"{name}.linear.weight"].unflatten(0, (heads, -1))
        for name in ("query", "key", "value", "output_gate")
    ]
    two = [W[f"{name}.linear.weight"].unflatten(0, (heads, -1)) for name in ("beta", "decay")]
    windows = [W[f"{name}_convolution.weight"] for name in ("query", "key", "value")]
    peer.load_state_dict(
        {
            "in_proj_qkvz.weight": torch.cat(four, 1).flatten(0, 1),
            "in_proj_ba.weight": torch.cat(two, 1).flatten(0, 1),
            "conv1d.weight": torch.cat(windows)[:, None],
            "dt_bias": W["dt_bias"],
            "A_log": W["A_log"],
            "norm.weight": W["output_norm.weight"],
            "out_proj.weight": W["output.linear.weight"],
        }
    )
    return peer


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("steps", [1, 70])
def test_is_the_layer_of_qwen3_next(backend: str, steps: int) -> None:
    part = mixer_with({"num_heads": 3, "head_dim": 8}, layer_norm_epsilon=1e-6)
    randomise(part, 0.3)
    peer = qwen3_next_with_weights_of(part, 3, 8, 1e-6)
    x = torch.randn(2, steps, 16)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with use_backend(backend):
        y, _ = part(mine)
    expected = peer(theirs)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad((y * weight).sum(), [mine, part.A_log, part.dt_bias]),
        torch.autograd.grad((expected * weight).sum(), [theirs, peer.A_log, peer.dt_bias]),
        rtol=1e-3,
        atol=1e-4,
    )


def test_without_a_convolution_silu_stays() -> None:
    """A convolution that passes every token through is the same layer."""
    convolved = mixer_with(EVERYTHING).double()
    randomise(convolved, 0.3)
    plain = mixer_with({**EVERYTHING, "short_convolution": 0}).double()
    weights = convolved.state_dict()
    for name in ("query", "key", "value"):
        window = weights.pop(f"{name}_convolution.weight")
        window[:, :-1], window[:, -1] = 0.0, 1.0
    plain.load_state_dict(weights)
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(plain(x)[0], convolved(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2, 8, 31])
def test_decays_start_in_the_published_range(heads: int) -> None:
    part = mixer_with({"num_heads": heads, "head_dim": 4})
    rates, steps = part.A_log.exp(), F.softplus(part.dt_bias)
    assert rates.shape == steps.shape == (heads,)
    assert (rates > 0).all() and (rates < LARGEST_A).all()
    assert (steps >= STEPS[0]).all() and (steps <= STEPS[1]).all()
    torch.testing.assert_close(rates.mean(), torch.tensor(LARGEST_A / 2))
    place = (steps / STEPS[0]).log() / math.log(STEPS[1] / STEPS[0])
    assert len(place.unique()) == heads
    if heads > 2:
        # every quarter of the range has its share, and the order is not that of A
        assert (torch.histc(place, 4, 0, 1) >= heads // 8).all()
        assert torch.corrcoef(torch.stack([rates, place]))[0, 1].abs() < 0.5


def test_decays_stay_float32() -> None:
    kept = model_with().fp32_parameters()
    assert {"blocks.0.mixer.A_log", "blocks.0.mixer.dt_bias"} <= kept


def test_beta_reaches_two_where_it_may() -> None:
    for allowed, top in ((False, 1.0), (True, 2.0)):
        part = mixer_with({"allow_negative": allowed, "num_heads": 1, "head_dim": 4, "short_convolution": 0})
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.fill_(0.5)
            part.beta.linear.weight.fill_(100.0)
        x = torch.ones(1, 1, 16)
        *_, beta, _ = part._inputs(x, None, part.init_state(1), Context())
        torch.testing.assert_close(beta, torch.full((1, 1, 1), top))


def test_sizes_of_the_state_and_the_layer() -> None:
    """The figures of docs/gated-delta.md: a layer in the shape of Qwen3-4B; nothing is allocated."""
    qwen = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "qk_norm": True, "rope": True}
    with torch.device("meta"):
        part = model_with(qwen, hidden_size=2560, num_hidden_layers=1).blocks[0].mixer
    state = part.init_state(1, "meta")
    sizes = {name: states.state_bytes({name: value}) for name, value in state.items() if value != {}}
    assert sizes == {
        "memory": 8 * 128 * 128 * 4,
        "position": 8,
        "query_convolution": 3 * 4096 * 4,
        "key_convolution": 3 * 1024 * 4,
        "value_convolution": 3 * 1024 * 4,
    }
    assert states.state_bytes(state) == 598_024
    assert states.state_bytes(part.init_state(1, "meta", max_len=1_000_000)) == 598_024
    assert part.capacity(state) is None
    inherited = 2560 * (4096 + 2 * 1024) + 4096 * 2560 + 2 * 128
    added = 2 * 2560 * 8 + 2 * 8 + 2560 * 4096 + 4 * (4096 + 2 * 1024) + 128
    assert sum(parameter.numel() for parameter in part.parameters()) == inherited + added


@pytest.mark.parametrize("neuron", [{"name": "none"}, ADAPTIVE])
@pytest.mark.parametrize("mixer", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_decoding_a_model_is_its_forward(mixer: dict[str, Any], neuron: dict[str, Any]) -> None:
    """Token by token, in chunks and whole: equal logits and states, over more than one chunk of the op."""
    model = model_with(mixer, neuron=neuron).double()
    randomise(model, 0.2)
    ids = torch.randint(0, 17, (2, 75))
    with torch.no_grad():
        whole, end = model(ids)
        logits, state = [], None
        for t in range(ids.shape[1]):
            one, state = model(ids[:, t], state)
            logits.append(one)
        head, middle = model(ids[:, :31])
        tail, last = model(ids[:, 31:], middle)
    torch.testing.assert_close(torch.stack(logits, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=1e-10, atol=1e-10)
    for other in (state, last):
        assert other is not None
        for name, value in states.flatten(end).items():
            torch.testing.assert_close(states.flatten(other)[name], value, rtol=1e-10, atol=1e-10)


def test_packed_documents_are_separate_texts() -> None:
    model = model_with(EVERYTHING, neuron=ADAPTIVE).double()
    randomise(model, 0.2)
    ids = torch.randint(0, 17, (1, 90))
    reset = torch.zeros(1, 90, dtype=torch.bool)
    reset[0, [0, 37, 38, 70]] = True
    with torch.no_grad():
        packed, _ = model(ids, None, Context(reset=reset))
        alone = [model(ids[:, a:b])[0] for a, b in ((0, 37), (37, 38), (38, 70), (70, 90))]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-10, atol=1e-10)


def loss_of(model: SpikeLM, ids: Tensor, targets: Tensor) -> Tensor:
    logits, _ = model(ids)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def test_checkpointed_gradients_are_the_same() -> None:
    model = model_with(EVERYTHING, neuron=ADAPTIVE).double()
    randomise(model, 0.2)
    ids = torch.randint(0, 17, (2, 70))
    found = []
    for model.gradient_checkpointing in (False, True):
        found.append(torch.autograd.grad(loss_of(model, ids, ids), list(model.parameters())))
    for name, a, b in zip(dict(model.named_parameters()), *found, strict=True):
        assert a.any(), name
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mixer", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_a_small_spiking_model_learns_to_look_up(mixer: dict[str, Any]) -> None:
    """Four keys get values; asked for a key the model names its value. Spikes before every projection.

    One layer: no other part of it can see a value that stands further back than the short convolution.
    """
    model = model_with(mixer, hidden_size=32, num_hidden_layers=1, initializer_range=0.1, neuron=ADAPTIVE)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(110):
        keys = torch.rand(32, 4).argsort(1) + 1
        values = torch.randint(5, 9, (32, 4))
        asked = torch.randint(0, 4, (32, 8))
        facts = torch.stack([keys, values], 2).flatten(1)
        answers = torch.full((32, 16), -1)
        answers[:, 8:] = values.gather(1, asked)
        losses.append(loss_of(model, torch.cat([facts, keys.gather(1, asked)], 1), answers))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    first, last = losses[0].item(), sum(loss.item() for loss in losses[-5:]) / 5
    assert last < 0.5 < math.log(4) < first, f"from {first:.2f} to {last:.2f}, guessing is {math.log(4):.2f}"


def test_every_projection_is_metered_and_overridden_by_its_path() -> None:
    plain = {"name": "none"}
    overrides = {"blocks.0.mixer.decay": plain, "blocks.*.mixer.beta": {"name": "adaptive", "k": 1.0}}
    model = model_with(neuron=ADAPTIVE, neuron_overrides=overrides)
    randomise(model, 0.1)
    meter = Meter()
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[0, :9] = False
    model(torch.randint(0, 17, (2, 40)), None, Context(meter=meter, valid=valid))
    counted = meter.summary()["projections"]
    for layer in range(2):
        for name in PROJECTIONS:
            entry = counted[f"blocks.{layer}.mixer.{name}"]
            assert entry["tokens"] == 71
            assert entry["spiking"] == ((layer, name) != (0, "decay"))
            if entry["spiking"]:
                assert 0 < entry["firing_rate"] < 1 and entry["mean_count"] > 0
    quiet, loud = counted["blocks.1.mixer.beta"], counted["blocks.1.mixer.decay"]
    assert quiet["mean_count"] < 0.5 * loud["mean_count"], "k = 1 instead of 3 on the same input"
    with pytest.raises(ConfigError, match="projection in neuron_overrides"):
        model_with(neuron_overrides={"blocks.*.mixer.alpha": plain})


def test_heads_can_be_split_over_ranks() -> None:
    """With every parameter cut as its part says, two halves add up to the whole (tensor parallelism)."""
    whole = mixer_with(EVERYTHING).double()
    randomise(whole, 0.3)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    expected, _ = whole(x)
    total = torch.zeros_like(expected)
    for rank in range(2):
        half = mixer_with({**EVERYTHING, "num_heads": 2, "num_kv_heads": 1}).double()
        own = dict(half.named_parameters())
        for path, parameter in whole.named_parameters():
            name = path.split(".")[0]
            cut = "column" if name in whole.column_vectors else getattr(getattr(whole, name), "shard", None)
            with torch.no_grad():
                own[path].copy_(
                    parameter if cut is None else parameter.chunk(2, ("column", "row").index(cut))[rank]
                )
        total = total + half(x)[0]
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_low_precision_keeps_the_memory_in_float32(weights: torch.dtype) -> None:
    """Under autocast, and with weights in bfloat16; without spikes, which flip on the edge."""
    model = model_with(EVERYTHING).to(weights)
    for name, parameter in model.named_parameters():
        if name in model.fp32_parameters():
            parameter.data = parameter.data.float()
    ids = torch.randint(0, 17, (2, 70))
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        logits, state = model(ids)
    assert states.flatten(state)["block1.mixer.memory"].dtype == torch.float32
    logits.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    exact, _ = model_with(EVERYTHING)(ids)
    rounded = model_with(EVERYTHING)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    least = (rounded(ids)[0] - exact).norm()  # what rounding the weights alone does
    assert 0 < (logits.float() - exact).norm() < 3 * least < 0.2 * exact.norm()


def test_gates_and_norms_can_be_left_out() -> None:
    part = mixer_with({"output_gate": False, "output_norm": False, "short_convolution": 0})
    assert {name.split(".")[0] for name, _ in part.named_parameters()} == {
        *(name for name in PROJECTIONS if name != "output_gate"),
        "A_log",
        "dt_bias",
    }
    assert set(part.init_state(1)) == {"memory", *(name for name in PROJECTIONS if name != "output_gate")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_gate": True}, "expected 'swish', or false"),
        ({"allow_negative": 1}, "allow_negative .* expected true or false"),
        ({"short_convolution": 1}, "expected at least 2 tokens"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads 3"),
        ({"head_dim": 1, "rope": True}, "rotated"),
        ({"feature_map": "relu"}, "option of mixer"),
        ({"gate_rank": 4}, "option of mixer"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_with(options)
