"""Names of parts: neurons, mixers, channels, spike codings.

A part registers itself under the name that configurations use. Other packages add theirs through the entry
point groups ``spikelm.neurons``, ``spikelm.mixers``, ``spikelm.channels`` and ``spikelm.codings``; they
are imported when a name is first asked for that this package does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from spikelm.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Mapping from a name to a part class or function.

    Args:
        kind: singular noun used in messages and, with an ``s``, in the entry point group.
        package: package that is imported before the first look-up, so that its parts are registered.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files a part under ``name``; a name can be taken once."""

        def add(entry: T) -> T:
            if name in self._entries and self._entries[name] is not entry:
                raise ConfigError(f"the {self.kind} name {name!r} is taken; choose another one")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The entry called ``name``.

        Raises:
            ConfigError: if neither this package nor an installed entry point has it.
        """
        import_module(self._package)
        if name not in self._entries:
            for point in entry_points(group=f"spikelm.{self.kind}s", name=name):
                self._entries[name] = point.load()
        if name not in self._entries:
            raise ConfigError(nearest(self.kind, name, self.names()))
        return self._entries[name]

    def names(self) -> list[str]:
        """All known names, sorted, those of entry points included."""
        import_module(self._package)
        points = {point.name for point in entry_points(group=f"spikelm.{self.kind}s")}
        return sorted(points | set(self._entries))


neurons: Registry[type[Any]] = Registry("neuron", "spikelm.neurons")
mixers: Registry[type[Any]] = Registry("mixer", "spikelm.mixers")
channels: Registry[type[Any]] = Registry("channel", "spikelm.channels")
codings: Registry[type[Any]] = Registry("coding", "spikelm.codings")
