"""The interpreter of decode plans under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spikelm.config import ModelConfig
from spikelm.decoding import DecodePlan
from spikelm.errors import KernelError
from spikelm.kernels.compile import compiler_command
from spikelm.model import SpikeLM

HERE = Path(__file__).parent
HYBRIDS = (
    *("spikingbrain-nano", "spikingbrain-moe-nano", "spikingbrain2-nano", "spikformer-lm-nano"),
    "spike-driven-lm-nano",
)


@pytest.mark.parametrize("preset", HYBRIDS)
def test_steps_of_hybrids(preset: str) -> None:
    """A plan alone, so that no other kernel is compiled: values are the matter of other tests."""
    torch.manual_seed(0)
    model = SpikeLM(ModelConfig.from_yaml(preset, hidden_size=96, vocab_size=67)).eval()
    try:
        plan = DecodePlan(model, 3, max_len=40)
    except KernelError as error:
        pytest.skip(str(error))
    for t in range(6):
        logits = plan.step(torch.tensor([t, 5, 66]), torch.tensor([2, -1, 0]))
        assert logits.isfinite().all() and logits[0].any() and not logits[1].any()


@pytest.mark.slow
def test_no_sanitizer_complains(sanitized: dict[str, str]) -> None:
    """The tests of plans again, with C that stops at a wrong access or undefined operation."""
    # Tests that run the kernels of hybrid models too would compile for many minutes here.
    files = [str(HERE / name) for name in ("test_rwkv.py", "test_plan.py", "test_sanitizers.py")]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", "-k", "not hundred and not random_records"]
    command += ["-n", "2"] if importlib.util.find_spec("xdist") else []
    run(command, sanitized, 1800)
    (built,) = Path(sanitized["SPIKELM_CACHE"]).glob("plan-*.so")
    assert b"__asan_init" in built.read_bytes()


def test_random_records() -> None:
    """Plans of any records in any order: the same bits wherever registers stand, and for a row alone."""
    try:
        compiler_command()
    except KernelError as error:
        pytest.skip(str(error))
    run([sys.executable, str(HERE / "fuzz_run.py"), "0", "60"], dict(os.environ), 300)


@pytest.mark.slow
def test_random_records_under_sanitizers(sanitized: dict[str, str]) -> None:
    """Many more of them, with C that stops at a wrong access or undefined operation."""
    run([sys.executable, str(HERE / "fuzz_run.py"), "1000", "400"], sanitized, 900)


def run(command: list[str], environment: dict[str, str], seconds: int) -> None:
    """A process that must end well, with this checkout on its path."""
    root = HERE.parents[1]
    path = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        cwd=root,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
