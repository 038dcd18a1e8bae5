"""Does perplexity by length cost the same memory at a million tokens? Memory, speed and figures by length.

One model reads a text as one stream, its state carried on, and again in windows (`spikelm eval --lengths`),
once for every length, and the process's peak memory is taken for each. Twelve bytes a token are the text. The
first length is read once before: what is compiled and allocated once is not counted. Without a checkpoint:
spikegpt-nano with random weights, whose figures mean nothing and whose memory and speed do.

    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/eval_length.py [CKPT] --data SOURCE

The variable lets the C library return freed memory at once; without it the gaps of its heap are counted, too.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from _record import record

from spikelm.checkpoint import load_model
from spikelm.config import ModelConfig
from spikelm.data.source import open_source
from spikelm.evaluation.corpus import Corpus, read_corpus, tokenizer_for
from spikelm.evaluation.lengths import measure_lengths, parse_lengths
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer

PRESET = "spikegpt-nano"
MEBIBYTE = 1 << 20


def peak() -> float:
    """Peak resident memory of this process in MiB since :func:`begin`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def begin() -> None:
    """Start a new peak."""
    Path("/proc/self/clear_refs").write_text("5")


def measured(model: SpikeLM, corpus: Corpus, length: int, window: int) -> dict[str, Any]:
    """Figures, seconds and peak memory of one length."""
    begin()
    started = time.perf_counter()
    # One window at a time: a short text would fill fewer rows than a long one, and take less memory for that.
    size = model.config.vocab_size
    found = measure_lengths(model, corpus, (length,), vocab_size=size, window=window, batch_size=1)
    seconds = time.perf_counter() - started
    return {
        **found["points"][0],
        "state_bytes": found["state_bytes"],
        "seconds": seconds,
        "tokens_per_second": 2 * length / seconds,  # carried and in windows
        "peak_mib": peak(),
    }


def main() -> None:
    """Measure every length and write ``results/eval_length.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, help=f"checkpoint folder (absent: {PRESET})")
    parser.add_argument("--data", default="builtin:python-docs", help="text, as spikelm eval takes it")
    parser.add_argument("--lengths", default="4k,64k,1M")
    parser.add_argument("--window", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lengths = parse_lengths(options.lengths)
    if options.checkpoint is None:
        model, words = SpikeLM(ModelConfig.from_yaml(PRESET)).eval(), Tokenizer.bytes()
    else:
        model = load_model(options.checkpoint, dtype=torch.float32)
        words = tokenizer_for(options.checkpoint, None, print)
    # Little more text than is read: what is not read would count as memory, too.
    most = int(lengths[-1] * 1.05 * max(1.0, float(words.token_bytes.max()))) + 64
    corpus = read_corpus(open_source(options.data), words, max_bytes=most)
    measured(model, corpus, lengths[0], options.window)
    points = []
    for length in lengths:
        points.append(measured(model, corpus, length, options.window))
        half = points[-1]["last_half"]
        print(
            f"{length:>9,} tokens: {points[-1]['bits_per_byte']:.4f} bits/byte, carrying gains "
            f"{half['gain']:+.4f} nats/token, {points[-1]['tokens_per_second']:,.0f} tokens/s, "
            f"peak {points[-1]['peak_mib']:.1f} MiB",
            flush=True,
        )
    figures = {
        "model": PRESET if options.checkpoint is None else options.checkpoint.name,
        "parameters": model.num_parameters(),
        "text": {"name": Path(options.data).name, "sha256": corpus.sha256, "bytes": corpus.bytes},
        "tokenizer_sha256": words.sha256,
        "window": options.window,
        "mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_"),
        "points": points,
        "peak_growth_mib": points[-1]["peak_mib"] - points[0]["peak_mib"],
        "text_mib": 12 * sum(len(tokens) for tokens in corpus.tokens) / MEBIBYTE,
    }
    print(f"written to {record('eval_length', figures)}")


if __name__ == "__main__":
    main()
