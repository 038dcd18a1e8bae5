"""Documents to blocks on the way: a thread tokenises and cuts, ahead of who asks for the blocks.

The blocks of a pass over a source are those that :class:`~spikelm.data.blocks.TokenBlocks` cuts from its
store. They come in chunks of :data:`CHUNK`; with each comes the place in the source where the next one
begins, from which a later reader goes on without tokenising what lies before.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from spikelm.data.encoding import Part, encode_documents
from spikelm.data.source import Source
from spikelm.errors import DataError
from spikelm.tokenizer import TokenArray, Tokenizer

CHUNK = 64
"""Blocks that are handed over at once."""
_AHEAD = 4  # chunks that wait to be asked for
_POLL = 0.1  # seconds in which a reader that is closed notices it


@dataclass(frozen=True, kw_only=True)
class Place:
    """The first token of a block: ``offset`` tokens into document ``document`` of the source, from 0."""

    document: int = 0
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Blocks that follow one another in the text.

    Attributes:
        window: [m, T + 1], tokens and the one after them; m is less than CHUNK only at the end of a pass.
        begins: bool [m, T + 1], where a document begins.
        next: where the next chunk begins; None at the end of the pass.
    """

    window: TokenArray
    begins: npt.NDArray[np.bool_]
    next: Place | None


def chunks(
    source: Source, tokenizer: Tokenizer, length: int, start: Place, workers: int = 1
) -> Iterator[Chunk]:
    """The blocks from ``start`` to the end of one pass; the last chunk says so and may be empty.

    Raises:
        DataError: the source is damaged, empty, or ends before ``start``.
    """
    ending = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype=tokenizer.dtype)
    held: list[TokenArray] = []  # tokens of no block yet
    begins: list[tuple[int, int]] = []  # (position, document) of the documents that begin among them
    count, inside = 0, start  # tokens held; where the first of them stands
    need = CHUNK * length
    number, size, offset = start.document, 0, start.offset  # size: tokens of the document so far
    documents = itertools.islice(source.documents(), start.document, None)
    encoded = encode_documents(documents, tokenizer, name=source.name, workers=workers, first=start.document)
    with closing(cast("Generator[Part, None, None]", encoded)) as parts:
        for part in parts:
            for piece in (part.tokens, ending) if part.last else (part.tokens,):
                if not len(piece) or (piece is ending and not size):  # what gave no tokens is no document
                    continue
                if not size and not offset:
                    begins.append((count, number))
                rest = piece[max(0, offset - size) :]
                size += len(piece)
                held.append(rest)
                count += len(rest)
            if part.last:
                if offset and offset >= size:
                    raise _moved(source, start)
                number, size, offset = number + 1, 0, 0
            if count <= need:
                continue
            tokens = np.concatenate(held)
            while len(tokens) > need:
                place = _place(begins, need, inside)
                yield _cut(tokens[: need + 1], begins, length, CHUNK, place)
                begins = [(at - need, document) for at, document in begins if at >= need]
                tokens, inside = tokens[need:], place
            held, count = [tokens], len(tokens)
    if number == start.document and start != Place():
        raise _moved(source, start)
    tokens = np.concatenate(held) if held else np.empty(0, tokenizer.dtype)
    yield _cut(tokens, begins, length, max(0, (len(tokens) - 1) // length), None)


def _cut(
    tokens: TokenArray, begins: list[tuple[int, int]], length: int, blocks: int, following: Place | None
) -> Chunk:
    """The first ``blocks`` blocks of ``tokens``."""
    index = np.arange(blocks)[:, None] * length + np.arange(length + 1)
    flags = np.zeros(len(tokens), dtype=bool)
    flags[[at for at, _ in begins if at < len(tokens)]] = True
    return Chunk(window=tokens[index], begins=flags[index], next=following)


def _place(begins: list[tuple[int, int]], position: int, inside: Place) -> Place:
    """Document and offset of the token at ``position``; the held tokens begin at ``inside``."""
    before = [entry for entry in begins if entry[0] <= position]
    if not before:
        return Place(document=inside.document, offset=inside.offset + position)
    at, document = before[-1]
    return Place(document=document, offset=position - at)


def _moved(source: Source, start: Place) -> DataError:
    return DataError(
        f"{source.name} ends before token {start.offset} of document {start.document}, where reading was to "
        "go on; it is not the text that was read before"
    )


class Reader:
    """Chunks of one pass, made by a thread that is a few of them ahead.

    Args:
        source: documents.
        tokenizer: how to encode them.
        length: tokens T of a block.
        start: where to begin; the first block is the one that begins there.
        workers: processes that tokenise; 1 for none but this one.
    """

    def __init__(
        self, source: Source, tokenizer: Tokenizer, length: int, start: Place, workers: int = 1
    ) -> None:
        self._chunks: queue.Queue[Chunk | BaseException] = queue.Queue(maxsize=_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._run,
            args=(source, tokenizer, length, start, workers),
            name=f"read {source.name}",
            daemon=True,
        )
        self._thread.start()

    def next(self) -> Chunk:
        """The next chunk; what went wrong in the thread is raised here."""
        found = self._chunks.get()
        if isinstance(found, BaseException):
            self.close()
            raise found
        return found

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        with suppress(queue.Empty):
            while True:  # make room: the thread may be waiting for it
                self._chunks.get_nowait()
        self._thread.join()

    def _run(self, source: Source, tokenizer: Tokenizer, length: int, start: Place, workers: int) -> None:
        try:
            for chunk in chunks(source, tokenizer, length, start, workers):
                if not self._put(chunk):
                    return
        except BaseException as error:  # noqa: BLE001 (told to who asks for the next chunk)
            self._put(error)

    def _put(self, item: Chunk | BaseException) -> bool:
        while not self._closed.is_set():
            try:
                self._chunks.put(item, timeout=_POLL)
                return True
            except queue.Full:
                continue
        return False
