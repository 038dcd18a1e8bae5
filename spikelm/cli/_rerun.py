"""Commands run again with the arguments of a record, for ``spikelm eval --verify``."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import tempfile
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spikelm.errors import ConfigError, nearest


def energy(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A record of the kind ``energy``."""
    return command("spikelm.cli.energy:energy", arguments)


def tasks(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A record of the kind ``tasks``."""
    return command("spikelm.cli.evaluate_tasks:run_tasks", arguments)


def long_context(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A record of the kind ``long-context``."""
    return command("spikelm.cli.evaluate_tasks:run_long_context", arguments)


def command(target: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Call a command's function and read the record it writes; its tables are not shown.

    Args:
        target: ``module:function``; the function takes ``json_file``.
        arguments: its parameters by name as JSON values; paths are strings.

    Raises:
        ConfigError: it has no such parameter.
        SpikeLMError: whatever the command refuses.
    """
    from spikelm.evaluation.record import read

    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    known = inspect.signature(function).parameters
    kinds = typing.get_type_hints(function)
    for key in arguments:
        if key not in known:
            raise ConfigError(f"the record cannot be run again: {nearest('argument', key, known)}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        values = {key: _as(kinds.get(key), value) for key, value in arguments.items()}
        with contextlib.redirect_stdout(io.StringIO()):
            function(**values, json_file=out)
        return read(out)


def _as(kind: Any, value: Any) -> Any:
    """Strings become paths where the parameter is one, or a list of them."""
    if kind is None or "Path" not in str(kind):
        return value
    if isinstance(value, list):
        return [Path(item) for item in value]
    return Path(value) if isinstance(value, str) else value
