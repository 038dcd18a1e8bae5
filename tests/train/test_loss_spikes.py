"""The detector of loss spikes: silent on ordinary noise, and on real training awake where it matters."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.errors import TrainingError
from spikelm.train.config import LossSpikeConfig, TrainConfig
from spikelm.train.loss_spikes import LossSpikes
from spikelm.train.trainer import Trainer
from spikelm.train.training_state import Progress


def detector(**options: Any) -> LossSpikes:
    return LossSpikes(LossSpikeConfig(**options), warmup=0)


def found(curve: list[float], norms: list[float] | None = None, **options: Any) -> list[Any]:
    """Spikes of a whole curve; the memory goes through JSON after every step, as in a checkpoint."""
    state, eyes, spikes = Progress(), detector(**options), []
    for index, loss in enumerate(curve):
        spike = eyes.see(state, 4, loss, None if norms is None else norms[index])
        spikes += [spike] if spike is not None else []
        state.recent = json.loads(json.dumps(state.recent))
        state.step += 1
        state.samples += 4
    return spikes


def falling(steps: int, noise: float, seed: int) -> list[float]:
    """A power law with the noise of batches."""
    source = random.Random(seed)
    return [(1.5 + 4.0 * (1 + i) ** -0.3) * math.exp(source.gauss(0.0, noise)) for i in range(steps)]


@pytest.mark.parametrize("noise", [0.0, 0.002, 0.02, 0.2])
def test_ordinary_noise_is_no_spike(noise: float) -> None:
    for seed in range(2):
        source = random.Random(100 + seed)
        norms = [math.exp(source.gauss(0.0, 0.5)) for _ in range(1000)]
        assert found(falling(1000, noise, seed), norms) == []


def test_spikes_are_named_once_for_each_episode() -> None:
    curve = falling(600, 0.01, 0)
    for step in (300, 301, 302, 450):
        curve[step] *= 1.5
    spikes = found(curve)
    assert [spike.step for spike in spikes] == [301, 451]
    spike = spikes[0]
    assert (spike.first, spike.last) == (1200, 1203) and spike.value == curve[300]
    assert spike.expected < spike.limit < spike.value and spike.expected == pytest.approx(curve[299], rel=0.1)
    assert "the loss jumped to" in spike.words() and f"{spike.value:.4g}" in spike.words()


def test_a_lasting_jump_becomes_ordinary() -> None:
    curve = falling(300, 0.01, 1) + [6.0 * math.exp(0.001 * (i % 7)) for i in range(300)]
    assert [spike.step for spike in found(curve, window=50)] == [301]


def test_gradient_norm_alone() -> None:
    norms = [1.0 + 0.1 * (i % 5) for i in range(200)]
    norms[150] = 500.0
    spikes = found(falling(200, 0.01, 2), norms)
    assert [(spike.figure, spike.step) for spike in spikes] == [("grad_norm", 151)]


def test_grace_off_and_settings() -> None:
    curve = [3.0] * 30
    curve[20] = 30.0
    assert found(curve) == []  # half a window is not yet known
    assert [spike.step for spike in found(curve, window=10)] == [21]
    assert found(curve, window=10, action="off") == []
    assert found(curve, window=10, threshold=1e4) == []
    warm = LossSpikes(LossSpikeConfig(window=10), warmup=25)
    state = Progress()
    for loss in curve:
        assert warm.see(state, 4, loss, 1.0) is None
        state.step += 1


# --- real training ------------------------------------------------------------------------------------------

CALM = {"steps": 60, "optim__lr": 2e-3, "model__dropout": 0.0, "eval_every": 0, "loss_spike__window": 20}


def corrupt(trainer: Trainer, sample: int) -> None:
    """The samples of one step are damaged: their targets become bytes that the text never has."""
    from spikelm.train import step

    original = step.micro_batches

    def micro_batches(blocks: Any, seed: int, first: int, *rest: Any) -> Any:
        pieces = original(blocks, seed, first, *rest)
        if blocks is trainer._text.train and first == sample:
            for piece in pieces:
                piece.targets.copy_(128 + torch.arange(piece.targets.numel()).view_as(piece.targets) % 100)
        return pieces

    step.micro_batches = micro_batches  # type: ignore[assignment]


@pytest.fixture
def _whole_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """What :func:`corrupt` changes is put back."""
    from spikelm.train import step

    monkeypatch.setattr(step, "micro_batches", step.micro_batches)


def trainer(values: dict[str, Any]) -> Trainer:
    return Trainer(TrainConfig.from_dict(values))


@pytest.mark.usefixtures("_whole_data")
def test_corrupted_batch_warns_and_goes_on(make_values: Any) -> None:
    run = trainer(make_values(**CALM))
    corrupt(run, 40 * 4)
    assert run.run().step == 60
    (line,) = run.log.read("loss_spike")
    assert (line["at"], line["figure"], line["samples"]) == (41, "loss", [160, 163])
    assert line["value"] > line["limit"] > line["expected"] > 0
    assert not run.log.read("stopped")


def test_ordinary_run_has_none_and_resumes_exactly(make_values: Any, tmp_path: Path) -> None:
    whole = trainer(make_values(**CALM, out=str(tmp_path / "whole")))
    whole.run()
    assert not whole.log.read("loss_spike")
    first = trainer(make_values(**{**CALM, "steps": 33}, schedule__name="constant"))
    first.run()
    again = trainer(make_values(**{**CALM, "steps": 60}, schedule__name="constant"))
    assert again.run().resumed_from == 33
    other = trainer(make_values(**CALM, schedule__name="constant", out=str(tmp_path / "other")))
    other.run()
    assert again._state.recent == other._state.recent and len(again._state.recent["loss"]) == 20


@pytest.mark.usefixtures("_whole_data")
def test_corrupted_batch_stops(make_values: Any) -> None:
    values = make_values(**CALM, loss_spike__action="stop")
    run = trainer(values)
    corrupt(run, 40 * 4)
    with pytest.raises(TrainingError) as caught:
        run.run()
    message = str(caught.value)
    for words in ["the loss jumped to", "in step 41, samples 160 to 163", "step-00000039 is from before"]:
        assert words in message, message
    assert run.log.read("stopped")[0]["reason"] == message
    # With another action the same folder goes on.
    assert trainer({**values, "loss_spike": {"window": 20, "action": "warn"}}).run().step == 60


@pytest.mark.usefixtures("_whole_data")
def test_corrupted_batch_is_passed_over(make_values: Any) -> None:
    run = trainer(make_values(**CALM, loss_spike__action="rollback"))
    corrupt(run, 40 * 4)
    result = run.run()
    assert result.step == 60 and run._state.avoid == [160] and run._state.samples == 61 * 4
    (line,) = run.log.read("bad_step")
    assert line["at"] == 41 and line["step"] == 39 and line["policy"] == "rollback"
    assert "the loss jumped to" in line["reason"] and line["samples"] == [160, 163]
    steps = [line["step"] for line in run.log.read("step")]
    assert steps == list(range(2, 61, 2))
    assert max(line["loss"] for line in run.log.read("step")[10:]) < 5.0  # the damage is gone


def test_learning_rate_far_too_high_is_seen_and_rollback_ends(
    make_values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going back does not help against a learning rate, and the run says so instead of trying for ever."""
    values = make_values(**{**CALM, "checkpoint_every": 30}, optim__clip=0.0, schedule__name="constant")
    values |= {"loss_spike": {"window": 20, "action": "rollback"}, "bad_step_limit": 2}
    run = trainer(values)
    step = run._backend.step
    monkeypatch.setattr(
        run._backend, "step", lambda factor: step(factor * (1.0 if run._state.step < 40 else 300.0))
    )
    with pytest.raises(TrainingError) as caught:
        run.run()
    message = str(caught.value)
    assert "jumped to" in message and "3 times since step 30" in message, message
    assert "stopped after the update" in message and "step-00000030 is intact" in message


@pytest.mark.usefixtures("_whole_data")
def test_rollback_without_a_checkpoint_stops(make_values: Any) -> None:
    run = trainer(make_values(**CALM, loss_spike__action="rollback", checkpoint_every=0))
    corrupt(run, 40 * 4)
    with pytest.raises(TrainingError, match="there is no checkpoint to go back to"):
        run.run()


def test_configuration(make_values: Any) -> None:
    assert TrainConfig.from_dict(make_values(loss_spike__action=False)).loss_spike.action == "off"
    assert TrainConfig.from_dict(make_values()).loss_spike.action == "warn"
