"""Starts the ranks of a run: through torchrun's agent, or the DeepSpeed launcher where a hostfile is given.

The agent runs inside this process (``torch.distributed.run`` as a library), so that the exit codes of the
ranks are seen; the command that does the same by hand is told. Signals go to the ranks themselves and not to
the launcher, which would kill them half a minute later: a checkpoint may take longer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from spikelm.errors import ConfigError, TrainingError
from spikelm.train.hostfile import read_hostfile

if TYPE_CHECKING:
    import psutil

MODULE = "spikelm.train"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
INTERRUPTED = 130
_GIVEN_BY_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOCAL = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Which ranks are started, and how. Made by :func:`plan`, which checks it.

    Attributes:
        words: what each rank is given: configuration, overrides, options.
        nproc: ranks on this machine (with a hostfile: on its first one).
        threads: of each rank, or None where the user's OMP_NUM_THREADS stays.
        nodes, node_rank: machines, and which one this is.
        master: ``HOST:PORT`` where the machines meet; empty for one machine.
        hosts: ranks of each machine of the hostfile.
        hostfile: its path, or None.
        deepspeed: use the DeepSpeed launcher.
        restarts: how often failed ranks are started again.
    """

    words: tuple[str, ...]
    nproc: int
    threads: int | None = None
    nodes: int = 1
    node_rank: int = 0
    master: str = ""
    hosts: dict[str, int] = field(default_factory=dict)
    hostfile: Path | None = None
    deepspeed: bool = False
    restarts: int = 0

    @property
    def world_size(self) -> int:
        """Ranks of the run, over all machines."""
        return sum(self.hosts.values()) or self.nproc * self.nodes

    @property
    def remote(self) -> bool:
        """Whether the DeepSpeed launcher starts ranks on other machines."""
        return len(self.hosts) > 1

    def command(self) -> list[str]:
        """The launcher's words, without the program itself."""
        return self._deepspeed() if self.deepspeed else self._torchrun()

    def told(self) -> str:
        """The command that does the same by hand."""
        return shlex.join(["deepspeed" if self.deepspeed else "torchrun", *self.command()])

    def _torchrun(self) -> list[str]:
        words = ["--nproc-per-node", str(self.nproc)]
        if self.nodes > 1:
            host, _, port = self.master.rpartition(":")
            words += ["--nnodes", str(self.nodes), "--node-rank", str(self.node_rank)]
            words += ["--master-addr", host, "--master-port", port]
        else:
            words += ["--standalone"]
        if self.restarts:
            words += ["--max-restarts", str(self.restarts)]
        return [*words, "-m", MODULE, *self.words]

    def _deepspeed(self) -> list[str]:
        words: list[str] = []
        if self.hostfile is not None:
            words += ["--hostfile", str(self.hostfile)]
            if not self.remote and next(iter(self.hosts)) in _LOCAL:
                # Nothing to reach: without these two it asks this machine for its own name over ssh.
                words += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
        else:
            # Any file that is not there: an /etc or /job hostfile of the machine must not join in.
            words += ["--hostfile", os.devnull + "-none", "--num_gpus", str(self.nproc)]
        if self.master:
            host, _, port = self.master.rpartition(":")
            words += ["--master_addr", host, "--master_port", port]
        else:
            words += ["--master_port", str(free_port())]
        return [*words, "--module", MODULE, *self.words]


def plan(
    words: Sequence[str],
    *,
    nproc: int | None = None,
    hostfile: Path | None = None,
    nodes: int | None = None,
    node_rank: int | None = None,
    master: str | None = None,
    deepspeed: bool = False,
    restarts: int = 0,
    gpus: int | None = None,
) -> Launch:
    """Check the options of a launch and fill in what was left out.

    Args:
        words: what each rank is given.
        nproc: ranks on each machine; None: its GPUs, or 1 without.
        hostfile: machines for the DeepSpeed launcher.
        nodes: number of machines.
        node_rank: which of them this is.
        master: ``HOST:PORT`` of the first.
        deepspeed: use the DeepSpeed launcher.
        restarts: how often failed ranks are started again.
        gpus: GPUs of this machine; None asks torch.

    Raises:
        ConfigError: options that contradict one another, in one sentence.
    """
    several = {"--nodes": nodes, "--node-rank": node_rank, "--master": master}
    given = [name for name, value in several.items() if value is not None]
    if hostfile is not None and given:
        raise ConfigError(f"{given[0]} does not go with --hostfile, which names the machines; leave one out")
    if deepspeed and given and hostfile is None:
        raise ConfigError(
            f"{given[0]} is torchrun's; the DeepSpeed launcher takes several machines from --hostfile"
        )
    if hostfile is not None and nproc is not None:
        raise ConfigError("--nproc does not go with --hostfile, whose slots say it; leave one out")
    if restarts and (deepspeed or hostfile is not None):
        raise ConfigError("--restarts is torchrun's; the DeepSpeed launcher cannot restart: start it again")
    if given and len(given) < 3 and nodes != 1:
        missing = [name for name in several if name not in given]
        raise ConfigError(
            f"{given[0]} needs {' and '.join(missing)} too: the same --nodes and --master on every machine, "
            "and --node-rank 0, 1, ... one on each"
        )
    nodes, node_rank = nodes or 1, node_rank or 0
    if not 0 <= node_rank < nodes:
        raise ConfigError(f"--node-rank is {node_rank} of --nodes {nodes}; machines count from 0")
    if master is not None:
        _check_master(master)
    hosts = {} if hostfile is None else read_hostfile(hostfile)
    if len(hosts) > 1 and shutil.which("pdsh") is None:
        raise ConfigError(
            "the DeepSpeed launcher reaches several machines through pdsh, which is not installed; install "
            "it, or start spikelm launch with --nodes, --node-rank and --master on every machine"
        )
    found = _gpus() if gpus is None else gpus
    if nproc is None:
        nproc = next(iter(hosts.values())) if hosts else max(1, found)
    elif found and nproc > found:
        raise ConfigError(f"--nproc is {nproc}, and this machine has {found} GPUs; use at most {found}")
    return Launch(
        words=tuple(words),
        nproc=nproc,
        threads=None if os.environ.get("OMP_NUM_THREADS") else max(1, cores() // nproc),
        nodes=nodes,
        node_rank=node_rank,
        master=master or "" if nodes > 1 else "",
        hosts=hosts,
        hostfile=hostfile,
        deepspeed=deepspeed or hostfile is not None,
        restarts=restarts,
    )


def _check_master(master: str) -> None:
    host, colon, port = master.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--master is {master!r}; expected HOST:PORT of the first machine, as node1:29500")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """A TCP port that nothing listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(launch: Launch, say: Callable[[str], None]) -> int:
    """Start the ranks and wait for them.

    Args:
        launch: what to start.
        say: told one line about what is started, and one about a rank that died without a word.

    Returns:
        0, also after SIGTERM or SIGUSR1 (the ranks wrote a checkpoint); 130 after Ctrl-C; else what the first
        rank that failed gave (2 for a SpikeLMError, which that rank has told).

    Raises:
        TrainingError: the launcher itself cannot work.
    """
    if launch.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(launch.threads)
    for name in _GIVEN_BY_LAUNCHERS:
        os.environ.pop(name, None)
    # Where a launcher dies, the C++ part of torch would tell stacks beside the two sentences that matter.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    where = f"{launch.nodes} machines" if launch.nodes > 1 else f"{len(launch.hosts) or 1} machine"
    where += "s" if launch.remote else ""
    threads, ranks = os.environ["OMP_NUM_THREADS"], launch.world_size
    say(
        f"{ranks} rank{'s' if ranks > 1 else ''} on {where}, "
        f"{threads} thread{'s' if threads != '1' else ''} each: {launch.told()}"
    )
    with _forwarding(launch, say) as received:
        failed = _run_deepspeed(launch) if launch.deepspeed else _run_torchrun(launch)
    if failed is None:
        return INTERRUPTED if signal.SIGINT in received else 0
    if received and failed.code < 0 and -failed.code in received:
        # Before there was anything to save, a signal ends a rank as it ends any program.
        return 128 - failed.code
    if failed.code < 0:
        name = signal.Signals(-failed.code).name
        what = "the machine may be out of memory" if name == "SIGKILL" else "see its output above"
        say(f"rank {failed.rank} was killed by {name} ({what}); the same command continues the run")
        return 128 - failed.code
    return failed.code


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The rank that ended the run: its exit code, negative for a signal."""

    rank: int
    code: int


def _run_torchrun(launch: Launch) -> Failed | None:
    """Run torchrun's agent in a thread, so that signals are this module's affair."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    words = launch.command()
    if "--standalone" in words:
        words[words.index("--standalone")] = "--rdzv-backend=c10d"
        words = [
            "--rdzv-endpoint",
            "localhost:0",
            "--rdzv-id",
            uuid.uuid4().hex,
            "--local-addr",
            "localhost",
            *words,
        ]
    config, program, arguments = config_from_args(get_args_parser().parse_args(words))
    _quiet_agent()
    ended: list[Failed | BaseException | None] = []

    def run() -> None:
        try:
            elastic_launch(config, program)(*arguments)
            ended.append(None)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            codes = {item.exitcode for item in error.failures.values()}
            # A rank that told a sentence outranks one that was only ended with it.
            ended.append(Failed(rank=rank, code=2 if 2 in codes else failure.exitcode))
        except BaseException as error:
            ended.append(error)

    agent = threading.Thread(target=run, name="torchrun", daemon=True)
    agent.start()
    while agent.is_alive():
        agent.join(timeout=0.2)
    (outcome,) = ended
    if isinstance(outcome, BaseException):
        reason = " ".join(str(outcome).split())
        raise TrainingError(
            f"torchrun cannot start the ranks ({type(outcome).__name__}: {reason})"
        ) from outcome
    return outcome


def _quiet_agent() -> None:
    """What the agent logs about a failed rank says less than the rank; LOGLEVEL brings it back."""
    if "LOGLEVEL" in os.environ:
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _run_deepspeed(launch: Launch) -> Failed | None:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error", *launch.command()]
    # A session of its own: a terminal's Ctrl-C must not reach the launcher, which kills what it started.
    process = subprocess.Popen(command, start_new_session=True)
    code = process.wait()
    if code == 0:
        return None
    # It passes a negative code on as that of an exit (247 for a rank that was killed by SIGKILL).
    return Failed(rank=-1, code=code - 256 if code > 192 else code)


@contextlib.contextmanager
def _forwarding(launch: Launch, say: Callable[[str], None]) -> Iterator[list[int]]:
    """While entered, signals go to the ranks; the list holds those that came."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            say(
                f"{signal.Signals(number).name}: every rank finishes its step and saves; "
                "once more ends them at once"
            )
        for process in ranks_of(os.getpid()) or _children(os.getpid()):
            with contextlib.suppress(Exception):
                process.send_signal(number)
        if launch.remote:
            # Ranks on other machines are the launcher's: it sends them SIGTERM, and has half a minute.
            for process in _children(os.getpid()):
                process.send_signal(signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _children(pid: int) -> list[psutil.Process]:
    import psutil

    return list(psutil.Process(pid).children())


def ranks_of(pid: int) -> list[psutil.Process]:
    """The ranks among the descendants of a process: those with RANK in their environment."""
    import psutil

    found: list[psutil.Process] = []
    waiting = psutil.Process(pid).children()
    while waiting:
        process = waiting.pop()
        try:
            if "RANK" in process.environ():
                found.append(process)
            else:
                waiting += process.children()
        except psutil.Error:
            continue
    return found
