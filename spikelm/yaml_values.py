"""YAML as configurations need it: 3e-4 is a number, a key given twice is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from spikelm.errors import ConfigError

# YAML 1.1, which PyYAML speaks, takes 3e-4 and 1E5 for strings because the dot is missing.
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with floats as everybody writes them and without silent duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that occurs twice: one of the two values would be dropped in silence."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ConfigError(f"key {key!r} on line {line} is not text")
            if key in seen:
                raise ConfigError(f"key {key!r} is given twice, the second time on line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_value(text: str, *, where: str) -> Any:
    """The value of ``text`` as YAML: ``3e-4`` -> 0.0003, ``[a, b]`` -> list, ``null`` -> None.

    Args:
        text: the value as typed.
        where: what it belongs to, for the error.

    Raises:
        ConfigError: the text is not YAML.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: the value is not YAML ({_short(error)}); quote it") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not YAML or is not a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_short(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if values is None:
        raise ConfigError(f"{path} is empty; a configuration is a mapping of keys to values")
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds a {type(values).__name__}; a configuration is a mapping of keys to values"
        )
    return values


def _short(error: yaml.YAMLError) -> str:
    """A YAML error on one line."""
    return " ".join(str(error).split())
