"""Plain C compiled once with the system compiler for this processor, kept in a user cache.

The compiler is ``$CC`` or else the first of cc, gcc and clang on the path. Shared libraries lie in
``$SPIKELM_CACHE``, or else ``spikelm/kernels`` under ``$XDG_CACHE_HOME`` (``~/.cache``). A library's name
holds a hash of its sources, the compiler's version, the flags and the processor's features, so that nothing
is ever rebuilt in place: a new library is written beside the cache entry and renamed, which is safe between
processes.

Floating point is never reassociated or contracted (no -ffast-math): a vector lane and a scalar remainder
give the same bits, whatever the number of threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from spikelm.errors import KernelError

CANDIDATES = ("cc", "gcc", "clang")
# The two -fno flags change no result: they say that nobody looks at errno or at the exception flags, without
# which GCC does not vectorise a loop with a comparison.
BASE_FLAGS = (
    *("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"),
    *("-fPIC", "-shared"),
)
# Tried in this order; compilers without OpenMP (Apple's) or without -march=native still give a library.
TARGET_FLAGS = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    ("-mcpu=native",),
    (),
)
TIMEOUT_S = 300
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
ENVIRONMENT = ("CC", "PATH", "SPIKELM_CACHE", "XDG_CACHE_HOME", "HOME")


def compiler_command() -> list[str]:
    """Command of the C compiler, for example ``["/usr/bin/cc"]``.

    Raises:
        KernelError: there is none, or ``$CC`` names a program that does not exist.
    """
    return list(_find_compiler(os.environ.get("CC", ""), os.environ.get("PATH", "")))


def compiler_version() -> str:
    """First line of the compiler's own description.

    Raises:
        KernelError: there is no compiler.
    """
    return _version(tuple(compiler_command())).partition("\n")[0]


def cache_folder() -> Path:
    """Folder that holds the compiled libraries (it need not exist yet)."""
    chosen = os.environ.get("SPIKELM_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "spikelm" / "kernels"


def load(source: Path, defines: Sequence[str] = ()) -> ctypes.CDLL:
    """Shared library of one C file, compiled if the cache lacks it.

    Args:
        source: the C file; what it includes in quotes belongs to the key.
        defines: preprocessor names to define, for example ``["SPIKELM_DOUBLE"]``.

    Raises:
        KernelError: no compiler, a compiler that fails, or a cache that cannot be written.
    """
    # The environment is part of the key of what is remembered: a changed CC or cache is seen.
    environment = tuple(os.environ.get(name, "") for name in ENVIRONMENT)
    loaded = _load(source, tuple(defines), environment)
    if isinstance(loaded, str):
        raise KernelError(loaded)
    return loaded


@cache
def _find_compiler(cc: str, path: str) -> tuple[str, ...]:
    if cc:
        words = shlex.split(cc)
        found = shutil.which(words[0], path=path) if words else None
        if found is None:
            raise KernelError(f"CC={cc!r} names no program; point CC at a C compiler or unset it")
        return (found, *words[1:])
    for name in CANDIDATES:
        found = shutil.which(name, path=path)
        if found is not None:
            return (found,)
    raise KernelError(f"no C compiler ({', '.join(CANDIDATES)}) on the path; install gcc or clang, or set CC")


@cache
def _version(command: tuple[str, ...]) -> str:
    return _run([*command, "--version"])


@cache
def processor() -> str:
    """Features of this processor: two machines that share a home folder must not share libraries."""
    cpuinfo = Path("/proc/cpuinfo")
    wanted = ("flags", "Features", "model name", "isa", "CPU part")
    lines: list[str] = []
    if cpuinfo.is_file():
        first = cpuinfo.read_text(errors="replace").partition("\n\n")[0]
        lines = [line for line in first.splitlines() if line.startswith(wanted)]
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *lines])


@cache
def _load(source: Path, defines: tuple[str, ...], environment: tuple[str, ...]) -> ctypes.CDLL | str:
    """The library, or the reason why there is none (a failure is not tried again in this process)."""
    try:
        command = compiler_command()
        folder = cache_folder()
        problem = "unknown"
        for target in TARGET_FLAGS:
            flags = (*BASE_FLAGS, *target, *(f"-D{name}" for name in defines))
            library = folder / f"{source.parent.name}-{_key(source, command, flags)}.so"
            try:
                return _open(library, source, [*command, *flags])
            except KernelError as error:
                problem = str(error)
        return problem
    except (KernelError, OSError) as error:
        return str(error) if isinstance(error, KernelError) else f"the C compiler could not be used: {error}"


def _key(source: Path, command: list[str], flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for part in (
        *(text.read_text() for text in included(source)),
        *command,
        _version(tuple(command)),
        *flags,
        processor(),
    ):
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:24]


def included(source: Path) -> list[Path]:
    """A C file and all files that it includes in quotes, directly or not, each once and in a fixed order."""
    found, waiting = [source], [source]
    while waiting:
        text = waiting.pop()
        for name in _INCLUDE.findall(text.read_text()):
            path = Path(os.path.normpath(text.parent / name))
            if path.is_file() and path not in found:
                found.append(path)
                waiting.append(path)
    return found


def _open(library: Path, source: Path, compile_command: list[str]) -> ctypes.CDLL:
    if library.is_file():
        try:
            return ctypes.CDLL(str(library))
        except OSError:
            # Cut short by a full disk, or built against another C library: build it again.
            library.unlink(missing_ok=True)
    _build(library, source, compile_command)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelError(f"the compiled kernel {library} does not load: {error}") from error


def _build(library: Path, source: Path, compile_command: list[str]) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-")
    except OSError as error:
        raise KernelError(
            f"the kernel cache {library.parent} cannot be written ({error.strerror}); "
            "set SPIKELM_CACHE to a folder you own"
        ) from error
    with folder as name:
        fresh = Path(name) / library.name
        _run([*compile_command, str(source), "-o", str(fresh), "-lm"])
        os.replace(fresh, library)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"{command[0]} could not be run: {error}") from error
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise KernelError(f"{command[0]} failed with exit code {done.returncode}: {first[:300]}")
    return done.stdout
