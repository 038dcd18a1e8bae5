"""The figures of a log line: FLOPs, peak, memory, spikes per layer; the same on one rank and on two."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spikelm.meter import Meter
from spikelm.train.config import TrainConfig
from spikelm.train.evaluation import combine
from spikelm.train.log import RunLog
from spikelm.train.memory import largest, memory
from spikelm.train.ranks import Ranks
from spikelm.train.spikes import brief, together
from spikelm.train.throughput import BUDGET, gemm_peak, model_flops
from spikelm.train.trainer import Trainer

RANK = """
import json, sys
import torch
torch.set_num_threads(1)
from spikelm.errors import SpikeLMError
from spikelm.train.config import TrainConfig
from spikelm.train.ranks import join
from spikelm.train.trainer import Trainer

ranks = join(60.0, torch.device("cpu"))
told = []
for values in json.loads(sys.argv[1]):
    trainer = Trainer(TrainConfig.from_dict(values), ranks=ranks)
    trainer._saving.due = lambda step, stopping: False  # this is not about checkpoints
    try:
        told.append(trainer.run().step)
    except SpikeLMError as error:
        told.append(str(error))
ranks.leave()
print(json.dumps(told))
"""


def test_model_flops_by_hand(make_values: Any) -> None:
    run = Trainer(TrainConfig.from_dict(make_values()))
    D, V = 16, 256
    hidden = run.model.blocks[0].channel.key.out_features
    # WKV4: receptance, key, value, output; channel: key, value, receptance; two layers; the head.
    macs = 2 * (4 * D * D + 2 * D * hidden + D * D) + D * V
    assert model_flops(run.model) == 6 * macs
    meter = Meter()
    run._runner.take(0, 0, meter)
    assert meter.summary()["total"]["dense_macs"] == macs  # what a token really passes through
    run.model.head.linear.weight.requires_grad_(False)  # type: ignore[union-attr]
    assert model_flops(run.model) == 6 * macs - 2 * D * V
    assert model_flops(nn.LayerNorm(4)) == 0


def test_peak_is_measured_once_and_leaves_no_trace() -> None:
    state = torch.get_rng_state()
    started = time.perf_counter()
    peak = gemm_peak(torch.device("cpu"), "fp32")
    assert time.perf_counter() - started < 60 * BUDGET  # a busy machine
    assert torch.equal(state, torch.get_rng_state())
    assert peak.threads == 1 and peak.dtype == "fp32" and peak.size >= 128
    # No slower than a product that is measured here, within what a busy machine does to either.
    a = torch.randn(256, 256)
    torch.mm(a, a)
    started = time.perf_counter()
    torch.mm(a, a)
    assert peak.flops > 0.2 * 2 * 256**3 / (time.perf_counter() - started)
    assert gemm_peak(torch.device("cpu"), "fp32") is peak


def test_memory_is_what_the_system_says() -> None:
    import mmap

    import psutil

    before = memory(torch.device("cpu"))
    assert before["rss"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    block = mmap.mmap(-1, 2**26)  # 64 MiB from the system, whatever the allocator still holds
    for page in range(0, 2**26, 4096):
        block[page] = 1
    after = memory(torch.device("cpu"))
    assert after["rss"] - before["rss"] > 32 * 2**20 and after["rss_peak"] >= after["rss"] > 0
    block.close()
    assert largest([{"a": 1, "b": 5}, {"a": 3}, {"b": 2}]) == {"a": 3, "b": 5}


def test_line_of_the_log(make_values: Any) -> None:
    run = Trainer(TrainConfig.from_dict(make_values(measure_mfu=True, optim__clip=1e-6)))
    run.run()
    (peak,) = run.log.read("peak")
    assert peak["model_flops_per_token"] == model_flops(run.model) and peak["ranks"] == 1
    for line in run.log.read("step"):
        assert line["mfu"] == pytest.approx(
            line["tokens_per_second"] * peak["model_flops_per_token"] / peak["flops"], rel=0.01, abs=1e-5
        )
        assert 0 < line["data_seconds"] < line["step_seconds"]
        assert line["tokens_per_second"] == pytest.approx(64 / line["step_seconds"], rel=0.01)
        assert line["clipped"] == 1.0 and line["memory"]["rss"] > 2**20
        assert list(line["layers"]) == ["0", "1"]
        mine = [v for k, v in line["projections"].items() if k.startswith("blocks.1.")]
        rates = [entry["firing_rate"] for entry in mine]
        assert min(rates) <= line["layers"]["1"]["firing_rate"] <= max(rates)
        for figures in [*line["layers"].values(), *line["projections"].values()]:
            assert figures["silent"] == pytest.approx(1.0 - figures["firing_rate"], abs=2e-6)
            assert figures["mean_count"] >= figures["firing_rate"] >= figures["at_cap"] >= 0.0
    free = Trainer(TrainConfig.from_dict(make_values(optim__clip=0.0, steps=2, out=str(run.out) + "-free")))
    free.run()
    (line,) = free.log.read("step")
    assert line["clipped"] is None and line["mfu"] is None and not free.log.read("peak")


def test_layer_figures() -> None:
    def entry(inputs: int, outputs: int, rate: float, never: float, tokens: int = 7) -> dict[str, Any]:
        figures = {"firing_rate": rate, "silent": 1 - rate, "mean_count": 2 * rate, "at_cap": 0.0}
        sizes = {"in_features": inputs, "out_features": outputs, "tokens": tokens}
        return {**sizes, "never_fired": never, **figures}

    neuron = {"features": 9, "firing_rate": 1.0, "tokens": 7}
    found = together([entry(2, 2, 0.5, 0.0), entry(2, 6, 0.1, 0.5), neuron, entry(2, 2, 0.0, 1.0, tokens=0)])
    assert found["firing_rate"] == pytest.approx((4 * 0.5 + 12 * 0.1) / 16)
    assert found["never_fired"] == pytest.approx(0.25)
    neurons = [
        {"features": 1, "firing_rate": 0.2, "silent": 0.8, "mean_count": 0.2, "never_fired": 0.0},
        {"features": 3, "firing_rate": 0.4, "silent": 0.6, "mean_count": 0.4, "never_fired": 1.0},
    ]
    for one in neurons:
        one["tokens"] = 5
    assert together(neurons)["firing_rate"] == pytest.approx(0.35)
    assert together([]) == {} and together([entry(2, 2, 0.0, 1.0, tokens=0)]) == {}
    # One token in ten of an expert counts a tenth.
    experts = [entry(2, 2, 0.5, 0.0, tokens=9), entry(2, 2, 0.0, 1.0, tokens=1)]
    assert together(experts)["firing_rate"] == pytest.approx(0.45)


def test_combining_alone_changes_nothing() -> None:
    meter = Meter()
    for path, spiking in (("blocks.0.a", True), ("blocks.0.b", False)):
        x = torch.randint(0, 3, (2, 5, 7)).float()
        meter.record(path, x, spiking=spiking, out_features=3, valid=None, cap=2)
    meter.record_neuron("blocks.0.n", torch.ones(2, 5, 4), spiking=True, valid=None)
    before = meter.summary()
    combine(meter, Ranks())
    assert meter.summary() == before
    combine(Meter(), Ranks())
    assert brief(Meter().summary())["layers"] == {}


def test_two_ranks_log_what_one_logs(make_values: Any, tmp_path: Path) -> None:
    """Spikes of all samples, the largest memory, trackers on rank 0 alone, and a spike that both agree on."""
    shared = {"model__dropout": 0.0, "steps": 2, "log_every": 1, "eval_every": 0, "checkpoint_every": 0}
    one = Trainer(TrainConfig.from_dict(make_values(**shared, out=str(tmp_path / "one"))))
    one.run()
    two = make_values(**shared, trackers="auto", measure_mfu=True, out=str(tmp_path / "two"))
    # With this threshold some step is a spike as soon as half the window is known, and both ranks must stop.
    stop = make_values(
        **{**shared, "steps": 30},
        loss_spike={"window": 10, "threshold": 1e-9, "action": "stop"},
        out=str(tmp_path / "stop"),
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shown = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, json.dumps([two, stop])],
            env={**os.environ, **shown, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ended = [process.communicate(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(error for _, error in ended)
    told = [json.loads(out) for out, _ in ended]
    assert told[0] == told[1] and told[0][0] == 2, told
    assert "jumped to" in told[0][1] and "there is no checkpoint to go back to" in told[0][1]

    log = RunLog(tmp_path / "two" / "log.jsonl")
    assert log.read("peak")[0]["ranks"] == 2 and not log.read("warning")
    mine, theirs = one.log.read("step")[0], log.read("step")[0]
    assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-6)
    assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=0.02)  # spikes flip
    for path, entry in mine["projections"].items():
        assert theirs["projections"][path] == pytest.approx(entry, abs=1e-3), path
    assert len(list((tmp_path / "two" / "tensorboard").glob("events*"))) == 1
