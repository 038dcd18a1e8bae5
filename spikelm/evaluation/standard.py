"""Standard test sets by name, read from a local copy or through ``datasets``.

| ``--data`` | documents | beside bits per byte |
| --- | --- | --- |
| ``wikitext-2``, ``wikitext-103`` (``#test``, ``#valid``) | pages, detokenised | perplexity per word, byte |
| ``enwik8`` (``#train``, ``#valid``, ``#test``) | its last 5 MB (90, 5, 5) | bits per character |
| ``lambada`` | passages; the last word is scored | accuracy and perplexity of the word |
| ``pg19``, ``books:PATH`` | books, one per file of a folder | bits per byte of every book |

Anything else is a source as :mod:`spikelm.data.source` has it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from spikelm.data.compressed import COMPRESSED_SUFFIXES, decode_utf8, read_bytes
from spikelm.data.source import Source, open_source
from spikelm.errors import ConfigError, DataError
from spikelm.evaluation import enwik8, wikitext

BOOKS = "books:"
_MARK = "\ufeff"


@dataclass(frozen=True, kw_only=True)
class StandardSet:
    """Where a set may lie.

    Args:
        kind: what is done with it: ``wikitext``, ``enwik8``, ``lambada`` or ``books``.
        splits: split -> its name on the Hub; the first is read where none is named.
        files: patterns below the data folder, ``{split}`` standing for the split.
        hub: source of the Hub, with ``{split}``; empty where there is none.
        advice: where to get the files by hand.
    """

    kind: str
    splits: dict[str, str]
    files: tuple[str, ...]
    hub: str = ""
    advice: str = ""


SETS: dict[str, StandardSet] = {
    **{
        f"wikitext-{size}": StandardSet(
            kind="wikitext",
            splits={"test": "test", "valid": "validation"},
            files=(f"wikitext-{size}-raw*/wiki.{{split}}.raw",),
            hub=f"hub:Salesforce/wikitext:wikitext-{size}-raw-v1#{{split}}.text",
            advice=f"wiki.{{split}}.raw of wikitext-{size}-raw-v1.zip",
        )
        for size in (2, 103)
    },
    "enwik8": StandardSet(
        kind="enwik8",
        splits={"test": "test", "valid": "valid", "train": "train"},
        files=("enwik8",),
        advice="enwik8 of mattmahoney.net/dc/enwik8.zip",
    ),
    "lambada": StandardSet(
        kind="lambada",
        splits={"test": "test"},
        files=("lambada_openai.jsonl", "lambada_test.jsonl"),
        hub="hub:EleutherAI/lambada_openai:default#{split}.text",
        advice="lambada_test.jsonl (one passage a line, field text)",
    ),
    "pg19": StandardSet(
        kind="books",
        splits={"test": "test", "valid": "validation"},
        files=("pg19/{split}",),
        hub="hub:emozilla/pg19#{split}.text",
        advice="the books of PG-19 as pg19/{split}/*.txt",
    ),
}


class Listed(Source):
    """Documents that are in memory already."""

    def __init__(self, name: str, kind: str, documents: Sequence[str]) -> None:
        super().__init__(name)
        self.kind, self._texts = kind, documents

    def _documents(self) -> Iterator[str]:
        yield from self._texts

    def fingerprint(self) -> str:
        """Not cached: text to be measured is read once."""
        raise DataError(f"{self.name} is text for a measurement and is not kept as tokens")


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is measured, and what else is known of it.

    Args:
        source: its documents.
        kind: ``text``, or as :class:`StandardSet` has it.
        limit: bytes at which reading stops, or None; None where documents were left out already.
        words: words of the original pages (``wikitext``), else None.
        bytes: bytes of the original pages (``wikitext``), else None.
        names: names of the documents (``books``), else None.
        prompts: characters of each document that are only read (``lambada``), else None.
    """

    source: Source
    kind: str = "text"
    limit: int | None = None
    words: int | None = None
    bytes: int | None = None
    names: tuple[str, ...] | None = None
    prompts: tuple[int, ...] | None = None


def open_text(spec: str, *, data_dir: str | None = None, max_bytes: int | None = None) -> Text:
    """The text that ``--data`` names.

    Args:
        spec: a name of the table above, or a source.
        data_dir: folder (or file) of the standard sets; the folder of SPIKELM_DATA, else this one, if None.
        max_bytes: read this much at most; of pages and passages whole ones, at least one.

    Raises:
        ConfigError: ``max_bytes`` is not positive.
        DataError: the set is not here and cannot be fetched, has no such split, or is damaged.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(f"max-bytes is {max_bytes}; expected a positive number")
    if spec.startswith(BOOKS):
        return _books(spec, Path(spec.removeprefix(BOOKS)), max_bytes)
    name, _, split = spec.partition("#")
    if name not in SETS:
        _refuse_unknown(spec)
        return Text(source=open_source(spec), limit=max_bytes)
    known = SETS[name]
    split = split or next(iter(known.splits))
    if split not in known.splits:
        raise DataError(f"{name} has no split {split!r}; expected one of {', '.join(known.splits)}")
    found = find(known, split, data_dir)
    if found is None and not known.hub:
        raise DataError(_absent(name, split, ""))
    if known.kind == "enwik8":
        assert found is not None  # it is on no hub
        return Text(
            source=Listed(spec, "enwik8", [enwik8.read(found, split)]), kind="enwik8", limit=max_bytes
        )
    if known.kind == "books" and found is not None:
        return _books(spec, found, max_bytes)
    rows = _rows(name, split) if found is None else None
    if known.kind == "wikitext":
        # The Hub's copy has the blank lines (one space) as empty rows.
        text = "".join(row or " \n" for row in rows) if rows is not None else _read(found)
        return _wikitext(spec, text, max_bytes)
    if known.kind == "lambada":
        return _lambada(spec, rows if rows is not None else _passages(found), max_bytes)
    books = rows or []
    return Text(
        source=Listed(spec, "books", books),
        kind="books",
        limit=max_bytes,
        names=tuple(f"book {index + 1}" for index in range(len(books))),
    )


def find(known: StandardSet, split: str, data_dir: str | None) -> Path | None:
    """The local copy of a set, also compressed: in the data folder or up to two folders below it."""
    root = Path(data_dir or os.environ.get("SPIKELM_DATA") or ".")
    if root.is_file():
        return root
    for pattern in known.files:
        named = pattern.format(split=split)
        for place in (named, *([named.rpartition("/")[2]] if data_dir else []), f"*/{named}", f"*/*/{named}"):
            for suffix in ("", *COMPRESSED_SUFFIXES):
                for path in sorted(root.glob(place + suffix)):
                    return path
    return None


def _absent(name: str, split: str, reason: str) -> str:
    known = SETS[name]
    advice = known.advice.format(split=split)
    network = f"; it cannot be fetched either ({reason})" if reason else ""
    return (
        f"{name} is not here; put {advice} (also as .xz, .gz or .zst) into a folder and name that with "
        f"--data-dir{network}"
    )


def _rows(name: str, split: str) -> list[str]:
    """The set through ``datasets``, which has a cache of its own."""
    known = SETS[name]
    source = open_source(known.hub.format(split=known.splits[split]))
    try:
        return list(source._documents())  # with the empty ones, which documents() leaves out
    except DataError as error:
        reason = str(error).removeprefix(f"{source.name}: ").partition(" (")[0]
        raise DataError(_absent(name, split, reason)) from error


def _read(path: Path | None) -> str:
    assert path is not None  # the caller has either a file or rows
    return decode_utf8(read_bytes(path), str(path))


def _wikitext(spec: str, text: str, max_bytes: int | None) -> Text:
    pages = list(_whole(wikitext.pages(text), max_bytes))
    if not pages:
        raise DataError(f"{spec} has no page; expected headings of the form ' = Title = '")
    return Text(
        source=Listed(spec, "WikiText pages", [wikitext.detokenised(page) for page in pages]),
        kind="wikitext",
        words=sum(wikitext.words(page) for page in pages),
        bytes=sum(len(page.encode("utf-8")) for page in pages),
    )


def _lambada(spec: str, passages: list[str], max_bytes: int | None) -> Text:
    kept = list(_whole(passages, max_bytes))
    prompts = []
    for number, passage in enumerate(kept):
        prompt, _, word = passage.rpartition(" ")
        if not prompt or not word:
            raise DataError(f"{spec}: passage {number} has no last word after a space: {passage[:40]!r}")
        prompts.append(len(prompt))
    if not kept:
        raise DataError(f"{spec} holds no passage; give a file with one passage a line")
    return Text(source=Listed(spec, "LAMBADA", kept), kind="lambada", prompts=tuple(prompts))


def _passages(path: Path | None) -> list[str]:
    """Lines {"text": whole passage}, or {"context": ..., "continuation": last word}."""
    found = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append(row["text"] if "text" in row else f"{row['context']} {row['continuation'].strip()}")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number} is no passage; expected JSON with 'text', or 'context' and "
                "'continuation'"
            ) from error
    return found


def _books(spec: str, path: Path, max_bytes: int | None) -> Text:
    """One book per text file of a folder; a file that holds several has a byte-order mark before each."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and ".txt" in p.suffixes)
        if not files:
            raise DataError(f"{spec}: folder {path} holds no .txt file (also .xz, .gz, .zst); expected books")
    else:
        files = [path]
    books: list[str] = []
    names: list[str] = []
    for file in files:
        name = file.name.partition(".")[0]
        parts = [part for part in _read(file).split(_MARK) if part.strip()]
        books += parts
        names += (
            [name] if len(parts) == 1 else [_title(part, name, n) for n, part in enumerate(parts, start=1)]
        )
    if not books:
        raise DataError(f"{spec} holds no text; expected at least one book")
    return Text(source=Listed(spec, "books", books), kind="books", limit=max_bytes, names=tuple(names))


def _title(book: str, name: str, number: int) -> str:
    """The first line of a book that has words, shortened."""
    line = next((line.strip() for line in book.splitlines() if line.strip()), "")
    return f"{name} {number}: {line[:40]}"


def _whole(documents: Sequence[str] | Iterator[str], max_bytes: int | None) -> Iterator[str]:
    """Documents until the next one would go beyond the limit; the first one in any case."""
    total = 0
    for text in documents:
        size = len(text.encode("utf-8"))
        if max_bytes is not None and total and total + size > max_bytes:
            return
        total += size
        yield text


def _refuse_unknown(spec: str) -> None:
    """Name the standard set that a word may have meant; everything that looks like a place is let through."""
    name = spec.partition("#")[0]
    if Path(name).exists() or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        return
    close = difflib.get_close_matches(name.lower(), SETS, n=1, cutoff=0.4)
    hint = f" did you mean {close[0]!r}?" if close else ""
    raise DataError(
        f"there is no file, folder or standard set {name!r};{hint} known sets: {', '.join(SETS)}, books:PATH"
    )
