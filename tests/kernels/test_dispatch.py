"""Which back-end runs: names, environment, explicit choices that fail, and life without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from spikelm.errors import KernelError
from spikelm.kernels import triton_excluded
from spikelm.kernels.dispatch import BACKENDS, OPS, available, backend, choose, use_backend
from spikelm.kernels.lif import lif
from spikelm.kernels.triton_targets import TARGETS
from spikelm.kernels.wkv4 import initial_state, wkv4

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIKELM_KERNELS", raising=False)


def test_block_beats_environment_beats_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend() == "auto"
    monkeypatch.setenv("SPIKELM_KERNELS", "torch")
    assert backend() == "torch" and choose("lif", CPU) == "torch"
    with use_backend("reference"):
        assert choose("lif", CPU) == "reference"
        with use_backend("auto"):
            assert choose("lif", CPU) in ("c", "torch")
        assert backend() == "reference"
    assert backend() == "torch"
    monkeypatch.setenv("SPIKELM_KERNELS", "")
    assert backend() == "auto"


def test_a_block_is_restored_after_an_error() -> None:
    with pytest.raises(RuntimeError), use_backend("torch"):
        raise RuntimeError
    assert backend() == "auto"


def test_a_block_is_this_thread_alone() -> None:
    seen: list[str] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match="did you mean 'triton'"), use_backend("tritn"):
        pass
    monkeypatch.setenv("SPIKELM_KERNELS", "cuda")
    with pytest.raises(KernelError, match="unknown kernel back-end 'cuda'"):
        choose("lif", CPU)
    monkeypatch.delenv("SPIKELM_KERNELS")
    with pytest.raises(KernelError, match="did you mean 'wkv4'"):
        choose("wkv", CPU)


@pytest.mark.parametrize("op", OPS)
def test_triton_is_refused_in_a_clear_sentence(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    why = "on CUDA and ROCm tensors" if "triton" in OPS[op] else f"no triton version of {op} yet"
    for device in (CPU, META):
        with use_backend("triton"), pytest.raises(KernelError, match=f"{why}.*; use auto"):
            choose(op, device)


def test_auto_takes_triton_for_cuda_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """(No CUDA device is needed to choose.)"""
    pytest.importorskip("triton")
    for target in TARGETS:
        monkeypatch.setattr(triton_excluded, "target_of", lambda device, target=target: target)
        for op, forms in OPS.items():
            fast = "triton" in forms and target not in triton_excluded.PROVISIONAL.get(op, ())
            assert choose(op, torch.device("cuda")) == ("triton" if fast else "torch")
            if "triton" in forms:  # by name it runs
                with use_backend("triton"):
                    assert choose(op, torch.device("cuda")) == "triton"


def test_auto_waits_for_what_was_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(triton_excluded, "PROVISIONAL", {"lif": ("sm_80",)})
    for target, expected in (("sm_80", "torch"), ("sm_90", "triton")):
        monkeypatch.setattr(triton_excluded, "target_of", lambda device, target=target: target)
        assert choose("lif", torch.device("cuda")) == expected
        with use_backend("triton"):
            assert choose("lif", torch.device("cuda")) == "triton"
    monkeypatch.setattr(triton_excluded, "target_of", lambda device: "sm_80")
    why = triton_excluded.why_provisional("lif", torch.device("cuda"))
    assert why is not None and why.startswith("provisional on sm_80, for which not all")
    assert triton_excluded.why_provisional("wkv4", torch.device("cuda")) is None


def test_c_is_refused_off_the_cpu() -> None:
    with use_backend("c"), pytest.raises(KernelError, match="on meta; use auto"):
        choose("lif", META)


def test_other_devices_run_the_torch_form() -> None:
    assert choose("wkv4", META) == "torch"
    k = torch.empty(2, 40, 4, device="meta")
    w = torch.empty(4, device="meta")
    y, state = wkv4(w, w, k, k, initial_state(2, 4, device="meta"))
    assert y.shape == (2, 40, 4) and state.shape == (2, 3, 4)
    s, v = lif(k, k[:, 0], w)
    assert s.shape == (2, 40, 4) and v.shape == (2, 4)


def test_available_lists_every_back_end() -> None:
    table = available()
    assert set(table) == set(OPS)
    for problems in table.values():
        assert set(problems) == set(BACKENDS)
        assert problems["reference"] is True and problems["torch"] is True
        assert all(isinstance(problem, str) or problem is True for problem in problems.values())


WITHOUT_A_COMPILER = """
import logging, torch
from spikelm.errors import KernelError
from spikelm.kernels.dispatch import available, choose, use_backend
from spikelm.kernels.lif import lif
from spikelm.kernels.triton_excluded import PROVISIONAL
from spikelm.kernels.wkv4 import initial_state, wkv4

records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append(record)
logging.getLogger("spikelm").addHandler(Keep())
logging.getLogger("spikelm").setLevel(logging.INFO)

k, w = torch.randn(2, 50, 8), torch.randn(8)
for _ in range(3):
    y, state = wkv4(w, w, k, k, initial_state(2, 8))
    s, v = lif(k, k[:, 0], w.sigmoid())
with use_backend("reference"):
    expected = wkv4(w, w, k, k, initial_state(2, 8))[0], lif(k, k[:, 0], w.sigmoid())[0]
torch.testing.assert_close(y, expected[0])
assert torch.equal(s, expected[1])
assert choose("lif", k.device) == choose("wkv4", k.device) == "torch"
warnings = [r.getMessage() for r in records if r.levelno == logging.WARNING]
assert len(warnings) == 1 and "names no program" in warnings[0], warnings
assert len([r for r in records if r.levelno == logging.INFO]) == 2, records
assert "names no program" in available()["lif"]["c"]
with use_backend("c"):
    try:
        lif(k, k[:, 0], w)
    except KernelError as error:
        print(error)
"""


def test_without_a_compiler(tmp_path: Path) -> None:
    """The torch forms run, with one warning; asking for C raises."""
    environment = {**os.environ, "CC": "/nowhere/cc", "SPIKELM_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "lif on cpu cannot use the 'c' back-end: CC='/nowhere/cc' names no program" in done.stdout
    assert not (tmp_path / "cache").exists()
