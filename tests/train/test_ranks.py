"""Two real ranks: the numbers of one process, whatever the backend, the ZeRO stage and the accumulation."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LEGS = Path(__file__).with_name("legs.py")
TWIN = {"model__twin": True, "model__dropout": 0.0}
TIMEOUT = 400

Backend = dict[str, Any]
DDP: Backend = {}


def zero(name: str) -> Backend:
    return {"backend": "deepspeed", "deepspeed": name}


CARRIED = {"data__carried": True, "schedule__name": "constant", "eval_every": 100}
BACKENDS = {"ddp": DDP, **{name: zero(name) for name in ("zero0", "zero1", "zero2", "zero3")}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(legs: dict[str, dict[str, Any]], folder: Path, world_size: int = 2) -> dict[str, dict[str, Any]]:
    """Results of the legs, by name, from ``world_size`` real processes."""
    folder.mkdir(exist_ok=True)
    listed = [{**leg, "out": str(folder / f"{name}.json")} for name, leg in legs.items()]
    file = folder / "legs.json"
    file.write_text(json.dumps(listed))
    shared = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(LEGS), str(file)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        said = [rank.communicate(timeout=TIMEOUT)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(said)[-6000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in legs}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_maker: Callable[..., Any]) -> Callable[..., Any]:
    folder = tmp_path_factory.mktemp("ranks")
    values = tiny_maker(folder)

    def leg(name: str, do: str = "train", extra: dict[str, Any] | None = None, **changes: Any) -> Any:
        chosen = {"log_every": 1, "checkpoint_every": 0, "eval_every": 0, **changes}
        return {"do": do, "values": values(out=str(folder / name), **chosen), **(extra or {})}

    return leg


@pytest.fixture(scope="module")
def told(make: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Everything that two ranks are asked to do, in one launch."""
    legs: dict[str, dict[str, Any]] = {}
    twenty = {**TWIN, "steps": 20, "eval_every": 20, "sample_every": 20, "sample_tokens": 5}
    for name, backend in BACKENDS.items():
        legs[name] = make(name, **twenty, **backend)
        legs[f"{name}-accumulated"] = make(f"{name}-accumulated", **twenty, accumulation=2, **backend)
        for place in ("loss", "gradient"):
            legs[f"{name}-bad-{place}"] = make(
                f"{name}-bad-{place}",
                "poison",
                {"at": [1, 3, 1], "place": place},
                **TWIN,
                **backend,
                steps=6,
                accumulation=2,
                on_bad_step="skip",
            )
    # Small parameters stay whole under stage 3 unless it is told to split all.
    split = tmp_path_factory.mktemp("settings") / "split.json"
    split.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    legs["zero3-split"] = make("zero3-split", **twenty, **zero(str(split)), gradient_checkpointing=True)
    for name in ("zero1", "zero3-split"):
        backend = zero("zero1" if name == "zero1" else str(split))
        for place in ("gradient", "huge"):
            legs[f"{name}-rollback-{place}"] = make(
                f"{name}-rollback-{place}",
                "poison",
                {"at": [1, 3, 1], "place": place},
                **TWIN,
                **backend,
                steps=6,
                accumulation=2,
                on_bad_step="rollback",
                checkpoint_every=2,
            )
    for name in ("zero2", "zero3"):
        legs[f"{name}-recomputed"] = make(
            f"{name}-recomputed", **twenty, **zero(name), gradient_checkpointing=True
        )
        legs[f"{name}-bf16"] = make(f"{name}-bf16", **TWIN, **zero(name), steps=8, precision="bf16")
    legs["ddp-bf16"] = make("ddp-bf16", **TWIN, steps=8, precision="bf16")
    for name in ("ddp", "zero1", "zero3"):
        legs[f"{name}-spiking"] = make(f"{name}-spiking", steps=20, eval_every=20, **BACKENDS[name])
    lif = {"model": {"hidden_size": 16, "num_hidden_layers": 2, "neuron": {"name": "plif", "gain": 1.0}}}
    legs["zero3-lif"] = make("zero3-lif", **zero("zero3"), steps=8, **lif)
    legs["ddp-lif"] = make("ddp-lif", **DDP, steps=8, **lif)
    legs["exchange"] = make(
        "exchange",
        "exchange",
        {"backends": [DDP, zero("zero3"), zero("zero1"), zero("zero0"), zero("zero2"), {"accumulation": 2}]},
        **TWIN,
        steps=30,
    )
    legs["carried"] = make("carried", **TWIN, **CARRIED, steps=6)
    for policy in ("skip", "rollback"):
        legs[f"stream-{policy}"] = make(
            f"stream-{policy}",
            "poison",
            {"at": [1, 5, 0], "place": "loss"},
            **TWIN,
            steps=9,
            data__stream=True,
            on_bad_step=policy,
            checkpoint_every=2,
        )
    legs["muon"] = make("muon", **zero("zero1"), optim__name="muon", steps=2)
    legs["too-small"] = make("too-small", steps=2, accumulation=3)
    return launch(legs, tmp_path_factory.mktemp("told"))


def one_process(leg: dict[str, Any], out: Path) -> dict[str, Any]:
    from spikelm.train.config import TrainConfig
    from spikelm.train.trainer import Trainer

    values = {**leg["values"], "out": str(out)}
    for key in ("backend", "deepspeed"):
        values.pop(key, None)
    trainer = Trainer(TrainConfig.from_dict(values))
    result = trainer.run()
    assert result.evaluation is not None
    return {
        "losses": [line["loss"] for line in trainer.log.read("step")],
        "norms": [line["grad_norm"] for line in trainer.log.read("step")],
        "evaluation": result.evaluation.to_dict(),
        "samples": [line["text"] for line in trainer.log.read("sample")],
        "weights": {
            name: float(value.double().square().sum())
            for name, value in trainer._backend.tensors(lambda name, nbytes: True)
        },
    }


@pytest.fixture(scope="module")
def alone(make: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    leg = make("alone", **TWIN, steps=20, eval_every=20, sample_every=20, sample_tokens=5)
    return one_process(leg, tmp_path_factory.mktemp("alone") / "run")


NAMES = [*BACKENDS, *(f"{name}-accumulated" for name in BACKENDS), "zero2-recomputed", "zero3-recomputed"]
NAMES.append("zero3-split")


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_learns_the_same_as_in_one_process(told: Any, alone: Any, name: str) -> None:
    found = told[name]
    assert len(found["losses"]) == 20
    assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert found["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    assert found["weights"].keys() == alone["weights"].keys()
    for key, value in alone["weights"].items():
        assert found["weights"][key] == pytest.approx(value, rel=1e-3, abs=1e-12), key
    expected = name.removesuffix("-accumulated").removesuffix("-recomputed").removesuffix("-split")
    assert found["backend"] == ("torch-ddp" if expected == "ddp" else f"deepspeed-{expected}")


@pytest.mark.parametrize("name", NAMES)
def test_evaluations_and_samples_are_those_of_one_process(told: Any, alone: Any, name: str) -> None:
    found = told[name]
    assert found["evaluation"]["tokens"] == alone["evaluation"]["tokens"]
    assert found["evaluation"]["loss"] == pytest.approx(alone["evaluation"]["loss"], abs=1e-5)
    assert found["evaluation"]["bits_per_byte"] == pytest.approx(
        alone["evaluation"]["bits_per_byte"], abs=1e-5
    )
    assert found["samples"] == alone["samples"] and len(found["samples"]) == 1


def test_spiking_models_agree_within_the_spread_of_seeds(told: Any, make: Any, tmp_path: Path) -> None:
    """A sum in another order flips a spike now and then; that must matter less than another seed does."""
    seeds = []
    for seed in range(4):
        leg = make(f"seed{seed}", steps=20, eval_every=20, seed=seed)
        seeds.append(one_process(leg, tmp_path / f"seed{seed}")["evaluation"])
    losses = [found["loss"] for found in seeds]
    spread = max(losses) - min(losses)
    assert spread > 1e-4
    for name in ("ddp-spiking", "zero1-spiking", "zero3-spiking"):
        found = told[name]["evaluation"]
        assert abs(found["loss"] - losses[0]) < spread, (name, losses)
        assert found["spike_rate"] == pytest.approx(seeds[0]["spike_rate"], abs=0.05)
        assert found["spikes"]["projections"].keys() == seeds[0]["spikes"]["projections"].keys()


@pytest.mark.parametrize("place", ["loss", "gradient"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_bad_step_of_one_rank_is_named_and_skipped_by_all(told: Any, name: str, place: str) -> None:
    found, reference = told[f"{name}-bad-{place}"], told["ddp-bad-loss"]
    (event,) = found["bad"]
    words = "the loss is nan" if place == "loss" else "the gradient is not finite"
    assert words in event["reason"] and "in step 4 on rank 1, micro-batch 2 of 2" in event["reason"]
    assert (event["rank"], event["micro_batch"], event["policy"]) == (1, 1, "skip")
    assert event["samples"] == [15, 15] and event["batch"] == [12, 15]
    assert bool(event["parameters"]) == (place == "gradient")
    # Nothing of the bad step is left: what follows is the same for a bad loss and a bad gradient.
    assert len(found["losses"]) == 6
    assert found["losses"] == pytest.approx(reference["losses"], abs=1e-5)


@pytest.mark.parametrize("place", ["gradient", "huge"])
@pytest.mark.parametrize("name", ["zero1", "zero3-split"])
def test_the_run_goes_back_under_zero(told: Any, name: str, place: str) -> None:
    """Huge: every number is finite, the norm is not (in float32), and DeepSpeed alone would go on."""
    found = told[f"{name}-rollback-{place}"]
    (event,) = found["bad"]
    assert event["step"] == 2 and event["at"] == 4 and event["rank"] == 1 and event["samples"] == [15, 15]
    assert found["losses"] == pytest.approx(told["ddp-bad-loss"]["losses"], abs=1e-5)


def test_the_skipped_batch_changed_nothing(told: Any, alone: Any) -> None:
    losses = told["ddp-bad-loss"]["losses"]
    assert losses[:3] == pytest.approx(alone["losses"][:3], abs=1e-5)
    assert abs(losses[3] - alone["losses"][3]) > 1e-3  # the batch after the bad one


def test_tensors_travel_between_backends(told: Any, make: Any, tmp_path: Path) -> None:
    """Weights and optimiser memory of every backend continue with every other as if nothing had happened."""
    found = told["exchange"]
    assert found["same_names"] and found["count"] > 50
    reference = one_process(make("thirty", **TWIN, steps=30, eval_every=30), tmp_path / "thirty")
    assert found["losses"] == pytest.approx(reference["losses"], abs=1e-5)


def test_bf16_and_learned_neurons(told: Any) -> None:
    for name in ("zero2-bf16", "zero3-bf16"):
        assert told[name]["losses"] == pytest.approx(told["ddp-bf16"]["losses"], abs=0.02)
        assert told[name]["losses"] != told["zero2"]["losses"][:8]
    assert told["zero3-lif"]["losses"] == pytest.approx(told["ddp-lif"]["losses"], abs=0.05)
    assert any("leak_logit" in name for name in told["zero3-lif"]["weights"])


def test_carried_lanes_of_two_ranks_go_on_in_one_process(told: Any, make: Any, tmp_path: Path) -> None:
    assert len(told["carried"]["losses"]) == 6
    reference = one_process(make("whole", **TWIN, **CARRIED, steps=10), tmp_path / "whole")
    # In the folder of the two ranks: their six steps, then four of one process.
    leg = make("carried", **TWIN, **CARRIED, steps=10, accumulation=2)
    continued = one_process(leg, Path(leg["values"]["out"]))
    assert told["carried"]["losses"] == pytest.approx(reference["losses"][:6], abs=1e-5)
    assert continued["losses"] == pytest.approx(reference["losses"], abs=1e-5)


def test_a_stream_goes_back_with_the_run(told: Any) -> None:
    skipped, returned = told["stream-skip"], told["stream-rollback"]
    assert [event["samples"] for event in returned["bad"]] == [event["samples"] for event in skipped["bad"]]
    assert returned["bad"][0]["step"] == 4 and skipped["bad"][0]["step"] == 5
    assert len(returned["losses"]) == 9
    assert returned["losses"] == pytest.approx(skipped["losses"], abs=1e-5)


def test_what_cannot_work_is_one_sentence(told: Any) -> None:
    assert "ZeRO splits matrices that Muon needs whole" in told["muon"]["error"]
    assert "batch_size is 4 for 2 ranks with accumulation 3" in told["too-small"]["error"]
    assert all("\n" not in told[name]["error"] for name in ("muon", "too-small"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2-offload", "zero3-offload"])
def test_offload_learns_the_same_and_travels(
    make: Any, alone: Any, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    """The optimiser in the machine's memory is DeepSpeed's own, compiled when it is first used (minutes)."""
    twenty = {**TWIN, "steps": 20, "eval_every": 20, "sample_every": 20, "sample_tokens": 5}
    legs = {
        "whole": make(f"{name}-whole", **twenty, **zero(name)),
        "exchange": make(
            f"{name}-exchange",
            "exchange",
            {"backends": [DDP, zero(name), zero("zero1"), zero(name)]},
            **TWIN,
            steps=20,
        ),
        "bad": make(
            f"{name}-bad",
            "poison",
            {"at": [1, 3, 1], "place": "gradient"},
            **TWIN,
            **zero(name),
            steps=6,
            accumulation=2,
            on_bad_step="skip",
        ),
    }
    told = launch(legs, tmp_path_factory.mktemp(name))
    assert told["whole"]["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert told["exchange"]["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert told["bad"]["bad"][0]["rank"] == 1 and len(told["bad"]["losses"]) == 6
