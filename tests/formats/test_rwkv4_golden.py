"""Proof from outside: RWKV-4 weights give the logits that other implementations give."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from spikelm.formats.rwkv4 import read_rwkv4
from spikelm.model import SpikeLM

FIXTURE = Path(__file__).parents[1] / "golden" / "rwkv4_random.safetensors"


def by_steps(model: SpikeLM, tokens: Tensor) -> Tensor:
    state, logits = None, []
    for token in tokens:
        out, state = model(token[None], state)
        logits.append(out[0])
    return torch.stack(logits)


def test_trained_660k(data_dir: Path) -> None:
    """rwkv.cpp's own test: logits after three bytes from the zero state."""
    folder = data_dir / "models" / "rwkv4-660k"
    converted = read_rwkv4(folder / "tiny-rwkv-4v0-660K-FP32.bin.xz")
    assert (converted.config.vocab_size, converted.config.hidden_size) == (256, 128)
    model = converted.model()
    raw = lzma.decompress((folder / "expected-logits-4v0-660K.bin.xz").read_bytes())
    expected = torch.from_numpy(np.frombuffer(raw, "<f4").copy())
    tokens = torch.tensor(list(b'"in'))
    with torch.no_grad():
        forward, _ = model(tokens[None])
        torch.testing.assert_close(forward[0, -1], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(by_steps(model, tokens)[-1], expected, atol=1e-5, rtol=0)
    assert expected.abs().max() > 1


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    with safe_open(FIXTURE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


@pytest.fixture(scope="module")
def random_model(recorded: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> SpikeLM:
    weights = {n.removeprefix("weight."): v for n, v in recorded.items() if n.startswith("weight.")}
    path = tmp_path_factory.mktemp("rwkv") / "random.pth"
    torch.save(weights, path)
    return read_rwkv4(path).model()


@pytest.mark.parametrize("path", ["forward", "chunks", "step"])
def test_random_weights_like_the_rwkv_package(
    random_model: SpikeLM, recorded: dict[str, Tensor], path: str
) -> None:
    """Every term counts here: the fixture's channel mix is as large as its time mix."""
    tokens = recorded["tokens"]
    with torch.no_grad():
        if path == "forward":
            logits = random_model(tokens[None])[0][0]
        elif path == "step":
            logits = by_steps(random_model, tokens)
        else:
            state, parts = None, []
            for chunk in tokens.split([7, 1, 24, 16]):
                part, state = random_model(chunk[None], state)
                parts.append(part[0])
            logits = torch.cat(parts)
    for name in ("logits", "step_logits"):
        torch.testing.assert_close(logits, recorded[name], atol=1e-5, rtol=0)


def test_state_like_the_rwkv_package(random_model: SpikeLM, recorded: dict[str, Tensor]) -> None:
    with torch.no_grad():
        _, state = random_model(recorded["tokens"][None])
    for layer in range(2):
        block = state[f"block{layer}"]
        num, den, largest = block["mixer"]["wkv"][0]
        theirs = {
            key: recorded[f"state.{layer}.{key}"]
            for key in ("mixer_last", "num", "den", "max", "channel_last")
        }
        torch.testing.assert_close(block["mixer"]["shift"][0], theirs["mixer_last"], atol=1e-5, rtol=0)
        torch.testing.assert_close(block["channel"]["shift"][0], theirs["channel_last"], atol=1e-5, rtol=0)
        # The exponent is each implementation's choice; numerator and denominator are compared at theirs.
        scale = torch.exp(largest - theirs["max"])
        torch.testing.assert_close(num * scale, theirs["num"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(den * scale, theirs["den"], atol=1e-5, rtol=1e-5)


def test_fixture_is_small_and_nothing_in_it_is_zero(recorded: dict[str, Tensor]) -> None:
    assert FIXTURE.stat().st_size < 300_000
    for name, value in recorded.items():
        if name.startswith("weight."):
            assert value.abs().mean() > 0.02, name
