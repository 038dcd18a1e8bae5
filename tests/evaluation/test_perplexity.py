from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from spikelm.config import ModelConfig
from spikelm.data.source import open_source
from spikelm.errors import ConfigError, DataError
from spikelm.evaluation.corpus import Corpus, read_corpus, start_token
from spikelm.evaluation.figures import BLOCK, Tally, ratio_stderr
from spikelm.evaluation.perplexity import Result, Windows, measure, parse_modes
from spikelm.evaluation.scoring import Scores, score
from spikelm.evaluation.segments import Segment, carried, disjoint
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.recurrence import EMPTY, Context
from spikelm.state import State
from spikelm.tokenizer import Tokenizer


class Uniform:
    """Every token is as likely as any other."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def init_state(self, batch: int, *_: object, **__: object) -> State:
        return {}

    def __call__(
        self, tokens: Tensor, state: State | None = None, ctx: Context = EMPTY
    ) -> tuple[Tensor, State]:
        return torch.zeros(*tokens.shape, self.vocab), {}


class Counting(Uniform):
    """Gives probability 1/(n+1) to the target token+1 when it has seen n tokens since its initial state."""

    def init_state(self, batch: int, *_: object, **__: object) -> State:
        return {"seen": torch.zeros(batch)}

    def __call__(
        self, tokens: Tensor, state: State | None = None, ctx: Context = EMPTY
    ) -> tuple[Tensor, State]:
        assert state is not None
        seen, columns = state["seen"], []
        for t in range(tokens.shape[1]):
            if ctx.reset is not None:
                seen = torch.where(ctx.reset[:, t], 0.0, seen)
            valid = torch.ones_like(seen) if ctx.valid is None else ctx.valid[:, t].float()
            seen = seen + valid
            columns.append(seen)
        p = 1.0 / (1.0 + torch.stack(columns, 1))
        logits = torch.log((1 - p) / (self.vocab - 1))[..., None].expand(*tokens.shape, self.vocab).clone()
        logits.scatter_(-1, ((tokens + 1) % self.vocab)[..., None], torch.log(p)[..., None])
        return logits, {"seen": seen}


def corpus(*documents: list[int], start: int | None = None) -> Corpus:
    """Documents of tokens of one byte each."""
    prefix = [] if start is None else [start]
    return Corpus(
        name="test",
        sha256="",
        bytes=sum(map(len, documents)),
        start_token=start,
        tokens=[np.array(prefix + d, np.int32) for d in documents],
        byte_lengths=[np.array([0.0] * len(prefix) + [1.0] * len(d)) for d in documents],
        rescaled=0,
    )


def small_model(neuron: str = "lif", dtype: torch.dtype = torch.float64) -> SpikeLM:
    torch.manual_seed(3)
    config = ModelConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, placement="after", neuron={"name": neuron}
    )
    model = SpikeLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.6)
    return model.to(dtype).eval()


def random_documents(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 40, (n,), generator=generator).tolist() for n in lengths]


def bits(result: Result) -> dict[str, float]:
    return {figure.label: figure.bits_per_byte for figure in result.figures}


def test_uniform_model_has_eight_bits_per_byte(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Größe: every byte costs eight bits, whatever the text says. " * 30, encoding="utf-8")
    read = read_corpus(open_source(str(path)), Tokenizer.bytes())
    result = measure(Uniform(256), read, Windows(length=64, stride=16, chunk=50), vocab_size=256)
    assert [f.label for f in result.figures] == ["disjoint@64", "strided@64/16", "carried"]
    size = path.stat().st_size
    for figure in result.figures:
        assert figure.bits_per_byte == pytest.approx(8.0, abs=1e-6)
        assert figure.nats_per_token == figure.nats_per_byte == pytest.approx(math.log(256), abs=1e-6)
        assert figure.perplexity_per_token == pytest.approx(256, rel=1e-5)
        assert (figure.tokens, figure.bytes, figure.documents) == (size - 1, size - 1, 1)
        assert figure.stderr_bits_per_byte == pytest.approx(0.0, abs=1e-6)


def test_counted_by_hand() -> None:
    """A document of four tokens, so three predictions, with 1, 2, 3 tokens seen."""
    result = measure(Counting(10), corpus([0, 1, 2, 3]), Windows(length=2, stride=1), vocab_size=10)
    expected = {
        "disjoint@2": math.log(2) + math.log(3) + math.log(2),
        "strided@2/1": math.log(2) + math.log(3) + math.log(3),
        "carried": math.log(2) + math.log(3) + math.log(4),
    }
    for figure in result.figures:
        nats = expected[figure.label]
        assert figure.nats == pytest.approx(nats, abs=1e-6)
        assert figure.bits_per_byte == pytest.approx(nats / 3 / math.log(2), abs=1e-6)
        assert figure.perplexity_per_byte == pytest.approx(math.exp(nats / 3), rel=1e-6)
        assert (figure.tokens, figure.bytes) == (3, 3)
    carried_figure = result.figures[2]
    assert [(b["from"], b["to"], b["tokens"]) for b in carried_figure.by_context] == [(1, 1, 1), (2, 3, 2)]
    assert carried_figure.by_context[1]["nats_per_token"] == pytest.approx(
        (math.log(3) + math.log(4)) / 2, abs=1e-6
    )


def test_start_token_scores_the_first_token_too() -> None:
    without = measure(Counting(10), corpus([1, 2, 3]), Windows(modes=("carried",)), vocab_size=10).figures[0]
    with_start = measure(
        Counting(10), corpus([1, 2, 3], start=0), Windows(modes=("carried",)), vocab_size=10
    ).figures[0]
    assert (without.tokens, without.bytes) == (2, 2)
    assert (with_start.tokens, with_start.bytes) == (3, 3)
    assert with_start.nats == pytest.approx(math.log(2) + math.log(3) + math.log(4), abs=1e-6)


def test_tokens_of_several_bytes() -> None:
    """Bits per byte are over bytes, perplexity per token over tokens."""
    one = corpus([0, 1, 2])
    longer = Corpus(**{**one.__dict__, "byte_lengths": [np.array([5.0, 2.0, 4.0])], "bytes": 11})
    figure = measure(Uniform(16), longer, Windows(modes=("carried",)), vocab_size=16).figures[0]
    assert (figure.tokens, figure.bytes) == (2, 6)
    assert figure.bits_per_byte == pytest.approx(2 * 4 / 6, abs=1e-6)
    assert figure.perplexity_per_token == pytest.approx(16, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_packing_never_changes_the_figures(batch_size: int, chunk: int) -> None:
    """Rows, chunks and the order of documents are the reader's business."""
    read = corpus(*[list(range(n)) for n in (9, 2, 1, 0, 17, 3, 4)])
    plain = bits(
        measure(Counting(20), read, Windows(length=4, stride=3, batch_size=1, chunk=999), vocab_size=20)
    )
    windows = Windows(length=4, stride=3, batch_size=batch_size, chunk=chunk)
    assert bits(measure(Counting(20), read, windows, vocab_size=20)) == pytest.approx(plain, abs=1e-9)


def nats_of_forward(model: SpikeLM, document: list[int]) -> Tensor:
    tokens = torch.tensor(document)
    with torch.no_grad():
        logits, _ = model(tokens[None, :-1])
    return torch.nn.functional.cross_entropy(logits[0], tokens[1:], reduction="none")


@pytest.mark.parametrize("neuron", ["lif", "none"])
def test_carried_state_is_one_long_forward(neuron: str) -> None:
    model = small_model(neuron)
    documents = random_documents(70, 11, 33)
    windows = Windows(modes=("carried",), batch_size=2, chunk=16)
    figure = measure(model, corpus(*documents), windows, vocab_size=40).figures[0]
    expected = torch.cat([nats_of_forward(model, d) for d in documents])
    assert figure.nats == pytest.approx(float(expected.sum()), abs=1e-9)
    assert figure.tokens == len(expected)


def test_disjoint_windows_are_separate_forwards() -> None:
    """Document resets and window resets: every window as if it were alone."""
    model = small_model()
    documents = random_documents(50, 7, 29)
    windows = Windows(modes=("disjoint",), length=8, batch_size=3, chunk=13)
    figure = measure(model, corpus(*documents), windows, vocab_size=40).figures[0]
    expected = sum(
        float(nats_of_forward(model, d[i : i + 9]).sum()) for d in documents for i in range(0, len(d) - 1, 8)
    )
    assert figure.nats == pytest.approx(expected, abs=1e-9)


def test_strided_by_the_length_equals_disjoint() -> None:
    model = small_model(dtype=torch.float32)
    read = corpus(*random_documents(50, 7, 29))
    a, b = measure(
        model, read, Windows(modes=("disjoint", "strided"), length=8, stride=8), vocab_size=40
    ).figures
    assert (a.nats, a.tokens, a.stderr_bits_per_byte) == (b.nats, b.tokens, b.stderr_bits_per_byte)


def test_per_token_scores_are_in_place() -> None:
    model = small_model()
    documents = random_documents(20, 31)
    found: dict[tuple[int, int], float] = {}
    read = corpus(*documents)
    for scores in score(model, carried(read.tokens), vocab_size=40, batch_size=2, chunk=9):
        for i, value in enumerate(scores.nats):
            assert scores.context + i == scores.first + i  # carried: the context is the whole document so far
            found[scores.document, scores.first + i] = value
    for d, document in enumerate(documents):
        expected = nats_of_forward(model, document)
        got = torch.tensor([found[d, i] for i in range(1, len(document))], dtype=torch.float64)
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


def test_large_vocabularies_are_read_in_narrow_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []

    class Watch(Uniform):
        def __call__(self, tokens: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, State]:
            widths.append(tokens.shape)
            return super().__call__(tokens)

    monkeypatch.setattr("spikelm.evaluation.scoring.LOGITS_PER_CHUNK", 600)
    read = corpus(list(range(50)), list(range(50)))
    figure = measure(Watch(100), read, Windows(modes=("carried",)), vocab_size=100).figures[0]
    assert figure.tokens == 98
    assert all(rows * columns * 100 <= 600 for rows, columns in widths)


def test_meter_sees_tokens_and_no_padding() -> None:
    model = small_model("none", torch.float32)
    read = corpus(*random_documents(20, 5, 9))
    result = measure(model, read, Windows(chunk=8, batch_size=3), vocab_size=40)
    assert result.spikes_over == "carried"
    entry = result.spikes["projections"]["blocks.0.mixer.key"]
    assert entry["tokens"] == 19 + 4 + 8
    assert 0 <= entry["firing_rate"] <= 1


def test_standard_error_over_documents_and_blocks() -> None:
    lengths = [np.ones(2) for _ in range(40)]
    tally = Tally(lengths)
    values = np.linspace(1, 2, 40)
    for d, value in enumerate(values):
        tally.add(Scores(document=d, first=1, context=1, nats=np.array([value])))
    figure = tally.figure("x")
    assert figure.stderr_over == "40 documents"
    assert figure.stderr_nats_per_token == pytest.approx(values.std(ddof=1) / math.sqrt(40))
    assert figure.stderr_bits_per_byte == pytest.approx(values.std(ddof=1) / math.sqrt(40) / math.log(2))

    tally = Tally([np.ones(3 * BLOCK)])
    nats = np.repeat([1.0, 2.0, 3.0], BLOCK)[1:]
    tally.add(Scores(document=0, first=1, context=1, nats=nats))
    figure = tally.figure("x")
    assert figure.stderr_over == f"3 blocks of at most {BLOCK} tokens"
    assert figure.stderr_nats_per_token == pytest.approx(1 / math.sqrt(3), rel=0.01)


def test_ratio_stderr_by_simulation() -> None:
    rng = np.random.default_rng(0)
    ratios, claimed = [], []
    for _ in range(400):
        size = rng.integers(50, 150, 60).astype(float)
        nats = size * rng.normal(1.5, 0.2, 60)
        ratios.append(nats.sum() / size.sum())
        claimed.append(ratio_stderr(nats, size))
    assert np.mean(claimed) == pytest.approx(np.std(ratios), rel=0.1)
    assert ratio_stderr(np.ones(1), np.ones(1)) is None


def test_corpus_of_a_tokenizer_without_start(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "añb"}\n{"text": "xyz"}\n', encoding="utf-8")
    read = read_corpus(open_source(f"{path}#text"), Tokenizer.bytes())
    assert [t.tolist() for t in read.tokens] == [list("añb".encode()), list(b"xyz")]
    assert (read.bytes, read.start_token, read.predictions, read.rescaled) == (7, None, 5, 0)
    other = tmp_path / "b.jsonl"
    other.write_text('{"text": "añ"}\n{"text": "bxyz"}\n', encoding="utf-8")
    assert read_corpus(open_source(f"{other}#text"), Tokenizer.bytes()).sha256 != read.sha256


def test_corpus_of_bpe_with_start(tmp_path: Path) -> None:
    text = "the cat sat on the mat, the cat ran. " * 20
    path = tmp_path / "t.txt"
    path.write_text(text + "é", encoding="utf-8")
    words = Tokenizer.train_bpe([text], 300)
    for choice, expected in (("none", None), ("eos", words.eos_id)):
        read = read_corpus(open_source(str(path)), words, start=choice)
        assert read.start_token == expected
        assert read.byte_lengths[0].sum() == read.bytes == len(text) + 2
        assert len(read.tokens[0]) == len(words.encode(text + "é")) + (expected is not None)


def test_bytes_of_a_tokenizer_that_changes_the_text_are_rescaled(tmp_path: Path) -> None:
    """Spaces are in no token of this one; the lengths must still add up to the text, in proportion."""
    vocab = {"[UNK]": 0, "ab": 1, "cdef": 2}
    words = Tokenizer(
        {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
        }
    )
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "ab   cdef"}\n{"text": "abcdef"}\n{"text": "ab"}\n', encoding="utf-8")
    read = read_corpus(open_source(str(path)), words)
    assert [t.tolist() for t in read.tokens] == [[1, 2], [0], [1]]
    assert read.byte_lengths[0].tolist() == [3.0, 6.0]  # two and four bytes of nine
    assert [lengths.sum() for lengths in read.byte_lengths] == [9, 6, 2]
    assert (read.bytes, read.rescaled) == (17, 2)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 100])
def test_max_bytes_cuts_at_a_character(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "aéb"}\n{"text": "cdef"}\n', encoding="utf-8")
    source = open_source(str(path))
    if limit < 3:  # "a", or "a" and half a character: a single token, nothing to score
        with pytest.raises(DataError, match="nothing to score"):
            read_corpus(source, Tokenizer.bytes(), max_bytes=limit)
        return
    read = read_corpus(source, Tokenizer.bytes(), max_bytes=limit)
    assert b"".join(t.astype(np.uint8).tobytes() for t in read.tokens) == "aébcdef".encode()[:limit]


def test_bad_input_in_one_sentence(tmp_path: Path) -> None:
    words = Tokenizer.bytes()
    path = tmp_path / "t.txt"
    path.write_text("hello")
    with pytest.raises(ConfigError, match="start token 'x'"):
        start_token(words, "x")
    with pytest.raises(ConfigError, match="no eos token"):
        start_token(words, "eos")
    with pytest.raises(ConfigError, match="max-bytes is 0"):
        read_corpus(open_source(str(path)), words, max_bytes=0)
    with pytest.raises(ConfigError, match="mode 'fast'"):
        Windows(modes=parse_modes("fast"))
    with pytest.raises(ConfigError, match="no mode"):
        Windows(modes=parse_modes(""))
    with pytest.raises(ConfigError, match="stride 9 is longer than length 8"):
        Windows(length=8, stride=9)
    for name in ("length", "stride", "batch_size", "chunk"):
        with pytest.raises(ConfigError, match=f"{name} is 0"):
            Windows(**{name: 0})
    with pytest.raises(DataError, match="token 111, but the model has 100 tokens"):
        measure(Uniform(100), read_corpus(open_source(str(path)), words), Windows(), vocab_size=100)
    assert parse_modes("all") == ("disjoint", "strided", "carried")
    assert parse_modes(" carried, disjoint ,carried") == ("carried", "disjoint")


def test_a_loss_that_is_not_finite_is_refused() -> None:
    class Broken(Uniform):
        def __call__(self, tokens: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, State]:
            logits = torch.zeros(*tokens.shape, self.vocab)
            logits[tokens == 3] = float("nan")
            return logits, {}

    with pytest.raises(DataError, match="token 4 of document 1"):
        list(score(Broken(9), disjoint(corpus([1, 2], [0, 1, 2, 3, 4]).tokens, 3), vocab_size=9))


def test_the_caller_is_never_in_inference_mode() -> None:
    """Neither where scores arrive nor where segments are read: both may be inside a training loop."""
    modes = []

    def watched() -> Iterator[Segment]:
        for segment in carried(corpus(*random_documents(5, 9, 3)).tokens):
            modes.append(torch.is_inference_mode_enabled())
            yield segment

    for _ in score(small_model(), watched(), vocab_size=40, batch_size=1, chunk=4):
        modes.append(torch.is_inference_mode_enabled())
    assert len(modes) > 6 and not any(modes)


def test_meter_is_optional() -> None:
    meter = Meter()
    model = small_model("none", torch.float32)
    list(score(model, carried(corpus([1, 2, 3]).tokens), vocab_size=40, meter=meter))
    assert "head" in meter.summary()["projections"]
