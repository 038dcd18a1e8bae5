"""What does reading shared prefixes once save in multiple-choice tasks?

    python benchmarks/eval_tasks.py [--model spikegpt-nano-sd] [--limit 12] [--rounds 3]

Writes results/eval_tasks.json. The requests are those that lm-evaluation-harness makes of the offline tasks
in $SPIKELM_DATA (zero and five examples before a question), the tokens are bytes, the weights random: which
tokens are read does not depend on them. Timed is the answering alone, in turns: shared prefixes read once,
every request read whole by the same code, and the harness's own HFLM on the same checkpoint. Seconds are
medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _record import record
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import spikelm.hf  # noqa: F401 (HFLM loads the checkpoint through transformers)
from spikelm.checkpoint import load_model, save_checkpoint
from spikelm.config import ModelConfig
from spikelm.evaluation.tasks.language_model import HarnessModel
from spikelm.evaluation.tasks.offline import FOLDER
from spikelm.evaluation.tasks.run import parse, run
from spikelm.model import SpikeLM
from spikelm.presets import find
from spikelm.tokenizer import Tokenizer
from spikelm.yaml_values import read_yaml

TASKS = ("arc_easy_local", "arc_easy_local@5", "piqa_local", "copa_local@5", "lambada_openai_local")
INT8 = {"name": "int8"}
ADAPTIVE = {"name": "adaptive", "k": 3.0}

Answers = list[tuple[float, bool]]


class Collecting(HarnessModel):
    """Notes the requests of a task instead of answering them."""

    requests: list[Instance]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> Answers:
        """Answer nothing of use."""
        self.requests = list(requests)
        return [(0.0, False)] * len(requests)


def models(preset: str) -> dict[str, SpikeLM]:
    """The preset's continuous twin, and the preset with int8 weights (its integer path)."""
    given = {**read_yaml(find("models", preset)), "initializer_range": 0.1}
    spiking = {"head_neuron": ADAPTIVE, "weights": INT8, "weight_overrides": {"head": INT8}}
    configs = {
        "continuous twin, float32": ModelConfig.from_dict(given).twin(),
        "integer path, int8": ModelConfig.from_dict({**given, **spiking}),
    }
    found = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        found[name] = SpikeLM(config).eval()
    return found


def timed(answer: Callable[[], Answers]) -> tuple[float, Answers]:
    """Seconds and answers of one call."""
    started = time.perf_counter()
    answers = answer()
    return time.perf_counter() - started, answers


def measure(folder: Path, task: str, limit: int, rounds: int, batch_size: int) -> dict[str, Any]:
    """One model on one task, all three ways in turns."""
    words, model = Tokenizer.bytes(), load_model(folder)
    collecting = Collecting(model, words)
    run(collecting, parse(task), limit=limit)
    requests = collecting.requests
    ours = {share: HarnessModel(model, words, batch_size=batch_size, share=share) for share in (True, False)}
    # Without bos and eos HFLM must be told what a text begins after.
    start = ours[True].prefix_token_id
    hf = HFLM(str(folder), device="cpu", dtype="float32", batch_size=batch_size, prefix_token_id=start)
    ways: dict[str, Callable[[], Answers]] = {
        "shared": lambda: ours[True].loglikelihood(requests),
        "whole": lambda: ours[False].loglikelihood(requests),
        "hflm": lambda: hf.loglikelihood(requests, disable_tqdm=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, Answers] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            spent, answers[name] = timed(way)
            seconds[name].append(spent)
    values = {name: [value for value, _ in found] for name, found in answers.items()}
    medians = {name: statistics.median(found) for name, found in seconds.items()}

    def apart(a: str, b: str) -> float:
        return max(abs(x - y) for x, y in zip(values[a], values[b], strict=True))

    return {
        "requests": len(requests),
        "tokens_whole": ours[False].reader.tokens_read // rounds,
        "tokens_shared": ours[True].reader.tokens_read // rounds,
        "seconds": medians,
        "every_run": seconds,
        "times_faster": medians["whole"] / medians["shared"],
        "times_faster_than_hflm": medians["hflm"] / medians["shared"],
        "largest_difference_to_whole": apart("shared", "whole"),
        "largest_difference_to_hflm": apart("shared", "hflm"),
        "largest_loglikelihood": max(map(abs, values["whole"])),
    }


def main() -> int:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="spikegpt-nano-sd")
    parser.add_argument("--tasks", default=" ".join(TASKS), help="separated by spaces")
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not os.environ.get(FOLDER):
        print(f"{FOLDER} is not set: there are no documents, nothing is measured")
        return 0
    figures: dict[str, Any] = {}
    for name, model in models(args.model).items():
        figures[name] = {}
        with tempfile.TemporaryDirectory() as temporary:
            folder = save_checkpoint(Path(temporary) / "model", model, Tokenizer.bytes())
            for task in args.tasks.split():
                row = measure(folder, task, args.limit, args.rounds, args.batch_size)
                figures[name][task] = row
                print(
                    f"{name}, {task}: {row['seconds']['shared']:.2f} s, {row['times_faster']:.2f}x faster "
                    f"than whole, {row['times_faster_than_hflm']:.2f}x than HFLM; {row['tokens_shared']:,} "
                    f"of {row['tokens_whole']:,} tokens; scores differ by "
                    f"{row['largest_difference_to_whole']:.1e}",
                    flush=True,
                )
    options = {key: value for key, value in vars(args).items() if key != "tasks"}
    print(record("eval_tasks", {**options, "models": figures}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
