"""``spikelm launch``: options, hostfiles, Slurm scripts, and real ranks that are stopped and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from spikelm.cli import main
from spikelm.errors import ConfigError
from spikelm.train import launch as module
from spikelm.train import stop
from spikelm.train.__main__ import without_local_rank
from spikelm.train.hostfile import read_hostfile
from spikelm.train.launch import cores, plan, ranks_of
from spikelm.train.process import launched_ranks
from spikelm.train.slurm import script, seconds_of

PROGRAM = [sys.executable, "-m", "spikelm"]


# --- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nodes": 2}, "--nodes needs --node-rank and --master too"),
        ({"nodes": 2, "node_rank": 0}, "--nodes needs --master too"),
        ({"master": "a:1"}, "--master needs --nodes and --node-rank too"),
        (
            {"nodes": 2, "node_rank": 2, "master": "a:1"},
            "--node-rank is 2 of --nodes 2; machines count from 0",
        ),
        ({"nodes": 2, "node_rank": 0, "master": "a"}, "--master is 'a'; expected HOST:PORT"),
        ({"nodes": 2, "node_rank": 0, "master": "a:99999"}, "--master is 'a:99999'; expected HOST:PORT"),
        ({"hostfile": Path("h"), "nproc": 2}, "--nproc does not go with --hostfile, whose slots say it"),
        ({"hostfile": Path("h"), "master": "a:1"}, "--master does not go with --hostfile"),
        (
            {"deepspeed": True, "nodes": 2},
            "--nodes is torchrun's; the DeepSpeed launcher takes several machines",
        ),
        ({"deepspeed": True, "restarts": 1}, "--restarts is torchrun's"),
        ({"nproc": 3, "gpus": 2}, "--nproc is 3, and this machine has 2 GPUs; use at most 2"),
    ],
)
def test_options_that_contradict(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(["c.yaml"], **{"gpus": 0, **options})
    assert str(error.value).startswith(said)


def test_what_is_left_out_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    alone = plan(["c.yaml"], gpus=0)
    assert (alone.nproc, alone.world_size, alone.threads) == (1, 1, cores())
    assert plan(["c.yaml"], gpus=4).nproc == 4
    many = plan(["c.yaml"], gpus=0, nproc=1000)
    assert many.threads == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert plan(["c.yaml"], gpus=0).threads is None


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = plan(
        ["c.yaml", "steps=3"], gpus=0, nproc=8, nodes=2, node_rank=1, master="node1:29500", restarts=2
    )
    assert several.world_size == 16
    assert several.told() == (
        "torchrun --nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr node1 --master-port 29500 "
        "--max-restarts 2 -m spikelm.train c.yaml steps=3"
    )
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    local = plan(["c.yaml"], gpus=0, hostfile=hosts)
    assert "--no_ssh_check --master_addr 127.0.0.1" in local.told() and not local.remote
    hosts.write_text("a slots=2\nb slots=4\n")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="through pdsh, which is not installed"):
        plan(["c.yaml"], gpus=0, hostfile=hosts)
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
    remote = plan(["c.yaml"], gpus=0, hostfile=hosts)
    assert (remote.world_size, remote.nproc, remote.remote, remote.deepspeed) == (6, 2, True, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# machines\n\nnode1 slots=8\nnode2 8\n", "line 4: 'node2 8' is not of the form NAME slots=N"),
        ("node1 slots=0\n", "line 1: node1 has slots=0; expected at least 1"),
        ("a slots=1\nb slots=1\na slots=2\n", "line 3: a was named before"),
        ("\n# nothing\n", "names no machine"),
    ],
)
def test_hostfile_errors_are_told_by_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_hostfile(path)


def test_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("node-1.example slots=8 # the first\n10.0.0.2 slots=4\n")
    assert read_hostfile(path) == {"node-1.example": 8, "10.0.0.2": 4}
    with pytest.raises(ConfigError, match="No such file"):
        read_hostfile(tmp_path / "none")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stepz=3"], "unknown key 'stepz'; did you mean 'steps'?"),
        (["--nproc", "5"], "batch_size is 4 for 5 ranks with accumulation 1"),
        (["--nodes", "2"], "--nodes needs --node-rank and --master too"),
        (["--slurm", "-", "--master", "a:1"], "--master does not go with --slurm"),
        (["--slurm", "-", "--time", "soon"], "--time is 'soon'; expected hours:minutes:seconds"),
    ],
)
def test_bad_input_starts_nothing(
    make_values: Any,
    tmp_path: Path,
    words: list[str],
    said: str,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(make_values()))
    monkeypatch.setattr(module, "start", lambda *args, **rest: pytest.fail("ranks were started"))
    assert main(["launch", str(config), *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("nodes", [1, 3])
def test_slurm_script(make_values: Any, tmp_path: Path, nodes: int) -> None:
    """A shell accepts it, and with stand-ins for Slurm's programs it starts what it should and requeues."""
    config, job = tmp_path / "my run.yaml", tmp_path / "jobs" / "job.sh"
    config.write_text(yaml.safe_dump(make_values(batch_size=12)))
    words = ["--nodes", str(nodes), "--nproc", "4", "--restarts", "1", "--time", "2-12"]
    assert main(["launch", "--slurm", str(job), *words, str(config), "sample_prompt=It was [$HOME"]) == 0
    subprocess.run(["bash", "-n", str(job)], check=True)
    lines = job.read_text().splitlines()
    for option in (
        f"nodes={nodes}",
        "gpus-per-node=4",
        "time=2-12",
        "signal=B:USR1@300",
        "requeue",
        "job-name=my-run",
    ):
        assert f"#SBATCH --{option}" in lines
    programs = tmp_path / "bin"
    programs.mkdir()
    stand_ins = {
        # Passes SIGUSR1 on to what it runs, as srun does.
        "srun": 'shift; "$@" & child=$!; trap "kill -USR1 $child" USR1; wait $child; wait $child',
        "spikelm": f'printf "%s\\n" "$@" > {tmp_path}/words; trap "exit 0" USR1; '
        "for i in $(seq 100); do sleep 0.1; done; exit 7",
        "scontrol": f'[ "$1" = show ] && printf "node7\\nnode8\\n" || echo "$@" > {tmp_path}/requeued',
    }
    for name, body in stand_ins.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "12345", "SLURM_NNODES": str(nodes)}
    slurm |= {"SLURM_NODEID": "1", "SLURM_CPUS_PER_TASK": "32"}
    path = f"{programs}:{os.environ['PATH']}"
    process = subprocess.Popen(["bash", str(job)], env={**os.environ, **slurm, "PATH": path})
    until = time.monotonic() + 20
    while not (tmp_path / "words").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 0
    given = (tmp_path / "words").read_text().splitlines()
    common = ["--nproc", "4", "--restarts", "1", str(config), "sample_prompt=It was [$HOME"]
    meeting = ["--node-rank", "1", "--nodes", "3", "--master", "node7:32345"]
    assert given == ["launch", *(meeting if nodes > 1 else []), *common]
    assert (tmp_path / "requeued").read_text() == "requeue 12345\n"


def test_local_rank_option_of_the_deepspeed_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")  # put back at the end, whatever becomes of it
    del os.environ["LOCAL_RANK"]
    assert without_local_rank(["--local_rank=3", "c.yaml", "steps=3"]) == ["c.yaml", "steps=3"]
    assert os.environ["LOCAL_RANK"] == "3"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched_ranks() == 4
    del os.environ["LOCAL_RANK"]


def test_one_wish_may_come_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler and a launcher both signal a rank; only a later signal ends it as usual."""
    with stop.StopSignals() as signals:
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert signals.received == "SIGUSR1"
        monkeypatch.setattr(stop, "ONE_WISH", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


# --- real ranks ---------------------------------------------------------------------------------------------


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "step"]


def write(config: Path, values: dict[str, Any]) -> str:
    config.write_text(yaml.safe_dump(values))
    return str(config)


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}


def test_stopped_under_torchrun_and_continued_under_deepspeed(make_values: Any, tmp_path: Path) -> None:
    """SIGUSR1 reaches both ranks, which save and exit 0; the same run goes on under the other launcher."""
    values = make_values(steps=100000, log_every=1, eval_every=0, checkpoint_every=0)
    config, log = write(tmp_path / "c.yaml", values), tmp_path / "run" / "log.jsonl"
    errors = (tmp_path / "errors").open("w+")
    process = subprocess.Popen(
        [*PROGRAM, "launch", "--nproc", "2", config],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    while process.poll() is None and not (log.exists() and '"step": 3,' in log.read_text()):
        time.sleep(0.05)
    assert {rank.environ()["RANK"] for rank in ranks_of(process.pid)} == {"0", "1"}
    ranks = ranks_of(process.pid)
    process.send_signal(signal.SIGUSR1)
    shown, _ = process.communicate(timeout=60)
    errors.seek(0)
    told = errors.read()
    assert process.returncode == 0, told
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    assert "2 ranks on 1 machine, 1 thread each: torchrun" in told
    assert told.count("preflight: 2 ranks on 1 machine") == 1  # rank 0 alone speaks
    assert told.count("SIGUSR1: stopped after step") == 1 and shown.count("training loss") == 1
    (told_preflight,) = [
        line for line in map(json.loads, log.read_text().splitlines()) if line["event"] == "preflight"
    ]
    assert told_preflight["all_reduce"]["gb_per_second"] > 0 and told_preflight["clock_skew"] < 1
    stopped = json.loads(log.read_text().splitlines()[-1])
    assert stopped["event"] == "interrupted" and stopped["signal"] == "SIGUSR1"

    steps = stopped["step"] + 2
    report = tmp_path / "result.json"
    words = [
        "launch",
        "--nproc",
        "2",
        "--deepspeed-launcher",
        config,
        f"steps={steps}",
        "--json",
        str(report),
    ]
    done = subprocess.run([*PROGRAM, *words], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(report.read_text())
    assert (result["resumed_from"], result["step"]) == (stopped["step"], steps)
    assert len(losses(tmp_path / "run")) == steps


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        "torchrun --standalone --nproc-per-node 2 -m spikelm.train",
        "deepspeed --num_gpus 2 --module spikelm.train",
        "accelerate launch --use_deepspeed --zero_stage 2 --num_processes 2 -m spikelm.train",
        "spikelm launch --hostfile HOSTS",
    ],
)
def test_every_launcher_gives_the_same_losses(make_values: Any, tmp_path: Path, launcher: str) -> None:
    values = make_values(steps=4, log_every=1, eval_every=0, out=str(tmp_path / "reference"))
    config = write(tmp_path / "c.yaml", values)
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    subprocess.run([*PROGRAM, "launch", "--nproc", "2", config], env=environment(), check=True)
    words = launcher.replace("HOSTS", str(tmp_path / "hosts")).split()
    words = [*PROGRAM, *words[1:]] if words[0] == "spikelm" else words
    subprocess.run([*words, config, f"out={tmp_path / 'other'}"], env=environment(), check=True)
    assert losses(tmp_path / "other") == losses(tmp_path / "reference")


@pytest.mark.slow
def test_accelerate_with_one_process(make_values: Any, tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", make_values(steps=4, log_every=1, eval_every=0))
    words = ["accelerate", "launch", "--cpu", "--num_processes", "1", "-m", "spikelm.train", config]
    subprocess.run(words, env=environment(), check=True)
    subprocess.run([*PROGRAM, "train", config, f"out={tmp_path / 'alone'}"], env=environment(), check=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
@pytest.mark.parametrize("launcher", [[], ["--deepspeed-launcher"]])
def test_signals_save_and_exit(
    make_values: Any, tmp_path: Path, number: signal.Signals, code: int, launcher: list[str]
) -> None:
    values = make_values(steps=100000, log_every=1, eval_every=0, checkpoint_every=0)
    config, log = write(tmp_path / "c.yaml", values), tmp_path / "run" / "log.jsonl"
    process = subprocess.Popen([*PROGRAM, "launch", "--nproc", "2", *launcher, config], env=environment())
    while process.poll() is None and not (log.exists() and '"step": 3,' in log.read_text()):
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    stopped = json.loads(log.read_text().splitlines()[-1])
    assert stopped["event"] == "interrupted" and stopped["signal"] == number.name
    assert (tmp_path / "run" / "latest" / "training.json").is_file()


@pytest.mark.slow
def test_two_machines_meet_and_check(make_values: Any, tmp_path: Path) -> None:
    """Two launchers, as on two machines, with the preflight alone."""
    config, port = write(tmp_path / "c.yaml", make_values()), module.free_port()
    words = ["launch", "--check", "--nproc", "1", "--nodes", "2", "--master", f"127.0.0.1:{port}", config]
    processes = [
        subprocess.Popen(
            [*PROGRAM, *words, "--node-rank", str(rank)], env=environment(), stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    shown = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert shown[0].startswith("preflight: 2 ranks") and "all-reduce" in shown[0] and shown[1] == ""
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_time_limits_of_slurm() -> None:
    limits = {"10": 600, "7:30": 450, "24:00:00": 86400, "2-12": 216000, "1-02:03:04": 93784}
    assert {limit: seconds_of(limit) for limit in limits} == limits
    with pytest.raises(ConfigError, match="--time is '00:03:00', and the ranks are told to save 300 seconds"):
        script(["nano-sd"], nodes=1, gpus=1, limit="00:03:00")


def test_a_script_is_checked_like_a_start(
    make_values: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(make_values()))
    job = tmp_path / "job.sh"
    assert main(["launch", "--nodes", "2", "--nproc", "4", "--slurm", str(job), str(config)]) == 2
    assert "batch_size is 4 for 8 ranks" in capsys.readouterr().err and not job.exists()
    assert main(["launch", "--nproc", "4", "--slurm", str(job), str(config)]) == 0
    assert f"wrote {job}" in capsys.readouterr().err and job.exists()
