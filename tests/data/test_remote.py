"""URLs: memory:// through fsspec, and a real web server that breaks off, repeats, refuses and moves."""

from __future__ import annotations

import gzip
import http.server
import io
import json
import lzma
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spikelm.data import TokenBlocks, open_source, remote
from spikelm.errors import DataError
from spikelm.tokenizer import Tokenizer

TEXT = "Grüße, 日本.\r\nSecond line\n" * 40_000


def parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file)
    return file.getvalue()


def records(texts: list[str]) -> bytes:
    return "\n".join(json.dumps({"text": text}) for text in texts).encode()


def read(spec: str) -> list[str]:
    return list(open_source(spec).documents())


class Site(http.server.ThreadingHTTPServer):
    """A web server whose files break off after ``broken`` bytes; it gives ranges where ``ranges`` is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.broken, self.ranges, self.chunked, self.tag = 0, False, False, '"1"'
        self.requests: list[str] = []

    def handle_error(self, request: object, address: object) -> None:
        """A client that goes away early is no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Site

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:  # noqa: N802 (the library's name)
        self.do_GET()

    def do_GET(self) -> None:  # noqa: N802
        site, path = self.server, self.path.partition("?")[0]
        site.requests.append(self.command)
        if path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/a.txt")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if path not in site.files:
            self.send_error(403 if path == "/secret" else 404)
            return
        data, begin = site.files[path], 0
        asked = self.headers.get("Range")
        if asked and site.ranges and self.headers.get("If-Range") == site.tag:
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if begin else 200)
        self.send_header("ETag", site.tag)
        if site.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if self.command == "HEAD":
            return
        rest = data[begin : begin + site.broken] if site.broken else data[begin:]
        if site.chunked:
            self.wfile.write(
                f"{len(data) - begin:x}\r\n".encode() + rest + (b"" if site.broken else b"\r\n0\r\n\r\n")
            )
        else:
            self.wfile.write(rest)
        self.close_connection = True


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_files_of_every_kind(site: Site, tmp_path: Path) -> None:
    site.files = {
        "/a.txt": TEXT.encode(),
        "/a.txt.xz": lzma.compress(TEXT.encode()),
        "/a.jsonl.gz": gzip.compress(records(["one", "two"])),
        "/a.parquet": parquet(["one", "two"]),
    }
    assert read(f"{site.url}/a.txt") == read(f"{site.url}/a.txt.xz") == read(f"{site.url}/moved") == [TEXT]
    assert read(f"{site.url}/a.txt?download=true") == [TEXT]
    for name in ("a.jsonl.gz", "a.parquet", "a.parquet?x=y"):
        assert read(f"{site.url}/{name}") == read(f"{site.url}/{name}#text") == ["one", "two"]
    site.chunked = True
    assert read(f"{site.url}/a.txt") == [TEXT]
    blocks = TokenBlocks.build(f"{site.url}/a.txt", Tokenizer.bytes(), 16, tmp_path)
    site.requests.clear()
    again = TokenBlocks.build(f"{site.url}/a.txt", Tokenizer.bytes(), 16, tmp_path)
    assert again.num_tokens == blocks.num_tokens and site.requests == ["HEAD"]
    site.tag = '"2"'
    assert open_source(f"{site.url}/a.txt").fingerprint() != blocks.store.index.fingerprint
    TokenBlocks.build(f"{site.url}/a.txt", Tokenizer.bytes(), 16, tmp_path)
    assert "GET" in site.requests


def test_a_connection_that_breaks_is_taken_up_again(site: Site) -> None:
    site.files = {
        "/a.txt": TEXT.encode(),
        "/a.jsonl.gz": gzip.compress(records([str(i) for i in range(30_000)])),
    }
    site.broken, site.ranges = 200_000, True
    assert read(f"{site.url}/a.txt") == [TEXT]
    site.broken = 20_000
    assert len(read(f"{site.url}/a.jsonl.gz")) == 30_000 and len(site.requests) > 5


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.parquet"])
def test_a_file_that_is_cut_off_is_one_sentence(chunked: bool, name: str, site: Site) -> None:
    data = {
        "a.txt": TEXT.encode(),
        "a.txt.xz": lzma.compress(TEXT.encode()),
        "a.parquet": parquet(["a"] * 9),
    }[name]
    site.files, site.broken, site.chunked = {f"/{name}": data}, len(data) // 2, chunked
    # Of a chunk that is not complete, Python's client gives no part.
    where = r"\d+" if chunked else f"{len(data) // 2} of {len(data)}"
    with pytest.raises(DataError, match=f"/{name} is cut off at byte {where}: ") as caught:
        read(f"{site.url}/{name}")
    assert "\n" not in str(caught.value)


def test_a_file_that_changes_in_between_is_not_mixed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.files, site.broken, site.ranges = {"/a.txt": TEXT.encode()}, 100_000, True
    stream = remote.RemoteFile(f"{site.url}/a.txt").open()
    stream.read(10)
    site.tag = '"2"'
    with pytest.raises(DataError, match="the server gives no rest of a file"):
        stream.read()


def test_what_is_not_there_is_one_sentence(site: Site) -> None:
    for path, message in (
        ("a.txt", "there is no file .*/a.txt .the server answers 404"),
        ("secret", "the server answers 403"),
    ):
        for ask in (lambda source: list(source.documents()), lambda source: source.fingerprint()):
            with pytest.raises(DataError, match=message):
                ask(open_source(f"{site.url}/{path}"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.txt"
        with pytest.raises(DataError, match=f"{url} cannot be reached: Connection refused") as caught:
            read(url)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="web servers do not list their files"):
        open_source(f"{site.url}/*.txt")
    with pytest.raises(DataError, match="names a field"):
        open_source(f"{site.url}/a.txt#text")


def test_a_silent_server_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(DataError, match="timed out"):
        read(f"http://127.0.0.1:{silent.getsockname()[1]}/a.txt")


def test_files_in_memory() -> None:
    system = fsspec.filesystem("memory")
    system.pipe(
        {
            "/spikelm/a.txt": TEXT.encode(),
            "/spikelm/a.txt.gz": gzip.compress(TEXT.encode()),
            "/spikelm/b1.jsonl": records(["one"]),
            "/spikelm/b0.jsonl": records(["zero"]),
            "/spikelm/c.parquet": parquet(["p", "q"]),
        }
    )
    assert read("memory://spikelm/a.txt") == read("memory://spikelm/a.txt.gz") == [TEXT]
    assert read("memory://spikelm/b?.jsonl#text") == ["zero", "one"]
    assert read("memory://spikelm/c.parquet#text") == ["p", "q"]
    with pytest.raises(DataError, match="c.parquet: unknown field 'txt'; did you mean 'text'"):
        read("memory://spikelm/c.parquet#txt")
    with pytest.raises(DataError, match="there is no file memory://spikelm/none.txt"):
        read("memory://spikelm/none.txt")
    with pytest.raises(DataError, match="no file matches memory://spikelm/z"):
        open_source("memory://spikelm/z*.txt")
    before = open_source("memory://spikelm/a.txt").fingerprint()
    assert open_source("memory://spikelm/a.txt").fingerprint() == before
    system.pipe("/spikelm/a.txt", b"other")
    assert open_source("memory://spikelm/a.txt").fingerprint() != before
    system.pipe("/spikelm/a.txt.gz", gzip.compress(TEXT.encode())[:-20])
    with pytest.raises(DataError, match="memory://spikelm/a.txt.gz is truncated or corrupted"):
        read("memory://spikelm/a.txt.gz")


def test_other_schemes(tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_text("words")
    assert read(f"file://{tmp_path}/a%20b.txt") == ["words"]
    with pytest.raises(DataError, match="nowhere://x/a.txt cannot be opened: Protocol not known: nowhere"):
        read("nowhere://x/a.txt")
