"""Tokenising in several processes: the same bytes for any number, kills, workers that die, two at once."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from spikelm.data import encoding, open_source
from spikelm.data.lock import local_lock, locked
from spikelm.data.source import Source
from spikelm.data.store import TokenStore, tokenise
from spikelm.data.worker import WorkerPool, pack, unpack
from spikelm.errors import ConfigError, DataError
from spikelm.tokenizer import Tokenizer

WORDS = "the quick brown fox jumps over a lazy dog 日本 naïve <|endoftext|> 12345 ...".split(" ")
BPE = Tokenizer.train_bpe([" ".join(WORDS) * 50], 300)

# Tokenises argv[1] into the cache argv[2] with argv[3] workers, which start at once.
SCRIPT = """
import sys
from pathlib import Path
from spikelm.data import encoding, open_source
from spikelm.data.store import tokenise
from spikelm.tokenizer import Tokenizer
encoding.IN_PROCESS_BYTES, encoding._BATCH_BYTES = 0, 20_000
source, cache, workers, tokenizer = sys.argv[1:]
class Counted(type(open_source(source))):
    def documents(self):
        print("reading", flush=True)
        yield from super().documents()
opened = open_source(source)
opened.__class__ = Counted
store = tokenise(opened, Tokenizer.load(tokenizer), Path(cache), workers=int(workers), shard_tokens=20_000)
print("done", store.index.num_tokens, flush=True)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of documents, short, empty and long, and a tokenizer beside it."""
    root = tmp_path_factory.mktemp("text")
    chance = random.Random(0)
    (root / "docs").mkdir()
    for i in range(60):
        count = 0 if i % 10 == 3 else 30_000 if i % 20 == 5 else chance.randrange(1, 800)
        lines = [" ".join(chance.choices(WORDS, k=8)) for _ in range(count // 8)]
        (root / "docs" / f"{i:03}.txt").write_text("\n".join(lines), encoding="utf-8")
    BPE.save(root / "tokenizer")
    return root


@pytest.fixture(scope="module")
def expected(text: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    cache = tmp_path_factory.mktemp("expected")
    return tokenise(open_source(text / "docs"), BPE, cache, workers=1, shard_tokens=20_000)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def start(text: Path, cache: Path, workers: int) -> subprocess.Popen[str]:
    words = [
        sys.executable,
        "-c",
        SCRIPT,
        str(text / "docs"),
        str(cache),
        str(workers),
        str(text / "tokenizer"),
    ]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "IN_PROCESS_BYTES", 100_000)
    monkeypatch.setattr(encoding, "_BATCH_BYTES", 20_000)


@pytest.mark.usefixtures("small_batches")
def test_any_number_of_workers_writes_the_same_bytes(
    text: Path, expected: TokenStore, tmp_path: Path
) -> None:
    done: list[int] = []
    store = tokenise(open_source(text / "docs"), BPE, tmp_path, done.append, workers=3, shard_tokens=20_000)
    assert len(store.index.shards) > 5 and files_of(store.path) == files_of(expected.path)
    assert done == sorted(done) and done[-1] == store.index.num_bytes
    texts = list(open_source(text / "docs").documents())
    whole = np.asarray(store.tokens)
    for i, begin in enumerate(store.starts):
        end = store.starts[i + 1] if i + 1 < len(store.starts) else len(whole)
        assert whole[begin:end].tolist() == [*BPE.encode(texts[i], parse_special=False), BPE.eos_id]


@pytest.mark.usefixtures("small_batches")
def test_a_worker_that_is_killed_is_one_sentence(
    text: Path, expected: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[WorkerPool] = []
    pids: list[int] = []

    class Watched(WorkerPool):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            pools.append(self)
            pids.extend(self.pids)

    monkeypatch.setattr(encoding, "WorkerPool", Watched)
    source = open_source(text / "docs")

    def kill(done: int) -> None:
        if pools:
            os.kill(pools.pop().pids[1], signal.SIGKILL)

    with pytest.raises(
        DataError, match=r"worker process \d+ was killed by signal SIGKILL.*same command"
    ) as caught:
        tokenise(source, BPE, tmp_path, kill, workers=2, shard_tokens=20_000)
    assert "\n" not in str(caught.value)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    (folder,) = tmp_path.iterdir()
    assert (folder / "00001").is_dir() and not (folder / "index.json").exists()
    store = tokenise(source, BPE, tmp_path, workers=2, shard_tokens=20_000)
    assert files_of(store.path) == files_of(expected.path)


SHARDS = "*/" + "[0-9]" * 5
"""Finished shards; one that is being written has a longer name and goes when it is continued."""


def test_a_kill_at_any_moment_is_continued(text: Path, expected: TokenStore, tmp_path: Path) -> None:
    chance, count, killed = random.Random(1), 0, 0
    for _ in range(4):
        process = start(text, tmp_path, 2)
        before, deadline = count, time.monotonic() + 60
        while count == before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
            count = len(list(tmp_path.glob(SHARDS)))
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        _, err = process.communicate(timeout=60)
        assert not err, err
        if list(tmp_path.glob("*/index.json")):  # a quick machine came to the end before the kill
            break
        killed += 1
        count = len(list(tmp_path.glob(SHARDS)))
        assert count > before
        if count == len(expected.index.shards):  # only the index is missing: the last shard is made again
            break
    assert killed >= 1 and count >= killed
    process = start(text, tmp_path, 1)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and not err, err
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert files_of(folder) == files_of(expected.path)


def test_processes_that_start_together_share_the_work(
    text: Path, expected: TokenStore, tmp_path: Path
) -> None:
    processes = [start(text, tmp_path, 1) for _ in range(3)]
    outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert sum("reading" in out for out, _ in outputs) == 1
    assert all(f"done {expected.index.num_tokens}" in out for out, _ in outputs)
    (folder,) = tmp_path.iterdir()
    assert files_of(folder) == files_of(expected.path)


def test_threads_that_start_together_share_the_work(tmp_path: Path) -> None:
    reads = []

    class Slow(Source):
        def _documents(self):
            reads.append(1)
            time.sleep(0.2)
            yield "abc"

        def fingerprint(self) -> str:
            return "slow"

    threads = [threading.Thread(target=tokenise, args=(Slow("slow"), BPE, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_lock_is_told_when_it_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("spikelm.data.lock._SILENT", 0.05)
    entered = threading.Event()

    def wait() -> None:
        with locked(tmp_path / "store", "tokenising a.txt"):
            entered.set()

    with caplog.at_level(logging.WARNING, "spikelm.data.lock"):
        with locked(tmp_path / "store", "tokenising a.txt"):
            thread = threading.Thread(target=wait)
            thread.start()
            assert not entered.wait(0.4)
        thread.join()
    assert entered.is_set() and list(tmp_path.iterdir()) == []
    (record,) = caplog.records
    assert f"waiting for process {os.getpid()} on" in record.message and "tokenising a.txt" in record.message


def test_file_systems_without_locks_take_one_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock

    def flock(handle: int, how: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").startswith(str(tmp_path)):
            raise OSError(errno.ENOLCK, "No locks available")
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "store", "work"):
        assert local_lock(tmp_path / "store").exists()
    assert not local_lock(tmp_path / "store").exists()


def test_workers_end_with_the_process_that_started_them() -> None:
    code = """
import time
from spikelm.data.worker import WorkerPool
from spikelm.tokenizer import Tokenizer
pool = WorkerPool(Tokenizer.bytes(), 2)
assert pool.submit([b"ab"]).result()[0].tolist() == [97, 98]
print(*pool.pids, flush=True)
time.sleep(100)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    process.kill()
    process.communicate()
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(
        Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in pids
    ):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def test_a_worker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spikelm.data.worker._START", "raise RuntimeError('no such thing')")
    pool = WorkerPool(BPE, 1)
    with pytest.raises(
        DataError, match=r"ended with code 1 while tokenising \(RuntimeError: no such thing\)"
    ):
        pool.submit([b"text"]).result()
    pool.close()


@pytest.mark.usefixtures("small_batches")
def test_text_that_is_not_unicode_names_its_document(tmp_path: Path) -> None:
    class Bad(Source):
        def _documents(self):
            yield "abc"
            yield "de\ud800"

        def fingerprint(self) -> str:
            return "bad"

    with pytest.raises(DataError, match=r"bad, document 1: character 2 of the text is a lone surrogate"):
        tokenise(Bad("bad"), BPE, tmp_path)


@pytest.mark.parametrize("workers", [-1, True, 1.5])
def test_numbers_of_workers_that_are_none(workers: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workers is"):
        encoding.resolve_workers(workers)  # type: ignore[arg-type]
    assert encoding.resolve_workers(0) >= 1


def test_messages_are_given_back() -> None:
    for items in ([], [b""], [b"a", b"", b"bcd" * 1000]):
        assert [bytes(item) for item in unpack(pack(items))] == items
