"""Overrides of a configuration, and what is wrong with one in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from spikelm.errors import ConfigError, nearest
from spikelm.yaml_values import parse_value


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``values`` with dotted ``key=value`` pairs applied; values are parsed as YAML.

    ``model=NAME`` replaces the model; ``model.hidden_size=128`` changes a value of the named preset;
    ``data.train.0.weight=2`` one of an entry of a list.

    Raises:
        ConfigError: a pair without ``=``, or a key inside something that is no section.
    """
    result: dict[str, Any] = _copy(values)
    for pair in overrides:
        key, equals, text = pair.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise ConfigError(f"override {pair!r} is not of the form key=value, for example optim.lr=3e-4")
        node: Any = result
        for depth, name in enumerate(path[:-1]):
            child = node[_index(node, name, pair)] if isinstance(node, list) else node.get(name)
            if path[: depth + 1] == ["model"] and isinstance(child, str):
                child = node[name] = {"preset": child}
            if child is None:
                child = node[name] = {}
            if not isinstance(child, (dict, list)):
                raise ConfigError(
                    f"override {pair!r}: {'.'.join(path[: depth + 1])} is a value, not a section"
                )
            node = child
        last = _index(node, path[-1], pair) if isinstance(node, list) else path[-1]
        node[last] = parse_value(text, where=f"override {pair!r}")
    return result


def _index(values: list[Any], name: str, pair: str) -> int:
    """Which entry of a list a part of a dotted key means (``data.train.0.weight``)."""
    if not name.isdecimal() or int(name) >= len(values):
        raise ConfigError(f"override {pair!r}: {name!r} is no entry of a list of {len(values)}; count from 0")
    return int(name)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a failed validation as one sentence that names the key."""
    problems = error.errors()
    # An unknown key explains a missing one (a typo), so it is told first.
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    names = [str(part) for part in first["loc"]]
    section, known = _section(model, names)
    if first["type"] == "extra_forbidden":
        full = [".".join([*section, name]) for name in known]
        return f"training configuration: {_unknown_key(model, names, section, full)}"
    key = ".".join(_without_types(names)) or "the configuration"
    got = first.get("input")
    if first["type"] == "missing":
        return f"training configuration: {key} is missing; it has no default"
    if first["type"] == "value_error":
        where = f"{key}: " if names else ""
        return f"training configuration: {where}{first['ctx']['error']}"
    reason = first["msg"][:1].lower() + first["msg"][1:]
    return f"training configuration: {key} is {got!r} ({type(got).__name__}); {reason}"


def _unknown_key(model: type[BaseModel], names: list[str], section: list[str], known: list[str]) -> str:
    """Sentence about an unknown key that also looks in other sections (``lr`` means ``optim.lr``)."""
    given = ".".join(names)
    by_leaf: dict[str, list[str]] = {}
    for key in _keys(model):
        by_leaf.setdefault(key.rpartition(".")[2], []).append(key)
    leaves = difflib.get_close_matches(names[-1], by_leaf, n=1, cutoff=0.75)
    if not leaves:
        return nearest("key", given, known)
    keys = by_leaf[leaves[0]]
    meant = [key for key in keys if key.split(".")[:-1] == section] or keys
    hint = " or ".join(repr(key) for key in meant)
    return f"unknown key {given!r}; did you mean {hint}? known: {', '.join(sorted(known))}"


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of every key, sections included."""
    for name in model.model_fields:
        yield prefix + name
        if (section := _nested(model, name)) is not None:
            yield from _keys(section, f"{prefix}{name}.")


def _nested(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section that a key holds, or None where it holds a value."""
    field = model.model_fields.get(name)
    inner = [field.annotation, *get_args(field.annotation)] if field is not None else []
    return next((kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _section(model: type[BaseModel], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The section a location lies in, and the keys that exist there."""
    section: list[str] = []
    for name in names[:-1]:
        nested = _nested(model, name)
        if nested is None:
            break
        section.append(name)
        model = nested
    return section, list(model.model_fields)


def _without_types(names: Sequence[str]) -> list[str]:
    """A pydantic location without the branch names of unions (``model.str`` is ``model``)."""
    return [name for name in names if name not in {"str", "dict[str,any]"}]


def _copy(values: Any) -> Any:
    """Deep copy of nested dictionaries and lists."""
    if isinstance(values, dict):
        return {key: _copy(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_copy(value) for value in values]
    return values
