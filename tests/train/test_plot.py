"""``spikelm plot loss``: what is drawn and said is what the log holds, and bad input is one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikelm.cli import main
from spikelm.errors import TrainingError
from spikelm.train.config import TrainConfig
from spikelm.train.curves import RunCurves
from spikelm.train.log import RunLog
from spikelm.train.trainer import Trainer


def test_curves_are_those_of_the_log(whole: Path) -> None:
    run = RunCurves.read(whole)
    log = RunLog(whole / "log.jsonl")
    assert run.series("loss").tolist() == [line["loss"] for line in log.read("step")]
    assert run.x("steps").tolist() == [2, 4, 6, 8, 10, 12] and run.x("tokens")[-1] == 12 * 64
    # Evaluations know their step alone; their other places come from the step lines.
    assert run.x("tokens", run.evaluations).tolist() == [4 * 64, 8 * 64, 12 * 64]
    assert run.x("steps", run.evaluations).tolist() == [4, 8, 12]
    names, rates = run.layers()
    assert names == ["0", "1"] and rates.shape == (2, 6) and ((rates > 0) & (rates < 1)).all()
    summary = run.summary()
    held_out = [line["bits_per_byte"] for line in log.read("evaluation")]
    assert summary["best_bits_per_byte"] == min(held_out)
    assert summary["best_step"] == (4, 8, 12)[int(np.argmin(held_out))]
    assert summary["step"] == summary["steps"] == 12 and summary["mfu"] is None and summary["peak_rss"] > 0
    json.dumps(run.to_dict(), allow_nan=False)


def test_command(whole: Path, make_values: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib import image

    values = make_values(model__twin=True, measure_mfu=True, out=str(tmp_path / "twin"), steps=4)
    Trainer(TrainConfig.from_dict(values)).run()
    sizes = []
    for axis in ("tokens", "steps", "seconds"):
        words = ["plot", "loss", str(whole), str(tmp_path / "twin" / "log.jsonl"), "--x", axis]
        assert main([*words, "--out", str(tmp_path / "new" / f"{axis}.png")]) == 0
        picture = image.imread(tmp_path / "new" / f"{axis}.png")
        assert picture[..., :3].std() > 0.01
        sizes.append(picture.shape)
    shown = capsys.readouterr().out
    for words in (
        "whole",
        "twin",
        "held out bits/byte",
        "12 of 12",
        "4 of 4",
        "MFU",
        "gradient norm",
        "picture: ",
    ):
        assert words in shown, words
    # Without a name the picture lies beside the log; a twin alone has no map of spikes, so it is lower.
    assert main(["plot", "loss", str(tmp_path / "twin"), "--json", str(tmp_path / "r.json")]) == 0
    assert image.imread(tmp_path / "twin" / "curves.png").shape[0] < sizes[0][0]
    (told,) = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert told["run"] == "twin" and told["curves"]["step"] == [2, 4] and told["mfu"] > 0
    assert told["spike_rate"] is None and told["spike_rate_of_layers"] == {}
    capsys.readouterr()
    assert main(["plot", "loss", str(whole), str(whole), "--json", "-"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["run"] for run in runs] == [str(whole)] * 2  # one name for both would say nothing


def test_a_log_with_gaps_and_strange_lines(whole: Path) -> None:
    """A run in progress, of an older version, that diverged."""
    path = whole / "log.jsonl"
    lines = path.read_text().splitlines()
    steps = [line for line in lines if json.loads(line)["event"] == "step"]
    first = json.loads(steps[0])
    old = {key: first[key] for key in ("event", "step", "tokens", "loss", "bits_per_byte", "lr", "seconds")}
    bad = {**first, "step": 3, "bits_per_byte": "nan", "grad_norm": "inf"}
    path.write_text("\n".join([json.dumps(old), json.dumps(bad), *steps[1:3], '{"event": "st']))
    run = RunCurves.read(path)
    assert np.isnan(run.series("grad_norm")[0]) and len(run.steps) >= 2
    assert main(["plot", "loss", str(path), "--out", str(whole / "x.png")]) == 0
    json.dumps(run.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere holds no log.jsonl; expected the folder of a run"),
        (["empty"], "has no line of a training step"),
        (["whole", "--x", "second"], "did you mean 'seconds'?"),
        (["whole", "--out", "picture.xyz"], "use a name that ends in .png"),
        (["whole", "--out", "whole/log.jsonl/x.png"], "cannot write whole/log.jsonl/x.png"),
        ([], "Missing argument 'RUN...'"),
    ],
)
def test_bad_input_is_one_sentence(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.jsonl").write_text("")
    assert main(["plot", "loss", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("spikelm: error: ") and error.count("\n") == 1 and message in error, error


def test_unreadable_log(whole: Path) -> None:
    (whole / "log.jsonl").unlink()
    shutil.rmtree(whole / "checkpoints")
    with pytest.raises(TrainingError, match="holds no log.jsonl"):
        RunCurves.read(whole)
