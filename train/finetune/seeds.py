"""All runs of a fine-tuning: data read once, one run per seed, one report."""

from __future__ import annotations

import contextlib
import fcntl
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spikelm.classifier import Classifier, load_body
from spikelm.errors import CheckpointError, ConfigError, DataError, TrainingError
from spikelm.provenance import versions
from spikelm.train.backend import choose_device
from spikelm.train.files import point_at, replace_text, why
from spikelm.train.finetune.batches import encode
from spikelm.train.finetune.card import model_card
from spikelm.train.finetune.examples import Task, expand, load_task
from spikelm.train.finetune.metrics import spread
from spikelm.train.finetune.run import BEST, Run, RunResult, Sets
from spikelm.train.reporting import ProgressFactory, silent_progress
from spikelm.train.setup import model_config, refuse_int8
from spikelm.train.stop import StopSignals

if TYPE_CHECKING:
    from spikelm.config import ModelConfig
    from spikelm.tokenizer import Tokenizer
    from spikelm.train.finetune.config import FinetuneConfig

FIGURES = ("accuracy", "macro_f1", "loss")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What all seeds gave.

    Attributes:
        out: folder; ``out/best`` is the classifier of the seed with the best dev figure.
        task: the sets.
        runs: one per finished or interrupted seed.
        parameters: of the classifier.
        cut: set -> texts that were longer than ``max_length``.
        interrupted: name of the signal that ended it early, or None.
    """

    out: Path
    task: Task
    runs: tuple[RunResult, ...]
    parameters: int
    cut: dict[str, int]
    interrupted: str | None
    config: dict[str, Any]

    def summary(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Set -> figure -> mean, standard deviation and standard error over the seeds."""
        found: dict[str, dict[str, dict[str, float | None]]] = {}
        for part in ("dev", "test"):
            measured = [values for run in self.runs if (values := getattr(run, part)) is not None]
            if measured:
                found[part] = {name: spread([values[name] for values in measured]) for name in FIGURES}
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "out": str(self.out),
            "checkpoint": str(self.out / BEST),
            "labels": list(self.task.labels),
            "protocol": self.task.protocol,
            "texts": self.task.counts(),
            "cut": self.cut,
            "parameters": self.parameters,
            "summary": self.summary(),
            "runs": [run.to_dict() for run in self.runs],
            "interrupted": self.interrupted,
            "config": self.config,
            "versions": versions(),
            "machine": platform.machine(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def finetune(
    config: FinetuneConfig,
    *,
    progress: ProgressFactory = silent_progress,
    warn: Callable[[str], None] = lambda text: None,
    title: str = "finetune",
) -> Report:
    """Fine-tune with every seed, measure, and leave classifiers, logs and a report in ``config.out``.

    Args:
        config: what to do.
        progress: opens a bar.
        warn: told what is odd but usable.
        title: what the bar calls the work.

    Raises:
        SpikeLMError: configuration, data, checkpoint or folder cannot be used, or a loss is not finite.
    """
    device = choose_device(config.device)
    task = load_task(config.data, warn)
    tokenizer, core = _origin(config, task)
    limit = config.data.max_length
    sets = Sets(**{part: encode(getattr(task, part), tokenizer, limit) for part in ("train", "dev", "test")})
    cut = {part: getattr(sets, part).cut for part in ("train", "dev", "test")}
    if any(cut.values()):
        total = len(sets.train) + len(sets.dev) + len(sets.test)
        warn(
            f"{sum(cut.values())} of {total} texts are longer than data.max_length={limit} tokens and lose "
            "their end"
        )
    steps = -(-len(sets.train) // config.batch_size) * config.epochs
    if config.schedule.warmup > steps:
        raise ConfigError(
            f"schedule.warmup is {config.schedule.warmup}, longer than the {steps} steps of {config.epochs} "
            "epochs; lower it"
        )
    out = Path(config.out)
    identity = {"task": task.fingerprint(), "tokenizer": tokenizer.sha256, "model": core.to_dict()}
    runs: list[RunResult] = []
    parameters = 0
    with _locked(out), StopSignals() as stop:
        for number in range(config.seeds):
            seed = config.seed + number
            model = _classifier(config, core, task, seed)
            parameters = model.num_parameters()
            run = Run(
                config,
                model,
                tokenizer,
                sets,
                seed=seed,
                out=out / f"seed-{seed}",
                device=device,
                identity=identity,
            )
            resumed = run.open()
            total = config.epochs * len(sets.train)
            name = title if config.seeds == 1 else f"{title}, seed {seed}"
            with progress(name, total, "texts", run.done) as bar:
                if resumed:
                    bar.say(f"continuing after epoch {run.state.epoch} of {config.epochs} in {run.out}")
                runs.append(run.fit(bar, stop))
                if stop.received is not None:
                    bar.say(
                        f"{stop.received}: stopped; {run.state.epoch} whole epochs are kept, the same "
                        "command continues"
                    )
            if stop.received is not None:
                break
        report = Report(
            out=out,
            task=task,
            runs=tuple(runs),
            parameters=parameters,
            cut=cut,
            interrupted=stop.received,
            config=config.model_dump(mode="json"),
        )
        _leave(report, config, tokenizer)
    return report


def _origin(config: FinetuneConfig, task: Task) -> tuple[Tokenizer, ModelConfig]:
    """Tokenizer and core configuration.

    Raises:
        CheckpointError, DataError, ConfigError: the checkpoint cannot be used, or its tokenizer is
            another one.
    """
    from spikelm.checkpoint import load_tokenizer, read_config
    from spikelm.tokenizer import Tokenizer

    choice = None if config.data.tokenizer is None else str(expand(config.data.tokenizer))
    if config.init_from is None:
        tokenizer = _trained(choice, task) if is_bpe(choice) else Tokenizer.load(choice or "bytes")
        core = model_config(config.model or {}, tokenizer)
        refuse_int8(core, "the model")
        return tokenizer, core
    if is_bpe(choice):
        raise ConfigError(
            f"data.tokenizer is {choice!r} and init_from {config.init_from!r}; a checkpoint has its own "
            "tokenizer: data.tokenizer=null takes it"
        )
    core = read_config(config.init_from)
    refuse_int8(core, f"init_from {config.init_from}")
    own: Tokenizer | None
    try:
        own = load_tokenizer(config.init_from)
    except DataError:
        own = None
    if choice is None:
        if own is None:
            raise CheckpointError(
                f"{config.init_from} holds no tokenizer; name the one it was trained with: data.tokenizer=..."
            )
        return own, core
    tokenizer = Tokenizer.load(choice)
    if own is not None and own.sha256 != tokenizer.sha256:
        raise DataError(
            f"data.tokenizer {choice} is not the tokenizer saved in {config.init_from}; leave data.tokenizer "
            "out: fine-tuning needs the one the model was trained with"
        )
    if tokenizer.vocab_size > core.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model only {core.vocab_size}; "
            "use the tokenizer the model was trained with"
        )
    return tokenizer, core


def is_bpe(tokenizer: str | None) -> bool:
    """Whether a tokenizer is to be trained on the training lines."""
    return tokenizer is not None and tokenizer.startswith("bpe:")


def _trained(choice: str | None, task: Task) -> Tokenizer:
    """The BPE that ``bpe:N`` asks for: the same text gives the same tokenizer."""
    from spikelm.tokenizer import Tokenizer

    size = str(choice).removeprefix("bpe:")
    if not size.isdecimal():
        raise ConfigError(f"data.tokenizer is {choice!r}; expected bpe:N with N tokens, as bpe:4096")
    return Tokenizer.train_bpe((f"{example.text}\n" for example in task.train), int(size))


def _classifier(config: FinetuneConfig, core: ModelConfig, task: Task, seed: int) -> Classifier:
    """The classifier with its initial weights."""
    torch.manual_seed(seed)
    model = Classifier(core, task.labels, pooling=config.pooling, score_dropout=config.score_dropout)
    if config.init_from is not None:
        load_body(model, config.init_from)
    return model


def _leave(report: Report, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
    """Report, link to the best seed's classifier, and model cards."""
    usable = [run for run in report.runs if run.folder is not None and run.dev is not None]
    values = report.to_dict()
    try:
        replace_text(report.out / "report.json", json.dumps(values, indent=1, ensure_ascii=False) + "\n")
        for run in usable:
            if run.folder is not None and run.interrupted is None:
                replace_text(run.folder / "README.md", model_card(report, run))
        if usable:
            best = max(usable, key=lambda run: float((run.dev or {})[config.metric]))
            if best.folder is not None:
                point_at(report.out / BEST, best.folder)
    except OSError as error:
        raise TrainingError(f"the report cannot be written to {report.out} ({why(error)})") from error


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder: two processes in one would write over one another.

    Raises:
        TrainingError: it is held, or cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        stream = (out / "run.lock").open("w")
    except OSError as error:
        raise TrainingError(
            f"the folder {out} cannot be written ({why(error)}); choose another: out=FOLDER"
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(
                f"another process is training in {out}; wait for it or choose another out folder"
            ) from error
        yield
