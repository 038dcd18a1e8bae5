from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spikelm.config import ModelConfig
from spikelm.errors import CheckpointError
from spikelm.formats.spikegpt import read_spikegpt


def write(weights: object, tmp_path: Path) -> Path:
    path = tmp_path / "model.pth"
    torch.save(weights, path)
    return path


@pytest.mark.parametrize("binary", [True, False])
def test_same_logits_as_the_equations(tmp_path: Path, published: SimpleNamespace, binary: bool) -> None:
    weights = published.weights()
    tokens = torch.randint(0, 20, (40,), generator=torch.Generator().manual_seed(1))
    expected, rate = published.logits(weights, tokens.tolist(), binary=binary)
    assert 0.02 < rate < 0.8  # neurons that never fire would prove nothing
    model = read_spikegpt(write(weights, tmp_path), binary_embedding=binary).model().double()
    with torch.no_grad():
        forward, end = model(tokens[None])
        torch.testing.assert_close(forward[0], expected, atol=1e-10, rtol=0)
        state, steps = None, []
        for token in tokens:
            logits, state = model(token[None], state)
            steps.append(logits[0])
        torch.testing.assert_close(torch.stack(steps), expected, atol=1e-10, rtol=0)
        for layer in ("block0", "block1"):
            for neuron in ("mixer_neuron", "channel_neuron"):
                torch.testing.assert_close(state[layer][neuron], end[layer][neuron], atol=1e-10, rtol=0)


def test_the_two_embeddings_differ(tmp_path: Path, published: SimpleNamespace) -> None:
    path = write(published.weights(), tmp_path)
    tokens = torch.arange(10)[None]
    a = read_spikegpt(path, binary_embedding=True).model()(tokens)[0]
    b = read_spikegpt(path, binary_embedding=False).model()(tokens)[0]
    assert not torch.allclose(a, b)


def test_sizes_come_from_the_shapes(tmp_path: Path, published: SimpleNamespace) -> None:
    weights = published.weights(layers=3, hidden=8, vocab=31, channel=20)
    config = read_spikegpt(write(weights, tmp_path), binary_embedding=True).config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (3, 8, 31)
    assert config.layers[0]["channel"] == {"name": "rwkv", "expand": 2.5}


def test_configuration_is_that_of_the_preset(tmp_path: Path, published: SimpleNamespace) -> None:
    config = read_spikegpt(write(published.weights(), tmp_path), binary_embedding=True).config
    preset = ModelConfig.from_yaml("spikegpt-46m")
    for name in ("placement", "neuron", "embedding_neuron", "dropout", "head_neuron"):
        assert getattr(config, name) == getattr(preset, name), name


def test_wrappers_and_half_precision(tmp_path: Path, published: SimpleNamespace) -> None:
    weights = published.weights()
    plain = read_spikegpt(write(weights, tmp_path), binary_embedding=True)
    wrapped = {"state_dict": {f"module.{name}": value for name, value in weights.items()}}
    other = read_spikegpt(write(wrapped, tmp_path), binary_embedding=True)
    assert all(torch.equal(plain.weights[name], other.weights[name]) for name in plain.weights)
    half = {name: value.bfloat16() for name, value in weights.items()}
    converted = read_spikegpt(write(half, tmp_path), binary_embedding=True)
    assert {value.dtype for value in converted.weights.values()} == {torch.float32}


def refused(weights: object, tmp_path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read_spikegpt(write(weights, tmp_path), binary_embedding=True)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_every_missing_tensor_is_named(tmp_path: Path, published: SimpleNamespace) -> None:
    for name in published.weights(layers=2):
        weights = published.weights(layers=2)
        del weights[name]
        refused(weights, tmp_path, repr(name), "missing")


def test_every_wrong_shape_is_named(tmp_path: Path, published: SimpleNamespace) -> None:
    sizes_are_read_from = {"emb.weight", "blocks.0.ffn.key.weight"}
    for name, value in published.weights(layers=1).items():
        if name in sizes_are_read_from:
            continue
        weights = published.weights(layers=1) | {name: torch.zeros(*value.shape[:-1], value.shape[-1] + 1)}
        refused(weights, tmp_path, repr(name), str([*value.shape[:-1], value.shape[-1] + 1]), "expected")


def test_other_faults(tmp_path: Path, published: SimpleNamespace) -> None:
    good = published.weights()
    refused(good | {"extra": torch.zeros(3)}, tmp_path, "'extra'", "unknown", "[3]")
    refused(good | {"emb.weight": torch.zeros(5)}, tmp_path, "'emb.weight'", "[5]", "[vocabulary, hidden]")
    refused(good | {"ln_out.bias": torch.full((12,), float("nan"))}, tmp_path, "'ln_out.bias'", "finite")
    refused(good | {"ln_out.bias": torch.zeros(12, dtype=torch.int64)}, tmp_path, "'ln_out.bias'", "int64")
    refused({"a": "text"}, tmp_path, "'a'", "str")
    refused([1, 2], tmp_path, "list")
    refused({}, tmp_path, "dict")


class Payload:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return Path.write_text, (str(self.target), "pwned")


def test_foreign_pickles_are_refused_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    for path, save in ((tmp_path / "a.pth", torch.save), (tmp_path / "b.pth", _pickle)):
        save({"emb.weight": Payload(target)}, path)
        with pytest.raises(CheckpointError, match="refused"):
            read_spikegpt(path, binary_embedding=True)
        assert not target.exists()


def _pickle(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(50), bytes(1000)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="x.pth"):
        read_spikegpt(path, binary_embedding=True)
    with pytest.raises(CheckpointError, match="no file"):
        read_spikegpt(tmp_path / "absent.pth", binary_embedding=True)


def test_truncated_file_is_refused(tmp_path: Path, published: SimpleNamespace) -> None:
    path = write(published.weights(), tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="refused"):
        read_spikegpt(path, binary_embedding=True)


def test_a_missing_block_is_named(tmp_path: Path, published: SimpleNamespace) -> None:
    weights = {n: v for n, v in published.weights(layers=3).items() if not n.startswith("blocks.1.")}
    refused(weights, tmp_path, "block 2", "block 1")
    refused(published.weights() | {"blocks.999999.ln1.bias": torch.zeros(12)}, tmp_path, "block 2")


def test_the_object_a_foreign_pickle_asks_for_is_named(tmp_path: Path) -> None:
    refused({"emb.weight": Payload(tmp_path / "pwned")}, tmp_path, "refused", "Python object")
