"""The C kernels under the address and undefined-behaviour sanitizers, in a process of their own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from spikelm.kernels.dispatch import OPS

HERE = Path(__file__).parent
# Two processes where pytest-xdist is installed: sanitized code is slow.
SHARED = ["-n", "2"] if importlib.util.find_spec("xdist") else []


@pytest.mark.slow
def test_no_sanitizer_complains(sanitized: dict[str, str]) -> None:
    """Every test of the C forms again, with kernels that stop at a wrong access or undefined operation."""
    in_c = [op for op, forms in OPS.items() if "c" in forms]
    files = [str(HERE / f"test_{name}.py") for name in (*in_c, "encode_int8", "gates")]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-k", "not torch and not opcheck and not compiled", *SHARED]
    done = subprocess.run(
        command,
        env=sanitized,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    built = list(Path(sanitized["SPIKELM_CACHE"]).glob("*.so"))
    assert {library.name.rpartition("-")[0] for library in built} >= set(in_c)
    assert all(b"__asan_init" in library.read_bytes() for library in built)


FUZZ = """
import random, sys, torch
sys.path.insert(0, sys.argv[1])
import test_library_rules as rules
from spikelm.kernels.dispatch import OPS, use_backend

torch.manual_seed(0)
chosen = random.Random(0)
seen = set()
for _ in range(60):
    rules.B, rules.C = chosen.choice([1, 2, 3]), chosen.choice([1, 7, 8, 9, 31, 33, 65, 130, 513])
    rules.H, rules.K = chosen.choice([1, 2, 3]), chosen.choice([1, 3, 8, 17, 33])
    T = chosen.choice([1, 2, 3, 15, 31, 32, 33, 65])
    torch.set_num_threads(chosen.choice([1, 2]))
    for op, call, given in rules.calls(T).values():
        if "c" not in OPS[op]:
            continue
        seen.add(op)
        learns = op != "rowwise"  # inference only
        leaves = [x.clone().requires_grad_(learns) if x.is_floating_point() else x for x in given]
        with use_backend("c"):
            outputs = [y for y in rules.tensors_of(call(*leaves)) if y.requires_grad]
            if outputs:
                torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
assert seen == {op for op, forms in OPS.items() if "c" in forms}, seen
"""


@pytest.mark.slow
def test_a_fuzz_of_shapes(sanitized: dict[str, str]) -> None:
    """Every op with a C form, forward and backward, at random shapes, sizes of teams and lengths."""
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(HERE)],
        env=sanitized,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
