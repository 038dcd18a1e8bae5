"""Tasks whose documents lie in a folder: no network is needed.

The task files stand beside this module in ``files/``, in the harness's own form, except that ``data_files``
names files of ``$SPIKELM_DATA/eval`` (as they are, or compressed with xz).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikelm.data.compressed import read_bytes
from spikelm.data.store import default_cache_dir
from spikelm.errors import ConfigError, DataError, nearest
from spikelm.yaml_values import read_yaml

FILES = Path(__file__).resolve().parent / "files"
FOLDER = "SPIKELM_DATA"
"""Environment variable that names the folder of data."""


def names() -> list[str]:
    """Names of all offline tasks."""
    return sorted(path.stem for path in FILES.glob("*.yaml"))


def config(name: str, shots: int = 0) -> dict[str, Any]:
    """An offline task as the harness's TaskManager takes it.

    Args:
        name: one of :func:`names`.
        shots: examples before every question: the first documents of the file, which are then left out of the
            questions. They are the same for all, so their state is computed once.

    Raises:
        ConfigError: no such task, or SPIKELM_DATA is not set.
        DataError: the task's documents are not there.
    """
    path = FILES / f"{name}.yaml"
    if name not in names():
        raise ConfigError(nearest("offline task", name, names()))
    task: dict[str, Any] = dict(read_yaml(path))
    task["dataset_kwargs"] = {
        "data_files": {task["test_split"]: str(data_file(name))},
        "cache_dir": str(default_cache_dir().parent / "datasets"),
    }
    if shots:
        task["num_fewshot"] = shots
        task["process_docs"] = lambda documents: documents.select(range(shots, len(documents)))
        task["fewshot_config"] = {
            "sampler": "first_n",
            "split": task["test_split"],
            "process_docs": lambda documents: list(documents.select(range(min(shots, len(documents))))),
        }
    return task


def data_file(name: str) -> Path:
    """The file of an offline task's documents.

    Raises:
        ConfigError: SPIKELM_DATA is not set.
        DataError: there is no such file.
    """
    task = read_yaml(FILES / f"{name}.yaml")
    (file,) = task["dataset_kwargs"]["data_files"].values()
    folder = os.environ.get(FOLDER)
    if not folder:
        raise ConfigError(
            f"task {name} reads eval/{file} of the folder that {FOLDER} names, but {FOLDER} is not set"
        )
    plain = Path(folder) / "eval" / str(file)
    for path in (plain.with_name(f"{plain.name}.xz"), plain):
        if path.is_file():
            return path
    raise DataError(f"task {name} needs {plain} (or {plain.name}.xz), which is not there; check {FOLDER}")


def checksums(tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Task -> file and SHA-256 of its documents (decompressed), for the offline ones of ``tasks``."""
    return {
        name: {
            "file": data_file(name).name,
            "sha256": hashlib.sha256(read_bytes(data_file(name))).hexdigest(),
        }
        for name in tasks
        if name in names()
    }
