"""Losses and gradients that are not finite are passed over or rolled back (two ranks: test_many_ranks)."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.errors import TrainingError
from spikelm.train.config import TrainConfig
from spikelm.train.trainer import Trainer

from .workers import break_trainer, start

STEADY = {"schedule__name": "constant", "log_every": 1}


def trainer(values: dict[str, Any], kind: str = "", *samples: int, times: int = 10**9) -> Trainer:
    found = Trainer(TrainConfig.from_dict(values))
    if kind:
        break_trainer(found, {"kind": kind, "rank": 0, "samples": samples, "times": times})
    return found


def progress(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "latest" / "training.json").read_text())["progress"]
    return values


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_bad_batch_is_passed_over(make_values: Any, tmp_path: Path, policy: str, kind: str) -> None:
    """Named in the log; before it the run is the run without the fault, and it goes on to the end."""
    whole = trainer(make_values(out=str(tmp_path / "whole"), accumulation=2, **STEADY))
    whole.run()
    run = trainer(make_values(on_bad_step=policy, accumulation=2, **STEADY), kind, 18)
    assert run.run().step == 12
    (event,) = run.log.read("bad_step")
    assert event["policy"] == policy and event["at"] == 5
    assert event["step"] == (4 if policy == "skip" else 3)
    assert (event["rank"], event["micro_batch"]) == (0, 1)
    assert event["samples"] == [18, 19] and event["batch"] == [16, 19]
    assert kind in event["reason"] and bool(event["parameters"]) == (kind == "gradient")
    end = progress(tmp_path / "run")
    assert end["avoid"] == [16] and end["samples"] == 13 * 4 and end["step"] == 12
    assert end["tokens"] == 12 * 4 * 16
    losses = [line["loss"] for line in run.log.read("step")]
    assert len(losses) == 12
    before = [line["loss"] for line in whole.log.read("step")]
    assert losses[:4] == before[:4] and losses[4] != before[4]
    assert [line["step"] for line in run.log.read("step")] == list(range(1, 13))


def test_skip_and_roll_back_come_to_the_same(make_values: Any, tmp_path: Path) -> None:
    """The steps done again are the same, bit for bit, so it does not matter how far a run goes back."""
    ends = []
    for policy in ("skip", "rollback"):
        run = trainer(make_values(on_bad_step=policy, out=str(tmp_path / policy), **STEADY), "loss", 17, 30)
        run.run()
        ends.append((run.model.state_dict(), progress(tmp_path / policy)))
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())
    for values in (ends[0][1], ends[1][1]):
        values.pop("seconds")
        assert values["avoid"] == [16, 28]
    assert ends[0][1] == ends[1][1]


def test_nothing_to_roll_back_to(make_values: Any) -> None:
    run = trainer(make_values(on_bad_step="rollback"), "loss", 4)
    with pytest.raises(TrainingError, match=r"in step 2.*no checkpoint to roll back to yet.*skip"):
        run.run()


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_too_many_bad_steps_in_a_row_stop(make_values: Any, policy: str) -> None:
    """Steps done again after a roll-back are no excuse."""
    run = trainer(make_values(on_bad_step=policy, bad_step_limit=3, **STEADY), "loss", *range(16, 200))
    words = "in a row" if policy == "skip" else "since step 3"
    with pytest.raises(TrainingError, match=rf"\(4 times {words}\): stopped before the update"):
        run.run()
    assert len(run.log.read("bad_step")) == 3
    assert run.log.read("stopped")[0]["batch"] == [28, 31]
    assert run.store.steps()[-1] == 3


def test_bad_steps_that_are_not_in_a_row_do_not_stop(make_values: Any) -> None:
    run = trainer(
        make_values(on_bad_step="rollback", bad_step_limit=1, checkpoint_every=2, **STEADY),
        "loss",
        17,
        29,
        41,
    )
    assert run.run().step == 12
    assert len(run.log.read("bad_step")) == 3


def test_a_rolled_back_run_uses_no_damaged_checkpoint(make_values: Any) -> None:
    """The newest one is damaged: the one before is used, and the damaged one is set aside."""
    run = trainer(make_values(on_bad_step="rollback", **STEADY), "loss", 33)
    original = run._saving.roll_back

    def damaging(bar: Any, warn: Any) -> Any:
        run._saving.finish(bar)
        path = run.store.path(6) / "training.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        return original(bar, warn)

    run._saving.roll_back = damaging  # type: ignore[method-assign]
    assert run.run().step == 12
    assert [line["step"] for line in run.log.read("bad_step")] == [3]
    assert "checkpoint of step 6 is unusable" in run.log.read("warning")[0]["text"]
    assert (run.store.folder / "corrupt-step-00000006").is_dir()


@pytest.mark.parametrize("policy", ["rollback"])
def test_what_is_passed_over_survives_kill_9(make_values: Any, tmp_path: Path, policy: str) -> None:
    """A real process, killed after the bad batch was passed over; the resumed one never meets it again."""
    values = make_values(on_bad_step=policy, checkpoint_every=2, async_checkpoints=False, **STEADY)
    (tmp_path / "jobs.json").write_text(
        json.dumps(
            [
                {
                    "values": values,
                    "told": str(tmp_path / "told"),
                    "faults": [
                        {"kind": "loss", "rank": 0, "samples": [18]},
                        {"kind": "kill", "rank": 0, "step": 8},
                    ],
                }
            ]
        )
    )
    (process,) = start(
        1, [str(Path(__file__).with_name("workers.py")), str(tmp_path / "jobs.json")], tmp_path
    )
    assert process.wait(120) == -signal.SIGKILL, (tmp_path / "rank-0.txt").read_text()
    assert progress(tmp_path / "run")["step"] == 6 and progress(tmp_path / "run")["avoid"] == [16]
    run = trainer(values)  # without the fault: what is passed over was decided before
    assert run.run().resumed_from == 6
    end = progress(tmp_path / "run")
    assert end["avoid"] == [16] and end["samples"] == 13 * 4
    whole = trainer({**values, "out": str(tmp_path / "whole")}, "loss", 18)
    whole.run()
    assert all(torch.equal(v, whole.model.state_dict()[k]) for k, v in run.model.state_dict().items())
