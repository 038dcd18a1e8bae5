"""Fine-tuning: it learns, padding changes nothing, transformers gives the same scores, runs go on exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import spikelm.hf  # noqa: F401 (makes the Auto classes know the model)
from spikelm.checkpoint import load_model, save_checkpoint
from spikelm.classifier import Classifier, load_body, load_classifier
from spikelm.cli import main
from spikelm.config import ModelConfig
from spikelm.errors import CheckpointError
from spikelm.model import SpikeLM
from spikelm.recurrence import Context
from spikelm.tokenizer import Tokenizer
from spikelm.train.finetune.batches import collate, encode
from spikelm.train.finetune.config import FinetuneConfig
from spikelm.train.finetune.seeds import Report, finetune
from spikelm.train.reporting import Bar

from .finetuning import NEURONS, run, values, write_toy


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A run of four epochs that was never interrupted."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder / "train.txt", 320, 1)
    write_toy(folder / "test.txt", 120, 2)
    return folder, run(folder)


def test_it_learns_what_can_be_learnt(finished: tuple[Path, Report]) -> None:
    """Held-out lines: every filler word is uninformative, so only the deciding words can have been learnt."""
    folder, report = finished
    (only,) = report.runs
    assert only.test is not None and only.dev is not None
    assert only.test["accuracy"] > 0.95 and only.test["texts"] == 120
    assert only.history[-1]["train_loss"] < 0.5 * only.history[0]["train_loss"]
    assert only.spikes is not None and 0.0 < only.spikes["spike_rate"] < 1.0
    assert only.dev == only.history[only.best_epoch - 1]["dev"]
    saved = json.loads((folder / "out" / "report.json").read_text())
    assert saved["summary"]["test"]["accuracy"]["mean"] == only.test["accuracy"]
    assert saved["texts"]["train"]["0"] + saved["texts"]["dev"]["0"] == 160


def test_shuffled_labels_cannot_be_learnt(tmp_path: Path) -> None:
    """The control: the same run on labels that mean nothing stays near chance."""
    write_toy(tmp_path / "train.txt", 320, 1, shuffled=True)
    write_toy(tmp_path / "test.txt", 120, 2)
    (only,) = run(tmp_path).runs
    assert only.test is not None and only.test["accuracy"] < 0.8


@pytest.mark.parametrize("pooling", ["mean", "last", "max"])
@pytest.mark.parametrize("neurons", NEURONS)
def test_padding_changes_nothing(neurons: str, pooling: str) -> None:
    """Scores and gradients of a padded batch are those of its texts alone."""
    config = ModelConfig.from_dict({"hidden_size": 16, "num_hidden_layers": 2, **NEURONS[neurons]})
    model = Classifier(config, ["a", "b", "c"], pooling=pooling).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    texts = [[5, 9, 200], [7], [1, 2, 3, 4, 5, 6, 7, 8], [3, 3, 3, 3]]
    grads: list[list[torch.Tensor]] = []
    for together in (True, False):
        model.zero_grad()
        if together:
            width = max(map(len, texts))
            tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in texts])
            valid = torch.tensor([[column < len(ids) for column in range(width)] for ids in texts])
            scores = model.classify(tokens, Context(valid=valid))
            kept = scores.detach()
        else:
            scores = torch.cat([model.classify(torch.tensor([ids])) for ids in texts])
            torch.testing.assert_close(scores.detach(), kept, rtol=0, atol=1e-12)
        torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1, 2, 1])).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for padded, alone in zip(*grads, strict=True):
        torch.testing.assert_close(padded, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pooling", ["mean", "last", "max"])
def test_transformers_gives_the_same_scores(toy: Path, pooling: str) -> None:
    report = run(toy, epochs=1, pooling=pooling, data__labels={"1": "good", "0": "bad"})
    folder = report.out / "best"
    ours = load_classifier(folder)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert ours.labels == ("good", "bad") and ours.pooling == pooling
    assert theirs.config.id2label == {0: "good", 1: "bad"} and theirs.config.num_labels == 2
    tokenizer = Tokenizer.load(folder)
    batch = collate(encode(report.task.test[:12], tokenizer, 64), range(12))
    assert batch.valid is not None
    with torch.no_grad():
        wanted = ours.classify(batch.tokens, Context(valid=batch.valid))
        scores = theirs(batch.tokens, attention_mask=batch.valid.long()).logits
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-6)
    assert wanted.std() > 0.01
    words = AutoTokenizer.from_pretrained(folder)(report.task.test[0].text)["input_ids"]
    assert words == tokenizer.encode(report.task.test[0].text)
    theirs.save_pretrained(toy / "again")
    torch.testing.assert_close(load_classifier(toy / "again").score.weight, ours.score.weight)
    assert load_classifier(toy / "again").pooling == pooling
    card = (folder / "README.md").read_text()
    assert "good" in card and "test set as given" in card and "Firing rate" in card
    with pytest.raises(CheckpointError, match="holds a language model"):
        save_checkpoint(toy / "lm", SpikeLM(ours.config))
        load_classifier(toy / "lm")


class Stopper:
    """A progress bar that sends this process a signal after some texts."""

    def __init__(self, texts: int) -> None:
        self.left = texts

    def advance(self, amount: float = 1) -> None:
        self.left -= int(amount)
        if self.left <= 0:
            self.left = 1 << 40
            os.kill(os.getpid(), signal.SIGTERM)

    def note(self, text: str) -> None: ...

    def say(self, text: str) -> None: ...


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / "best" / "model.safetensors")


def same(one: Report, other: Report) -> None:
    """Everything that is no time of day is equal, to the bit."""
    for mine, theirs in zip(one.runs, other.runs, strict=True):
        strip = [{**entry, "seconds": 0} for entry in mine.history]
        assert strip == [{**entry, "seconds": 0} for entry in theirs.history]
        assert mine.test == theirs.test and mine.best_epoch == theirs.best_epoch


def test_an_interrupted_run_continues_exactly(finished: tuple[Path, Report], toy: Path) -> None:
    """Stopped in the middle of an epoch: that epoch is done again, the result is the uninterrupted one."""
    folder, whole = finished
    config = FinetuneConfig.from_dict(values(toy))
    per_epoch = len(whole.task.train)

    @contextmanager
    def bar(title: str, total: float | None = None, unit: str = "it", done: float = 0) -> Iterator[Bar]:
        yield Stopper(per_epoch + per_epoch // 2)

    stopped = finetune(config, progress=bar)
    assert stopped.interrupted == "SIGTERM" and stopped.runs[0].epochs == 1
    assert stopped.runs[0].test is None
    assert load_classifier(toy / "out" / "best").labels == ("0", "1")  # usable, as it is
    again = finetune(config)
    assert again.interrupted is None
    same(again, whole)
    for name, value in weights(folder).items():
        assert torch.equal(value, weights(toy)[name]), name
    events = [json.loads(line) for line in (toy / "out/seed-0/log.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in events if e["event"] == "epoch"] == [1, 2, 3, 4]
    same(finetune(config), whole)  # a finished run is measured again, not trained again
    with pytest.raises(CheckpointError, match="resume=true continues"):
        run(toy, resume=False)
    with pytest.raises(CheckpointError, match=r"holds another run \(batch_size differ"):
        run(toy, batch_size=8)
    write_toy(toy / "train.txt", 320, 5)
    with pytest.raises(CheckpointError, match="another run .*task"):
        run(toy)


def test_a_killed_process_continues_exactly(finished: tuple[Path, Report], toy: Path) -> None:
    """kill -9 of a real process, whenever it happens to strike after the first epoch."""
    _, whole = finished
    (toy / "run.yaml").write_text(json.dumps(values(toy)))
    process = subprocess.Popen(
        [sys.executable, "-m", "spikelm", "finetune", str(toy / "run.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # another number of threads rounds otherwise
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while not (toy / "out/seed-0/state.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    _, said = process.communicate()
    assert (toy / "out/seed-0/state.json").exists(), said.decode()
    same(run(toy), whole)


def test_ctrl_c_leaves_a_usable_state(toy: Path) -> None:
    (toy / "run.yaml").write_text(json.dumps(values(toy, epochs=1000)))
    process = subprocess.Popen(
        [sys.executable, "-m", "spikelm", "finetune", str(toy / "run.yaml"), "--json", str(toy / "r.json")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while not (toy / "out/seed-0/state.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said.decode()
    assert b"whole epochs are kept, the same command continues" in said
    report = json.loads((toy / "r.json").read_text())
    assert report["interrupted"] == "SIGINT" and report["runs"][0]["dev"]["texts"] == 45
    assert load_classifier(toy / "out/best").labels == ("0", "1")
    with pytest.raises(CheckpointError, match="holds a text classifier, not a language model"):
        load_model(toy / "out/best")


def test_damaged_state_is_told(toy: Path) -> None:
    run(toy, epochs=1)
    (file,) = (toy / "out/seed-0").glob("state-*.safetensors")
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        run(toy, epochs=1)


def test_early_stopping_keeps_the_best_weights(toy: Path) -> None:
    """A learning rate that spoils the model ends the run, and what is kept is the best epoch."""
    report = run(
        toy, epochs=12, patience=2, optim={"lr": 5e-2, "min_lr": 1e-5}, schedule={"name": "constant"}
    )
    (only,) = report.runs
    accuracies = [entry["dev"]["accuracy"] for entry in only.history]
    best = accuracies.index(max(accuracies))
    assert only.best_epoch == best + 1
    assert only.epochs == best + 3 < 12
    model = load_classifier(report.out / "best")
    dev = encode(report.task.dev, Tokenizer.load(report.out / "best"), 64)
    with torch.no_grad():
        answers = [int(model.classify(torch.tensor([ids])).argmax()) for ids in dev.tokens]
    right = sum(a == label for a, label in zip(answers, dev.labels, strict=True))
    assert right / len(answers) == pytest.approx(max(accuracies))


def test_seeds_are_separate_runs(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toy / "run.yaml").write_text(json.dumps(values(toy, epochs=2)))
    assert main(["finetune", str(toy / "run.yaml"), "--seeds", "2", "--json", str(toy / "r.json")]) == 0
    report = json.loads((toy / "r.json").read_text())
    one, two = report["runs"]
    assert (one["seed"], two["seed"]) == (0, 1)
    assert one["history"][0]["train_loss"] != two["history"][0]["train_loss"]
    figures = [one["test"]["accuracy"], two["test"]["accuracy"]]
    summary = report["summary"]["test"]["accuracy"]
    assert summary["mean"] == pytest.approx(sum(figures) / 2)
    assert summary["sd"] == pytest.approx(abs(figures[0] - figures[1]) / 2**0.5)
    best = max((one, two), key=lambda found: found["dev"]["accuracy"])
    assert (toy / "out/best").resolve().parent.name == f"seed-{best['seed']}"
    assert "standard deviation" in capsys.readouterr().out


def test_from_a_checkpoint(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    core = SpikeLM(ModelConfig.from_dict({"hidden_size": 16, "num_hidden_layers": 1, **NEURONS["sd"]}))
    save_checkpoint(toy / "lm", core, Tokenizer.bytes())
    classifier = Classifier(core.config, ["a", "b"])
    score = classifier.score.weight.clone()
    load_body(classifier, toy / "lm")
    for name, value in core.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(classifier.state_dict()[name], value), name
    assert torch.equal(classifier.score.weight, score)
    data = [f"data.train={toy / 'train.txt'}", f"data.test={toy / 'test.txt'}", f"out={toy / 'out'}"]
    assert main(["finetune", str(toy / "lm"), *data, "epochs=1", "optim.lr=1e-3", "device=cpu"]) == 0
    saved = load_file(toy / "out/best/model.safetensors")["model.embedding.weight"]
    moved = (saved - core.embedding.weight.detach()).abs().max()
    assert 0 < moved < 0.1  # trained from these weights, not from new ones
    other = toy / "bpe"
    Tokenizer.train_bpe(["some words and more words"] * 9, 300).save(other)
    capsys.readouterr()
    assert main(["finetune", str(toy / "lm"), *data, f"data.tokenizer={other}"]) == 2
    assert "is not the tokenizer saved in" in capsys.readouterr().err
    assert main(["finetune", str(toy / "lm"), *data, "data.tokenizer=bpe:300"]) == 2
    assert "has its own tokenizer" in capsys.readouterr().err
    assert main(["finetune", str(toy / "lm")]) == 2
    assert "data.train is missing" in capsys.readouterr().err
