"""Samples made ahead: the same ones, however the trainer jumps; errors when they are due; no thread left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from spikelm.data import TokenBlocks
from spikelm.data.samples import Batch, Samples
from spikelm.errors import DataError
from spikelm.tokenizer import Tokenizer
from spikelm.train.batches import MicroBatch, micro_batches
from spikelm.train.config import TrainConfig
from spikelm.train.prefetch import Prefetch
from spikelm.train.ranks import Ranks
from spikelm.train.trainer import Trainer

TEXT = TokenBlocks.from_documents(["".join(chr(33 + i * i % 90) for i in range(4000))], Tokenizer.bytes(), 16)


class Watched(Samples):
    """Samples that say when and by whom they were asked for, and can fail."""

    block_length, num_tokens, num_bytes, carried = 16, 4000, 4000, False

    def __init__(self, fail_at: int = -1) -> None:
        self.asked: list[int] = []
        self.threads: set[str] = set()
        self.fail_at, self.closed, self.inside = fail_at, 0, 0

    def gather(self, seed: int, samples: Any) -> Batch:
        self.inside += 1
        assert self.inside == 1, "asked by two threads at once"
        self.asked.append(int(samples[0]))
        self.threads.add(threading.current_thread().name)
        if self.fail_at in samples:
            self.inside = 0
            raise DataError(f"sample {self.fail_at} is damaged")
        batch = TEXT.gather(seed, samples)
        time.sleep(0.001)
        self.inside -= 1
        return batch

    def fingerprint(self) -> Any:
        return "watched"

    def describe(self) -> dict[str, Any]:
        return {}

    def epochs(self, seed: int, samples: int) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def config(make_values: Any, **changes: Any) -> TrainConfig:
    return TrainConfig.from_dict(make_values(batch_size=4, accumulation=2, **changes))


def same(found: list[MicroBatch], expected: list[MicroBatch]) -> bool:
    return all(
        one.first == other.first
        and one.count == other.count
        and one.nbytes == other.nbytes
        and all(
            torch.equal(getattr(one, name), getattr(other, name)) for name in ("inputs", "targets", "reset")
        )
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
@pytest.mark.parametrize("rank", [0, 1])
def test_jumps_change_nothing(make_values: Any, depth: int, rank: int) -> None:
    """Steps in order, skipped, gone back to, and repeated, some while others are being made."""
    samples = Watched()
    ahead = Prefetch(samples, config(make_values, data__prefetch=depth), Ranks(rank=rank, world_size=2))
    chance = np.random.default_rng(depth)
    first = 0
    for _ in range(60):
        expected = micro_batches(TEXT, 0, first, 4, 2, rank, 2)
        assert same(ahead.take(first), expected)
        first = int(
            chance.choice([first + 4, first + 4, first + 4, first + 8, max(0, first - 12), first, 100])
        )
    ahead.close()
    assert samples.closed == 1
    assert samples.threads == ({"MainThread"} if depth == 0 else {"prefetch_0"})


def test_steps_are_made_ahead_but_not_too_far(make_values: Any) -> None:
    samples = Watched()
    ahead = Prefetch(samples, config(make_values, data__prefetch=2), Ranks())
    for step in range(5):
        ahead.take(4 * step)
        deadline = time.monotonic() + 5.0
        while len(samples.asked) < 2 * (step + 3) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert samples.asked == list(range(0, 4 * (step + 3), 2))  # this step and two more, each made once
    ahead.take(4 * 6)  # a batch that is passed over is dropped, and nothing is made twice
    ahead.close()
    assert len(samples.asked) == len(set(samples.asked))


def test_errors_arrive_when_they_are_due(make_values: Any) -> None:
    samples = Watched(fail_at=9)
    ahead = Prefetch(samples, config(make_values, data__prefetch=5), Ranks())
    assert ahead.take(0) and ahead.take(4)
    with pytest.raises(DataError, match="sample 9 is damaged"):
        ahead.take(8)
    assert ahead.take(12)[0].first == 12  # passed over
    ahead.close()
    assert ahead.take(0)[0].first == 0  # closed is not the end
    ahead.close()


# --- in the trainer ---------------------------------------------------------------------------------------


def test_a_run_is_the_same_without(make_values: Any, tmp_path: Any) -> None:
    ends = []
    for depth in (0, 3):
        trainer = Trainer(
            TrainConfig.from_dict(make_values(out=str(tmp_path / f"run{depth}"), data__prefetch=depth))
        )
        trainer.run()
        ends.append(trainer.model.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
    assert TrainConfig.from_dict(make_values()).data.prefetch == 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_ends_the_run_and_its_threads(make_values: Any, tmp_path: Any, stream: bool) -> None:
    """What the data says is what the run says; the fixture looks at the threads."""
    lines = [f'{{"text": "{chr(97 + i % 26) * 40}"}}' for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
    values = make_values(
        steps=50, data__train=str(tmp_path / "train.jsonl"), data__stream=stream, checkpoint_every=5
    )
    del values["data"]["valid"]
    with pytest.raises(DataError, match="line 41 .*is not valid JSON"):
        Trainer(TrainConfig.from_dict(values)).run()
