"""What is compared and measured before the first step, so that a run of weeks does not fail on day two.

Ranks that differ in a version, a configuration key or a data file would train together and give nonsense
without a word; a slow link or a full disk shows only later. One report goes into the log and one line to the
terminal.
"""

from __future__ import annotations

import json
import platform
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from spikelm.errors import ConfigError, TrainingError
from spikelm.train.ranks import Ranks

PACKAGES = ("torch", "deepspeed", "triton", "transformers", "tokenizers", "safetensors")
SKEW = 5.0  # seconds; more confuses log times and files that are compared by age
BYTES_PER_PARAMETER = 12  # fp32 weights and Adam's two moments; other optimisers need less
_LARGE = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}  # bytes; gloo over one machine moves 64 MB in half a second
_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class AllReduce:
    """Speed of the sum over all ranks.

    Attributes:
        latency_us: median time of one number, microseconds.
        nbytes: size of the large one.
        gb_per_second: its bytes over its median time.
    """

    latency_us: float
    nbytes: int
    gb_per_second: float


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """The report.

    Attributes:
        world_size: ranks of the run.
        versions: of Python and the packages, the same on all ranks.
        hosts: machine -> ranks on it.
        devices: device of each rank.
        threads: threads of each rank.
        all_reduce: speed of the connection, None for one rank.
        clock_skew: seconds between the fastest and the slowest clock, None for one rank.
        disk_free: bytes free for the run's folder, None where the file system does not say.
        disk_needed: bytes of the checkpoints that it has yet to hold.
        warnings: what is odd, in sentences.
    """

    world_size: int
    versions: dict[str, str]
    hosts: dict[str, int]
    devices: list[str]
    threads: list[int]
    all_reduce: AllReduce | None
    clock_skew: float | None
    disk_free: int | None
    disk_needed: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def line(self) -> str:
        """The report in one line."""
        kinds = sorted({device.partition(":")[0] for device in self.devices})
        parts = [
            f"{_counted(self.world_size, 'rank')} on {_counted(len(self.hosts), 'machine')} "
            f"({'/'.join(kinds)}, {_counted(max(self.threads), 'thread')} each)"
        ]
        if self.all_reduce is not None:
            parts.append(
                f"all-reduce {self.all_reduce.latency_us:.0f} us, {self.all_reduce.gb_per_second:.2f} GB/s"
            )
        if self.clock_skew is not None:
            parts.append(f"clocks within {self.clock_skew:.1f} s")
        free = "unknown" if self.disk_free is None else f"{self.disk_free / 2**30:.1f} GiB free"
        parts.append(f"disk {free}, {self.disk_needed / 2**30:.1f} GiB needed")
        return "preflight: " + ", ".join(parts)


def preflight(
    ranks: Ranks,
    *,
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    out: Path,
    keep: int,
    parameters: int,
    device: torch.device,
) -> Preflight:
    """Compare the ranks, time their connection, look at the disk. Called on all ranks together.

    Args:
        ranks: this process among those of the run.
        config: training configuration as nested values.
        data: name -> fingerprint of tokenizer and text.
        out: folder of the run.
        keep: checkpoints that it keeps.
        parameters: of the whole model.
        device: where this rank computes.

    Raises:
        ConfigError: two ranks have another version, configuration, tokenizer or text.
        TrainingError: there is no room for the checkpoints.
    """
    mine = {
        "same": {
            **{f"the version of {name}": value for name, value in package_versions().items()},
            **{f"configuration key {key}": value for key, value in flat(config).items()},
            **{key: value for key, value in data.items()},
        },
        "host": socket.gethostname(),
        "device": _named(device),
        "threads": torch.get_num_threads(),
    }
    told = ranks.gather(mine)
    compare([seen["same"] for seen in told])
    several = ranks.world_size > 1
    skew = clock_skew(ranks) if several else None
    speed = all_reduce_speed(ranks) if several else None
    # Rank 0 writes; what it finds is an error of all.
    free, present = ranks.broadcast(list(disk_room(out)) if ranks.main else None)
    needed = max(0, (keep + 1) * parameters * BYTES_PER_PARAMETER - present)
    if free is not None and free < needed:
        raise TrainingError(
            f"{out} has {free / 2**30:.2f} GiB free, and keep={keep} checkpoints with one being written need "
            f"{needed / 2**30:.2f} GiB more; make room, lower keep, or choose another disk: out=FOLDER"
        )
    hosts: dict[str, int] = {}
    for seen in told:
        hosts[seen["host"]] = hosts.get(seen["host"], 0) + 1
    return Preflight(
        world_size=ranks.world_size,
        versions=package_versions(),
        hosts=hosts,
        devices=[seen["device"] for seen in told],
        threads=[seen["threads"] for seen in told],
        all_reduce=speed,
        clock_skew=skew,
        disk_free=free,
        disk_needed=needed,
        warnings=tuple(_warnings(skew, [seen["device"] for seen in told])),
    )


def compare(ranks: list[dict[str, Any]]) -> None:
    """See that every rank has the same values under the same names.

    Raises:
        ConfigError: two do not; names both ranks and both values.
    """
    first = ranks[0]
    for rank, values in enumerate(ranks[1:], 1):
        for name in sorted(first.keys() | values.keys(), key=lambda key: (key not in first, key)):
            one, other = first.get(name, "absent"), values.get(name, "absent")
            if one != other:
                raise ConfigError(
                    f"{name} is {_shown(one)} on rank 0 and {_shown(other)} on rank {rank}; "
                    "give every machine the same environment, configuration and files"
                )


def package_versions() -> dict[str, str]:
    """Versions of Python, this package and those that results depend on; absent ones are left out."""
    from spikelm import __version__

    found = {"python": platform.python_version(), "spikelm": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def clock_skew(ranks: Ranks) -> float:
    """Seconds between the fastest and the slowest clock, less what the exchange itself may have taken."""
    ranks.barrier()
    started = time.perf_counter()
    told = ranks.gather(time.time())
    exchange = time.perf_counter() - started
    return float(max(0.0, max(told) - min(told) - exchange))


def all_reduce_speed(ranks: Ranks) -> AllReduce:
    """Median latency of a small sum and bandwidth of a large one."""
    nbytes = _LARGE["cuda" if ranks.device.type == "cuda" else "cpu"]
    small = _median_seconds(torch.zeros(1, device=ranks.device))
    large = _median_seconds(torch.zeros(nbytes // 4, device=ranks.device))
    return AllReduce(latency_us=small * 1e6, nbytes=nbytes, gb_per_second=nbytes / large / 1e9)


def _median_seconds(value: torch.Tensor) -> float:
    seconds = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        dist.all_reduce(value)
        if value.device.type == "cuda":
            torch.cuda.synchronize(value.device)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds[1:])[_REPEATS // 2]  # the first one opens the connections


def disk_room(out: Path) -> tuple[int | None, int]:
    """Bytes free where ``out`` lies or will lie, and bytes that its checkpoints hold already.

    The first is None where nothing can be said: a folder that may not be looked into, a file system without
    a size. Whether it can be written is found out when the run's folder is opened.
    """
    place = out.absolute()
    try:
        while not place.exists():
            place = place.parent
        usage = shutil.disk_usage(place)
        files = [file for file in (out / "checkpoints").rglob("*") if file.is_file()]
        return usage.free if usage.total else None, sum(file.lstat().st_size for file in files)
    except OSError:
        return None, 0


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return found


def _named(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _warnings(skew: float | None, devices: list[str]) -> list[str]:
    found = []
    if skew is not None and skew > SKEW:
        found.append(f"the clocks of the machines differ by {skew:.1f} s; times in logs are not comparable")
    kinds = sorted({device.partition("(")[2].rstrip(")") or device.partition(":")[0] for device in devices})
    if len(kinds) > 1:
        found.append(f"the ranks have different devices ({', '.join(kinds)}); the slowest one sets the pace")
    return found
