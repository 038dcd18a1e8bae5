"""RULER's tasks through lm-evaluation-harness: its questions are ours, and so are its figures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.checkpoint import save_checkpoint
from spikelm.cli.evaluate_tasks import rerun_tasks, run_tasks
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError, DataError
from spikelm.evaluation.longcontext import harness
from spikelm.evaluation.longcontext.measure import make_prompt
from spikelm.evaluation.longcontext.prompt import Haystack
from spikelm.evaluation.longcontext.ruler import RULER
from spikelm.evaluation.tasks import run as running
from spikelm.evaluation.tasks.language_model import HarnessModel
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()


def small() -> SpikeLM:
    torch.manual_seed(0)
    return SpikeLM(ModelConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1)).eval()


class Reading(HarnessModel):
    """Answers with the first ``n`` magic numbers that it finds in the question."""

    def __init__(self, n: int) -> None:
        super().__init__(small(), BYTES)
        self.n, self.asked = n, []  # type: ignore[var-annotated]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        self.asked += [request.args for request in requests]
        return [" ".join(re.findall(r"is: (\d{7})", request.args[0])[: self.n]) for request in requests]


@pytest.mark.parametrize(("n", "expected"), [(4, 1.0), (1, 0.25), (0, 0.0)])
def test_the_harness_scores_what_the_model_writes(
    n: int, expected: float, prose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "HAYSTACK", prose)
    model = Reading(n)
    name = "ruler_niah_multivalue_1k"
    found = running.run(model, {name: -1}, limit=5, seed=3)
    assert found == {name: {"acc": expected, "acc_stderr": pytest.approx(0.0), "n": 5}}
    text, options = model.asked[0]
    haystack = Haystack(running.open_source(prose))
    assert text == make_prompt("niah_multivalue", 0, None, 1024, BYTES, 3, haystack).text
    assert options["max_gen_toks"] == 2 * len("1234567, 1234567, 1234567, 1234567") + 16
    assert not options["do_sample"] and not options["until"]


@pytest.mark.parametrize("kind", RULER)
def test_every_kind_is_a_task(kind: str, haystack: Haystack) -> None:
    task = harness.config(f"ruler_{kind}_2k", BYTES, haystack, samples=2)
    documents = task["custom_dataset"]()["test"]
    assert len(documents) == 2 and len(documents[0]["text"]) <= 2048
    whole, half = documents[0]["answers"], documents[0]["answers"][: len(documents[0]["answers"]) // 2]
    assert task["process_results"](documents[0], [" and ".join(whole)]) == {"acc": 1.0}
    if half:
        share = len(half) / len(whole)
        assert task["process_results"](documents[0], [" and ".join(half)])["acc"] == pytest.approx(share)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_checkpoint(tmp_path / "m", small(), BYTES)
    saved = run_tasks([folder], "ruler_niah_single_1_1k", limit=2)
    shown = capsys.readouterr()
    assert "ruler_niah_single_1_1k" in shown.out and "Custom kwargs" not in shown.err
    assert saved["results"]["models"]["m"]["ruler_niah_single_1_1k"]["n"] == 2
    assert rerun_tasks(saved["arguments"])["results"] == saved["results"]
    for name, message in (
        ("ruler_vtt_4k", "unknown task of RULER 'vtt'; did you mean 'vt'"),
        ("ruler_vt_0", "length '0'"),
        ("ruler_vt_1k@2", "takes no examples"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_tasks([folder], name, limit=1)
    with pytest.raises(DataError, match="30 tokens are too few"):
        run_tasks([folder], "ruler_vt_30", limit=1)
    with pytest.raises(ConfigError, match="expected ruler_KIND_LENGTH"):
        harness.kind_and_length("ruler_vt")
