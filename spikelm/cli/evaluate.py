"""``spikelm eval``: measure a checkpoint on text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikelm.cli._common import JsonOption, console, progress, tokenizer_for, warn, write_json

if TYPE_CHECKING:
    from spikelm.evaluation.perplexity import Result


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder.")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help="Text: a file (also .xz, .gz, .zst), a folder, FILE.jsonl#FIELD, builtin:...",
        ),
    ],
    mode: Annotated[
        str, typer.Option("--mode", help="Any of disjoint,strided,carried (separated by commas), or all.")
    ] = "all",
    length: Annotated[
        int, typer.Option("--length", help="Tokens of a window (disjoint and strided).")
    ] = 1024,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride", help="Tokens by which strided windows advance; half of --length up to 512 if absent."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows read side by side.")] = 8,
    chunk: Annotated[
        int, typer.Option("--chunk", help="Tokens of a row read at once; changes speed and memory only.")
    ] = 512,
    max_bytes: Annotated[
        int | None, typer.Option("--max-bytes", help="Stop after this many bytes of text.")
    ] = None,
    start: Annotated[
        str,
        typer.Option(
            "--start",
            help="Token before every document: none, bos or eos; with one, first tokens are scored too.",
        ),
    ] = "none",
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Tokenizer to use instead of the checkpoint's; or 'bytes'."),
    ] = None,
    twin: Annotated[
        bool, typer.Option("--twin", help="Switch every neuron off, keeping the weights.")
    ] = False,
    coding: Annotated[
        str | None,
        typer.Option(
            "--coding",
            metavar="NAME",
            help="Run expanded over the micro-steps of a coding (ternary, bidirectional, ...) and tell what "
            "every coding would send.",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Dtype of the weights: float32, bfloat16 or float64.")
    ] = "float32",
    json_file: JsonOption = None,
) -> None:
    """Measure a checkpoint: bits per byte, perplexity, spike rates.

    Three figures, never mixed: disjoint windows, strided windows, and carried state (whole documents in
    constant memory). Every token is scored once, except a document's first one, which needs a token
    before it (--start).

    Example: spikelm eval runs/demo/spiking --data builtin:python-docs#valid --json eval.json
    """
    import dataclasses

    import torch

    from spikelm.checkpoint import load_model
    from spikelm.codings import build_coding
    from spikelm.data.source import open_source
    from spikelm.errors import ConfigError
    from spikelm.evaluation.corpus import read_corpus
    from spikelm.evaluation.perplexity import Windows, check_vocabulary, measure, parse_modes
    from spikelm.model import SpikeLM
    from spikelm.provenance import git_revision, versions

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if dtype not in dtypes:
        raise ConfigError(f"dtype {dtype!r}; expected one of {', '.join(dtypes)}")
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if stride is None:
        stride = min(512, max(1, length // 2))
    expansion = None if coding is None else build_coding(coding)
    windows = Windows(
        modes=parse_modes(mode), length=length, stride=stride, batch_size=batch_size, chunk=chunk
    )
    words = tokenizer_for(checkpoint, tokenizer)
    corpus = read_corpus(open_source(data), words, start=start, max_bytes=max_bytes)
    model = load_model(checkpoint, device=str(target), dtype=dtypes[dtype])
    if twin:
        spiking = model
        with torch.device("meta"):
            model = SpikeLM(spiking.config.twin())
        weights = {name: value for name, value in spiking.state_dict().items() if name in model.state_dict()}
        model.load_state_dict(weights, assign=True)
        model.tie_weights()  # assigning gives the head weights of its own
    model.eval()
    config = model.config
    check_vocabulary(corpus, config.vocab_size)
    if corpus.rescaled:
        warn(
            f"{corpus.rescaled} documents are not the sum of their tokens' bytes under this tokenizer; "
            "the lengths of their tokens were scaled"
        )
    total = corpus.predictions * len(windows.modes)
    with progress("measuring", total, "tokens") as bar:
        result = measure(
            model,
            corpus,
            windows,
            vocab_size=config.vocab_size,
            device=target,
            advance=bar.advance,
            coding=expansion,
        )
    if coding is not None and not result.spikes["codings"]:
        warn("no projection of this model has spikes as its input: nothing was expanded, it is dense")
    if str(json_file) != "-":
        _print(result, corpus.name, corpus.start_token)
    report: dict[str, Any] = result.to_dict() | {
        "checkpoint": str(checkpoint),
        "twin": twin,
        "coding": coding,
        "dtype": dtype,
        "device": str(target),
        "config": config.to_dict(),
        "parameters": model.num_parameters(),
        "data": {
            "source": data,
            "name": corpus.name,
            "sha256": corpus.sha256,
            "documents": len(corpus.tokens),
            "bytes": corpus.bytes,
            "scored_tokens": corpus.predictions,
            "start_token": corpus.start_token,
            "first_token_scored": corpus.start_token is not None,
            "max_bytes": max_bytes,
        },
        "tokenizer_sha256": words.sha256,
        "windows": dataclasses.asdict(windows),
        "versions": versions(),
        "git_revision": git_revision(),
    }
    write_json(json_file, report)


def _print(result: Result, name: str, start_token: int | None) -> None:
    from rich.table import Table

    first = result.figures[0]
    table = Table(
        title=f"{name}: {first.tokens:,} tokens, {first.bytes:,} bytes, {first.documents:,} documents scored"
    )
    for heading in (
        "figure",
        "bits/byte",
        "± s.e.",
        "nats/token",
        "nats/byte",
        "perplexity/token",
        "perplexity/byte",
    ):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for figure in result.figures:
        error = figure.stderr_bits_per_byte
        table.add_row(
            figure.label,
            f"{figure.bits_per_byte:.4f}",
            "-" if error is None else f"{error:.4f}",
            f"{figure.nats_per_token:.4f}",
            f"{figure.nats_per_byte:.4f}",
            f"{figure.perplexity_per_token:.4g}",
            f"{figure.perplexity_per_byte:.4g}",
        )
    out = console()
    out.print(table)
    scored = (
        "scored too, after a start token"
        if start_token is not None
        else "not scored (nothing predicts it; see --start)"
    )
    out.print(f"standard error over {first.stderr_over}; a document's first token is {scored}")
    total = result.spikes["total"]
    if not result.spikes["projections"]:
        return
    if result.spikes["neurons"]:
        rates = Table(title=f"neurons outside projections, over {result.spikes_over}")
        for heading in ("neuron", "firing rate", "never fired"):
            rates.add_column(heading, justify="left" if heading == "neuron" else "right")
        for path, entry in result.spikes["neurons"].items():
            rates.add_row(path, *(f"{entry[key]:.4f}" for key in ("firing_rate", "never_fired")))
        out.print(rates)
    if total["spiking_share"] == 0.0:
        out.print("no projection has spikes as its input (dense: every weight is used for every token)")
        return
    spikes = Table(title=f"input of the projections, over {result.spikes_over}")
    for heading in (
        "projection",
        "spikes",
        "firing rate",
        "mean |count| over all inputs",
        "at cap",
        "never fired",
    ):
        spikes.add_column(heading, justify="left" if heading == "projection" else "right")
    for path, entry in result.spikes["projections"].items():
        spikes.add_row(
            path,
            "yes" if entry["spiking"] else "no",
            *(f"{entry[key]:.4f}" for key in ("firing_rate", "mean_count", "at_cap", "never_fired")),
        )
    spikes.add_row(
        "all, by multiply-accumulates",
        f"{total['spiking_share']:.0%}",
        f"{total['firing_rate']:.4f}",
        f"{total['mean_count']:.4f}",
        "",
        "",
    )
    out.print(spikes)
    if result.spikes.get("codings"):
        _print_codings(result.spikes["codings"])


def _print_codings(found: dict[str, Any]) -> None:
    """Micro-steps, events and sparsity of every coding over all counts."""
    from rich.table import Table

    table = Table(
        title="codings over all counts, exact windows (as many micro-steps as the largest count needs)"
    )
    for heading in ("coding", "micro-steps", "events per channel", "sparsity"):
        table.add_column(heading, justify="left" if heading == "coding" else "right")
    for name, entry in found.items():
        if "not_applicable" in entry:
            table.add_row(name, "-", "-", "no code for negative counts")
            continue
        exact = entry["exact"]
        table.add_row(
            name, str(exact["steps"]), f"{exact['events_per_channel']:.4f}", f"{exact['sparsity']:.4f}"
        )
    console().print(table)
