"""The processes of a run: who this one is among them, and what they tell each other.

    ranks = join(timeout=600.0, device=device)
    if ranks.main:
        ...

A launcher (torchrun, deepspeed, accelerate) sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
Without them a run is one process, and every method answers at once. Values travel as JSON, never pickled.
"""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from spikelm.errors import ConfigError, TrainingError
from spikelm.train.watchdog import Phases, Unwatched

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

MEET = 300.0
"""Seconds that ranks have to come together: machines start at different times, imports over NFS are slow."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """One process among those of a run.

    Attributes:
        rank: number of this process, from 0.
        local_rank: its number on this machine.
        world_size: how many there are.
        device: where tensors of a collective must be (the GPU under nccl, else the CPU).
        store: key-value store that all ranks reach (None for one process); it works beside a collective that
            hangs.
        timeout: seconds without progress after which the run ends with an error.
        watchdog: told what this process does; the program's one ends it when it hangs (a library user has
            none).
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: Any = None
    timeout: float = 600.0
    watchdog: Phases = field(default_factory=Unwatched)

    @classmethod
    def from_environment(cls) -> Ranks:
        """Numbers from a launcher's variables alone, without meeting the others (collectives do not work)."""
        return cls(
            rank=_number("RANK", 0), local_rank=_number("LOCAL_RANK", 0), world_size=_number("WORLD_SIZE", 1)
        )

    @property
    def main(self) -> bool:
        """Whether this process prints, logs and renames."""
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """Sum of ``value`` over the ranks, on the device it came from; the argument is left alone."""
        if self.world_size == 1:
            return value
        moved = value.detach().to(self.device, copy=True)
        dist.all_reduce(moved)
        return moved.to(value.device)

    def totals(self, *values: float) -> list[float]:
        """Sums of numbers over the ranks, in one exchange of float64."""
        if self.world_size == 1:
            return list(values)
        found: list[float] = self.total(torch.tensor(values, dtype=torch.float64)).tolist()
        return found

    def agree(self, flag: bool) -> bool:
        """Whether ``flag`` is true on every rank."""
        return flag if self.world_size == 1 else self.totals(float(not flag)) == [0.0]

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on some rank."""
        return not self.agree(not flag)

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in their order, on every rank."""
        if self.world_size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(data)], device=self.device))
        lengths = [int(size) for size in sizes]
        room = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        room[: len(data)] = data
        found = [torch.empty_like(room) for _ in range(self.world_size)]
        dist.all_gather(found, room)
        return [
            json.loads(bytes(piece[:length].cpu().numpy().tobytes()))
            for piece, length in zip(found, lengths, strict=True)
        ]

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's JSON value, on every rank (what the others pass is not looked at)."""
        return self.gather(value if self.main else None)[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.totals(0.0)

    def leave(self) -> None:
        """End the process group; collectives are over."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def join(timeout: float, device: torch.device, patience: float | None = None) -> Ranks:
    """Take this process's place among the ranks that the launcher started.

    Args:
        timeout: seconds without progress that end a run; ranks have at least :data:`MEET` to meet here.
        device: where this process computes; decides between nccl and gloo.
        patience: seconds after which a collective is an error; None takes ``timeout``. With a watchdog, which
            names the rank that hangs, it should be longer than anything the watchdog allows.

    Raises:
        ConfigError: the launcher's variables are incomplete or contradict one another.
        TrainingError: the other ranks cannot be reached.
    """
    world_size = _number("WORLD_SIZE", 1)
    if world_size == 1:
        return Ranks(timeout=timeout)
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but {missing[0]} is not set; start ranks with spikelm launch, "
            "torchrun, deepspeed or accelerate launch, or unset WORLD_SIZE for one process"
        )
    rank, local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE {world_size}; ranks count from 0")
    wait = datetime.timedelta(seconds=timeout)
    meet = datetime.timedelta(seconds=max(timeout, MEET))
    try:
        if not dist.is_initialized():
            store, rank, world_size = next(rendezvous("env://", rank, world_size, timeout=meet))
            store.set_timeout(wait)
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("spikelm", store),
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=patience or timeout),
            )
        else:
            store = None
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).partition("\n")[0]
        raise TrainingError(
            f"rank {rank} of {world_size} cannot meet the others at {where} ({reason}); "
            "are all ranks started, with the same master address and port?"
        ) from error
    return Ranks(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        device=device if device.type == "cuda" else torch.device("cpu"),
        store=None if store is None else PrefixStore("spikelm-side", store),
        timeout=timeout,
    )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}; expected a whole number, as launchers set it") from error
