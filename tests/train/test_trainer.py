"""The run as a whole: what it learns, says and logs, and when it stops."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm.cli import main
from spikelm.errors import DataError, TrainingError
from spikelm.train.config import TrainConfig
from spikelm.train.reporting import printable
from spikelm.train.spikes import SpikeWarnings, spike_rate
from spikelm.train.trainer import Trainer


class Recorder:
    """A progress bar that remembers."""

    def __init__(self) -> None:
        self.done, self.notes, self.lines = 0.0, [""], [""]
        self.opened: tuple[Any, ...] = ()

    def advance(self, amount: float = 1) -> None:
        self.done += amount

    def note(self, text: str) -> None:
        self.notes.append(text)

    def say(self, text: str) -> None:
        self.lines.append(text)

    @contextmanager
    def open(
        self, title: str, total: float | None = None, unit: str = "it", done: float = 0
    ) -> Iterator[Recorder]:
        self.opened, self.done = (title, total, unit, done), 0.0  # of the bar opened last
        yield self


def trainer(values: dict[str, Any], bar: Recorder | None = None) -> Trainer:
    return Trainer(TrainConfig.from_dict(values), **({} if bar is None else {"progress": bar.open}))


def test_learns_and_reports(make_values: Any, tmp_path: Path) -> None:
    bar = Recorder()
    run = trainer(make_values(steps=60, optim__lr=2e-2, eval_every=20, model__dropout=0.0), bar)
    result = run.run()
    evaluations = run.log.read("evaluation")
    assert [line["step"] for line in evaluations] == [20, 40, 60]
    assert result.evaluation is not None
    assert result.evaluation.bits_per_byte < 4.2 < evaluations[0]["bits_per_byte"] + 1.5
    assert result.evaluation.bits_per_byte == pytest.approx(result.evaluation.loss / math.log(2))  # bytes
    assert result.step == result.steps == 60 and result.tokens == 60 * 4 * 16
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / "step-00000060"
    assert not run.model.training
    json.dumps(result.to_dict())

    assert bar.opened == ("train", 60 * 64, "tokens", 0) and bar.done == 60 * 64
    assert "bits/byte" in bar.notes[-1] and "spikes" in bar.notes[-1] and "loss" in bar.notes[-1]
    assert any(line.startswith("step 20: held out") for line in bar.lines)


def test_log(make_values: Any) -> None:
    run = trainer(make_values())
    run.run()
    header, *rest = run.log.read()
    assert header["event"] == "run" and header["parameters"] == run.model.num_parameters()
    assert header["config"]["optim"]["betas"] == [0.9, 0.95] and header["model"]["vocab_size"] == 256
    assert (
        header["versions"]["torch"] == torch.__version__ or header["versions"]["torch"] in torch.__version__
    )
    steps = [line for line in rest if line["event"] == "step"]
    assert [line["step"] for line in steps] == [2, 4, 6, 8, 10, 12]
    for line in steps:
        assert line["tokens"] == line["step"] * 64
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / math.log(2))
        assert line["tokens_per_second"] > 0 and line["grad_norm"] > 0 and line["lr"] > 0
        assert 0 < line["spike_rate"] < 1
        assert "blocks.0.mixer.key" in line["projections"]
    assert steps[0]["lr"] == pytest.approx(3e-3)  # the second of two steps of warm-up


def test_twin_has_no_spike_rate(make_values: Any) -> None:
    run = trainer(make_values(model__twin=True, steps=2))
    result = run.run()
    assert result.evaluation is not None and result.evaluation.spike_rate is None
    assert run.log.read("step")[0]["spike_rate"] is None


def test_evaluation_leaves_no_trace(make_values: Any, tmp_path: Path) -> None:
    ends = []
    for every, samples in ((0, 0), (1, 3)):
        values = make_values(eval_every=every, sample_every=samples, out=str(tmp_path / f"r{every}"))
        run = trainer(values)
        run.run()
        ends.append(run.model.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_samples_are_written(make_values: Any) -> None:
    bar = Recorder()
    run = trainer(make_values(sample_every=6, sample_prompt="spike", sample_tokens=9), bar)
    run.run()
    assert [line["step"] for line in run.log.read("sample")] == [6, 12]
    assert sum("writes: spike" in line for line in bar.lines) == 2


def test_no_validation_text(make_values: Any) -> None:
    values = make_values()
    del values["data"]["valid"]
    assert trainer(values).run().evaluation is None


def test_whole_validation_set(make_values: Any) -> None:
    run = trainer(make_values(eval_batches=0, steps=2))
    result = run.run()
    assert result.evaluation is not None and run._text.valid is not None
    assert result.evaluation.tokens == len(run._text.valid) * 16


@pytest.mark.parametrize(
    ("optim", "place", "bad"),
    [
        ("adamw", "loss", math.nan),
        ("adamw", "loss", math.inf),
        ("adamw", "gradient", math.nan),
        ("muon", "gradient", math.inf),
    ],
)
def test_not_finite_stops_before_the_update(
    make_values: Any, monkeypatch: pytest.MonkeyPatch, optim: str, place: str, bad: float
) -> None:
    values = make_values(accumulation=2, optim__name=optim, schedule__name="constant")
    run = trainer(values)
    backend = run._backend
    before: dict[str, torch.Tensor] = {}

    if place == "loss":
        original = backend.loss

        def loss(inputs: Any, targets: Any, state: Any, ctx: Any, **options: Any) -> Any:
            output = original(inputs, targets, state, ctx, **options)
            if ctx.step == 4 and ctx.random is not None and int(ctx.random.stream[0]) == 18:
                before.update({k: v.clone() for k, v in run.model.state_dict().items()})
                return dataclasses.replace(output, loss=output.loss * bad)
            return output

        monkeypatch.setattr(backend, "loss", loss)
        words = ["the loss is", "in step 5, micro-batch 2 of 2, samples 18 to 19"]
    else:
        step = backend.step

        def poisoned(factor: float) -> Any:
            if run._state.step == 4:
                run.model.embedding.weight.grad[3, 1] = bad  # type: ignore[index]
                before.update({k: v.clone() for k, v in run.model.state_dict().items()})
            return step(factor)

        monkeypatch.setattr(backend, "step", poisoned)
        words = ["the gradient is not finite (embedding.weight)", "in step 5, samples 16 to 19"]

    with pytest.raises(TrainingError) as caught:
        run.run()
    message = str(caught.value)
    for word in [*words, "stopped before the update", "step-00000003 is intact"]:
        assert word in message, message
    assert "\n" not in message
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert run.log.read("stopped")[0]["reason"] == message
    result = trainer(values).run()  # the fault gone, the same command goes on
    assert result.resumed_from == 3 and result.step == 12
    assert not run.log.read("stopped")


@pytest.mark.parametrize("checkpoint_every", [0, 3])
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_the_same_trainer_goes_on_after_a_refused_step(
    make_values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_every: int, place: str
) -> None:
    """The refused step leaves neither gradients nor sums behind."""
    values = make_values(accumulation=2, checkpoint_every=checkpoint_every)
    whole = trainer({**values, "out": str(tmp_path / "whole")})
    whole.run()
    run = trainer(values)
    backend = run._backend
    loss = backend.loss

    def poisoned(inputs: Any, targets: Any, state: Any, ctx: Any, **options: Any) -> Any:
        output = loss(inputs, targets, state, ctx, **options)
        if ctx.step == 4 and ctx.random is not None and int(ctx.random.stream[0]) == 18:
            if place == "loss":
                return dataclasses.replace(output, loss=output.loss * math.nan)
            run.model.embedding.weight.grad[3, 1] = math.nan  # type: ignore[index]
        return output

    with monkeypatch.context() as patch:
        patch.setattr(backend, "loss", poisoned)
        with pytest.raises(TrainingError, match="in step 5"):
            run.run()
    assert run.run().step == 12
    assert all(torch.equal(v, whole.model.state_dict()[k]) for k, v in run.model.state_dict().items())
    assert [line["loss"] for line in run.log.read("step")] == [
        line["loss"] for line in whole.log.read("step")
    ]


def test_real_divergence_is_caught(make_values: Any) -> None:
    """No mock: weights that overflow."""
    run = trainer(make_values())
    with torch.no_grad():
        run.model.head.linear.weight.fill_(3e38)  # type: ignore[union-attr]
    with pytest.raises(TrainingError, match="in step 1, micro-batch 1 of 1, samples 0 to 3.*no checkpoint"):
        run.run()
    assert run.store.steps() == []


@pytest.mark.parametrize("mixer", ["gla", "gated_delta"])
def test_a_gate_that_a_kernel_refuses_is_a_bad_step(make_values: Any, mixer: str) -> None:
    """No mock: activations that are NaN before they make a gate, which kernels on CPUs raise for."""
    layer = {"mixer": {"name": mixer, "num_heads": 2}, "channel": {"name": "rwkv"}}
    run = trainer(make_values(model__layers=[layer]))
    with torch.no_grad():
        run.model.embedding.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="the loss is nan in step 1, micro-batch 1 of 1, samples 0 to 3"):
        run.run()


def test_nothing_to_predict(make_values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(make_values())
    original = run._text.train.batch

    def batch(*args: Any) -> Any:
        found = original(*args)
        found.targets.fill_(-100)
        return found

    monkeypatch.setattr(run._text.train, "batch", batch)
    with pytest.raises(TrainingError, match="step 1: no token to predict in samples 0 to 3"):
        run.run()


def test_too_little_text(make_values: Any, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("short")
    with pytest.raises(DataError, match="fewer than one block"):
        trainer(make_values())


def projection(rate: float, mean: float, spiking: bool = True) -> dict[str, Any]:
    return {
        "spiking": spiking,
        "firing_rate": rate,
        "silent": 1.0 - rate,
        "mean_count": mean,
        "in_features": 4,
        "out_features": 2,
        "tokens": 8,
    }


def test_spike_warnings() -> None:
    summary = {
        "projections": {
            "dead": projection(0.0005, 0.0005),
            "stuck": projection(0.97, 0.97),
            "counts": projection(0.97, 2.5),
            "fine": projection(0.2, 0.2),
            "dense": projection(1.0, 1.0, spiking=False),
        },
        "neurons": {},
    }
    warnings = SpikeWarnings()
    assert warnings.check(summary) == []  # one reading says nothing
    found = warnings.check(summary)
    assert len(found) == 2 and found[0].startswith("dead is silent: 99.95%")
    assert found[1].startswith("stuck is saturated: it fires 97.0%")
    assert warnings.check(summary) == []  # and is said once
    assert spike_rate(summary) == pytest.approx((0.0005 + 0.97 + 0.97 + 0.2) / 4)
    dense = {"dense": projection(1.0, 1.0, spiking=False)}
    assert spike_rate({"projections": dense, "neurons": {}}) is None
    outside = {"a": {"features": 1, "firing_rate": 0.2}, "b": {"features": 3, "firing_rate": 0.4}}
    assert spike_rate({"projections": dense, "neurons": outside}) == pytest.approx(0.35)


@pytest.mark.parametrize(("threshold", "word"), [(1e9, "is silent"), (-1e9, "is saturated")])
def test_spike_warnings_of_a_run(make_values: Any, threshold: float, word: str) -> None:
    bar = Recorder()
    neuron = {"name": "heaviside", "threshold": threshold}
    values = make_values(model__neuron_overrides={"blocks.1.mixer.key": neuron})
    run = trainer(values, bar)
    run.run()
    assert [word in line["text"] for line in run.log.read("warning")] == [True]
    assert sum(line.startswith(f"warning: blocks.1.mixer.key {word}") for line in bar.lines) == 1


def test_printable() -> None:
    assert printable("a\x1b[2Jb\n\u00e9") == "a\ufffd[2Jb\n\u00e9"


def command(make_values: Any, tmp_path: Path, **changes: Any) -> list[str]:
    path = tmp_path / "c.json"  # JSON is YAML
    path.write_text(json.dumps(make_values(**changes)))
    path = path.rename(tmp_path / "c.yaml")
    return ["train", str(path)]


def test_command(make_values: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command(make_values, tmp_path)
    assert main([*words, "steps=4", "optim.lr=1e-3", "--json", str(tmp_path / "r.json")]) == 0
    shown = capsys.readouterr()
    assert "4 of 4" in shown.out and "bits/byte" in shown.out and "held out" in shown.err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["step"] == 4 and result["evaluation"]["bits_per_byte"] > 0
    assert main([*words, "steps=4", "optim.lr=2e-3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("spikelm: error: ") and error.count("\n") == 1
    assert "optim.lr is 0.001 in the checkpoint and 0.002 now" in error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optim.lrr=1"], "did you mean 'optim.lr'"),
        (["steps"], "not of the form key=value"),
        (["data.train=nowhere.txt"], "nowhere.txt"),
        (["data.tokenizer=nowhere"], "nowhere"),
        (["model=spikegpt-nanoo"], "spikegpt-nano"),
        (["model.hiden_size=3"], "did you mean 'hidden_size'"),
    ],
)
def test_command_refuses_in_one_sentence(
    make_values: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert main([*command(make_values, tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("spikelm: error: ") and error.count("\n") == 1 and expected in error, error


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    assert "Example: spikelm train" in capsys.readouterr().out
