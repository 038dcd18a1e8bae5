"""Perplexity by length: by hand, against one forward, in the same memory at any length."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from spikelm.config import ModelConfig
from spikelm.errors import ConfigError, DataError
from spikelm.evaluation.corpus import Corpus
from spikelm.evaluation.figures import ratio_stderr
from spikelm.evaluation.lengths import measure_lengths, parse_lengths
from spikelm.model import SpikeLM


def corpus(*documents: list[int], width: float = 1.0) -> Corpus:
    return Corpus(
        name="t",
        sha256="",
        bytes=sum(map(len, documents)),
        start_token=None,
        tokens=[np.array(d, np.int32) for d in documents],
        byte_lengths=[np.full(len(d), width) for d in documents],
        rescaled=0,
    )


def test_lengths_of_words() -> None:
    assert parse_lengths("4k, 1K,1M,500,4096") == (500, 1024, 4096, 1 << 20)
    for wrong in ("", "1k,", "-3", "1.5k", "0", "k", "1g"):
        with pytest.raises(ConfigError, match="expected positive numbers as in 1024,4k,1M"):
            parse_lengths(wrong)


def nats_of_forward(model: SpikeLM, tokens: list[int]) -> Tensor:
    ids = torch.tensor(tokens)
    with torch.no_grad():
        logits, _ = model(ids[None, :-1])
    return torch.nn.functional.cross_entropy(logits[0], ids[1:], reduction="none")


@pytest.mark.parametrize("cut", [1300, 700])
@pytest.mark.parametrize("chunk", [64, 999])
def test_one_stream_and_windows_of_it(cut: int, chunk: int) -> None:
    """Documents are joined; figures are those of one forward pass, of windows those of their own."""
    torch.manual_seed(3)
    model = SpikeLM(ModelConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.6)
    tokens = torch.randint(0, 40, (1300,), generator=torch.Generator().manual_seed(0)).tolist()
    read = corpus(tokens[:cut], tokens[cut:], width=2.0)
    lengths = (7, 600, 1200)
    found = measure_lengths(model, read, lengths, vocab_size=40, window=100, batch_size=3, chunk=chunk)
    whole = nats_of_forward(model, tokens[:1201])
    windows = torch.cat([nats_of_forward(model, tokens[i : i + 101]) for i in range(0, 1200, 100)])
    assert [point["tokens"] for point in found["points"]] == list(lengths)
    assert found["window"] == 100 and found["state_bytes"] > 0
    for n, point in zip(lengths, found["points"], strict=True):
        assert point["bytes"] == 2 * n
        assert point["nats_per_token"] == pytest.approx(float(whole[:n].mean()), abs=1e-10)
        assert point["bits_per_byte"] == pytest.approx(float(whole[:n].mean()) / 2 / math.log(2), abs=1e-10)
        assert point["perplexity_per_token"] == pytest.approx(math.exp(float(whole[:n].mean())))
        half, begin = point["last_half"], n // 2
        assert (half["from"], half["tokens"]) == (begin, n - begin)
        assert half["nats_per_token"] == pytest.approx(float(whole[begin:n].mean()), abs=1e-10)
        assert half["window_nats_per_token"] == pytest.approx(float(windows[begin:n].mean()), abs=1e-10)
        assert half["gain"] == pytest.approx(float((windows - whole)[begin:n].mean()), abs=1e-10)
    # Over [600, 1200) the blocks end at 1024: the error is that of two sums.
    gain = (windows - whole)[600:1200].numpy()
    expected = ratio_stderr(np.array([gain[:424].sum(), gain[424:].sum()]), np.array([424.0, 176.0]))
    assert found["points"][2]["last_half"]["gain_stderr"] == pytest.approx(expected, rel=1e-9)
    assert found["points"][0]["last_half"]["stderr"] is None


def test_too_short_a_text() -> None:
    model = SpikeLM(ModelConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1)).eval()
    with pytest.raises(DataError, match="has 9 tokens and the longest of --lengths needs 10"):
        measure_lengths(model, corpus([1] * 4, [2] * 5), (4, 9), vocab_size=40)


MEMORY = """
import sys
from pathlib import Path
import numpy as np, torch
from spikelm.config import ModelConfig
from spikelm.evaluation.corpus import Corpus
from spikelm.evaluation.lengths import measure_lengths
from spikelm.model import SpikeLM

torch.set_num_threads(1)
model = SpikeLM(ModelConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1)).eval()

def peak(n):
    Path("/proc/self/clear_refs").write_text("5")  # begin a new peak
    text = Corpus(name="t", sha256="", bytes=n + 1, start_token=None, tokens=[np.zeros(n + 1, np.int32)],
                  byte_lengths=[np.ones(n + 1)], rescaled=0)
    measure_lengths(model, text, (n,), vocab_size=256, window=256)
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmHWM"))

print([peak(n) / 1024 for n in map(int, sys.argv[1:])])
"""


def peaks(*lengths: int) -> list[float]:
    """Peak memory in MiB of measuring at each length, one after the other in a process of its own."""
    # Freed chunks go back to the system at once, so that the heap's gaps are not taken for memory in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    words = [sys.executable, "-c", MEMORY, *map(str, lengths)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    return [float(value) for value in done.stdout.strip(" []\n").split(",")]


needs_peaks = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK) or not Path("/proc/self/status").exists(),
    reason="the peak of memory cannot be reset here",
)


@needs_peaks
def test_the_same_memory_at_sixteen_times_the_length() -> None:
    """Logits of 64k tokens are 64 MiB, states of them 8 MiB: none of it may stay. Tokens are 0.8 MiB."""
    _, short, long = peaks(4096, 4096, 65536)
    assert abs(long - short) < 3.0


@needs_peaks
@pytest.mark.slow
def test_the_same_memory_at_a_million_tokens() -> None:
    """Twelve bytes a token are the text itself, 12 MiB; nothing else grows."""
    _, short, long = peaks(4096, 4096, 1 << 20)
    assert long - short < 12.0 + 6.0
