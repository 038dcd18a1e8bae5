"""Standard sets: pages and their counts, characters and bytes, last words, books; what is missing."""

from __future__ import annotations

import dataclasses
import json
import lzma
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from spikelm.checkpoint import save_checkpoint
from spikelm.cli import main
from spikelm.config import ModelConfig
from spikelm.errors import DataError
from spikelm.evaluation import enwik8, wikitext
from spikelm.evaluation.record import read
from spikelm.evaluation.standard import SETS, open_text
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer

PAGE = (
    " = First Page = \n \n He had a guest @-@ starring role , in 2 @,@ 000 shows ( or more ) . \n"
    ' \n = = A section = = \n \n " Quoted " it \'s . \n \n'
)
WIKI = " \n" + PAGE + " = Second Page = \n \n Größe of 5 ° C . \n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=257, hidden_size=8, num_hidden_layers=1)
    model = SpikeLM(config)
    words = Tokenizer.train_bpe(["a b"], 257)  # bytes and an end of text
    return save_checkpoint(tmp_path_factory.mktemp("c") / "model", model, words)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder but the one that is named, and nothing is asked of the network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.delenv("SPIKELM_DATA", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def measured(checkpoint: Path, tmp_path: Path, *words: str) -> dict:
    out = tmp_path / "eval.json"
    assert main(["eval", str(checkpoint), *words, "--json", str(out)]) == 0
    return read(out)


def test_pages_and_their_text() -> None:
    first, second = wikitext.pages(WIKI)
    # The line end before the next heading belongs to no page.
    assert first == PAGE[:-1] and second.startswith(" = Second Page = \n")
    assert wikitext.detokenised(first) == (
        " = First Page =\n\nHe had a guest-starring role, in 2,000 shows (or more).\n"
        '\n== A section ==\n\n"Quoted" it\'s.\n'
    )
    assert "5°C" in wikitext.detokenised(second)
    assert wikitext.words(" a b \n") == 4  # the harness counts the empty ends, and so must we


def test_wikitext_is_counted_on_the_original_page(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sets" / "wikitext-2-raw"
    folder.mkdir(parents=True)
    (folder / "wiki.test.raw").write_text(WIKI, encoding="utf-8", newline="")
    words = ["--data", "wikitext-2", "--data-dir", str(folder.parent), "--mode", "carried"]
    record = measured(checkpoint, tmp_path, *words, "--start", "eos")
    assert "word perplexity" in capsys.readouterr().out
    figure = record["results"]["models"]["model"]["figures"]["carried"]
    pages = list(wikitext.pages(WIKI))
    text = "".join(wikitext.detokenised(page) for page in pages)
    size = sum(len(page.encode()) for page in pages)
    count = sum(len(page.split()) + 2 for page in pages)  # white space at both ends: two empty words
    assert figure["bytes"] == len(text.encode()) and figure["characters"] == len(text)
    original = figure["original"]
    assert (original["words"], original["bytes"], original["complete"]) == (count, size, True)
    assert size > figure["bytes"]
    assert original["bits_per_byte"] == pytest.approx(figure["nats"] / size / math.log(2), rel=1e-12)
    assert original["byte_perplexity"] == pytest.approx(math.exp(figure["nats"] / size), rel=1e-12)
    assert original["word_perplexity"] == pytest.approx(math.exp(figure["nats"] / count), rel=1e-12)
    assert (record["data"]["original_words"], record["data"]["original_bytes"]) == (count, size)
    # Without a start token the first token of every page is missing, and the record says so.
    without = measured(checkpoint, tmp_path, *words)["results"]["models"]["model"]["figures"]["carried"]
    assert not without["original"]["complete"] and without["tokens"] == figure["tokens"] - 2
    # A limit keeps whole pages.
    short = measured(checkpoint, tmp_path, *words, "--max-bytes", "10")
    assert short["data"]["documents"] == 1 and short["data"]["original_bytes"] == len(pages[0].encode())


def test_wikitext_as_the_harness_reads_it(data_dir: Path) -> None:
    """62 and 60 pages, and every page as lm-evaluation-harness feeds and counts it."""
    harness = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    for split, expected in (("test", 62), ("valid", 60)):
        path = data_dir / "lm" / "wikitext-2-raw" / f"wiki.{split}.raw.xz"
        pages = list(wikitext.pages(lzma.decompress(path.read_bytes()).decode("utf-8")))
        text = open_text(f"wikitext-2#{split}", data_dir=str(data_dir))
        assert len(pages) == expected
        documents = list(text.source.documents())
        assert documents == [harness.wikitext_detokenizer({"page": page}) for page in pages]
        counts = [harness.process_results({"page": page}, (0.0,)) for page in pages]
        assert text.words == sum(count["word_perplexity"][1] for count in counts)
        assert text.bytes == sum(count["byte_perplexity"][1] for count in counts)


@pytest.fixture(scope="module")
def wiki_bytes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """100,000,000 bytes of UTF-8 like enwik8: markup and characters of one to four bytes, cut at the end."""
    rng = np.random.default_rng(0)
    pieces = [
        "<page><title>Größe</title>", "'''Spikes''' are [[rare]]; ", "日本語の記事。", "naïve &amp; cliché ",
        "Ελληνικά ", "𝔘𝔫𝔦 ", "{{cite|year=2006}}\n", "русский текст ",
    ]  # fmt: skip
    block = "".join(pieces[i] for i in rng.integers(0, len(pieces), 100_000)).encode()
    path = tmp_path_factory.mktemp("wiki") / "enwik8"
    with path.open("wb") as file:
        left = enwik8.SIZE
        while left:
            left -= file.write(block[:left])
    yield path
    path.unlink()


def test_enwik8_in_bytes_and_characters(
    checkpoint: Path, wiki_bytes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = wiki_bytes.read_bytes()
    assert len(raw) == 100_000_000
    parts = {split: enwik8.read(wiki_bytes, split) for split in enwik8.PARTS}
    # Nothing is lost and nothing is read twice, wherever the cuts fall.
    whole = raw.decode("utf-8", errors="ignore")
    assert len(whole) < len(raw) and "".join(parts.values()) == whole
    for split, size in (("train", 90_000_000), ("valid", 5_000_000), ("test", 5_000_000)):
        assert abs(len(parts[split].encode()) - size) <= 3
    words = ["--data", "enwik8", "--data-dir", str(wiki_bytes.parent), "--mode", "disjoint,carried"]
    record = measured(checkpoint, tmp_path, *words, "--max-bytes", "3000", "--start", "eos")
    assert "bits/character" in capsys.readouterr().out
    read_text = parts["test"].encode()[:3000].decode("utf-8", errors="ignore")
    figures = record["results"]["models"]["model"]["figures"]
    assert list(figures) == ["disjoint@1024", "carried"]
    for figure in figures.values():
        assert (figure["bytes"], figure["characters"]) == (len(read_text.encode()), len(read_text))
        assert figure["characters"] < figure["bytes"]
        assert figure["bits_per_byte"] == pytest.approx(figure["nats"] / math.log(2) / figure["bytes"])
        assert figure["bits_per_character"] == pytest.approx(
            figure["nats"] / math.log(2) / figure["characters"], rel=1e-12
        )
    other = open_text("enwik8#valid", data_dir=str(wiki_bytes))  # the file itself may be named
    assert next(other.source.documents()) == parts["valid"]


@pytest.mark.parametrize("cut", range(12))
def test_every_cut_within_characters(cut: int) -> None:
    raw = "aé日𝔘z".encode()  # 1, 2, 3, 4 and 1 bytes
    left = enwik8.cut(raw[: cut + 3], cut, "t") if cut else ""
    right = enwik8.cut(raw[cut:], len(raw) - cut, "t", offset=cut)
    assert left + right == "aé日𝔘z"


def test_enwik8_that_is_damaged(wiki_bytes: Path, tmp_path: Path) -> None:
    short = tmp_path / "enwik8"
    short.write_bytes(b"abc")
    with pytest.raises(DataError, match="has 3 bytes where enwik8 has 100,000,000"):
        enwik8.read(short, "test")
    with pytest.raises(DataError, match=r"byte 97 \(0xff\) is not valid UTF-8"):
        enwik8.cut(b"ab\xffc", 4, "t", offset=95)


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    folder = tmp_path / "sets"
    folder.mkdir()
    rows = [
        {"context": "the cat sat on the", "continuation": "mat"},
        {"text": "a dog and another dog"},
        {"context": "x", "continuation": " y"},
    ]
    (folder / "lambada_test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder


def test_lambada_scores_the_last_word(
    checkpoint: Path, passages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a forward pass of every passage by itself."""
    from spikelm.checkpoint import load_model

    record = measured(checkpoint, tmp_path, "--data", "lambada", "--data-dir", str(passages))
    assert "last word of 3 passages" in capsys.readouterr().out
    model, nats, right = load_model(checkpoint, dtype=torch.float32), [], []
    words = Tokenizer.load(checkpoint)
    for prompt, word in (("the cat sat on the", " mat"), ("a dog and another", " dog"), ("x", " y")):
        ids = torch.tensor(words.encode(prompt + word))
        with torch.inference_mode():
            logits, _ = model(ids[None, :-1])
        scores = torch.nn.functional.cross_entropy(logits[0], ids[1:], reduction="none")
        first = len(words.encode(prompt)) - 1
        nats.append(float(scores[first:].sum()))
        right.append(bool((logits[0].argmax(-1) == ids[1:])[first:].all()))
    entry = record["results"]["models"]["model"]
    found = entry["last_word"]
    assert found["n"] == 3 and found["accuracy"] == np.mean(right)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    assert found["perplexity_stderr"] == pytest.approx(
        found["perplexity"] * np.std(nats, ddof=1) / math.sqrt(3), rel=1e-5
    )
    figure = entry["figures"]["last-word"]
    assert (figure["tokens"], figure["bytes"]) == (4 + 4 + 2, 4 + 4 + 2)
    assert figure["nats"] == pytest.approx(sum(nats), rel=1e-5)


def test_lambada_counts_a_model_that_knows_the_word(tmp_path: Path, passages: Path) -> None:
    """A model that always expects the next byte of " dog" is right in that passage alone."""
    from spikelm.evaluation.corpus import read_corpus
    from spikelm.evaluation.lambada import last_words, measure_last_words

    class Knows:
        def init_state(self, *_: object, **__: object) -> dict:
            return {}

        def __call__(self, tokens: torch.Tensor, state: object, ctx: object) -> tuple[torch.Tensor, dict]:
            logits = torch.zeros(*tokens.shape, 256)
            following = {ord("r"): " ", ord(" "): "d", ord("d"): "o", ord("o"): "g"}
            for byte, char in following.items():
                logits[tokens == byte] = 20.0 * torch.nn.functional.one_hot(torch.tensor(ord(char)), 256)
            return logits, {}

    text = open_text("lambada", data_dir=str(passages))
    words = Tokenizer.bytes()
    assert text.prompts is not None
    found = last_words(read_corpus(text.source, words), words, list(text.source.documents()), text.prompts)
    assert found.predictions == 10
    _, accuracy = measure_last_words(Knows(), found, vocab_size=256)
    assert accuracy["accuracy"] == pytest.approx(1 / 3)


def test_the_two_forms_of_lambada_are_the_same(data_dir: Path) -> None:
    both = [
        open_text("lambada", data_dir=str(data_dir / "eval" / f"lambada_{name}.jsonl.xz"), max_bytes=200_000)
        for name in ("openai", "test")
    ]
    texts = [list(text.source.documents()) for text in both]
    assert texts[0] == texts[1] and len(texts[0]) > 400 and both[0].prompts == both[1].prompts


def test_books_one_by_one(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "Emma.txt").write_text("Emma Woodhouse, handsome, clever, and rich. " * 20)
    (folder / "two.txt").write_text("\ufeff\nONE\n\nabc\ufeffTWO\n\ndef", encoding="utf-8")
    record = measured(checkpoint, tmp_path, "--data", f"books:{folder}", "--length", "64")
    out = capsys.readouterr().out
    assert "bits/byte of every book, carried" in out and "two 2: TWO" in out
    entry = record["results"]["models"]["model"]
    books = entry["documents"]
    assert [book["name"] for book in books] == ["Emma", "two 1: ONE", "two 2: TWO"]
    figure = entry["figures"]["carried"]
    assert sum(book["bytes"] for book in books) == figure["bytes"]
    nats = sum(book["bits_per_byte"] * book["bytes"] for book in books) * math.log(2)
    assert nats == pytest.approx(figure["nats"], rel=1e-9)
    # pg19 is found in the same way.
    (tmp_path / "sets" / "pg19").mkdir(parents=True)
    folder.rename(tmp_path / "sets" / "pg19" / "test")
    text = open_text("pg19", data_dir=str(tmp_path / "sets"))
    assert text.names == ("Emma", "two 1: ONE", "two 2: TWO")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("wikitext-103", "put wiki.test.raw of wikitext-103-raw-v1.zip"),
        ("wikitext-2#valid", "put wiki.valid.raw of wikitext-2-raw-v1.zip"),
        ("enwik8", "put enwik8 of mattmahoney.net/dc/enwik8.zip"),
        ("lambada", "put lambada_test.jsonl"),
        ("pg19", "pg19/test/*.txt"),
    ],
)
def test_a_set_that_is_not_here(
    name: str, advice: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", name, "--data-dir", str(tmp_path)]
    assert main(["eval", str(checkpoint), *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spikelm:")]
    assert len(lines) == 1 and advice in lines[0] and "--data-dir" in lines[0]


def test_damaged_sets(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    folder.mkdir()
    path = folder / "lambada_test.jsonl"
    for content, message in (
        ('{"passage": "x y"}', "line 1 is no passage"),
        ("[1]", "line 1 is no passage"),
        ('{"text": "word"}', "passage 0 has no last word"),
        ("\n", "holds no passage"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            open_text("lambada", data_dir=str(folder))
    (folder / "wikitext-2-raw").mkdir()
    (folder / "wikitext-2-raw" / "wiki.test.raw").write_text(" \n")
    with pytest.raises(DataError, match="has no page"):
        open_text("wikitext-2", data_dir=str(folder))
    with pytest.raises(DataError, match="holds no .txt file"):
        open_text(f"books:{folder / 'wikitext-2-raw'}")


def test_lambada_takes_no_windows(
    checkpoint: Path, passages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", "lambada", "--data-dir", str(passages), "--mode", "strided"]
    assert main(["eval", str(checkpoint), *words]) == 2
    assert "leave --mode and --lengths out" in capsys.readouterr().err


def test_the_hubs_copy_of_wikitext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    """Its rows are lines, blank ones empty: the same pages as those of the file."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    rows = ["" if line == " " else f"{line}\n" for line in WIKI.split("\n")[:-1]]
    pq.write_table(pa.table({"text": rows}), folder / "test-00000-of-00001.parquet")
    known = dataclasses.replace(SETS["wikitext-2"], hub=f"hub:{folder.parent}#{{split}}.text")
    monkeypatch.setitem(SETS, "wikitext-2", known)
    fetched = open_text("wikitext-2", data_dir=str(tmp_path / "nothing"))
    (tmp_path / "wikitext-2-raw").mkdir()
    (tmp_path / "wikitext-2-raw" / "wiki.test.raw").write_text(WIKI, encoding="utf-8", newline="")
    local = open_text("wikitext-2", data_dir=str(tmp_path))
    assert list(fetched.source.documents()) == list(local.source.documents())
    assert (fetched.words, fetched.bytes) == (local.words, local.bytes)
