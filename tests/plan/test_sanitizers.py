"""The interpreter of decode plans under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

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
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so")


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
def test_no_sanitizer_complains(tmp_path: Path) -> None:
    """The tests of plans again, with C that stops at a wrong access or undefined operation."""
    try:
        (compiler, *_) = compiler_command()
    except KernelError as error:
        pytest.skip(str(error))
    # The sanitizers' runtime must be the first library of a process that was not built with it.
    preload = []
    for name in LIBRARIES:
        found = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False
        ).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"the compiler has no {name}")
        preload.append(found)
    environment = {
        **os.environ,
        "CC": f"{compiler} -g -fsanitize=address,undefined",
        "SPIKELM_CACHE": str(tmp_path / "cache"),
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    # Tests that run the kernels of hybrid models too would compile for many minutes here.
    files = [str(HERE / name) for name in ("test_rwkv.py", "test_plan.py", "test_sanitizers.py")]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", "-k", "not hundred"]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (built,) = (tmp_path / "cache").glob("plan-*.so")
    assert b"__asan_init" in built.read_bytes()
