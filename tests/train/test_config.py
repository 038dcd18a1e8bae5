"""What a configuration accepts, and the one sentence for what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spikelm.errors import ConfigError
from spikelm.presets import find, names
from spikelm.tokenizer import Tokenizer
from spikelm.train.config import TrainConfig
from spikelm.train.overrides import apply_overrides
from spikelm.train.setup import model_config
from spikelm.yaml_values import parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-2e+3", -2000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("12", 12),
        ("1_000", 1000),
        ("true", True),
        ("null", None),
        ("", None),
        ("[0.9, 0.99]", [0.9, 0.99]),
        ("{name: lif, tau: 2e0}", {"name": "lif", "tau": 2.0}),
        ("3e", "3e"),
        ("e5", "e5"),
        ("builtin:python-docs#train", "builtin:python-docs#train"),
    ],
)
def test_yaml_values(text: str, value: Any) -> None:
    got = parse_value(text, where="x")
    assert got == value and type(got) is type(value)


def test_overrides(make_values: Any) -> None:
    values = make_values()
    changed = apply_overrides(
        values, ["optim.lr=3e-4", "model=spikegpt-nano", "model.hidden_size=32", "schedule.name=wsd"]
    )
    config = TrainConfig.from_dict(changed)
    assert config.optim.lr == 3e-4 and config.schedule.name == "wsd" and config.schedule.warmup == 2
    assert config.model == {"preset": "spikegpt-nano", "hidden_size": 32}
    assert values["optim"]["lr"] == 3e-3  # the input is left alone


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optim__learning_rate", 1.0, ["unknown key 'optim.learning_rate'", "optim.lr"]),
        ("optin", {}, ["unknown key 'optin'", "did you mean 'optim'"]),
        ("lr", 3, ["unknown key 'lr'; did you mean 'optim.lr' or 'optim.muon.lr'?", "known: accumulation,"]),
        ("warmpu", 3, ["did you mean 'schedule.warmup'?"]),
        ("data__batch_size", 3, ["did you mean 'batch_size'?"]),
        ("optim__muon__momentun", 0.9, ["did you mean 'optim.muon.momentum'"]),
        ("data__blok_length", 3, ["did you mean 'data.block_length'"]),
        ("steps", "many", ["steps is 'many' (str)", "integer"]),
        ("steps", True, ["steps is True (bool)", "integer"]),
        ("steps", 0, ["steps is 0", "greater than or equal to 1"]),
        ("steps", 1.5, ["steps is 1.5", "integer"]),
        ("optim__lr", "fast", ["optim.lr is 'fast'", "number"]),
        ("optim__lr", float("nan"), ["optim.lr is nan"]),
        ("optim__lr", -1.0, ["optim.lr is -1.0", "greater than 0"]),
        ("optim__betas", [0.9], ["optim.betas"]),
        ("optim__betas", [0.9, 1.0], ["optim.betas.1 is 1.0"]),
        ("optim__name", "adagrad", ["optim.name is 'adagrad'", "'adamw'", "'muon'"]),
        ("precision", "fp8", ["precision is 'fp8'", "bf16"]),
        ("device", "gpu", ["device is 'gpu'"]),
        ("model", 5, ["model is 5 (int)"]),
        ("resume", "yes please", ["resume", "boolean"]),
        ("data", 3, ["data is 3 (int)"]),
        ("optim__min_lr", 1.0, ["min_lr is 1.0, above lr"]),
        ("accumulation", 5, ["accumulation is 5 and batch_size 4"]),
        (
            "schedule__warmup",
            13,
            ["schedule.warmup is 13, longer than the 12 steps", "for example schedule.warmup=1,"],
        ),
    ],
)
def test_wrong_values_are_one_sentence(make_values: Any, key: str, value: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict(make_values(**{key: value}))
    message = str(caught.value)
    assert message.startswith("training configuration: ") and "\n" not in message
    for word in words:
        assert word in message, message


def test_a_short_run_of_a_preset_says_what_to_type() -> None:
    words = ["steps=6", "schedule.warmup=1"]
    with pytest.raises(ConfigError, match=f"set schedule.warmup too, for example {words[1]},"):
        TrainConfig.from_yaml("nano-sd", words[:1])
    assert TrainConfig.from_yaml("nano-sd", words).schedule.warmup == 1


def test_the_published_settings_that_the_enwik8_preset_names() -> None:
    text = find("train", "spikegpt-46m-enwik8").read_text(encoding="utf-8")
    words = text.partition("As published by the paper: ")[2].splitlines()[0].split()
    config = TrainConfig.from_yaml("spikegpt-46m-enwik8", words)
    assert (config.optim.name, config.optim.lr, config.optim.weight_decay) == ("adam", 6e-4, 0.0)
    assert (config.l2wrap, config.batch_size) == (1e-4, 12)


def test_adam_is_as_published(make_values: Any) -> None:
    optim = TrainConfig.from_dict(make_values(optim__name="adam")).optim
    assert (optim.betas, optim.eps, optim.weight_decay) == ((0.9, 0.99), 4e-9, 0.0)
    with pytest.raises(ConfigError, match="weight_decay is not part of the published adam"):
        TrainConfig.from_dict(make_values(optim__name="adam", optim__weight_decay=0.1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: x\nmodel: y\n", "'model' is given twice, the second time on line 2"),
        ("model: [", "is not YAML"),
        ("- 1\n", "holds a list"),
        ("", r"c\.yaml is empty; a configuration is a mapping"),
        ("# nothing yet\n", r"c\.yaml is empty"),
        ("1: 2\n", "key 1 on line 1 is not text"),
        ("model: a\n", "data is missing"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        TrainConfig.from_yaml(path)


@pytest.mark.parametrize("pair", ["optim.lr", "=3", "optim..lr=3", "steps.x=1", "a=[", "data.train.x=1"])
def test_bad_overrides(make_values: Any, pair: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        apply_overrides(make_values(), [pair])


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        TrainConfig.from_yaml("nowhere.yaml")
    with pytest.raises(ConfigError, match="unknown train preset 'nano-sdd'"):
        TrainConfig.from_yaml("nano-sdd")


@pytest.mark.parametrize("name", names("train"))
def test_presets_are_valid(name: str) -> None:
    config = TrainConfig.from_yaml(find("train", name))
    resolved = model_config(config.model, Tokenizer.bytes())
    assert resolved.vocab_size == 256


def test_model_forms() -> None:
    tokenizer = Tokenizer.bytes()
    preset = model_config("spikegpt-nano-sd", tokenizer)
    assert model_config({"preset": "spikegpt-nano-sd", "neuron": {"k": 5.0}}, tokenizer).neuron == {
        **preset.neuron,
        "k": 5.0,
    }
    replaced = model_config({"preset": "spikegpt-nano-sd", "neuron": {"name": "lif"}}, tokenizer)
    assert replaced.neuron == {"name": "lif"}
    assert model_config({"preset": "spikegpt-nano-sd", "twin": True}, tokenizer) == preset.twin()
    assert model_config({"preset": "spikegpt-216m"}, tokenizer).vocab_size == 256
    assert model_config({"preset": "spikegpt-216m", "vocab_size": 50277}, tokenizer).vocab_size == 50277
    with pytest.raises(ConfigError, match="model.vocab_size is 100 and the tokenizer has 256 tokens"):
        model_config({"hidden_size": 8, "vocab_size": 100}, tokenizer)
    with pytest.raises(ConfigError, match="did you mean 'hidden_size'"):
        model_config({"hiden_size": 8}, tokenizer)
    with pytest.raises(ConfigError, match="model.twin is 'x'"):
        model_config({"twin": "x"}, tokenizer)
