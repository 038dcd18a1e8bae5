"""Real text that needs no download: the documentation every Python installation carries.

The language reference of :mod:`pydoc` (one document per topic) and the docstrings of the standard library
(one document per module: headings with signatures, then the docstrings in the order of the source). Modules
are parsed, never imported, so nothing runs and the text is the same on every machine with the same Python.
About 2.3 MB with Python 3.11.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from spikelm.data.source import Source
from spikelm.errors import DataError

# Folders whose docstrings are no documentation of the library, or that belong to other packages.
LEFT_OUT = frozenset(
    {"test", "tests", "idlelib", "site-packages", "dist-packages", "turtledemo", "_bundled", "__pycache__"}
)
_FORMAT = 1  # change when the text made from the same Python changes
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class PythonDocs(Source):
    """Language reference and library docstrings of the Python that runs.

    Args:
        root: folder of the standard library; that of this Python unless given.
    """

    kind = "documentation of this Python"

    def __init__(self, root: Path | None = None) -> None:
        super().__init__("builtin:python-docs")
        self._root = root or Path(sysconfig.get_path("stdlib"))

    def _documents(self) -> Iterator[str]:
        documents = _all_documents(str(self._root))
        if not documents:
            raise DataError(
                f"{self.name}: this Python carries no library sources in {self._root}; give a file or folder"
            )
        yield from documents

    def fingerprint(self) -> str:
        """Version of Python and the names and sizes of the library's files."""
        listing = "\n".join(f"{name}:{path.stat().st_size}" for name, path in _modules(self._root))
        digest = hashlib.sha256(listing.encode("utf-8", errors="surrogateescape")).hexdigest()
        return f"python-docs:{_FORMAT}:{sys.version}:{digest}"


@functools.lru_cache(maxsize=1)  # parsing takes seconds, and a run opens both #train and #valid
def _all_documents(root: str) -> tuple[str, ...]:
    return tuple(_topics(Path(root))) + tuple(
        text for name, path in _modules(Path(root)) if (text := _module_text(name, path))
    )


def _topics(root: Path) -> Iterator[str]:
    """Topics of the language reference, in alphabetical order."""
    path = root / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Dict):
            table: dict[str, str] = ast.literal_eval(node)
            for name in sorted(table):
                yield f"{name}\n\n{table[name].strip()}\n"
            return


def _modules(root: Path) -> list[tuple[str, Path]]:
    """Dotted name and file of every module of the standard library, sorted by name."""
    found = []
    for where, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name.isidentifier() and name not in LEFT_OUT]
        for file in names:
            if file.endswith(".py") and file.removesuffix(".py").isidentifier():
                parts = (Path(where) / file).relative_to(root).with_suffix("").parts
                found.append((".".join(parts).removesuffix(".__init__"), Path(where) / file))
    return sorted(found)


def _module_text(name: str, path: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # lib2to3 and the like carry files for other versions of Python
        return ""
    own = ast.get_docstring(tree)
    sections = [f"{name}\n\n{own}"] if own else []
    sections += _sections(name, tree.body)
    return "\n\n\n".join(section.strip() for section in sections) + "\n" if sections else ""


def _sections(prefix: str, body: list[ast.stmt]) -> Iterator[str]:
    """Heading and docstring of every documented class and function, outermost first."""
    for node in body:
        if isinstance(node, _Definition):
            docstring = ast.get_docstring(node, clean=False)
            if docstring and docstring.strip():
                yield f"{_heading(prefix, node)}\n\n{inspect.cleandoc(docstring)}"
            if isinstance(node, ast.ClassDef):
                yield from _sections(f"{prefix}.{node.name}", node.body)
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _sections(prefix, node.body)


def _heading(prefix: str, node: _Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {prefix}.{node.name}" + (f"({bases})" if bases else "")
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{word} {prefix}.{node.name}({ast.unparse(node.args)}){result}"
