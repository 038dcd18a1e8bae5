from __future__ import annotations

import lzma
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spikelm.errors import CheckpointError
from spikelm.formats.rwkv4 import read_rwkv4
from spikelm.formats.rwkv_cpp import MAGIC, is_rwkv_cpp


def rwkv_cpp_bytes(
    weights: dict[str, torch.Tensor], *, layers: int = 2, dtype: int = 0, header: tuple[int, ...] = ()
) -> bytes:
    vocab, hidden = weights["emb.weight"].shape
    out = struct.pack("<6i", *(header or (MAGIC, 100, vocab, hidden, layers, dtype)))
    for name, value in weights.items():
        value = value.squeeze()
        if name.endswith("time_decay"):
            value = -torch.exp(value)
        key = name.encode()
        out += struct.pack("<3i", value.dim(), len(key), dtype)
        out += struct.pack(f"<{value.dim()}i", *reversed(value.shape))
        out += key + value.numpy().astype("<f2" if dtype else "<f4").tobytes()
    return out


@pytest.mark.parametrize("suffix", ["bin", "bin.xz"])
def test_same_weights_as_the_pth(tmp_path: Path, published: SimpleNamespace, suffix: str) -> None:
    weights = published.weights()
    torch.save(weights, tmp_path / "m.pth")
    content = rwkv_cpp_bytes(weights)
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(lzma.compress(content) if suffix.endswith("xz") else content)
    assert is_rwkv_cpp(path) and not is_rwkv_cpp(tmp_path / "m.pth")
    ours, theirs = read_rwkv4(path), read_rwkv4(tmp_path / "m.pth")
    assert ours.config == theirs.config
    assert ours.config.neuron["name"] == ours.config.embedding_neuron["name"] == "none"
    for name, value in theirs.weights.items():
        torch.testing.assert_close(ours.weights[name], value, atol=1e-6, rtol=1e-6)


def test_half_precision_file(tmp_path: Path, published: SimpleNamespace) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(rwkv_cpp_bytes(published.weights(), dtype=1))
    assert read_rwkv4(path).weights["head.linear.weight"].dtype == torch.float32


def refused(path: Path, content: bytes, *words: str) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_rwkv4(path)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_faults(tmp_path: Path, published: SimpleNamespace) -> None:
    path = tmp_path / "m.bin"
    weights = published.weights()
    good = rwkv_cpp_bytes(weights)
    refused(path, good[:-5], "truncated", "head.weight")
    refused(path, good[:30], "truncated")
    refused(path, good[:20], "truncated", "header")
    refused(path, good + good[24:], "twice")
    refused(path, rwkv_cpp_bytes(weights, layers=3), "3 layers")
    refused(path, rwkv_cpp_bytes(weights, header=(MAGIC, 100, 999, 12, 2, 0)), "[999, 12]")
    refused(path, good[:24] + struct.pack("<3i", 1, 10**9, 0), "damaged")
    refused(path, good[:24] + struct.pack("<3i", 2, 1, 0) + struct.pack("<2i", -4, 8) + b"x", "positive")
    refused(
        path, good[:24] + struct.pack("<3i", 2, 1, 0) + struct.pack("<2i", 2**30, 2**30) + b"x", "truncated"
    )
    refused(path, good[:24] + struct.pack("<3i", 1, 1, 9) + struct.pack("<i", 8) + b"x", "dtype 9")
    path = tmp_path / "m.bin.xz"
    refused(path, lzma.compress(good)[:-20], "m.bin.xz")


def test_later_versions_are_refused(tmp_path: Path, published: SimpleNamespace) -> None:
    path = tmp_path / "m.pth"
    for name in ("blocks.0.att.ln_x.weight", "blocks.0.att.time_maa_k", "blocks.0.att.x_r"):
        torch.save(published.weights() | {name: torch.zeros(12)}, path)
        with pytest.raises(CheckpointError, match="expected RWKV-4"):
            read_rwkv4(path)


def test_any_channel_width(tmp_path: Path, published: SimpleNamespace) -> None:
    for hidden, channel in ((12, 48), (12, 24), (7, 9), (49, 50)):
        torch.save(published.weights(layers=1, hidden=hidden, channel=channel), tmp_path / "m.pth")
        model = read_rwkv4(tmp_path / "m.pth").model()
        assert model.blocks[0].channel.key.linear.weight.shape == (channel, hidden)


def test_numpy_is_little_endian_here() -> None:
    assert np.dtype("<f4") == np.dtype(np.float32)
