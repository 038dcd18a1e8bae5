"""Tensor parallelism on two real ranks: sharded models against whole ones, to the bit in int8."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.errors import ShapeError
from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.encode import adaptive_encode

RANKS = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the ranks measured; one launch for all tests."""
    out = tmp_path_factory.mktemp("ranks") / "found.json"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("shards.py")), str(out)],
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.parametrize("model", ["hybrid", "plif", "twin", "heads"])
def test_a_sharded_model_is_the_whole_one_in_float64(found: dict[str, Any], model: str) -> None:
    """Prefill, step by step, with padding, and the gradient of every weight."""
    numbers = found[model]
    assert max(numbers[key] for key in ("logits", "steps", "padded", "gradients")) < 1e-10
    assert numbers["share"] < 0.56  # norms, mixtures and low ranks are on both


def test_without_the_rule_a_shard_computes_something_else(found: dict[str, Any]) -> None:
    assert found["naive"] > 0.05


def test_swiglu(found: dict[str, Any]) -> None:
    assert found["swiglu"]["far"] < 1e-10 and found["swiglu"]["width"] == 48
    assert found["swiglu int8"]["equal"]


def test_int8_per_channel_has_the_bits_of_the_whole_model(found: dict[str, Any]) -> None:
    assert [entry["equal"] for entry in found["int8"].values()] == [True] * 5
    assert found["int8 hybrid"]["equal"]


def test_int8_otherwise_differs_by_rounding(found: dict[str, Any]) -> None:
    for name in ("int8 delta", "int8 sums", "int8 groups", "int8 weight-only"):
        assert found[name]["far"] < 1e-4, name


def test_what_cannot_be_shared_is_refused(found: dict[str, Any]) -> None:
    said = found["refusals"]
    assert (
        "2 ranks get 48 of 96 input features each, which is no multiple of the int8 group_size 32"
        in (said["groups"])
    )
    assert "1 heads of 8 features cannot be shared by 2 ranks" in said["heads"]
    assert "channel.gate has 33 output features, which 2 ranks cannot share evenly" in said["features"]
    assert "rate_target before a row-parallel projection" in said["rate_target"]
    assert "is a shard already" in said["twice"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_of_a_part_of_a_row_are_those_of_the_row(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    counts, threshold = adaptive_encode(x, k=3.0, dead_zone=0.7, cap=4)
    mean = adaptive_encode(x, k=2.0**-20)[1] * 2.0**-20
    for form in ("auto", "torch", "reference"):
        with use_backend(form):
            part = x[..., 8:24].clone().requires_grad_()
            got, same = adaptive_encode(part, k=3.0, dead_zone=0.7, cap=4, mean=mean)
            assert torch.equal(got, counts[..., 8:24]) and torch.equal(same, threshold)
            (gradient,) = torch.autograd.grad(got.sum(), part)
            clipped = torch.round(part / threshold).abs() > 4
            torch.testing.assert_close(gradient, torch.where(clipped, 0.0, 1 / threshold.expand_as(part)))
    with pytest.raises(
        ShapeError, match=r"mean must be floating \[3, 5, 1\] on cpu for x \[3, 5, 40\], got .* \[3, 5\]"
    ):
        adaptive_encode(x, k=3.0, mean=mean[..., 0])
