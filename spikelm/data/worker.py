"""Worker processes that turn text into tokens.

A worker is a fresh Python that reads requests on standard input and answers on standard output, so it needs
nothing of the program that started it (no guard around its main module, no threads copied in the middle of
their work), and it ends by itself when that program does: its input is then at its end.

A message is its length (uint64) and its bytes. The first is the tokenizer as JSON. A request holds texts and
its answer arrays: how many (uint64), their lengths in bytes (uint64 each), and the bytes. An answer begins
with ``+``, or with ``-`` and the text of an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

import numpy as np

from spikelm.errors import DataError
from spikelm.tokenizer import TokenArray, Tokenizer

_START = "import sys; from spikelm.data.worker import main; sys.exit(main())"


def encode_parts(tokenizer: Tokenizer, texts: Sequence[bytes]) -> list[TokenArray]:
    """Tokens of texts (UTF-8) that are not cut any further; special tokens are not recognised."""
    if tokenizer.is_bytes:
        return [np.frombuffer(text, dtype=np.uint8).astype(tokenizer.dtype) for text in texts]
    words = [text.decode("utf-8") for text in texts]
    encoded = tokenizer.encode_batch(words, parse_special=False)
    return [np.array(ids, dtype=tokenizer.dtype) for ids in encoded]


class WorkerPool:
    """``count`` worker processes, each fed by a thread of its own.

    Args:
        tokenizer: what they encode with.
        count: how many.
    """

    def __init__(self, tokenizer: Tokenizer, count: int) -> None:
        self.count = count
        self._dtype = tokenizer.dtype
        # What workers say before they fail; in a file, because nobody reads a pipe while they work.
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="tokenise")
        first = json.dumps(tokenizer.spec).encode("ascii")
        try:
            for _ in range(count):
                self._workers.append(_Worker(first, self._said))
                self._idle.put(self._workers[-1])
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, texts: Sequence[bytes]) -> Future[list[TokenArray]]:
        """Tokens of the texts (see :func:`encode_parts`), once a worker has made them.

        The future raises :class:`DataError` where the worker refused a text or died.
        """
        return self._threads.submit(self._encode, texts)

    def _encode(self, texts: Sequence[bytes]) -> list[TokenArray]:
        worker = self._idle.get()
        try:
            answer = worker.ask(pack(texts))
        finally:
            self._idle.put(worker)
        return [np.frombuffer(item, dtype=self._dtype) for item in unpack(answer)]

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for worker in self._workers:
            worker.process.kill()  # a thread that waits for its answer sees the end of the pipe
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._said.close()


class _Worker:
    def __init__(self, tokenizer: bytes, said: IO[bytes]) -> None:
        self._first: bytes | None = tokenizer
        self._said = said
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if "\0" not in path)
        # One thread each: there are as many workers as cores.
        threads = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=os.environ | threads | {"PYTHONPATH": paths},
        )

    def ask(self, request: bytes) -> bytes:
        """Send a request and wait for the answer."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            if self._first is not None:
                send(stdin, self._first)
                self._first = None
            send(stdin, request)
            answer = receive(stdout)
        except (OSError, ValueError):  # ValueError: the pool closed it
            answer = None
        if answer is None:
            raise DataError(self._obituary())
        if answer[:1] != b"+":
            raise DataError(answer[1:].decode("utf-8", errors="replace"))
        return answer[1:]

    def _obituary(self) -> str:
        code = self.process.wait()
        how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        self._said.seek(0)
        lines = self._said.read().decode("utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        hint = "; is the memory full?" if code == -signal.SIGKILL else ""
        return (
            f"worker process {self.process.pid} {how} while tokenising{hint}{f' ({last})' if last else ''}; "
            "give the same command again to go on after the last whole shard"
        )

    def close(self) -> None:
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was not yet sent
                    stream.close()


def pack(items: Sequence[bytes]) -> bytes:
    """Several byte strings as one; :func:`unpack` gives them back."""
    sizes = np.array([len(items), *map(len, items)], dtype="<u8")
    return b"".join([sizes.tobytes(), *items])


def unpack(message: bytes) -> list[memoryview]:
    """The byte strings that :func:`pack` joined."""
    count = int(np.frombuffer(message, "<u8", 1)[0])
    sizes = np.frombuffer(message, "<u8", count, 8)
    ends = 8 * (count + 1) + np.cumsum(sizes, dtype=np.int64)
    view = memoryview(message)
    return [view[int(end) - int(size) : int(end)] for size, end in zip(sizes, ends, strict=True)]


def send(stream: IO[bytes], message: bytes) -> None:
    """Write one message."""
    stream.write(len(message).to_bytes(8, "little"))
    stream.write(message)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes | None:
    """Read one message; None where the stream ends."""
    size = stream.read(8)
    if len(size) < 8:
        return None
    message = stream.read(int.from_bytes(size, "little"))
    return message if len(message) == int.from_bytes(size, "little") else None


def main() -> int:
    """Serve requests until the input ends."""
    # Ctrl-C reaches every process of the terminal; the one that started this one decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library may print must not be taken for an answer
    specification = receive(requests)
    if specification is None:
        return 0
    tokenizer = Tokenizer(json.loads(specification))
    while (request := receive(requests)) is not None:
        try:
            texts: list[Any] = [bytes(text) for text in unpack(request)]
            answer = b"+" + pack([ids.tobytes() for ids in encode_parts(tokenizer, texts)])
        except DataError as error:
            answer = b"-" + str(error).encode("utf-8", errors="replace")
        except Exception as error:  # whatever the library raises: told by the process that was asked
            answer = b"-" + f"the tokenizer failed: {type(error).__name__}: {error}".encode(errors="replace")
        try:
            send(answers, answer)
        except BrokenPipeError:
            return 0
    return 0
