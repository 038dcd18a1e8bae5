"""``data.train`` of a configuration: one source, or several with weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

KEYS = ("source", "weight")


@dataclass(frozen=True, kw_only=True)
class Component:
    """One source of a mixture.

    Attributes:
        source: specification.
        weight: its share of the samples, relative to the other weights; 0 leaves the source out.
    """

    source: str
    weight: float = 1.0


def parse_components(value: Any) -> str | list[Component]:
    """A source specification, or the checked components of a mixture.

    Raises:
        ValueError: one sentence about the first thing that is wrong.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"got {value!r} ({type(value).__name__}); expected a source, or a list of "
            "{source: SPEC, weight: NUMBER}"
        )
    if not value:
        raise ValueError("the list is empty; give at least one {source: SPEC, weight: NUMBER}")
    found = [_component(entry, f"entry {number}") for number, entry in enumerate(value)]
    seen: set[str] = set()
    for part in found:
        if part.source in seen:
            raise ValueError(f"{part.source} is given twice; give it once, with the sum of the weights")
        seen.add(part.source)
    if not any(part.weight for part in found):
        raise ValueError("all weights are 0; give at least one source a positive weight")
    return found


def plain(value: str | list[Component]) -> Any:
    """JSON values that :func:`parse_components` reads."""
    return value if isinstance(value, str) else [asdict(part) for part in value]


def _component(entry: Any, where: str) -> Component:
    if isinstance(entry, Component):
        entry = asdict(entry)
    if not isinstance(entry, dict) or not entry.keys() <= set(KEYS) or "source" not in entry:
        raise ValueError(f"{where} is {entry!r}; expected {{source: SPEC, weight: NUMBER}}")
    source, weight = entry["source"], entry.get("weight", 1.0)
    if not isinstance(source, str):
        raise ValueError(f"{where}: source is {source!r} ({type(source).__name__}); expected text")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise ValueError(f"{where}: the weight of {source} is {weight!r}; expected a number")
    if not math.isfinite(weight) or weight < 0:
        raise ValueError(
            f"{where}: the weight of {source} is {weight}; expected a finite number of at least 0"
        )
    return Component(source=source, weight=float(weight))
