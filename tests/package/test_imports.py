"""What importing costs, and what it may not need."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

HEAVY = [
    "torch",
    "transformers",
    "datasets",
    "pydantic",
    "deepspeed",
    "triton",
    "vllm",
    "accelerate",
    "tokenizers",
]
CORE = [
    "spikelm.neurons",
    "spikelm.mixers",
    "spikelm.channels",
    "spikelm.projection",
    "spikelm.config",
    "spikelm.model",
    "spikelm.presets",
    "spikelm.kernels.dispatch",
    "spikelm.kernels.lif",
    "spikelm.kernels.wkv4",
]


def run(code: str) -> str:
    """Output of a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_quick_and_loads_nothing() -> None:
    out = run(f"""
        import sys, time
        start = time.perf_counter()
        import spikelm
        print(time.perf_counter() - start)
        print([name for name in {HEAVY} if name in sys.modules])
    """)
    seconds, loaded = out.splitlines()
    assert float(seconds) < 3
    assert loaded == "[]"


def test_public_names_load_when_used() -> None:
    out = run("""
        import sys, time
        start = time.perf_counter()
        import spikelm
        for name in spikelm.__all__:
            assert getattr(spikelm, name) is not None and name in dir(spikelm)
        try:
            spikelm.nothing
        except AttributeError as error:
            print(error)
        print([name for name in ("deepspeed", "triton", "vllm", "datasets") if name in sys.modules])
    """)
    assert out.splitlines() == ["module 'spikelm' has no attribute 'nothing'", "[]"]


@pytest.mark.parametrize("module", CORE)
def test_core_needs_torch_alone(module: str) -> None:
    blocked = [name for name in HEAVY if name != "torch"] + ["typer", "rich", "numpy", "yaml", "safetensors"]
    if module == "spikelm.config":
        blocked.remove("yaml")
    run(f"""
        import torch, sys
        import importlib.abc

        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {blocked}:
                    raise ImportError(f"{{name}} is blocked: {module} must import with torch alone")

        before = set(sys.modules)
        sys.meta_path.insert(0, Block())
        import {module}
        new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
        assert not new & set({blocked}), new
    """)
