"""``spikelm energy``: what a token costs in operations, bytes, estimated energy and measured time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikelm.cli._common import JsonOption, console, progress, tokenizer_for, warn, write_json

if TYPE_CHECKING:
    from spikelm.energy.ledger import Question
    from spikelm.evaluation.corpus import Corpus


def energy(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CKPT...", help="Checkpoint folders.")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help="Text: a file (also .xz, .gz, .zst), a folder, FILE.jsonl#FIELD, builtin:..., or a "
            "standard set (wikitext-2, ...) as for spikelm eval.",
        ),
    ],
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", help="Sequences decoded together, beside batch 1.")
    ] = 8,
    on_chip: Annotated[
        float, typer.Option("--on-chip", metavar="MB", help="Size of the on-chip memory in MB of 2^20 bytes.")
    ] = 1.0,
    prices: Annotated[
        str | None,
        typer.Option(
            "--prices",
            metavar="FILE|NAME",
            help="Price table that is shown: horowitz-45nm (the default), horowitz-45nm-int32-sums, "
            "jouppi-7nm, or a YAML file of your own. The JSON has all of them.",
        ),
    ] = None,
    length: Annotated[
        int, typer.Option("--length", help="Tokens of a window of text, each read from the initial state.")
    ] = 1024,
    max_bytes: Annotated[
        int, typer.Option("--max-bytes", help="Stop after this many bytes of text.")
    ] = 65536,
    timed: Annotated[
        int, typer.Option("--timed", help="Tokens of a timed run of decoding; 0 times nothing.")
    ] = 128,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed runs of each layout.")] = 5,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Tokenizer to use instead of the checkpoints'; or 'bytes'."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Count what a model does for one token: operations, bytes, estimated energy, measured time.

    Accumulates are counted only where the measured input of a projection really is spikes, under every spike
    coding. Weights count as skipped only where a kernel skips them. Estimates (operations and bytes times
    published prices) and measurements (seconds, and joules where a counter exists) are never mixed.
    docs/energy.md has every formula.

    Example: spikelm energy runs/demo/spiking runs/demo/twin --data builtin:python-docs#valid --batch 4
    """
    arguments = {
        "checkpoints": [str(path) for path in checkpoints],
        "data": data,
        "batch": batch,
        "on_chip": on_chip,
        "prices": prices,
        "length": length,
        "max_bytes": max_bytes,
        "timed": timed,
        "repeats": repeats,
        "tokenizer": tokenizer,
        "device": device,
    }
    results, corpora, sha256 = _run(arguments)
    if str(json_file) != "-":
        _print(results, corpora)
    if json_file is not None:
        write_json(json_file, _record(arguments, results, corpora, sha256))


def rerun(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A new record from the ``arguments`` of an old one (``spikelm eval --verify``).

    What is under ``measured`` is time and does not come out alike; nor does ``verdict``, which speaks of it.
    """
    return _record(arguments, *_run(arguments))


def _run(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Corpus], set[str]]:
    """Results, the text of every label, and the hashes of the tokenizers it was read with."""
    import torch

    from spikelm.checkpoint import load_model
    from spikelm.energy.ledger import ledger
    from spikelm.errors import ConfigError
    from spikelm.evaluation.corpus import read_corpus
    from spikelm.evaluation.job import labels
    from spikelm.evaluation.standard import open_text
    from spikelm.registry import codings

    try:
        device = torch.device(arguments["device"])
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {arguments['device']!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    question = _question(arguments)
    models: dict[str, Any] = {}
    corpora: dict[str, Corpus] = {}
    hashes = set()
    text = open_text(arguments["data"], max_bytes=arguments["max_bytes"])
    for label, folder in labels(arguments["checkpoints"]).items():
        words = tokenizer_for(folder, arguments["tokenizer"])
        corpus = read_corpus(text.source, words, max_bytes=text.limit)
        model = load_model(folder, device=str(device), dtype=torch.float32).eval()
        with progress(f"reading, {label}", corpus.predictions, "tokens") as bar:
            models[label] = ledger(model, corpus, question, device=device, advance=bar.advance)
        corpora[label] = corpus
        hashes.add(words.sha256)
    if len(hashes) > 1:
        warn("the checkpoints have different tokenizers: figures per token are of different lengths of text")
    tables = {name: table.model_dump(mode="json") for name, table in question.tables.items()}
    results = {
        "codings": codings.names(),
        "prices": {"shown": question.shown, "tables": tables},
        "models": models,
    }
    return results, corpora, hashes


def _question(arguments: Mapping[str, Any]) -> Question:
    from spikelm.energy.ledger import MEGABYTE, Question
    from spikelm.energy.prices import load_prices
    from spikelm.errors import ConfigError

    size = arguments["on_chip"]
    if not 0 < size < 2**20:
        raise ConfigError(f"on-chip is {size} MB; expected a positive number, for example 1")
    shown, tables = load_prices(arguments["prices"])
    return Question(
        tables=tables,
        shown=shown,
        length=arguments["length"],
        batch=arguments["batch"],
        on_chip=max(1, round(size * MEGABYTE)),
        timed=arguments["timed"],
        repeats=arguments["repeats"],
    )


def _record(
    arguments: Mapping[str, Any], results: Mapping[str, Any], corpora: Mapping[str, Corpus], hashes: set[str]
) -> dict[str, Any]:
    from spikelm.checkpoint import resolve_folder
    from spikelm.evaluation.job import labels
    from spikelm.evaluation.record import stamp

    corpus = next(iter(corpora.values()))
    folders = labels(arguments["checkpoints"])
    return stamp(
        "energy",
        results,
        arguments=arguments,
        checkpoints={label: resolve_folder(folder) for label, folder in folders.items()},
        data={
            "source": arguments["data"],
            "name": corpus.name,
            "sha256": corpus.sha256,
            "documents": len(corpus.tokens),
            "bytes": corpus.bytes,
        },
        tokenizer_sha256=next(iter(hashes)) if len(hashes) == 1 else None,
        seed=None,
        n=corpus.predictions,
    )


def _print(results: Mapping[str, Any], corpora: Mapping[str, Corpus]) -> None:
    from spikelm.cli import _energy_tables as tables

    out = console()
    shown = results["prices"]["shown"]
    for label, model in results["models"].items():
        for table in tables.of_model(label, model, shown, corpora[label].name):
            out.print(table)
        for sentence in model["verdict"]:
            out.print(f"- {sentence}", markup=False)
    if len(results["models"]) > 1:
        out.print(tables.comparison(results["models"], shown))
