"""Does a committed result reproduce? Its arguments are run again and every figure is compared.

On the machine, versions and threads of the record, int8 weights on a CPU must give the same bits: their sums
are exact. Everything else is compared within a relative tolerance that is told (``TOLERANCES``): sums of
floats depend on the machine and the library. Times and joules are never compared.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikelm.errors import CheckpointError, DataError, nearest
from spikelm.evaluation.record import identity, read


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How records of one kind are made again.

    Args:
        rerun: ``module:function`` that takes the recorded arguments and returns a new record.
        volatile: keys anywhere in the results that no repetition gives again (measured times).
    """

    rerun: str
    volatile: frozenset[str] = frozenset()


KINDS: dict[str, Kind] = {
    "eval": Kind(rerun="spikelm.evaluation.job:rerun"),
    "energy": Kind(rerun="spikelm.cli.energy:rerun", volatile=frozenset({"measured", "verdict"})),
    "tasks": Kind(rerun="spikelm.cli.evaluate_tasks:rerun_tasks"),
    "long-context": Kind(rerun="spikelm.cli.evaluate_tasks:rerun_long_context"),
}
"""Kind of a record -> how it is made again; a new kind of measurement adds a line."""

TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2e-2}
"""Relative tolerance by the dtype of the arguments; a spike that flips moves a figure by less."""

_MACHINE = ("cpu", "vector_units", "threads", "device")
_VERSIONS = ("torch", "numpy")
_TEXT = ("sha256", "files")
"""Hashes of what was read: of documents, or of the files of tasks."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One value that is not as recorded.

    Args:
        path: where in the results, with dots.
        recorded: the value of the record; None where it had none.
        now: the value of the repetition; None where it has none.
    """

    path: str
    recorded: Any
    now: Any


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a repetition found.

    Args:
        kind: of the record.
        tolerance: relative; 0 where the same bits were demanded of every model.
        why: why that tolerance, in words.
        compared: values compared.
        identical: how many of them were the same to the last bit.
        differences: those outside the tolerance.
    """

    kind: str
    tolerance: float
    why: str
    compared: int
    identical: int
    differences: tuple[Difference, ...]

    @property
    def reproduced(self) -> bool:
        """Whether every value is within the tolerance."""
        return not self.differences


def verify(path: Path, *, rerun: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None) -> Verdict:
    """Run a record again and compare.

    Args:
        path: a file that ``--json`` wrote.
        rerun: what makes it again; that of :data:`KINDS` if None.

    Raises:
        DataError: the file is no record, its kind is unknown, or the text is missing or has changed.
        CheckpointError: a checkpoint is missing or has changed.
    """
    old = read(path)
    if old["kind"] not in KINDS:
        raise DataError(f"{path}: {nearest('kind of record', str(old['kind']), KINDS)}")
    kind = KINDS[old["kind"]]
    check_checkpoints(old, path)
    new = (rerun or load(kind.rerun))(old["arguments"])
    check_inputs(old, new, path)
    tolerance, exact, why = _tolerance(old, new)
    # Figures of such a model alone; those that compare it with others are sums of both.
    same_bits = tuple(f"{part}.{label}." for part in ("models", "lengths") for label in exact)
    compared = identical = 0
    differences = []
    for place, before, now in _pairs(old["results"], new["results"], kind.volatile):
        compared += 1
        if _same(before, now):
            identical += 1
        elif not _close(before, now, 0.0 if place.startswith(same_bits) else tolerance):
            differences.append(Difference(path=place, recorded=before, now=now))
    return Verdict(
        kind=old["kind"],
        tolerance=tolerance,
        why=why,
        compared=compared,
        identical=identical,
        differences=tuple(differences),
    )


def load(target: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """The function that ``module:function`` names."""
    module, _, name = target.partition(":")
    found: Callable[[Mapping[str, Any]], Mapping[str, Any]] = getattr(importlib.import_module(module), name)
    return found


def check_checkpoints(record: Mapping[str, Any], path: Path) -> None:
    """Refuse checkpoints that are not those of the record.

    Raises:
        CheckpointError: one is missing, or its weights or configuration have changed.
    """
    for label, old in record.get("checkpoints", {}).items():
        folder = Path(old["path"])
        if not folder.is_dir():
            raise CheckpointError(
                f"checkpoint {label} of {path} is not at {folder}; put it there, or run from the folder the "
                "record was made in"
            )
        now = identity(folder)
        for key, name in (("sha256", "weights"), ("config", "configuration")):
            if now[key] != old[key]:
                raise CheckpointError(
                    f"the {name} of checkpoint {folder} changed since {path} was made; measure it again, or "
                    "restore the checkpoint"
                )


def check_inputs(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    """Refuse a repetition on other text or with another tokenizer.

    Raises:
        DataError: naming what changed.
    """
    before, now = (record.get("data") or {} for record in (old, new))
    if any(before.get(key) != now.get(key) for key in _TEXT):
        source = before.get("source")
        raise DataError(f"the text {source} changed since {path} was made; restore it, or measure again")
    if old.get("tokenizer_sha256") != new.get("tokenizer_sha256"):
        raise DataError(f"the tokenizer changed since {path} was made; restore it, or measure again")


def _tolerance(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[float, list[str], str]:
    """The relative tolerance, labels of the models that must give the same bits all the same, and why."""
    dtype = str(old["arguments"].get("dtype", "float32"))
    loose = TOLERANCES.get(dtype, TOLERANCES["float32"])
    exact = _integer(old)
    floats = f"sums of {dtype} depend on the machine and the library"
    if not exact:
        return loose, [], floats
    before, now = _place(old), _place(new)
    changed = [key for key in before if before[key] != now[key]]
    if changed:
        return loose, [], f"int8 weights, but another {changed[0]} than when it was recorded"
    same = "int8 weights on the machine of the record: the same bits"
    if len(exact) < len(old["checkpoints"]):
        return loose, exact, f"{floats}; {', '.join(exact)}: {same}"
    return 0.0, exact, same


def _integer(record: Mapping[str, Any]) -> list[str]:
    """Labels of checkpoints that multiply integer counts with int8 weights on a CPU, neurons on."""
    arguments = record["arguments"]
    if arguments.get("twin") or not str(arguments.get("device", "cpu")).startswith("cpu"):
        return []
    found = {label: entry["config"] or {} for label, entry in record.get("checkpoints", {}).items()}
    return [
        label
        for label, config in found.items()
        if any(
            spec.get("name") == "int8"
            for spec in (config.get("weights") or {}, *(config.get("weight_overrides") or {}).values())
        )
    ]


def _place(record: Mapping[str, Any]) -> dict[str, Any]:
    machine = record.get("machine", {})
    versions = machine.get("versions", {})
    return {key: machine.get(key) for key in _MACHINE} | {key: versions.get(key) for key in _VERSIONS}


def _pairs(old: Any, new: Any, volatile: frozenset[str], place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every value of two trees, with its place; None where one of them has none."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            if key not in volatile:
                yield from _pairs(old.get(key), new.get(key), volatile, f"{place}.{key}".lstrip("."))
        return
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        for index, (before, now) in enumerate(zip(old, new, strict=True)):
            yield from _pairs(before, now, volatile, f"{place}[{index}]")
        return
    yield place, old, _written(new)


def _written(value: Any) -> Any:
    """A value as a file has it: plain, and null where a number is not finite."""
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, float) and not math.isfinite(plain):
        return None
    return str(plain) if isinstance(plain, Path) else plain


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, float) or isinstance(now, float):
        return _number(before) and _number(now) and float(before) == float(now)
    return bool(before == now)


def _close(before: Any, now: Any, tolerance: float) -> bool:
    """Counts and words must be the same; floats may differ by the tolerance, near zero absolutely."""
    if not (_number(before) and _number(now)) or (isinstance(before, int) and isinstance(now, int)):
        return False
    return math.isclose(before, now, rel_tol=tolerance, abs_tol=tolerance)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
