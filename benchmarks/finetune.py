"""Does fine-tuning learn? MR and Subj from scratch, beside a majority vote and a regression on words.

All three see the same training lines and are measured on the same test fold (data.fold of the preset); the
logistic regression (words and pairs of words) chooses its weight decay on the same dev lines. A nano model
with a vocabulary of its own starts from random weights: without pretraining the published figures are not
the goal here. Far more than the majority is expected; more than the words alone would be good.

    .venv/bin/python benchmarks/finetune.py [--seeds 3] [--tasks subj mr] [-- KEY=VALUE ...]

Needs the data folder in SPIKELM_DATA. Tens of minutes on two cores with the defaults.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _record import record
from torch import Tensor

from spikelm.cli._common import progress
from spikelm.train.finetune.config import FinetuneConfig
from spikelm.train.finetune.examples import Example, Task
from spikelm.train.finetune.metrics import measure
from spikelm.train.finetune.seeds import finetune

WORDS = 20_000
CONFIGURATION = ("model", "pooling", "optim", "schedule", "epochs", "patience", "batch_size")
DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)


def majority(task: Task) -> dict[str, Any]:
    """The class that is most frequent in training, for every text."""
    winner = Counter(example.label for example in task.train).most_common(1)[0][0]
    truth = [example.label for example in task.test]
    figures = measure(truth, [winner] * len(truth), len(task.labels), 0.0).to_dict()
    return {key: figures[key] for key in ("texts", "accuracy", "stderr", "macro_f1")}


def features(texts: Sequence[Example], index: dict[str, int]) -> Tensor:
    """Which words and pairs of words occur, sparse [texts, words]."""
    rows, columns = [], []
    for row, example in enumerate(texts):
        for column in {index[gram] for gram in grams(example.text) if gram in index}:
            rows.append(row)
            columns.append(column)
    where = torch.tensor([rows, columns])
    size = (len(texts), len(index))
    return torch.sparse_coo_tensor(where, torch.ones(len(rows)), size, check_invariants=True).coalesce()


def grams(text: str) -> list[str]:
    """Words, and words beside one another."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]


def regression(task: Task) -> dict[str, Any]:
    """Multinomial logistic regression on words and pairs of words, L2 chosen on the dev lines."""
    counts = Counter(gram for example in task.train for gram in set(grams(example.text)))
    index = {gram: i for i, (gram, _) in enumerate(counts.most_common(WORDS))}
    sets = {part: features(getattr(task, part), index) for part in ("train", "dev", "test")}
    truth = {part: torch.tensor([found.label for found in getattr(task, part)]) for part in sets}
    best: tuple[float, float, Tensor] | None = None
    for decay in DECAYS:
        weight = torch.zeros(len(index) + 1, len(task.labels), requires_grad=True)
        solver = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def closure(weight: Tensor = weight, solver: Any = solver, decay: float = decay) -> Tensor:
            solver.zero_grad()
            scores = torch.sparse.mm(sets["train"], weight[:-1]) + weight[-1]
            loss = F.cross_entropy(scores, truth["train"]) + 0.5 * decay * weight[:-1].square().sum()
            torch.autograd.backward(loss)
            return loss

        solver.step(closure)
        found = weight.detach()
        scores = torch.sparse.mm(sets["dev"], found[:-1]) + found[-1]
        accuracy = float((scores.argmax(1) == truth["dev"]).float().mean())
        if best is None or accuracy > best[0]:
            best = (accuracy, decay, found)
    assert best is not None
    dev, decay, weight = best
    scores = torch.sparse.mm(sets["test"], weight[:-1]) + weight[-1]
    nats = float(F.cross_entropy(scores, truth["test"], reduction="sum"))
    metrics = measure(truth["test"].tolist(), scores.argmax(1).tolist(), len(task.labels), nats)
    return {**metrics.to_dict(), "dev_accuracy": dev, "decay": decay, "features": len(index)}


def main() -> int:
    """Run, print, record; 1 if a model is not clearly better than the majority."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["subj", "mr"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--name", default="finetune", help="name of the result file")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE for every configuration, after --")
    options = parser.parse_args()
    if not os.environ.get("SPIKELM_DATA"):
        print("SPIKELM_DATA names no data folder; there is nothing to measure.", file=sys.stderr)
        return 0
    figures: dict[str, Any] = {}
    good = True
    for name in options.tasks:
        with tempfile.TemporaryDirectory() as folder:
            pairs = [*options.overrides, f"seeds={options.seeds}", f"out={folder}"]
            config = FinetuneConfig.from_yaml(name, pairs)
            started = time.perf_counter()
            report = finetune(config, progress=progress, title=name)
            if report.interrupted is not None:
                return 130
            seconds = time.perf_counter() - started
        task = report.task
        summary = report.summary()
        model = {
            "accuracy": summary["test"]["accuracy"],
            "macro_f1": summary["test"]["macro_f1"],
            "runs": [
                {
                    "seed": run.seed,
                    "epochs": run.epochs,
                    "best_epoch": run.best_epoch,
                    "dev": run.dev,
                    "test": run.test,
                    "spike_rate": (run.spikes or {}).get("spike_rate"),
                    "seconds": run.seconds,
                }
                for run in report.runs
            ],
            "parameters": report.parameters,
            "seconds": seconds,
        }
        base, words = majority(task), regression(task)
        figures[name] = {
            "texts": {part: len(getattr(task, part)) for part in ("train", "dev", "test")},
            "protocol": task.protocol,
            "configuration": {
                key: report.config[key] for key in ("model", "optim", "epochs", "patience", "batch_size")
            },
            "spiking": model,
            "majority": base,
            "words": words,
        }
        mean = float(summary["test"]["accuracy"]["mean"] or 0.0)
        good = good and mean > base["accuracy"] + 0.1
        spread = summary["test"]["accuracy"]["sd"]
        deviation = "" if spread is None else f" (standard deviation {spread:.4f})"
        print(
            f"{name}: spiking model {mean:.4f}{deviation}, words {words['accuracy']:.4f}, "
            f"majority {base['accuracy']:.4f} (standard error {words['stderr']:.4f}); {seconds:.0f} s"
        )
    print(record(options.name, figures))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
