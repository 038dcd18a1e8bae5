"""What commands share: JSON, units, progress."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from spikelm.cli import _common
from spikelm.cli._common import human_bytes, human_count, human_time, progress, write_json
from spikelm.errors import ConfigError


def test_json_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = {
        "nan": math.nan,
        "numpy": np.float32(0.5),
        "tensor": torch.tensor(3),
        "path": tmp_path,
        "list": (1, [2.5, None], {"deep": math.inf}),
        "text": "ä",
    }
    write_json(Path("-"), result)
    shown = json.loads(capsys.readouterr().out)
    assert shown["nan"] is None and shown["numpy"] == 0.5 and shown["tensor"] == 3
    assert shown["path"] == str(tmp_path) and shown["list"] == [1, [2.5, None], {"deep": None}]
    write_json(tmp_path / "a" / "b.json", result)
    assert json.loads((tmp_path / "a" / "b.json").read_text(encoding="utf-8")) == shown
    write_json(None, {"never": object()})


def test_json_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        write_json(tmp_path, {})
    with pytest.raises(TypeError, match="object has no JSON form"):
        write_json(tmp_path / "x.json", {"bad": object()})


def test_units() -> None:
    assert [human_count(n) for n in (7, 1500, 215_399_424, 2e9, 3e12)] == ["7", "1.5k", "215M", "2G", "3T"]
    assert [human_bytes(n) for n in (12, 1536, 3 << 20, 5 << 30)] == ["12 B", "1.5 KiB", "3.0 MiB", "5.0 GiB"]
    assert [human_time(n) for n in (5, 65, 3725, math.inf)] == ["0:05", "1:05", "1:02:05", "-:--"]


def test_short_work_prints_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("counting", total=3) as bar:
        for _ in range(3):
            bar.advance()
    assert capsys.readouterr() == ("", "")


def test_long_work_prints_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(_common.time, "monotonic", lambda: clock[0])
    with progress("training", total=1000, unit="tokens", done=200) as bar:
        bar.note("loss 2.5")
        for _ in range(8):
            clock[0] += 1.0
            bar.advance(100)
        bar.say("a sample")
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == ""
    assert lines[0] == "training: 400/1k tokens, 100 tokens/s, loss 2.5, 0:06 left"
    assert len(lines) == 4 and "a sample" in lines  # two of eight advances, the sample, the end
    assert lines[-1] == "training: 1k/1k tokens, 100 tokens/s, loss 2.5, done in 0:08"


def test_a_failure_does_not_claim_to_be_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(_common.time, "monotonic", lambda: clock[0])
    with pytest.raises(ZeroDivisionError), progress("work", total=2) as bar:
        clock[0] = 5.0
        bar.advance()
        raise ZeroDivisionError
    assert "done" not in capsys.readouterr().err


def test_terminal_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress("training", total=10, unit="steps") as bar:
        bar.advance(10)
        bar.note("loss 1.5")
        bar.say("a line above")
    shown = capsys.readouterr().err
    assert "training" in shown and "steps/s" in shown and "loss 1.5" in shown and "a line above" in shown
