"""DeepSpeed's compiled operators: built once, by one process, with progress, into a cache of this package.

DeepSpeed compiles an operator when a rank first needs it, for one or two minutes each, in all ranks at once
behind a lock file that a killed process leaves behind. Here they are built before, under a lock that ends
with its process, in a folder that belongs to this torch, this DeepSpeed, this compiler and this processor.

What the training configuration decides (the optimiser) is never DeepSpeed's FusedAdam, and its shared-memory
communication between CPU ranks serves inference, so :mod:`spikelm.train.backend_deepspeed` declines it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spikelm.errors import ConfigError, TrainingError
from spikelm.train.reporting import ProgressFactory, silent_progress

BUILDERS = {
    "cpu_adam": "CPUAdamBuilder",
    "async_io": "AsyncIOBuilder",
}
"""Operators that can be built here, and how DeepSpeed's accelerator calls their builders."""

_STEP = re.compile(r"^\[(\d+)/(\d+)\]")
_BUILD = """
import sys
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder(sys.argv[1]).load(verbose=True)
"""


def needed(settings: Mapping[str, Any]) -> list[str]:
    """Operators that a DeepSpeed configuration needs.

    Args:
        settings: contents of the JSON file.
    """
    zero = settings.get("zero_optimization", {})
    devices = [zero.get(key, {}).get("device", "none") for key in ("offload_optimizer", "offload_param")]
    found = []
    if devices[0] != "none":
        found.append("cpu_adam")
    if "nvme" in devices:
        found.append("async_io")
    return found


def prepare(settings: Mapping[str, Any], progress: ProgressFactory = silent_progress) -> list[str]:
    """Build what a DeepSpeed configuration needs and the cache lacks; every rank may call it at once.

    Args:
        settings: contents of the JSON file.
        progress: opens the progress bar of a build.

    Returns:
        the operators that were built by this call.

    Raises:
        ConfigError: DeepSpeed or a compiler is missing.
        TrainingError: the compiler fails, or the cache cannot be written.
    """
    names = needed(settings)
    return build(names, progress) if names else []


def build(names: Sequence[str], progress: ProgressFactory = silent_progress) -> list[str]:
    """Build operators that the cache lacks.

    Args:
        names: keys of :data:`BUILDERS`.
        progress: opens the progress bar.

    Returns:
        the operators that were built by this call.

    Raises:
        ConfigError: DeepSpeed or a compiler is missing.
        TrainingError: the compiler fails, or the cache cannot be written.
    """
    root = use_cache()
    built = []
    for name in [name for name in names if not is_built(name, root)]:
        compiler()
        with _lock(root, name):
            if is_built(name, root):  # by the process that held the lock
                continue
            # Under our lock nobody builds, so this is what a killed build left; DeepSpeed would wait for it.
            (root / name / "lock").unlink(missing_ok=True)
            _compile(name, progress)
            built.append(name)
    return built


def is_built(name: str, root: Path | None = None) -> bool:
    """Whether the cache holds an operator; the library appears when it is linked, so it is whole."""
    return ((root or folder()) / name / f"{name}.so").is_file()


def use_cache() -> Path:
    """Let torch keep compiled operators in this package's cache, unless the user set TORCH_EXTENSIONS_DIR.

    Ninja, which torch calls by its name, may be installed beside this Python only.

    Returns:
        the folder.

    Raises:
        TrainingError: it cannot be written.
    """
    root = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder())))
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"the cache of compiled operators {root} cannot be written ({error.strerror}); "
            "set SPIKELM_CACHE to a folder you own"
        ) from error
    if shutil.which("ninja") is None:
        os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{Path(sys.executable).parent}"
    return root


def folder() -> Path:
    """``deepspeed-ops/KEY`` in ``$SPIKELM_CACHE`` or in the user's cache folder.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    if named := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(named)
    if cache := os.environ.get("SPIKELM_CACHE"):
        base = Path(cache)
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spikelm"
    return base.expanduser().absolute() / "deepspeed-ops" / _key()


def _key() -> str:
    """What a compiled operator depends on, as a short hash."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from spikelm.kernels.compile import processor

    try:
        deepspeed = version("deepspeed")
    except PackageNotFoundError as error:
        raise ConfigError("DeepSpeed is not installed; pip install 'spikelm[train]'") from error
    parts = [torch.__version__, str(torch.version.cuda), sys.version, deepspeed, processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def compiler() -> str:
    """The C++ compiler that torch will call.

    Raises:
        ConfigError: there is none, or no ninja.
    """
    named = os.environ.get("CXX", "c++")
    found = shutil.which(named.split()[0]) if named.split() else None
    if found is None:
        raise ConfigError(
            f"DeepSpeed's operators need a C++ compiler and there is no {named!r} on the path; install one "
            "(apt install g++), set CXX, or use settings without offload"
        )
    if shutil.which("ninja") is None:
        raise ConfigError(
            "DeepSpeed's operators are built by ninja, which is not installed; pip install ninja"
        )
    return found


@contextmanager
def _lock(root: Path, name: str) -> Iterator[None]:
    """One builder of an operator at a time; the lock goes with its process, however it ends."""
    with (root / f"{name}.building").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _compile(name: str, progress: ProgressFactory) -> None:
    """Build one operator in a process of its own: torch keeps what it loads, and prints what it does."""
    command = [sys.executable, "-c", _BUILD, BUILDERS[name]]
    lines: list[str] = []
    with (
        progress(f"compile DeepSpeed's {name} (once)", None, "files") as bar,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if match := _STEP.match(line):
                bar.advance(1)
                bar.note(f"{match[1]} of {match[2]}")
    if process.returncode != 0:
        reason = next((line for line in lines if "error:" in line), None)
        reason = reason or next((line for line in reversed(lines) if line.strip()), "no output")
        raise TrainingError(f"DeepSpeed's operator {name} cannot be built: {reason.strip()[:300]}")
