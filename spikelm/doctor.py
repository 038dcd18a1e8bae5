"""Examination of the machine: each check says what was found and, where it could be better, what to do.

Every check is a function from nothing to one :class:`Finding`; a check that itself breaks becomes a finding
that says so, because a doctor who faints helps nobody.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spikelm.errors import KernelError

Verdict = Literal["ok", "warn", "fail"]

_GIB = 2**30
_LOW_DISK = 5 * _GIB  # a 216M model, its optimiser state and two checkpoints
_NO_DISK = _GIB // 4
_LOW_MEMORY = 4 * _GIB  # the demo and the 46M model train within it


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: what was checked.
        verdict: ``ok``; ``warn``: works, but something is missing or slow; ``fail``: essential and broken.
        found: what is there, in one line.
        mend: what to do about it; empty where nothing needs doing.
        details: the figures behind ``found``, JSON values.
    """

    name: str
    verdict: Verdict
    found: str
    mend: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


def examine() -> list[Finding]:
    """Run every check, essential ones first; takes a few seconds (torch is imported, a C file compiled)."""
    return [_guarded(name, check) for name, check in _CHECKS.items()]


def summary(findings: list[Finding]) -> dict[str, Any]:
    """The findings as JSON values: ``{"ok": bool, "checks": {name: {verdict, found, mend, ...}}}``."""
    return {
        "ok": all(finding.verdict != "fail" for finding in findings),
        "checks": {
            finding.name: {
                "verdict": finding.verdict,
                "found": finding.found,
                "mend": finding.mend,
                **finding.details,
            }
            for finding in findings
        },
    }


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:
        # Whatever broke, the other checks must still run, and this one must say what happened.
        text = f"the check itself failed: {type(error).__name__}: {error}"
        return Finding(
            name=name, verdict="fail", found=text, mend="Please report this with the output of --json."
        )


def _python() -> Finding:
    version = platform.python_version()
    found = f"{version} ({sys.executable}) on {platform.system()} {platform.machine()}"
    details = {"version": version, "platform": platform.platform()}
    return Finding(name="python", verdict="ok", found=found, details=details)


def _package() -> Finding:
    from spikelm import __version__, presets

    home = Path(__file__).resolve().parent
    count = sum(len(presets.names(kind)) for kind in presets.kinds())
    found = f"{__version__} in {home}, {count} presets"
    details = {"version": __version__, "home": str(home), "presets": count}
    if not count:
        mend = "The presets are missing: reinstall with pip install --force-reinstall --no-deps spikelm."
        return Finding(name="spikelm", verdict="fail", found=found, mend=mend, details=details)
    return Finding(name="spikelm", verdict="ok", found=found, details=details)


def _torch() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        mend = "pip install --constraint constraints/cpu.txt torch (without a GPU), or pip install torch."
        return Finding(name="torch", verdict="fail", found=f"cannot be imported: {error}", mend=mend)
    capability = torch.backends.cpu.get_cpu_capability()
    product = torch.ones(8, 8) @ torch.ones(8, 8)
    if not bool((product == 8).all()):
        mend = "Reinstall torch: pip install --force-reinstall torch."
        return Finding(
            name="torch", verdict="fail", found=f"{torch.__version__} multiplies wrongly", mend=mend
        )
    found = f"{torch.__version__}, CPU kernels for {capability}"
    details = {"version": torch.__version__, "cpu_capability": capability, "cuda_build": torch.version.cuda}
    return Finding(name="torch", verdict="ok", found=found, details=details)


def _libraries() -> Finding:
    missing, present = _requirements(extra=None)
    if missing:
        mend = "pip install " + " ".join(f"'{name}'" for name in missing)
        found = f"missing or too old: {', '.join(missing)}"
        return Finding(name="libraries", verdict="fail", found=found, mend=mend, details={"missing": missing})
    found = ", ".join(f"{name} {version}" for name, version in present.items() if name != "torch")
    return Finding(name="libraries", verdict="ok", found=found, details={"versions": present})


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        found = ", ".join(f"{item.name} with {item.total_memory / _GIB:.0f} GiB" for item in devices)
        return Finding(name="device", verdict="ok", found=found, details={"gpus": [d.name for d in devices]})
    if _gpu_on_board():
        mend = "Install a torch built for the GPU's driver: pip install --force-reinstall torch."
        found = f"a GPU that torch {torch.__version__} cannot use"
        return Finding(name="device", verdict="warn", found=found, mend=mend, details={"gpus": []})
    return Finding(
        name="device", verdict="ok", found="no GPU: everything runs on the CPU", details={"gpus": []}
    )


def _gpu_on_board() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        run = subprocess.run([command, "-L"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return run.returncode == 0 and b"GPU" in run.stdout


def _threads() -> Finding:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    found = f"torch uses {threads} of {cores} core(s)" + (f", OMP_NUM_THREADS={variable}" if variable else "")
    details = {"threads": threads, "cores": cores}
    if threads > cores:
        mend = f"More threads than cores wait for each other: set OMP_NUM_THREADS={cores}."
        return Finding(name="threads", verdict="warn", found=found, mend=mend, details=details)
    if threads < cores and variable:
        mend = "Unset OMP_NUM_THREADS to use every core (right for training, not for several processes)."
        return Finding(name="threads", verdict="ok", found=found, mend=mend, details=details)
    return Finding(name="threads", verdict="ok", found=found, details=details)


def _memory() -> Finding:
    total, free = _memory_bytes()
    if total is None or free is None:
        return Finding(name="memory", verdict="ok", found="not reported by this system")
    found = f"{free / _GIB:.1f} GiB free of {total / _GIB:.1f}"
    details = {"free_bytes": free, "total_bytes": total}
    if free < _LOW_MEMORY:
        mend = "Close other programs, or train with a smaller batch and gradient checkpointing."
        return Finding(name="memory", verdict="warn", found=found, mend=mend, details=details)
    return Finding(name="memory", verdict="ok", found=found, details=details)


def _memory_bytes() -> tuple[int | None, int | None]:
    table = Path("/proc/meminfo")
    if not table.is_file():
        return None, None
    values = {}
    for line in table.read_text().splitlines():
        key, _, rest = line.partition(":")
        values[key] = int(rest.split()[0]) * 1024
    return values.get("MemTotal"), values.get("MemAvailable")


def _huge_pages() -> Finding:
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not file.is_file():
        return Finding(name="huge pages", verdict="ok", found="not reported by this system")
    mode = file.read_text().partition("[")[2].partition("]")[0]
    details = {"transparent": mode}
    if mode == "never":
        mend = f"Large weights are read a little slower: echo madvise | sudo tee {file}"
        return Finding(
            name="huge pages", verdict="warn", found="transparent: never", mend=mend, details=details
        )
    return Finding(name="huge pages", verdict="ok", found=f"transparent: {mode}", details=details)


def _compiler() -> Finding:
    from spikelm.kernels.compile import compiler_command, compiler_version

    try:
        command, version = compiler_command(), compiler_version()
    except KernelError as error:
        mend = (
            "Install one: apt install gcc (Debian), dnf install gcc (Fedora), xcode-select --install (macOS)."
        )
        found = f"{error}; the slower torch forms of the kernels are used"
        return Finding(name="C compiler", verdict="warn", found=found, mend=mend)
    details: dict[str, Any] = {"command": command, "version": version}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.c"
        source.write_text("#include <omp.h>\nint probe(void) { return omp_get_max_threads(); }\n")
        words = [*command, "-shared", "-fPIC", "-fopenmp", str(source), "-o", str(source.with_suffix(".so"))]
        details["openmp"] = (
            subprocess.run(words, capture_output=True, timeout=60, check=False).returncode == 0
        )
    if not details["openmp"]:
        mend = "Install the compiler's OpenMP library (libgomp or libomp) to use more than one thread."
        found = f"{version}, without OpenMP"
        return Finding(name="C compiler", verdict="warn", found=found, mend=mend, details=details)
    return Finding(name="C compiler", verdict="ok", found=f"{version}, OpenMP", details=details)


_EXTRAS = {
    "train": "ZeRO over several devices, TensorBoard",
    "gpu": "Triton kernels",
    "serve": "serving",
    "eval": "tasks of lm-evaluation-harness",
    "dev": "tests and tools",
}


def _extras() -> Finding:
    states: dict[str, Any] = {}
    words = []
    for extra, purpose in _EXTRAS.items():
        missing, present = _requirements(extra=extra)
        states[extra] = {"installed": not missing, "missing": missing, "versions": present}
        state = "installed" if present else "needs nothing more"
        words.append(f"{extra}: " + (f"not installed ({purpose})" if missing else state))
    lacking = [extra for extra, state in states.items() if not state["installed"]]
    import torch

    found, details = "; ".join(words), {"extras": states}
    if "gpu" in lacking and torch.cuda.is_available():
        mend = "The GPU's kernels need Triton: pip install 'spikelm[gpu]'."
        return Finding(name="extras", verdict="warn", found=found, mend=mend, details=details)
    mend = f"Optional: pip install 'spikelm[{','.join(lacking)}]'." if lacking else ""
    return Finding(name="extras", verdict="ok", found=found, mend=mend, details=details)


def _requirements(extra: str | None) -> tuple[list[str], dict[str, str]]:
    """Requirements of the core (None) or of an extra: those not met, and the versions of those that are."""
    from packaging.requirements import Requirement

    missing, present = [], {}
    for line in importlib.metadata.requires("spikelm") or []:
        requirement = Requirement(line)
        marker = requirement.marker
        belongs = marker is None or marker.evaluate({"extra": extra or ""})
        if extra is not None and (marker is None or marker.evaluate({"extra": ""})):
            belongs = False  # a core requirement, not one of this extra
        if not belongs:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{requirement.name}{requirement.specifier}")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            present[requirement.name] = version
        else:
            missing.append(f"{requirement.name}{requirement.specifier}")
    return missing, present


def _disk() -> Finding:
    place = Path.cwd()
    free = shutil.disk_usage(place).free
    found, details = f"{free / _GIB:.1f} GiB free in {place}", {"free_bytes": free, "path": str(place)}
    if free < _LOW_DISK:
        mend = "Free some space, or let checkpoints go to another disk."
        verdict: Verdict = "fail" if free < _NO_DISK else "warn"
        return Finding(name="disk", verdict=verdict, found=found, mend=mend, details=details)
    return Finding(name="disk", verdict="ok", found=found, details=details)


def _kernels() -> Finding:
    from spikelm.kernels.dispatch import available, backend

    table = available()
    details = {"chosen": backend(), "ops": {op: dict(states) for op, states in table.items()}}
    usable = {op: [name for name, state in states.items() if state is True] for op, states in table.items()}
    found = f"{backend()}; " + ", ".join(f"{op}: {'/'.join(names)}" for op, names in usable.items())
    slow = {op: str(table[op]["c"]) for op, names in usable.items() if "c" not in names and "c" in table[op]}
    if slow:
        reason = next(iter(slow.values()))
        mend = f"No C kernel for {', '.join(slow)} (several times slower): {reason}"
        return Finding(name="kernels", verdict="warn", found=found, mend=mend, details=details)
    return Finding(name="kernels", verdict="ok", found=found, details=details)


def _cache() -> Finding:
    from spikelm.data.store import default_cache_dir
    from spikelm.kernels.compile import cache_folder

    mend = "Set SPIKELM_CACHE to a folder that can be written."
    words, sizes = [], {}
    for what, folder in (("kernels", cache_folder()), ("tokens", default_cache_dir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            found = f"{folder} cannot be written: {error.strerror}"
            return Finding(
                name="cache", verdict="warn", found=found, mend=mend, details={"path": str(folder)}
            )
        sizes[what] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        words.append(f"{what} in {folder} ({sizes[what] / 2**20:.1f} MiB)")
    return Finding(name="cache", verdict="ok", found=", ".join(words), details={"bytes": sizes})


def _deepspeed_ops() -> Finding:
    from spikelm.errors import SpikeLMError
    from spikelm.train import ops

    name = "DeepSpeed ops"
    try:
        root = ops.folder()
    except SpikeLMError:
        return Finding(name=name, verdict="ok", found="DeepSpeed is not installed; plain torch needs none")
    built = [op for op in ops.BUILDERS if ops.is_built(op, root)]
    details = {"built": built, "path": str(root)}
    found = (
        f"{', '.join(built)} in {root}" if built else f"none built yet (only offload needs them; in {root})"
    )
    try:
        ops.compiler()
    except SpikeLMError as error:
        return Finding(name=name, verdict="warn", found=found, mend=f"{error}.", details=details)
    return Finding(name=name, verdict="ok", found=found, details=details)


_CHECKS: Mapping[str, Callable[[], Finding]] = {
    "python": _python,
    "spikelm": _package,
    "torch": _torch,
    "libraries": _libraries,
    "device": _device,
    "threads": _threads,
    "memory": _memory,
    "huge pages": _huge_pages,
    "C compiler": _compiler,
    "kernels": _kernels,
    "extras": _extras,
    "DeepSpeed ops": _deepspeed_ops,
    "disk": _disk,
    "cache": _cache,
}
