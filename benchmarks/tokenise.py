"""How fast is text turned into a token store, with one process and with several?

For the byte tokenizer and a byte-level BPE, on the novels: the whole of ``tokenise`` (encoding,
writing, checksums, fsync) with 1, 2, ... worker processes in turn, repeated; and beside it the ``tokenizers``
library alone in one process with one thread and with all, which is what the workers are there for. Every run
must give the same tokens.

Usage: python benchmarks/tokenise.py [--megabytes 32] [--repeats 3] [--dry]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from spikelm.data import encoding, open_source
from spikelm.data.source import Source
from spikelm.data.store import tokenise
from spikelm.tokenizer import Tokenizer

VOCABULARY = 8192

# The library in a process of its own, because it reads the number of threads once.
LIBRARY = """
import json, sys, time
from pathlib import Path
from spikelm.tokenizer import Tokenizer
tokenizer, text = Tokenizer.load(sys.argv[1]), Path(sys.argv[2]).read_text(encoding="utf-8")
next(tokenizer.encode_arrays([text[:100_000]]))
start = time.perf_counter()
tokens = sum(len(ids) for ids in tokenizer.encode_arrays([text]))
print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}))
"""


class Text(Source):
    """One document in memory."""

    def __init__(self, text: str) -> None:
        super().__init__("novels")
        self._text = text

    def _documents(self):
        yield self._text

    def fingerprint(self) -> str:
        """Its length."""
        return f"{len(self._text)}"


def library(tokenizer: Path, text: Path, threads: str) -> dict[str, Any]:
    """Seconds and tokens of the library alone, with one thread or (``0``) with all."""
    settings = {"TOKENIZERS_PARALLELISM": "false" if threads == "1" else "true", "RAYON_NUM_THREADS": threads}
    words = [sys.executable, "-c", LIBRARY, str(tokenizer), str(text)]
    done = subprocess.run(words, env=os.environ | settings, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def rate(seconds: list[float], size: int, tokens: int) -> dict[str, Any]:
    """Figures of some repeats: the median, and all."""
    median = statistics.median(seconds)
    return {
        "megabytes_per_second": round(size / 1e6 / median, 3),
        "tokens_per_second": round(tokens / median),
        "seconds": [round(value, 3) for value in seconds],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=32.0, help="how much text")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print the figures and write no file")
    options = parser.parse_args()
    folder = os.environ.get("SPIKELM_DATA")
    if folder is None:
        print("SPIKELM_DATA is not set: no text to measure with", file=sys.stderr)
        return 2
    # Workers start at once, so that a short text shows what they do.
    encoding.IN_PROCESS_BYTES = 0
    text = next(open_source(Path(folder) / "lm/novels/train.txt.xz").documents())
    text = text[: int(options.megabytes * 1e6)]
    size = len(text.encode("utf-8"))
    cores = encoding.resolve_workers(0)
    counts = sorted({1, 2, cores})
    bpe = Tokenizer.train_bpe([text[:4_000_000]], VOCABULARY)
    figures: dict[str, Any] = {"bytes": size, "cores": cores, "repeats": options.repeats, "tokenizers": {}}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        bpe.save(root / "bpe")
        (root / "text").write_text(text, encoding="utf-8")
        for label, tokenizer in (("bytes", Tokenizer.bytes()), (f"bpe-{VOCABULARY}", bpe)):
            times: dict[str, list[float]] = {}
            hashes, tokens = set(), 0
            for repeat in range(options.repeats):
                # The order turns, so that no number of workers always has the quiet moment.
                for workers in counts[repeat % len(counts) :] + counts[: repeat % len(counts)]:
                    if tokenizer.is_bytes and workers > 1:
                        continue  # it uses none
                    start = time.perf_counter()
                    store = tokenise(
                        Text(text), tokenizer, root / f"{label}-{workers}-{repeat}", workers=workers
                    )
                    times.setdefault(f"{workers} workers", []).append(time.perf_counter() - start)
                    hashes.add(store.index.tokens_sha256)
                    tokens = store.index.num_tokens
                if not tokenizer.is_bytes:
                    for threads, title in (("1", "library, one thread"), ("0", "library, all threads")):
                        found = library(root / "bpe", root / "text", threads)
                        times.setdefault(title, []).append(found["seconds"])
            if len(hashes) != 1:
                print(f"{label}: the tokens differ between runs", file=sys.stderr)
                return 1
            rates = {title: rate(seconds, size, tokens) for title, seconds in times.items()}
            figures["tokenizers"][label] = {"tokens": tokens, "rates": rates}
            for title, found in rates.items():
                print(f"{label:>10}  {title:<22} {found['megabytes_per_second']:8.2f} MB/s", end="")
                print(f"{found['tokens_per_second']:>12,} tokens/s")
    if not options.dry:
        from _record import record

        print(f"written to {record('tokenise', figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
