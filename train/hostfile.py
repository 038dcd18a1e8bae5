"""Machines of a run, one a line: ``NAME slots=N`` (the format of DeepSpeed and Open MPI)."""

from __future__ import annotations

import re
from pathlib import Path

from spikelm.errors import ConfigError

_LINE = re.compile(r"^(?P<host>[A-Za-z0-9_][A-Za-z0-9_.:-]*)\s+slots=(?P<slots>\d+)$")


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks of each machine, in the order of the file; empty lines and ``#`` comments are passed over.

    Raises:
        ConfigError: the file cannot be read, names no machine, or has a wrong line (told by its number).
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the hostfile {path} cannot be read ({getattr(error, 'strerror', error)})"
        ) from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        where = f"{path}, line {number}"
        match = _LINE.match(text)
        if match is None:
            raise ConfigError(f"{where}: {text!r} is not of the form NAME slots=N, for example node1 slots=8")
        host, slots = match["host"], int(match["slots"])
        if slots < 1:
            raise ConfigError(
                f"{where}: {host} has slots={slots}; expected at least 1, or leave the line out"
            )
        if host in hosts:
            raise ConfigError(f"{where}: {host} was named before; give each machine one line")
        hosts[host] = slots
    if not hosts:
        raise ConfigError(f"the hostfile {path} names no machine; expected lines such as node1 slots=8")
    return hosts
