"""How many tokens a second do the samples of each kind give, and what is left for the trainer?

For blocks of a token store, a mixture, a stream and carried lanes, with blocks of 256 and 1024 tokens: the
rate at which a trainer that computes nothing gets its steps (a batch of 16,384 tokens in one micro-batch), in
the trainer's own thread and made ahead in another. Goal: one million tokens a second. A stream is tokenised
on the way, so its rate is the tokenizer's; it is measured with bytes and with a BPE trained on the same text.
A second figure says what making steps ahead hides: the time a step of STEP_SECONDS of other work (asleep, so
that the thread has the processor as it has beside a GPU) takes longer than that.

    .venv/bin/python benchmarks/loader.py [--seconds S] [--data FOLDER] [--quick]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _record import record

from spikelm.data import TokenBlocks, open_source
from spikelm.data.lanes import Lanes
from spikelm.data.mixture import Mixture
from spikelm.data.samples import Samples
from spikelm.data.store import tokenise
from spikelm.data.stream import Stream
from spikelm.tokenizer import Tokenizer
from spikelm.train.config import TrainConfig
from spikelm.train.prefetch import Prefetch
from spikelm.train.ranks import Ranks

GOAL = 1e6
TOKENS = 16384
STEP_SECONDS = 0.02
VOCABULARY = 16384


def text_of(data: Path, folder: Path, name: str, limit: int | None) -> Path:
    """The text of ``NAME.txt.xz`` in a plain file, so that unpacking is not what is measured."""
    path = folder / f"{name}.txt"
    text = next(open_source(data / f"{name}.txt.xz").documents())
    path.write_text(text[:limit], encoding="utf-8")
    return path


def kinds(folder: Path, data: Path, limit: int | None) -> dict[str, Callable[[int], Samples]]:
    """Maker of the samples of every kind, given the block length; stores are tokenised now."""
    train, other = (text_of(data, folder, name, limit) for name in ("train", "valid"))
    # The streams read documents of a usual size: paragraphs of the same text.
    lines = folder / "lines"
    lines.mkdir()
    for number, start in enumerate(range(0, len(text := train.read_text(encoding="utf-8")), 20_000)):
        (lines / f"{number:06d}.txt").write_text(text[start : start + 20_000], encoding="utf-8")
    tokenizers = {"bytes": Tokenizer.bytes(), "bpe": Tokenizer.train_bpe([text[:4_000_000]], VOCABULARY)}
    stores = {
        (name, path): tokenise(open_source(path), tokenizer, folder / "cache")
        for name, tokenizer in tokenizers.items()
        for path in (train, other)
    }
    found: dict[str, Callable[[int], Samples]] = {}
    for name, tokenizer in tokenizers.items():
        one, two = stores[name, train], stores[name, other]

        def blocks(length: int, one: Any = one, tokenizer: Any = tokenizer) -> Samples:
            return TokenBlocks(one, tokenizer, length)

        def mixture(length: int, one: Any = one, two: Any = two, tokenizer: Any = tokenizer) -> Samples:
            parts = {
                "train": TokenBlocks(one, tokenizer, length),
                "valid": TokenBlocks(two, tokenizer, length),
            }
            return Mixture(parts, [0.7, 0.3])

        def stream(length: int, buffer: int = 0, tokenizer: Any = tokenizer) -> Samples:
            return Stream(open_source(lines), tokenizer, length, buffer, workers=0)

        def shuffled(length: int, stream: Any = stream) -> Samples:
            made: Samples = stream(length, 1024)
            return made

        def lanes(length: int, one: Any = one, tokenizer: Any = tokenizer) -> Samples:
            return Lanes(one, tokenizer, length, TOKENS // length)

        made = {
            "store": blocks,
            "mixture": mixture,
            "stream": stream,
            "shuffled stream": shuffled,
            "lanes": lanes,
        }
        found |= {f"{kind}, {name}": maker for kind, maker in made.items()}
    return found


def measure(make: Callable[[int], Samples], length: int, depth: int, seconds: float, busy: float) -> float:
    """Seconds per step of the trainer's loop, after the first steps."""
    config = TrainConfig.from_dict(
        {
            "model": "none",
            "data": {"train": "none", "block_length": length, "prefetch": depth},
            "batch_size": TOKENS // length,
        }
    )
    ahead = Prefetch(make(length), config, Ranks())
    first, steps = 0, 0
    for _ in range(3):
        ahead.take(first)
        first += config.batch_size
    started = time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds or steps < 3:
        ahead.take(first)
        first += config.batch_size
        steps += 1
        if busy:
            time.sleep(busy)
    ahead.close()
    return spent / steps


def main() -> int:
    """Measure, print, record; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("SPIKELM_DATA", ".")) / "lm" / "novels"
    )
    parser.add_argument(
        "--quick", action="store_true", help="little text, short measurements, nothing recorded"
    )
    options = parser.parse_args()
    seconds = 0.3 if options.quick else options.seconds
    torch.set_num_threads(1)
    rates: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in kinds(Path(folder), options.data, 2_000_000 if options.quick else None).items():
            for length in (256, 1024):
                inline, ahead = (measure(make, length, depth, seconds, 0.0) for depth in (0, 2))
                beside = measure(make, length, 2, seconds, STEP_SECONDS)
                alone = measure(make, length, 0, seconds, STEP_SECONDS)
                rates[f"{name}, T={length}"] = {
                    "tokens_per_second": round(TOKENS / inline),
                    "tokens_per_second_prefetched": round(TOKENS / ahead),
                    "added_to_a_step_milliseconds": round(1e3 * (alone - STEP_SECONDS), 3),
                    "added_to_a_step_milliseconds_prefetched": round(1e3 * (beside - STEP_SECONDS), 3),
                }
                print(f"{name}, T={length}: {rates[f'{name}, T={length}']}", flush=True)
    met = {
        name: max(r["tokens_per_second"], r["tokens_per_second_prefetched"]) >= GOAL
        for name, r in rates.items()
    }
    missed = [name for name, good in met.items() if not good]
    print(
        f"at least {GOAL:,.0f} tokens/s: all but {missed}" if missed else f"all at least {GOAL:,.0f} tokens/s"
    )
    if not options.quick:
        figures = {
            "tokens_per_step": TOKENS,
            "goal_tokens_per_second": GOAL,
            "step_seconds": STEP_SECONDS,
            "rates": rates,
            "below_goal": missed,
        }
        print(record("loader", figures))
    return 1 if any("stream" not in name for name in missed) else 0


if __name__ == "__main__":
    raise SystemExit(main())
