"""DeepSpeed's operators: which are needed, a missing compiler in one sentence, and (slow) a real build."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from spikelm import doctor
from spikelm.cli import main
from spikelm.errors import ConfigError, TrainingError
from spikelm.train import ops
from spikelm.train.deepspeed_config import presets, read_settings

pytest.importorskip("deepspeed")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("SPIKELM_CACHE", str(tmp_path / "cache"))
    # Set and taken away by monkeypatch, so that what the code sets does not outlive the test.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "x")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    return tmp_path / "cache"


def test_only_offload_needs_operators() -> None:
    wanted = {name: ops.needed(read_settings(name)) for name in presets()}
    assert wanted.pop("zero2-offload") == wanted.pop("zero3-offload") == ["cpu_adam"]
    assert set(map(tuple, wanted.values())) == {()}
    nvme = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}
    assert ops.needed(nvme) == ["async_io"]


def test_no_compiler_is_one_sentence(
    cache: Path, make_values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="need a C\\+\\+ compiler and there is no 'no-such-compiler'"):
        ops.prepare(read_settings("zero2-offload"))
    assert ops.prepare(read_settings("zero2")) == []
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(make_values(deepspeed="zero2-offload")))
    assert main(["launch", "--nproc", "2", str(config)]) == 2  # before any rank is started
    assert "no-such-compiler" in capsys.readouterr().err
    finding = doctor._deepspeed_ops()
    assert finding.verdict == "warn" and "no-such-compiler" in finding.mend


def test_what_is_built_is_not_built_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = ops.use_cache()
    assert root.parent == cache / "deepspeed-ops" and not ops.is_built("cpu_adam", root)
    (root / "cpu_adam").mkdir()
    (root / "cpu_adam" / "cpu_adam.so").write_bytes(b"library")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert ops.prepare(read_settings("zero2-offload")) == []
    assert doctor._deepspeed_ops().details["built"] == ["cpu_adam"]


def test_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(TrainingError, match="SPIKELM_CACHE"):
        ops.prepare(read_settings("zero2-offload"))


@pytest.mark.slow
def test_two_processes_build_once(cache: Path, tmp_path: Path) -> None:
    """A real build by two processes at once, beside the lock file that a killed build left behind."""
    root = ops.folder()
    (root / "cpu_adam").mkdir(parents=True)
    (root / "cpu_adam" / "lock").touch()
    code = (
        "from spikelm.cli._common import progress\n"
        "from spikelm.train import ops\n"
        "print(ops.build(['cpu_adam'], progress))\n"
    )
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True) for _ in range(2)
    ]
    results = [process.communicate(timeout=900) for process in both]
    assert sorted(out for out, _ in results) == ["['cpu_adam']\n", "[]\n"], results
    assert "compile DeepSpeed's cpu_adam (once)" in "".join(errors for _, errors in results)
    started = time.perf_counter()
    load = (
        "from spikelm.train import ops; ops.use_cache()\n"
        "from deepspeed.ops.adam import DeepSpeedCPUAdam; import torch\n"
        "p = torch.nn.Parameter(torch.ones(4)); p.grad = torch.ones(4)\n"
        "DeepSpeedCPUAdam([p], lr=0.1).step(); print(float(p.detach().sum()))\n"
    )
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=True)
    assert abs(float(done.stdout.splitlines()[-1]) - 3.6) < 1e-3
    assert time.perf_counter() - started < 60  # loaded, not compiled again
