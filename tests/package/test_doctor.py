"""``spikelm doctor`` on machines where something is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spikelm import doctor
from spikelm.cli import main
from spikelm.doctor import Finding, examine, summary


def examined(folder: Path, **environment: str) -> tuple[int, dict[str, Any]]:
    """Exit code and findings of a fresh process with another environment."""
    command = [sys.executable, "-m", "spikelm", "doctor", "--json", "-"]
    result = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.stderr == ""
    return result.returncode, json.loads(result.stdout)["checks"]


def test_no_compiler_is_no_catastrophe(tmp_path: Path) -> None:
    code, checks = examined(tmp_path, CC="no-such-compiler", SPIKELM_CACHE=str(tmp_path / "cache"))
    assert code == 0
    assert checks["C compiler"]["verdict"] == "warn" and "no-such-compiler" in checks["C compiler"]["found"]
    assert "apt install" in checks["C compiler"]["mend"]
    assert checks["kernels"]["verdict"] == "warn"
    assert checks["kernels"]["ops"]["wkv4"]["torch"] is True


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, checks = examined(tmp_path, SPIKELM_CACHE=str(tmp_path / "file"))
    assert code == 0
    assert checks["cache"]["verdict"] == "warn" and "SPIKELM_CACHE" in checks["cache"]["mend"]


def test_missing_library_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = doctor._requirements
    monkeypatch.setattr(
        doctor, "_requirements", lambda extra: (["pydantic>=2.7"], {}) if extra is None else real(extra)
    )
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "pip install 'pydantic>=2.7'" in shown and "1 essential" in shown


def test_requirements_are_read_from_the_package() -> None:
    missing, present = doctor._requirements(None)
    assert missing == [] and {"torch", "typer", "pyyaml"} <= set(present)
    missing, present = doctor._requirements("dev")
    assert "pytest" in present and "torch" not in present


def test_little_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1 << 30

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage)
    assert doctor._disk().verdict == "warn"
    Usage.free = 1 << 20
    assert doctor._disk().verdict == "fail"


def test_a_broken_check_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks() -> Finding:
        raise RuntimeError("out of order")

    fine = Finding(name="fine", verdict="ok", found="all right")
    monkeypatch.setattr(doctor, "_CHECKS", {"broken": breaks, "fine": lambda: fine})
    findings = examine()
    assert [finding.verdict for finding in findings] == ["fail", "ok"]
    assert "out of order" in findings[0].found
    assert summary(findings)["ok"] is False
