"""Triton kernels compiled ahead of time, without a GPU: proof that they build, and what each one takes.

    python -m spikelm.kernels.ahead            compile everything, print the table
    python -m spikelm.kernels.ahead --write    write benchmarks/results/triton_ahead.json and its page,
                                               docs/gpu-resources.md; modules that did not change are kept

Every module with Triton kernels (``kernels/<op>/triton*.py``) has a function ``compilations(target)``, which
lists the configurations that it ships for a target. The table holds registers, shared memory and spilled
bytes of each, and a hash of the sources, so that a table that is out of date is seen.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spikelm.errors import KernelError
from spikelm.kernels.triton_excluded import PROVISIONAL

TARGETS: Mapping[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""Name of a target -> Triton's back-end, architecture and warp size."""
SHARED_LIMIT: Mapping[str, int] = {
    "sm_80": 166912,
    "sm_90": 232448,
    "sm_100": 232448,
    "gfx942": 65536,
}
"""Bytes of shared memory that one block may use."""
MOST_SPILLED = 64
"""Spilled bytes per thread beyond which a configuration is not shipped."""
FOLDER = Path(__file__).parent
TABLE = FOLDER.resolve().parent / "benchmarks" / "results" / "triton_ahead.json"
"""The committed table; only a checkout has it."""
PAGE = FOLDER.resolve().parent / "docs" / "gpu-resources.md"
"""The same as a page to read."""


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """One configuration of a kernel.

    Args:
        kernel: the ``@triton.jit`` function.
        name: unique name, for example ``gla_forward[K=128,V=128,bf16]``.
        signature: argument -> Triton type (``*bf16``, ``i32``, ``fp32``); no ``constexpr`` ones.
        constants: constexpr argument -> value; arguments that are None at launch belong here too.
        num_warps: warps of a block.
        num_stages: stages of software pipelining.
        options: other compiler options, for example ``{"enable_fp_fusion": False}``.
        unaligned: pointer arguments that are not promised to be multiples of 16 bytes.
        multiples: integer arguments that are multiples of 16 in the usual call; a launch sees that by itself,
            and memory is then read in wider pieces. (One that is 1 belongs into ``constants``.)
    """

    kernel: Any
    name: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    unaligned: Sequence[str] = ()
    multiples: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a compiled kernel takes: registers and spilled bytes per thread, shared memory in bytes."""

    registers: int
    shared: int
    spilled: int


def modules() -> list[str]:
    """Names of the modules with Triton kernels that list configurations, in order."""
    found = []
    for path in sorted(FOLDER.glob("*/triton*.py")):
        if "def compilations(" in path.read_text():
            found.append(f"spikelm.kernels.{path.parent.name}.{path.stem}")
    return found


def shipped(module: str) -> list[str]:
    """The targets on which ``auto`` takes a module's op."""
    provisional = PROVISIONAL.get(module.split(".")[2], ())
    return [target for target in TARGETS if target not in provisional]


def source_hash(module: str) -> str:
    """Hash of what decides a module's table: its file and the Triton sources that it imports, theirs too."""
    digest = hashlib.sha256()
    for path in _sources(module):
        digest.update(path.read_bytes())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _sources(module: str) -> list[Path]:
    """Files ``triton*.py`` that a module reads, itself among them."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        path = FOLDER.joinpath(*waiting.pop().split(".")[2:]).with_suffix(".py")
        if path in found or not path.name.startswith("triton") or not path.is_file():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                waiting += [str(node.module), *(f"{node.module}.{name.name}" for name in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [name.name for name in node.names]
        waiting = [name for name in waiting if name.startswith("spikelm.kernels.")]
    return sorted(found)


def compilations(module: str, target: str) -> list[Compilation]:
    """The configurations of one module for one target."""
    if target not in TARGETS:
        raise KernelError(f"target {target!r} is unknown; expected one of {', '.join(TARGETS)}")
    found: list[Compilation] = importlib.import_module(module).compilations(target)
    return found


def compile_one(wanted: Compilation, target: str) -> Resources:
    """Compile a configuration for a target, outside Triton's cache.

    Raises:
        KernelError: Triton runs as an interpreter in this process, or the compiler fails.
    """
    compiled, log = _compile(wanted, target)
    shared = int(compiled.metadata.shared)
    if "amdgcn" in compiled.asm:
        return _amd(compiled.asm["amdgcn"], shared, TARGETS[target][2])
    return _nvidia(log, shared)


def assembly(wanted: Compilation, target: str) -> str:
    """The PTX or AMDGCN that a configuration becomes; errors as those of :func:`compile_one`."""
    compiled, _ = _compile(wanted, target)
    text: str = compiled.asm["amdgcn" if "amdgcn" in compiled.asm else "ptx"]
    return text


def _compile(wanted: Compilation, target: str) -> tuple[Any, str]:
    """The compiled kernel and what ptxas said."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise KernelError("TRITON_INTERPRET is set, and interpreted kernels do not compile; unset it")
    names = list(wanted.kernel.arg_names)
    missing = set(names) - set(wanted.signature) - set(wanted.constants)
    unknown = (set(wanted.signature) | set(wanted.constants)) - set(names)
    if missing or unknown:
        raise KernelError(
            f"{wanted.name}: arguments without type or value: {sorted(missing)}, "
            f"not of the kernel: {sorted(unknown)}"
        )
    signature = {name: wanted.signature.get(name, "constexpr") for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in wanted.signature.items()
        if (kind.startswith("*") and name not in wanted.unaligned) or name in wanted.multiples
    }
    source = ASTSource(wanted.kernel, signature, dict(wanted.constants), aligned)
    options = {"num_warps": wanted.num_warps, "num_stages": wanted.num_stages, **wanted.options}
    log = io.StringIO()
    with _fresh_cache(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        try:
            compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
        except Exception as error:
            raise KernelError(f"{wanted.name} does not compile for {target}: {error}") from error
    return compiled, log.getvalue()


def table(
    targets: Sequence[str] = tuple(TARGETS),
    only: Sequence[str] = (),
    known: Mapping[str, Any] | None = None,
    jobs: int = 1,
    after: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Compile every configuration.

    Args:
        targets: which to compile for.
        only: ops whose modules are compiled; empty for all, but on targets where an op is provisional.
        known: an older table; modules whose sources and Triton are those of it are taken over.
        jobs: processes that compile.
        after: called with what there is after each module.

    Returns:
        {"triton": version, "modules": {module: {"source": hash, "kernels": {name: {target: resources}}}}}
    """
    import triton

    result: dict[str, Any] = {"triton": triton.__version__, "modules": {}}
    with _pool(jobs) as run:
        for module in modules():
            if only and module.split(".")[2] not in only:
                continue
            here = [target for target in targets if only or target in shipped(module)]
            if not here:
                continue
            if known is not None and not stale(known, module, here):
                result["modules"][module] = known["modules"][module]
                continue
            entry: dict[str, Any] = {"source": source_hash(module), "kernels": {}}
            wanted = [
                (module, target, compilation.name)
                for target in here
                for compilation in compilations(module, target)
            ]
            for (_, target, name), taken in zip(wanted, run(_compile_named, wanted), strict=True):
                entry["kernels"].setdefault(name, {})[target] = asdict(taken)
            result["modules"][module] = entry
            if after is not None:
                after(result)
    return result


def _compile_named(wanted: tuple[str, str, str]) -> Resources:
    """Compile the configuration of a module, target and name (which another process can be told)."""
    module, target, name = wanted
    (found,) = (entry for entry in compilations(module, target) if entry.name == name)
    return compile_one(found, target)


@contextlib.contextmanager
def _pool(jobs: int) -> Iterator[Callable[..., Iterable[Resources]]]:
    """A ``map`` in this process or over several new ones."""
    if jobs <= 1:
        yield map
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as executor:
        yield executor.map


def stale(known: Mapping[str, Any], module: str, targets: Sequence[str] = tuple(TARGETS)) -> str | None:
    """Why a table does not speak of a module as it is now, or None."""
    import triton

    if known.get("triton") != triton.__version__:
        return f"the table was made with Triton {known.get('triton')}, this is {triton.__version__}"
    entry = known["modules"].get(module)
    if entry is None:
        return f"{module} is not in the table"
    if entry["source"] != source_hash(module):
        return f"{module} has changed since the table was made"
    for target in targets:
        for wanted in compilations(module, target):
            if target not in entry["kernels"].get(wanted.name, {}):
                return f"{wanted.name} is not in the table for {target}"
    return None


def problems(found: Mapping[str, Any]) -> list[str]:
    """Sentences on every configuration of a table that must not be shipped."""
    sentences = []
    for module in found["modules"].values():
        for name, per_target in module["kernels"].items():
            for target, taken in per_target.items():
                if taken["spilled"] > MOST_SPILLED:
                    sentences.append(f"{name} spills {taken['spilled']} bytes on {target}")
                if taken["shared"] > SHARED_LIMIT[target]:
                    sentences.append(f"{name} needs {taken['shared']} bytes of shared memory on {target}")
    return sentences


def page(found: Mapping[str, Any]) -> str:
    """The table as Markdown: registers / bytes of shared memory / spilled bytes, by target."""
    lines = [
        "# What the GPU kernels take",
        f"Compiled ahead of time with Triton {found['triton']}, without a GPU: registers per thread / "
        "bytes of shared memory per block / spilled bytes per thread (gfx942 counts vector registers).",
        "Made by `python -m spikelm.kernels.ahead --write` from the configurations that the modules ship; "
        "[gpu.md](gpu.md) says what that proves and what it does not.",
    ]
    for module, entry in found["modules"].items():
        lines += ["", f"## {module.removeprefix('spikelm.kernels.')}", f"| kernel | {' | '.join(TARGETS)} |"]
        lines.append("| --- |" + " ---: |" * len(TARGETS))
        for name, taken in sorted(entry["kernels"].items()):
            cells = [
                "{registers} / {shared} / {spilled}".format(**taken[target])
                if target in taken
                else "not shipped"
                for target in TARGETS
            ]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _write(found: Mapping[str, Any]) -> None:
    TABLE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(found))


@contextlib.contextmanager
def _fresh_cache() -> Iterator[None]:
    """A cached kernel would be loaded without telling what it takes."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = before


def _nvidia(log: str, shared: int) -> Resources:
    """Resources from what ptxas says."""
    registers = re.search(r"Used (\d+) registers", log)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spilled is None:
        raise KernelError(f"ptxas did not tell what the kernel takes: {log[:300]!r}")
    return Resources(registers=int(registers[1]), shared=shared, spilled=max(map(int, spilled.groups())))


def _amd(assembly: str, shared: int, lanes: int) -> Resources:
    """Resources from the notes in the assembly; spilled registers hold 4 bytes per thread."""

    def note(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return 0 if found is None else int(found[1])

    scalar = -(-4 * note("sgpr_spill_count") // lanes)  # one for all lanes
    return Resources(
        registers=note("vgpr_count"), shared=shared, spilled=4 * note("vgpr_spill_count") + scalar
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write it where asked; exit code 1 where a configuration must not be shipped."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels without a GPU.")
    parser.add_argument(
        "--write", action="store_true", help=f"write the table and its page, {TABLE.name} and {PAGE.name}"
    )
    parser.add_argument("--all", action="store_true", help="with --write: compile what has not changed too")
    parser.add_argument("--jobs", type=int, help="processes that compile; default: one for each core")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--op", action="append", default=[], help="only this op's kernels")
    chosen = parser.parse_args(arguments)
    if chosen.write and (chosen.target or chosen.op):
        parser.error("--write is the whole table, without --target and --op")
    known = None
    if chosen.write and not chosen.all and TABLE.is_file():
        known = json.loads(TABLE.read_text())
    jobs = chosen.jobs or os.cpu_count() or 1
    found = table(chosen.target or tuple(TARGETS), chosen.op, known, jobs, _write if chosen.write else None)
    for module in found["modules"].values():
        for name, per_target in module["kernels"].items():
            for target, taken in per_target.items():
                print(
                    f"{name:60} {target:7} {taken['registers']:4} registers {taken['shared']:7} B shared "
                    f"{taken['spilled']:5} B spilled"
                )
    if chosen.write:
        _write(found)
    wrong = problems(found)
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
