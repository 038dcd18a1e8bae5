"""What ``spikelm eval --tasks`` calls: table, record, repetition, and one sentence for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spikelm.checkpoint import save_checkpoint
from spikelm.cli.evaluate_tasks import labelled, rerun_tasks, run_tasks
from spikelm.errors import CheckpointError, ConfigError, DataError, SpikeLMError
from spikelm.evaluation import record
from spikelm.tokenizer import Tokenizer

from .conftest import small


def test_table_record_and_repetition(
    checkpoint: Path,
    offline_data: Path,
    bpe: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = save_checkpoint(tmp_path / "other", small("twin", bpe.vocab_size), bpe)
    target = tmp_path / "tasks.json"
    found = run_tasks([checkpoint, other], "copa_local,piqa_local@2", limit=20, json_file=target)
    shown = capsys.readouterr()
    assert "it/s" not in shown.err and "Overwriting" not in shown.err
    for text in ("copa_local", "piqa_local@2", "acc_norm", "small", "other", "±"):
        assert text in shown.out
    saved = record.read(target)
    assert saved == json.loads(json.dumps(found))
    assert saved["kind"] == "tasks" and saved["n"] == 40 and saved["seed"] == 0
    assert set(saved["checkpoints"]) == set(saved["results"]["models"]) == {"small", "other"}
    assert saved["tokenizer_sha256"] is None  # each has its own
    assert set(saved["data"]["files"]) == {"copa_local", "piqa_local"}
    assert all(len(file["sha256"]) == 64 for file in saved["data"]["files"].values())
    row = saved["results"]["models"]["small"]["copa_local"]
    assert set(row) == {"acc", "acc_stderr", "n"} and row["n"] == 20
    again = rerun_tasks(saved["arguments"])
    assert again["results"] == saved["results"]
    assert capsys.readouterr().out == ""


def test_json_on_standard_output(
    checkpoint: Path, offline_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_tasks([checkpoint], "copa_local", limit=2, json_file=Path("-"))
    assert json.loads(capsys.readouterr().out)["results"]["models"]["small"]["copa_local"]["n"] == 2


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ({"tasks": "piqa_locl"}, ConfigError, "did you mean 'piqa_local'"),
        ({"tasks": "helaswag"}, ConfigError, "did you mean 'hellaswag'"),
        ({"tasks": ""}, ConfigError, "no task is named"),
        ({"limit": -1}, ConfigError, "limit is -1"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"dtype": "int4"}, ConfigError, "dtype 'int4'"),
        ({"device": "tpu9"}, ConfigError, "device 'tpu9'"),
        ({"checkpoints": []}, ConfigError, "no checkpoint is given"),
        ({"checkpoints": [Path("/nowhere/at/all")]}, CheckpointError, "holds no config.json"),
    ],
)
def test_bad_input(
    checkpoint: Path, offline_data: Path, words: dict[str, Any], kind: type[SpikeLMError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        run_tasks(**{"checkpoints": [checkpoint], "tasks": "copa_local", **words})
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_no_tokenizer(tmp_path: Path, offline_data: Path) -> None:
    bare = save_checkpoint(tmp_path / "bare", small("twin"))
    with pytest.raises(DataError, match=r"bare has no usable tokenizer .*; questions are text"):
        run_tasks([bare], "copa_local")


def test_without_the_data_folder(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKELM_DATA", "/nowhere/at/all")
    with pytest.raises(DataError, match="copa_local needs /nowhere/at/all/eval/copa.jsonl"):
        run_tasks([checkpoint], "copa_local")


def test_online_tasks_without_a_network_are_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="the documents of piqa cannot be had"):
        run_tasks([checkpoint], "piqa", limit=1)


def test_without_the_harness_the_extra_is_named(checkpoint: Path) -> None:
    code = f"""
import sys
sys.modules["lm_eval"] = None  # as if it were not installed
from pathlib import Path
from spikelm.cli.evaluate_tasks import run_tasks
from spikelm.errors import ConfigError
try:
    run_tasks([Path({str(checkpoint)!r})], "copa_local")
except ConfigError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == ("tasks need lm-evaluation-harness, which is not installed; pip install 'spikelm[eval]'\n")


def test_the_package_needs_no_harness_until_it_is_used() -> None:
    code = """
import sys
import spikelm.cli.evaluate_tasks, spikelm.evaluation.tasks.run, spikelm.evaluation.longcontext.measure
print([name for name in sys.modules if name.partition(".")[0] == "lm_eval"])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"


def test_labels_are_as_short_as_they_may_be(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "step1", tmp_path / "b" / "step1", tmp_path / "b" / "step2"]
    for folder in folders:
        folder.mkdir(parents=True)
    assert list(labelled(folders[:1])) == ["step1"]
    assert list(labelled(folders[1:])) == ["step1", "step2"]
    assert list(labelled(folders)) == ["a/step1", "b/step1", "b/step2"]
    with pytest.raises(ConfigError, match="is given twice"):
        labelled([folders[0], folders[0] / ".." / "step1"])
