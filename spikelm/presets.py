"""Presets: the YAML files that come with the package, found by kind and name.

They live in ``configs/`` of a checkout, which is ``spikelm/configs`` in an installed wheel (a link in the
checkout), so one path serves both.
"""

from __future__ import annotations

from pathlib import Path

from spikelm.errors import ConfigError, nearest

_ROOT = Path(__file__).resolve().parent / "configs"
_SUFFIX = ".yaml"


def kinds() -> list[str]:
    """Kinds of presets there are, for example ``["models", "train"]``."""
    if not _ROOT.is_dir():
        return []
    return sorted(folder.name for folder in _ROOT.iterdir() if folder.is_dir() and any(folder.glob("*.yaml")))


def names(kind: str) -> list[str]:
    """Names of the presets of a kind, without suffix; empty for a kind that does not exist."""
    return sorted(path.stem for path in (_ROOT / kind).glob("*" + _SUFFIX))


def find(kind: str, name: str | Path) -> Path:
    """Path of a preset, or of a YAML file given by its path.

    Args:
        kind: folder under ``configs/``: ``"models"``, ``"train"``, ...
        name: a preset's name (``"spikegpt-46m"``), or the path of a file; what ends in ``.yaml`` or
            ``.yml`` or contains a separator is taken for a path.

    Returns:
        The path of an existing file.

    Raises:
        ConfigError: there is no such preset or file; the message lists the known names.
    """
    path = Path(name)
    if path.suffix in {_SUFFIX, ".yml"} or len(path.parts) > 1:
        if path.is_file():
            return path
        raise ConfigError(f"{path} is not a file; known presets of configs/{kind}: {_listing(kind)}")
    preset = _ROOT / kind / f"{name}{_SUFFIX}"
    if str(name) not in names(kind):
        raise ConfigError(
            nearest(f"{kind} preset", str(name), names(kind)) + " (or give the path of a .yaml file)"
        )
    return preset


def _listing(kind: str) -> str:
    return ", ".join(names(kind)) or "none"
