"""Tasks and long context: what ``spikelm eval`` does for ``--tasks`` and ``--long-context``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikelm.cli._common import console, progress, write_json
from spikelm.evaluation.longcontext.prompt import HAYSTACK

if TYPE_CHECKING:
    import torch

    from spikelm.model import SpikeLM
    from spikelm.tokenizer import Tokenizer


def run_tasks(
    checkpoints: list[Path],
    tasks: str,
    limit: int | None = None,
    batch_size: int = 16,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    json_file: Path | None = None,
) -> dict[str, Any]:
    """Ask checkpoints the questions of lm-evaluation-harness, print a table, return the record.

    Args:
        checkpoints: folders; each with its own tokenizer.
        tasks: names, separated by commas; NAME@K for K examples, ``local`` for all offline tasks.
        limit: documents of each task at most.
        batch_size: sequences read side by side.
        device: where to compute.
        dtype: of the weights.
        seed: of examples and sampled texts.
        json_file: also written there.

    Raises:
        ConfigError: the harness is not installed, an unknown task, an impossible number.
        CheckpointError: no checkpoint.
        DataError: no tokenizer, or documents that are not there.
    """
    record = rerun_tasks(
        {
            "checkpoints": [str(folder) for folder in checkpoints],
            "tasks": tasks,
            "limit": limit,
            "batch_size": batch_size,
            "device": device,
            "dtype": dtype,
            "seed": seed,
        }
    )
    if str(json_file) != "-":
        _print_tasks(record["results"]["models"])
    write_json(json_file, record)
    return record


def rerun_tasks(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The record of :func:`run_tasks` with these arguments; nothing is printed."""
    from importlib.metadata import version

    from spikelm.evaluation.record import stamp
    from spikelm.evaluation.tasks import offline
    from spikelm.evaluation.tasks.run import bare, check_installed, check_names, parse, run

    asked = parse(str(arguments["tasks"]))
    check_installed()
    check_names(list(asked))
    data = offline.checksums([bare(name) for name in asked])
    folders = labelled([Path(folder) for folder in arguments["checkpoints"]])
    words: dict[str, Tokenizer] = {label: _tokenizer(folder) for label, folder in folders.items()}
    from spikelm.evaluation.tasks.language_model import HarnessModel

    models: dict[str, Any] = {}
    for label, folder in folders.items():
        model = _model(folder, arguments)
        with progress(f"tasks, {label}", unit="tokens") as bar:
            asker = HarnessModel(
                model,
                words[label],
                batch_size=arguments["batch_size"],
                seed=arguments["seed"],
                advance=bar.advance,
            )
            models[label] = run(asker, asked, limit=arguments["limit"], seed=arguments["seed"])
    documents = [row["n"] for row in next(iter(models.values())).values() if row["n"] is not None]
    return stamp(
        "tasks",
        {"models": models},
        arguments=arguments,
        checkpoints=folders,
        data={"source": "lm-evaluation-harness", "version": version("lm_eval"), "files": data},
        tokenizer_sha256=_one([tokenizer.sha256 for tokenizer in words.values()]),
        seed=arguments["seed"],
        n=sum(documents),
    )


def run_long_context(
    checkpoints: list[Path],
    kinds: str,
    lengths: str = "1k,4k",
    samples: int = 20,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    json_file: Path | None = None,
    haystack: str = HAYSTACK,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Measure how far back checkpoints remember, print tables, return the record.

    Args:
        checkpoints: folders.
        kinds: any of passkey, needle, mqar, ruler (or one of RULER's), separated by commas.
        lengths: tokens, separated by commas: ``1k,4k,1m``.
        samples: prompts per length (and depth).
        device: where to compute.
        dtype: of the weights.
        seed: of everything drawn.
        json_file: also written there.
        haystack: text to hide things in, as ``--data`` takes it.
        batch_size: prompts read side by side.

    Raises:
        ConfigError: an unknown kind, an impossible number.
        CheckpointError: no checkpoint.
        DataError: no tokenizer (``mqar`` needs none), too short a length, a haystack without sentences.
    """
    record = rerun_long_context(
        {
            "checkpoints": [str(folder) for folder in checkpoints],
            "kinds": kinds,
            "lengths": lengths,
            "samples": samples,
            "device": device,
            "dtype": dtype,
            "seed": seed,
            "haystack": haystack,
            "batch_size": batch_size,
        }
    )
    if str(json_file) != "-":
        _print_long_context(record["results"]["models"])
    write_json(json_file, record)
    return record


def rerun_long_context(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The record of :func:`run_long_context` with these arguments; nothing is printed."""
    from spikelm.data.source import open_source
    from spikelm.errors import ConfigError
    from spikelm.evaluation.longcontext.measure import (
        measure_prompts,
        measure_recall,
        parse_kinds,
        parse_lengths,
    )
    from spikelm.evaluation.longcontext.prompt import Haystack
    from spikelm.evaluation.record import stamp
    from spikelm.evaluation.tasks.reader import Reader

    kinds, lengths = parse_kinds(str(arguments["kinds"])), parse_lengths(str(arguments["lengths"]))
    samples, seed = arguments["samples"], arguments["seed"]
    for name in ("samples", "batch_size"):
        if arguments[name] < 1:
            raise ConfigError(f"{name} is {arguments[name]}; expected at least 1")
    hay = Haystack(open_source(str(arguments["haystack"])))
    folders = labelled([Path(folder) for folder in arguments["checkpoints"]])
    words: dict[str, Tokenizer] = {}
    if kinds != ("mqar",):
        words = {label: _tokenizer(folder) for label, folder in folders.items()}
    models: dict[str, Any] = {}
    for label, folder in folders.items():
        model = _model(folder, arguments)
        rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        with progress(f"long context, {label}", unit="tokens") as bar:
            reader = Reader(
                model,
                vocab_size=model.config.vocab_size,
                device=model.embedding.weight.device,
                batch_size=arguments["batch_size"],
                advance=bar.advance,
            )
            for kind in kinds:
                for length in lengths:
                    bar.note(f"{kind}, {length:,} tokens")
                    if kind == "mqar":
                        rows[kind].append(measure_recall(reader, length, samples=samples, seed=seed))
                        continue
                    rows[kind] += measure_prompts(
                        reader, words[label], kind, length, samples=samples, seed=seed, haystack=hay
                    )
        models[label] = rows
    sha = hashlib.sha256("\n".join(hay.sentences).encode()).hexdigest() if hay.used else None
    return stamp(
        "long-context",
        {"models": models},
        arguments=arguments,
        checkpoints=folders,
        data={"source": arguments["haystack"], "name": hay.name, "sha256": sha},
        tokenizer_sha256=_one([tokenizer.sha256 for tokenizer in words.values()]),
        seed=seed,
        n=samples,
    )


def labelled(folders: Sequence[Path]) -> dict[str, Path]:
    """A name for each checkpoint: its folder's, with as many parents' as make it unique.

    Raises:
        ConfigError: none is given, or one is given twice.
    """
    from spikelm.checkpoint import resolve_folder
    from spikelm.errors import ConfigError

    if not folders:
        raise ConfigError("no checkpoint is given; expected at least one folder")
    whole = [folder.resolve() for folder in folders]
    if len(set(whole)) < len(whole):
        twice = next(folder for number, folder in enumerate(whole) if folder in whole[:number])
        raise ConfigError(f"checkpoint {twice} is given twice; give it once")
    deepest = max(len(path.parts) for path in whole)
    depth = next(
        depth for depth in range(1, deepest + 1) if len({path.parts[-depth:] for path in whole}) == len(whole)
    )
    return {
        "/".join(path.parts[-depth:]): resolve_folder(folder)
        for path, folder in zip(whole, folders, strict=True)
    }


def _tokenizer(folder: Path) -> Tokenizer:
    from spikelm.cli._common import tokenizer_for
    from spikelm.errors import DataError

    try:
        return tokenizer_for(folder, None)
    except DataError as error:
        raise DataError(
            f"{folder} has no usable tokenizer ({error}); questions are text: save the tokenizer the model "
            "was trained with beside it"
        ) from error


def _model(folder: Path, arguments: Mapping[str, Any]) -> SpikeLM:
    import torch

    from spikelm.checkpoint import load_model
    from spikelm.errors import ConfigError

    dtypes: dict[str, torch.dtype] = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float64": torch.float64,
    }
    dtype, device = str(arguments["dtype"]), str(arguments["device"])
    if dtype not in dtypes:
        raise ConfigError(f"dtype {dtype!r}; expected one of {', '.join(dtypes)}")
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return load_model(folder, device=target, dtype=dtypes[dtype])


def _one(hashes: Sequence[str]) -> str | None:
    """The hash where all are equal, else None (each checkpoint then has its own tokenizer)."""
    return hashes[0] if len(set(hashes)) == 1 else None


def _number(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "-"
    numbers = [value] if stderr is None else [value, stderr]
    return " ± ".join(f"{number:.4f}" if abs(number) < 1e5 else f"{number:.4g}" for number in numbers)


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> None:
    """A table whose first ``words`` columns are text and the others numbers."""
    from rich.table import Table

    table = Table(title=title)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < words else "right")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def _print_tasks(models: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    labels = list(models)
    rows = []
    for task, first in models[labels[0]].items():
        for metric in first:
            if metric == "n" or "_stderr" in metric:
                continue
            name, comma, kind = metric.partition(",")
            error = f"{name}_stderr{comma}{kind}"
            values = [models[label].get(task, {}) for label in labels]
            cells = [_number(own.get(metric), own.get(error)) for own in values]
            rows.append([task, metric, "-" if first["n"] is None else f"{first['n']:,}", *cells])
    _table("tasks (± one standard error)", ["task", "metric", "n", *labels], rows, words=2)


def _print_long_context(models: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    for label, kinds in models.items():
        rows = [
            [
                kind,
                f"{row['length']:,}",
                "-" if row["depth"] is None else f"{row['depth']:.0%}",
                f"{row['n']:,}",
                _number(row["accuracy"], row["stderr"]),
            ]
            for kind, found in kinds.items()
            for row in found
        ]
        title = f"{label}: share of answers that are right (± one standard error)"
        _table(title, ["task", "tokens", "depth", "n", "accuracy"], rows, words=1)
