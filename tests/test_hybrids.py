"""Whole hybrid models: the nano presets made small, through everything that handles a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm import state as states
from spikelm.checkpoint import load_model, save_checkpoint
from spikelm.codings.base import build_coding
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError
from spikelm.loss import next_token_loss
from spikelm.model import SpikeLM
from spikelm.recurrence import Context
from spikelm.train.optim import parameter_groups

PRESETS = (
    "spikingbrain-nano",
    "spikingbrain-moe-nano",
    "spikingbrain2-nano",
    "spikformer-lm-nano",
    "spike-driven-lm-nano",
)
SMALL = {"num_heads": 4, "head_dim": 8, "hidden": 24, "window": 5, "experts": 4, "gate_rank": 4}
VOCABULARY = 61
T = 12


def shrunk(value: Any) -> Any:
    if isinstance(value, Mapping):
        small = {key: SMALL[key] if key in SMALL else shrunk(entry) for key, entry in value.items()}
        if "num_kv_heads" in small:
            small["num_kv_heads"] = 4 if small["name"] == "gated_delta" else 2
        return small
    return [shrunk(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def small(name: str, **changes: Any) -> ModelConfig:
    """The preset with every kind of layer it has, few features, and sinks where it has them."""
    values = ModelConfig.from_yaml(name).to_dict()
    values |= {"layers": shrunk(values["layers"]), "hidden_size": 32, "vocab_size": VOCABULARY}
    values["sink_tokens"] = min(values["sink_tokens"], 3)
    return ModelConfig.from_dict({**values, **changes})


def build(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> SpikeLM:
    torch.manual_seed(0)
    model = SpikeLM(small(name, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def tokens(rows: int = 2, length: int = T, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def same_state(found: states.State, expected: states.State) -> None:
    other = states.flatten(expected)
    for name, value in states.flatten(found).items():
        assert value.dtype in (torch.float64, torch.int64), name
        close(value, other[name])


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_the_state_is_all_that_is_remembered(name: str) -> None:
    """Token by token, in chunks, saved and read back, its rows repeated."""
    model, x = build(name), tokens()
    whole, end = model(x)
    state = model.init_state(2, max_len=T)
    for t in range(5):
        logits, state = model(x[:, t], state)
        close(logits, whole[:, t])
    like = model.empty_state(2, max_len=T)
    state = states.detach(states.unflatten(dict(states.flatten(state)), like))
    beams = states.select_rows(state, torch.tensor([1, 0, 1]))
    close(model(x[[1, 0, 1], 5:], beams)[0], whole[[1, 0, 1], 5:])
    logits, state = model(x[:, 5:], state)
    close(logits, whole[:, 5:])
    same_state(state, end)


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_resets_and_padding_in_a_carried_state(name: str) -> None:
    """Row 0 is reset at a token that is not valid, row 1 is not valid at all, row 2 is reset at once."""
    model, x = build(name), tokens(3)
    start = model(tokens(3, 7, seed=2), model.init_state(3, max_len=40))[1]
    valid, reset = torch.ones(3, T, dtype=torch.bool), torch.zeros(3, T, dtype=torch.bool)
    valid[0, 3] = valid[1] = False
    reset[0, 3] = reset[2, 0] = True
    logits, end = model(x, start, Context(reset=reset, valid=valid))
    same_state(states.select_rows(end, torch.tensor([1])), states.select_rows(start, torch.tensor([1])))
    close(logits[:1, :3], model(x[:1, :3], states.select_rows(start, torch.tensor([0])))[0])
    for row, first in ((0, 4), (2, 0)):
        fresh = model.init_state(1, max_len=40)
        alone, last = model(x[row : row + 1, first:], fresh)
        close(logits[row : row + 1, first:], alone)
        same_state(states.select_rows(end, torch.tensor([row])), last)
    reset[1, 5] = True
    _, end = model(x, start, Context(reset=reset, valid=valid))
    same_state(states.select_rows(end, torch.tensor([1])), model.init_state(1, max_len=40))


@pytest.mark.parametrize("name", PRESETS)
def test_recomputation_changes_nothing(name: str) -> None:
    model, x = build(name).train(), tokens()
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[0, 5] = reset[1, 0] = True
    seen: list[tuple[int, dict[str, list[int]], dict[str, torch.Tensor | None]]] = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        losses: list[torch.Tensor] = []
        loads: dict[str, torch.Tensor] = {}
        output = next_token_loss(model, x, x, None, Context(reset=reset, losses=losses, loads=loads))
        output.loss.backward()
        counted = {path: load.tolist() for path, load in loads.items()}
        seen.append((len(losses), counted, {key: value.grad for key, value in model.named_parameters()}))
    (*kept, expected), (*recomputed, found) = seen
    assert kept == recomputed
    for key, gradient in expected.items():
        assert gradient is not None, key  # DistributedDataParallel waits for every one
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_bf16_autocast_is_near(name: str) -> None:
    model, x = build(name, torch.float32).train(), tokens(4)
    found = []
    for low in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            output = next_token_loss(model, x, x, None, Context(losses=[]))
        output.loss.backward()
        for key, value in states.flatten(output.state).items():
            assert value.dtype in (torch.float32, torch.int64), key
        found.append((output.loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))  # type: ignore[union-attr]
    assert torch.isfinite(found[1][1]).all()
    assert found[1][0] == pytest.approx(found[0][0], abs=0.05)
    assert torch.cosine_similarity(found[0][1], found[1][1], 0) > 0.7


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_expanded_over_micro_steps_is_collapsed(name: str) -> None:
    model, x = build(name), tokens()
    whole, _ = model(x)
    for coding in ("ternary", "twos_complement"):
        close(model(x, None, Context(coding=build_coding(coding)))[0], whole)


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_folders_of_both_worlds(name: str, tmp_path: Path) -> None:
    """Ours read by transformers and the reverse; what stays float32 in bfloat16; both write the same text."""
    from spikelm.hf import SpikeLMForCausalLM

    model, x = build(name, torch.float32), tokens()
    logits, _ = model(x)
    save_checkpoint(tmp_path / "ours", model)
    assert torch.equal(load_model(tmp_path / "ours")(x)[0], logits)
    theirs = SpikeLMForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(theirs(x).logits, logits)
    theirs.save_pretrained(tmp_path / "theirs")
    low = load_model(tmp_path / "theirs", dtype=torch.bfloat16)
    kept = {key for key, value in low.state_dict().items() if value.dtype == torch.float32}
    assert kept == low.fp32_parameters() & low.state_dict().keys()
    their_low = SpikeLMForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    assert kept == {
        key.removeprefix("model.")
        for key, value in their_low.state_dict().items()
        if value.dtype == torch.float32
    }
    assert torch.equal(their_low(x).logits, low(x)[0])

    written = theirs.generate(x[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)[0, T:].tolist()
    own, state = model(x[:1], model.init_state(1, max_len=T + 6))
    expected = []
    for _ in range(6):
        chosen = own[:, -1].argmax(-1)
        expected.append(int(chosen))
        own, state = model(chosen[:, None], state)
    assert written == expected


@torch.no_grad()
def test_an_int8_router_stays_int8_in_bfloat16(tmp_path: Path) -> None:
    """The router is kept in float32, and transformers would make floats of whole numbers, too."""
    from spikelm.hf import SpikeLMForCausalLM

    integers = {"weights": {"name": "int8", "group_size": 16}, "neuron_overrides": {}}
    save_checkpoint(tmp_path, build("spikingbrain-moe-nano", torch.float32, **integers))
    own = load_model(tmp_path, dtype=torch.bfloat16)
    theirs = SpikeLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(theirs(tokens()).logits, own(tokens())[0])


def test_sinks_and_filters_are_optimised_as_vectors() -> None:
    """Muon would make them orthogonal, and weight decay would pull them to zero."""
    config = small("spikingbrain-moe-nano").to_dict()
    delta = {"name": "gated_delta", "short_convolution": 4}
    config["layers"] = [{"mixer": delta, "channel": config["layers"][1]["channel"]}]
    groups = parameter_groups(SpikeLM(ModelConfig.from_dict(config)))
    vectors = {name for name, _ in groups.vectors}
    assert {"sinks.weight", "blocks.0.mixer.query_convolution.weight"} <= vectors
    neurons = {name for name, _ in groups.neurons}
    assert {"blocks.0.channel.router.linear.weight", "blocks.0.mixer.A_log"} <= neurons
    assert all(name.endswith("linear.weight") for name, _ in groups.hidden)
    assert any(".experts.3.up." in name for name, _ in groups.hidden)


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ({"name": "gla", "headz": 3}, r"blocks\.1\.mixer: unknown option of mixer 'gla' 'headz'"),
        ({"name": "swa", "window": 0}, r"blocks\.1\.mixer: window is 0; expected"),
        ({"name": "swa", "num_heads": 4, "num_kv_heads": 3}, r"blocks\.1\.mixer: num_kv_heads 3 does not"),
        ({"name": "parallel", "branches": 3}, r"blocks\.1\.mixer: parallel branches is 3; expected"),
        (
            {"name": "parallel", "branches": [{"num_heads": 2}, {"name": "swa"}]},
            r"^blocks\.1\.mixer\.branch0 is \{'num_heads': 2\}; expected a mapping with a name",
        ),
        (
            {"name": "parallel", "branches": [{"name": "swa"}, {"name": "gla", "gate_rank": 0}]},
            r"^blocks\.1\.mixer\.branch1: gate_rank is 0; expected",
        ),
    ],
)
def test_a_bad_option_is_said_with_its_layer(mixer: dict[str, Any], message: str) -> None:
    plain = {"mixer": {"name": "wkv4"}, "channel": {"name": "rwkv"}}
    config = ModelConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=2, layers=(plain, {**plain, "mixer": mixer})
    )
    with pytest.raises(ConfigError, match=message):
        SpikeLM(config)


@pytest.mark.parametrize("value", [None, [1]])
@pytest.mark.parametrize("key", ["neuron_overrides", "weight_overrides"])
def test_overrides_are_mappings(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key} is .*; expected a mapping"):
        ModelConfig(**{key: value})


def test_a_folder_of_format_1_is_read(tmp_path: Path) -> None:
    """What came with format 2 has the values that format 1 meant."""
    torch.manual_seed(0)
    model = SpikeLM(ModelConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2)).eval()
    save_checkpoint(tmp_path / "old", model)
    file = tmp_path / "old" / "config.json"
    values = json.loads(file.read_text())
    for key in ("norm", "embedding_norm", "initializer_range", "sink_tokens", "weights", "weight_overrides"):
        del values[key]
    file.write_text(json.dumps({**values, "format_version": 1}))
    assert torch.equal(load_model(tmp_path / "old")(tokens())[0], model(tokens())[0])
