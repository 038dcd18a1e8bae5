"""Which places are chosen, and what is read of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spikelm.checkpoint import load_model
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError, DataError
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.plots.reading import choose, joined, middle, neuron_name, place, read, sites
from spikelm.plots.samples import open_sample, sample
from spikelm.tokenizer import Tokenizer

KINDS = (
    "mixer.key mixer.value mixer.receptance mixer.output channel.key channel.value channel.receptance".split()
)


def paths(found: list[object]) -> list[str]:
    return [site.path for site in found]  # type: ignore[attr-defined]


def test_every_neuron_that_spikes_is_found(checkpoints: Callable[[str], Path]) -> None:
    before, after, dense = (sites(load_model(checkpoints(name))) for name in ("adaptive", "after", "dense"))
    assert set(before) == {f"blocks.{i}.{kind}" for i in range(3) for kind in KINDS}
    assert set(after) == {f"blocks.{i}.{kind}_neuron" for i in range(3) for kind in ("mixer", "channel")}
    assert dense == {}
    assert {neuron_name(site) for site in after.values()} == {"plif"}
    assert place("blocks.12.mixer.key") == (12, "mixer.key") and place("head") == (None, "head")


def test_choice(checkpoints: Callable[[str], Path]) -> None:
    found = sites(load_model(checkpoints("adaptive")))
    assert len(choose(found)) == 21
    assert paths(choose(found, layer=1, projection="channel.key")) == ["blocks.1.channel.key"]
    assert paths(choose(found, projection="blocks.2.mixer.key")) == ["blocks.2.mixer.key"]
    assert len(choose(found, projection="key")) == 6
    assert middle(choose(found, projection="value")).path == "blocks.1.mixer.value"
    for options, message in (
        ({"layer": 3}, "layer 3 has no spiking neuron; layers with one: 0, 1, 2"),
        ({"projection": "channel.kee"}, "unknown projection 'channel.kee'; did you mean 'channel.key'"),
        ({"projection": "ey"}, "unknown projection 'ey'"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose(found, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="its neurons are adaptive"):
        choose(found, accept=lambda site: False, wanted="membrane")
    with pytest.raises(ConfigError, match="it is dense"):
        choose({})


def test_pieces_change_nothing_and_hooks_are_gone(checkpoints: Callable[[str], Path]) -> None:
    model = load_model(checkpoints("lif"))
    chosen = choose(sites(model), layer=1)
    tokens = list(b"spikes are rare; silence is cheap")
    results = []
    for chunk in (5, 100):
        meter = Meter(raster=[chosen[0].path])
        results.append((read(model, tokens, meter=meter, inputs=chosen, chunk=chunk), meter))
    for path, given in results[0][0].items():
        torch.testing.assert_close(given.x, results[1][0][path].x, atol=1e-5, rtol=1e-4)
        assert given.x.shape == (len(tokens), given.x.shape[1])
        assert torch.equal(given.state["membrane"], torch.zeros(1, given.x.shape[1]))  # type: ignore[arg-type]
    path = chosen[0].path
    assert joined(results[0][1], path).shape == (len(tokens), 16)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ConfigError, match="does not see every token"):
        joined(results[0][1], "head")


def test_text_that_cannot_be_read(checkpoints: Callable[[str], Path]) -> None:
    model = load_model(checkpoints("lif"))
    with pytest.raises(DataError, match="no tokens"):
        read(model, [])
    with pytest.raises(DataError, match="contains token 256, but the model has 256 tokens"):
        read(model, [1, 256])
    with torch.no_grad():
        model.embedding.weight[5] = float("nan")
    with pytest.raises(DataError, match="logits are not finite within tokens 4 to 8"):
        read(model, [1, 2, 3, 4, 1, 5, 1, 1, 1], chunk=4)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_experts_do_not_see_every_token() -> None:
    """Parts that are given some of the tokens have no sequence, and are left out."""
    config = ModelConfig(
        vocab_size=256,
        hidden_size=16,
        num_hidden_layers=1,
        neuron={"name": "adaptive"},
        layers=[{"mixer": {"name": "wkv4"}, "channel": {"name": "moe", "experts": 4, "top_k": 1}}],
    )
    model = SpikeLM(config).eval()
    chosen = choose(sites(model))
    given = read(model, list(b"spikes are rare"), inputs=chosen)
    experts = [site.path for site in chosen if "experts" in site.path]
    assert experts and not set(experts) & set(given)
    assert "blocks.0.mixer.key" in given


def test_samples(tmp_path: Path) -> None:
    words = Tokenizer.bytes()
    found = sample(words, "ab\n<c>", most=4)
    assert found.tokens == list(b"ab\n<") and found.labels == ["a", "b", "\n", "<"]
    assert sample(words, "ab", most=4).tokens == list(b"ab")
    assert sample(words, "abc", most=2).sha256 == sample(words, "abd", most=2).sha256 != found.sha256
    assert found.to_dict().keys() == {"source", "tokens", "tokens_sha256"}, "the text itself stays here"
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "b.txt").write_text("the first one that is long enough")
    (tmp_path / "c.txt").write_text("a still longer text that is not looked for any more")
    take = open_sample(words, text=None, data=str(tmp_path), most=10)
    assert bytes(take.tokens) == b"the first "
    whole = open_sample(words, text=None, data=str(tmp_path), most=1000)
    assert bytes(whole.tokens).startswith(b"a still longer")
    for options, message in (
        ({"text": None, "data": None}, "one of the two"),
        ({"text": "a", "data": "b"}, "one of the two"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_sample(words, most=5, **options)
    with pytest.raises(ConfigError, match="tokens is 0"):
        open_sample(words, text="a", data=None, most=0)
    with pytest.raises(DataError, match="text has no tokens"):
        open_sample(words, text="", data=None, most=5)
