"""Mixtures of experts in training: the same on one rank and two; their bias saved, restored, left alone."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from spikelm.channels.moe import MoE
from spikelm.train.config import TrainConfig
from spikelm.train.trackers import curves
from spikelm.train.trainer import Trainer

from .test_ranks import LEGS, TWIN, launch, one_process, zero
from .test_resume import assert_same, run

assert LEGS.exists()
EIGHT = {"steps": 8, "eval_every": 8, "schedule__name": "constant"}
BIAS = "blocks.0.channel.expert_bias"


def packs(folder: Path) -> dict[str, str]:
    """Data of short documents, one or several in a block."""
    lines = [json.dumps({"text": "spikes are " * (number % 4) + "rare"}) for number in range(40)]
    (folder / "short.jsonl").write_text("\n".join(lines) + "\n")
    return {key: f"{folder / 'short.jsonl'}#text" for key in ("data__train", "data__valid")}


def mixture(**options: Any) -> dict[str, Any]:
    """A model whose experts outnumber the tokens that some of them get on a rank."""
    channel = {"name": "moe", "experts": 12, "top_k": 2, "hidden": 8, "shared": 1, "loss_free_bias": 0.01}
    layer = {"mixer": {"name": "wkv4"}, "channel": {**channel, **options}}
    return {"model__layers": [layer, {"mixer": {"name": "wkv4"}, "channel": {"name": "swiglu"}}]}


SINKS = {**TWIN, **mixture(experts=3), "model__sink_tokens": 2, "steps": 2, "eval_every": 2}
SINKS["schedule__name"] = "constant"


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_maker: Callable[..., Any]) -> Callable[..., Any]:
    folder = tmp_path_factory.mktemp("experts")
    values = tiny_maker(folder)

    def leg(name: str, do: str = "train", extra: dict[str, Any] | None = None, **changes: Any) -> Any:
        chosen = {"log_every": 1, "checkpoint_every": 0, "eval_every": 0, **mixture(), **changes}
        return {"do": do, "values": values(out=str(folder / name), **chosen), **(extra or {})}

    return leg


@pytest.fixture(scope="module")
def told(make: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Everything that two ranks are asked to do, in one launch."""
    split = tmp_path_factory.mktemp("settings") / "split.json"
    split.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    backends = {"ddp": {}, "zero2": zero("zero2"), "zero3": zero(str(split))}
    eight = {**TWIN, **EIGHT}
    legs: dict[str, dict[str, Any]] = {}
    for name, backend in backends.items():
        legs[name] = make(name, **eight, **backend)
        at = {"at": [1, 2, 0], "place": "loss" if name == "ddp" else "gradient"}
        legs[f"{name}-bad"] = make(
            f"{name}-bad", "poison", at, **TWIN, **backend, steps=3, on_bad_step="skip"
        )
        if name == "zero2":
            continue
        spiking = {"steps": 2, "eval_every": 2, "gradient_checkpointing": True}
        legs[f"{name}-spiking"] = make(f"{name}-spiking", **backend, **spiking)
    # Documents that begin in other columns on each rank, after sink tokens.
    sinks = {**SINKS, **packs(split.parent)}
    legs["ddp-sinks"] = make("ddp-sinks", **sinks)
    legs["zero3-sinks"] = make("zero3-sinks", **sinks, **backends["zero3"], gradient_checkpointing=True)
    # Four steps, and four more after a resume.
    legs["zero3-half"] = make("zero3-resumed", **eight | {"steps": 4}, **backends["zero3"])
    legs["zero3-resumed"] = make("zero3-resumed", **eight, **backends["zero3"])
    free = mixture(balance_loss=0.0)
    legs["ddp-free-accumulated"] = make("ddp-free-accumulated", **eight, **free, accumulation=2)
    return launch(legs, tmp_path_factory.mktemp("told"))


@pytest.fixture(scope="module")
def alone(make: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, with the micro-batches that two ranks have (the balance loss is one of a micro-batch)."""
    folder = tmp_path_factory.mktemp("alone")
    eight = {**TWIN, **EIGHT}
    return {
        "balanced": process(make("alone", **eight, accumulation=2), folder / "balanced"),
        "free": process(make("alone", **eight, **mixture(balance_loss=0.0)), folder / "free"),
        "sinks": process(make("alone", **SINKS, **packs(folder), accumulation=2), folder / "sinks"),
    }


def process(leg: dict[str, Any], out: Path) -> dict[str, Any]:
    found = one_process(leg, out)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found["experts"] = [line.get("experts") for line in lines if line["event"] == "step"]
    return found


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3", "ddp-free-accumulated"])
def test_two_ranks_learn_what_one_learns(told: Any, alone: Any, name: str) -> None:
    found, reference = told[name], alone["free" if "free" in name else "balanced"]
    assert found["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    assert found["norms"] == pytest.approx(reference["norms"], rel=1e-4)
    assert found["weights"].keys() == reference["weights"].keys()
    for key, value in reference["weights"].items():
        assert found["weights"][key] == pytest.approx(value, rel=1e-3, abs=1e-12), key
    # The loads of all ranks, every choice of every token: 8 steps of 64 tokens and 2 experts.
    assert found["experts"] == reference["experts"] and len(found["experts"]) == 8
    entry = found["experts"][-1]["blocks.0.channel"]
    assert len(entry["shares"]) == 12 and sum(entry["shares"]) == pytest.approx(1.0, abs=1e-4)
    bias = found["biases"][BIAS]
    assert any(bias) and all(abs(b / 0.01 - round(b / 0.01)) < 1e-3 and abs(b) < 0.0801 for b in bias)
    assert found["evaluation"]["loss"] == pytest.approx(reference["evaluation"]["loss"], abs=1e-5)


@pytest.mark.parametrize("name", ["ddp", "zero3"])
def test_packs_with_sinks_on_two_ranks(told: Any, alone: Any, name: str) -> None:
    found, reference = told[f"{name}-sinks"], alone["sinks"]
    assert found["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    assert found["norms"] == pytest.approx(reference["norms"], rel=1e-4)
    assert found["weights"]["model/sinks.weight"] == pytest.approx(
        reference["weights"]["model/sinks.weight"], rel=1e-3
    )
    assert found["evaluation"]["loss"] == pytest.approx(reference["evaluation"]["loss"], abs=1e-5)


def test_zero3_takes_the_bias_from_a_checkpoint(told: Any) -> None:
    assert told["zero3-resumed"]["resumed"] == 4
    assert told["zero3-resumed"]["biases"] == told["zero3"]["biases"] != told["zero3-half"]["biases"]
    assert told["zero3-resumed"]["losses"] == pytest.approx(told["zero3"]["losses"], abs=1e-6)


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_a_bad_step_on_two_ranks_moves_no_bias(told: Any, name: str) -> None:
    found = told[f"{name}-bad"]
    assert len(found["bad"]) == 1 and len(found["losses"]) == 3
    # Three steps of four were taken, and each moved a bias by one rate at most.
    assert 0 < max(abs(b) for b in found["biases"][BIAS]) < 0.0301
    assert found["biases"] == told["ddp-bad"]["biases"]


@pytest.mark.parametrize("name", ["ddp", "zero3"])
def test_spiking_mixtures_train_and_evaluate(told: Any, name: str) -> None:
    found = told[f"{name}-spiking"]
    assert all(math.isfinite(loss) for loss in found["losses"]) and len(found["losses"]) == 2
    # The first step is the same everywhere; later a sum in another order may flip a spike.
    assert found["losses"][0] == pytest.approx(told["ddp-spiking"]["losses"][0], abs=1e-4)
    path = "blocks.0.channel.experts.*.up"
    assert 0.0 < found["evaluation"]["spikes"]["projections"][path]["firing_rate"] < 1.0


# --- one process --------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_run_that_was_not_stopped(
    make_values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between two lines of the log, which hold the loads of all steps since the one before."""
    options = {**mixture(), "log_every": 5}
    run(make_values(**options, out=str(tmp_path / "whole")))
    original = Trainer._train_step

    def step(self: Trainer, bar: Any) -> None:
        original(self, bar)
        if self._state.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", step)
        assert run(make_values(**options, out=str(tmp_path / "cut"))).interrupted == "SIGTERM"
    assert run(make_values(**options, out=str(tmp_path / "cut"))).resumed_from == 7
    assert_same(tmp_path / "whole", tmp_path / "cut")
    lines = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    logged = [line["experts"]["blocks.0.channel"] for line in lines if line["event"] == "step"]
    assert len(logged) == 3 and all(0 < entry["entropy"] <= 1 for entry in logged)
    shown = curves("step", next(line for line in lines if line["event"] == "step"))
    assert shown["moe/blocks.0.channel/max_share"] == logged[0]["max_share"]


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_bad_step_moves_no_bias(make_values: Any, place: str) -> None:
    trainer = Trainer(TrainConfig.from_dict(make_values(**mixture(), accumulation=2)))
    moe = cast(MoE, trainer.model.get_submodule("blocks.0.channel"))
    runner, original = trainer._runner, trainer._backend.loss
    trainer.model.train()
    good = runner.take(0, 0, None)
    assert good.bad is None and sum(good.loads["blocks.0.channel"]) == 4 * 16 * 2
    assert moe.expert_bias is not None
    before = moe.expert_bias.clone()
    assert before.any()

    def broken(*args: Any, **options: Any) -> Any:
        output = original(*args, **options)
        if place == "loss":
            return replace(output, loss=output.loss * math.nan)
        return replace(output, loss=output.loss + torch.sqrt(output.loss * 0.0))

    trainer._backend.loss = broken  # type: ignore[method-assign]
    bad = runner.take(4, 1, None)
    runner.close()
    assert bad.bad is not None and not bad.loads
    assert torch.equal(moe.expert_bias, before)


def test_accumulation_recomputation_and_loads(make_values: Any) -> None:
    """The loads of a step are those of its tokens, however they are cut and however often computed."""
    found = []
    for options in ({}, {"accumulation": 2}, {"gradient_checkpointing": True}):
        trainer = Trainer(TrainConfig.from_dict(make_values(**mixture(), **TWIN, **options)))
        trainer.model.train()
        outcome = trainer._runner.take(0, 0, None)
        trainer._runner.close()
        found.append((outcome.loads, trainer.model.state_dict()[BIAS].tolist(), outcome.aux))
    assert found[0][:2] == found[1][:2] == found[2][:2]
    assert found[0][2] == pytest.approx(found[2][2]) and found[0][2] > 0
