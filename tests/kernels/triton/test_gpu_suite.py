"""`make gpu`: its tests need nothing but pytest, torch and triton, and its benchmark runs (interpreted)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[3]
SUITE = ("tests/kernels/triton", "tests/test_gpu.py", "tests/test_graph_decoding.py")
ALONE = f"""
import sys
for name in '''numpy pydantic datasets hypothesis transformers tokenizers safetensors accelerate deepspeed
               typer rich yaml psutil matplotlib pyarrow fsspec zstandard peft trl'''.split():
    sys.modules[name] = None  # importing it raises ImportError
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *{SUITE!r}]))
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_its_tests_import_torch_and_triton_alone() -> None:
    done = run("-c", ALONE, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    for path in SUITE:
        assert path in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_benchmark_says_that_there_is_no_gpu() -> None:
    done = run("benchmarks/gpu.py")
    assert done.returncode == 0 and not done.stderr
    assert done.stdout == "No GPU that torch can use on this machine, so there is nothing to measure.\n"
    refused = run("benchmarks/gpu.py", "--device", "cpu")
    assert refused.returncode == 2 and "add --tiny" in refused.stderr


def test_the_benchmark_runs_interpreted(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "figures.json"
    done = run("benchmarks/gpu.py", "--tiny", "--device", "cpu", "--op", "event_linear", "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert {"cpu", "versions", "date", "git_revision"} <= set(found["machine"])
    figures = found["figures"]
    assert figures["interpreted"] and figures["excluded"] == []
    assert all(value > 0 for name, value in figures["limits"].items() if name.startswith("copy"))
    for row in figures["rows"]:
        ours, peer = row["milliseconds"]["triton"], row["milliseconds"]["torch bf16 matmul"]
        assert ours["forward"] > 0 and peer["forward"] > 0 and ours["backward"] is None
        assert row["forward_limit_ms"] >= 0 and row["first_call_seconds"] > 0
        share = row["forward_limit_ms"] / ours["forward"]
        assert row["forward_share"] == pytest.approx(share, abs=1e-4)
    assert [row["op"] for row in figures["rows"]] == ["event_linear"] * 2
    assert not (ROOT / "benchmarks" / "results" / "gpu.json").exists() or "interpreted" not in done.stdout


def load(name: str) -> Any:
    """A module of the folder benchmarks, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_decode_step_is_measured_beside_the_graph() -> None:
    """(On a CPU the same class without capture.)"""
    cpu = torch.device("cpu")
    found = load("_gpu_decode").decode(cpu, True, load("gpu").Timer(cpu, True))
    assert found["captured"] is False
    for batch in (1, 8):
        row = found[f"batch {batch}"]
        assert row["largest_difference"] < 1e-4 and row["python_ms"] > 0 and row["graph_ms"] > 0


def test_what_is_wrong_is_excluded_with_the_reason(device: torch.device) -> None:
    gpu, cases = load("gpu"), load("_gpu_cases")
    good = cases.Case(
        op="event_linear",
        name="square",
        make=lambda: {"x": torch.randn(4, 8, device=device), "pool": torch.zeros(3, device=device)},
        call=lambda x, pool: (pool.add_(1.0), x * x)[1],
        bytes=1,
        leaves=("x",),
    )
    assert gpu.check(good) is None

    def only_in_float32(x: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        return x * x + (0.01 if x.dtype == torch.float32 else 0.0)

    assert "result is off by" in gpu.check(replace(good, call=only_in_float32))

    def gradient(x: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        return x * x.detach() if x.dtype == torch.float32 else x * x

    assert "gradient of x is off by 5.0e-01" in gpu.check(replace(good, call=gradient))

    def state(x: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        pool.add_(1.0 if x.dtype == torch.float32 else 2.0)
        return x * x

    assert "pool is off by" in gpu.check(replace(good, call=state))
    assert "result is not finite" in gpu.check(replace(good, call=lambda x, pool: x / 0.0))

    def broken(x: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("PassManager::run failed")

    assert gpu.check(replace(good, call=broken)) == "RuntimeError: PassManager::run failed"
    counted = iter([0.0, 1.0])
    flips = replace(good, compare="bits", leaves=(), call=lambda x, pool: torch.full((4,), next(counted)))
    assert "result differs from the reference in 100.00% of its elements" in gpu.check(flips)
