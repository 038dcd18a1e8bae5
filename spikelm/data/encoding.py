"""Documents to tokens, in the order of the documents, in this process or in several.

Long documents are cut where the tokens cannot change and short ones are put together, so every worker always
has about the same to do. Cutting and order do not depend on the number of workers; so neither do the tokens.

Processes, not threads: the ``tokenizers`` library is parallel only inside one call, and turning its results
into arrays holds Python's lock, so that one process hardly gains from a second core
(``benchmarks/tokenise.py``).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from spikelm.data.plain_text import split_lines, utf8
from spikelm.data.worker import WorkerPool, encode_parts
from spikelm.errors import ConfigError, DataError
from spikelm.tokenizer import TokenArray, Tokenizer

IN_PROCESS_BYTES = 8 << 20
"""Text that is encoded before worker processes are started: less is done sooner without them."""
_BATCH_BYTES = 1 << 19
_AHEAD = 3  # batches per worker that are read ahead


class Part(NamedTuple):
    """A document, or a part of one.

    Attributes:
        tokens: its ids.
        num_bytes: its UTF-8 bytes.
        last: whether the document ends with it.
    """

    tokens: TokenArray
    num_bytes: int
    last: bool


@dataclass(kw_only=True)
class _Batch:
    texts: list[bytes] = field(default_factory=list)
    last: list[bool] = field(default_factory=list)
    size: int = 0

    def parts(self, arrays: list[TokenArray]) -> Iterator[Part]:
        for text, last, tokens in zip(self.texts, self.last, arrays, strict=True):
            yield Part(tokens, len(text), last)


def resolve_workers(workers: int) -> int:
    """Number of processes: ``workers``, or one for every core this process may use where it is 0.

    Raises:
        ConfigError: it is no number of processes.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ConfigError(f"workers is {workers!r}; expected 0 (all cores) or a positive number")
    return workers or len(os.sched_getaffinity(0))


def encode_documents(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    name: str,
    workers: int = 0,
    first: int = 0,
) -> Iterator[Part]:
    """Tokens of all documents, part by part; the same parts for any number of workers.

    Args:
        documents: texts.
        tokenizer: how to encode them; special tokens in the text are not recognised.
        name: what to call the source in messages.
        workers: processes, 0 for one per core. The byte tokenizer, which is faster than a pipe, uses none.
        first: number of the first document, for messages.

    Raises:
        DataError: a text is not Unicode, or a worker died.
    """
    count = 1 if tokenizer.is_bytes else resolve_workers(workers)
    pool: WorkerPool | None = None
    waiting: deque[tuple[_Batch, Future[list[TokenArray]]]] = deque()
    done = 0
    failure: DataError | None = None
    try:
        batches = _batches(documents, tokenizer, name, first)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except DataError as error:
                failure = error  # told once all before it is done, so that a later run can go on from there
                break
            if count > 1 and pool is None and done >= IN_PROCESS_BYTES:
                pool = WorkerPool(tokenizer, count)
            done += batch.size
            if pool is None:
                yield from batch.parts(encode_parts(tokenizer, batch.texts))
                continue
            waiting.append((batch, pool.submit(batch.texts)))
            while len(waiting) > _AHEAD * count or (waiting and waiting[0][1].done()):
                earliest, future = waiting.popleft()
                yield from earliest.parts(future.result())
        for earliest, future in waiting:
            yield from earliest.parts(future.result())
        if failure is not None:
            raise failure
    finally:
        if pool is not None:
            pool.close()


def _batches(documents: Iterable[str], tokenizer: Tokenizer, name: str, first: int) -> Iterator[_Batch]:
    """Batches of parts; where the documents end with an error, it comes after all before it."""
    batch = _Batch()
    cut = tokenizer.is_bytes or tokenizer.splits_at_lines
    try:
        for number, text in enumerate(documents, first):
            parts = list(split_lines(text)) if cut else [text]
            encoded = [_utf8(part, name, number) for part in parts]
            for i, data in enumerate(encoded):
                batch.texts.append(data)
                batch.last.append(i == len(encoded) - 1)
                batch.size += len(data)
                if batch.size >= _BATCH_BYTES:
                    yield batch
                    batch = _Batch()
    except DataError:
        if batch.texts:
            yield batch
        raise
    if batch.texts:
        yield batch


def _utf8(text: str, name: str, number: int) -> bytes:
    try:
        return utf8(text)
    except DataError as error:
        raise DataError(f"{name}, document {number}: {error}") from error
