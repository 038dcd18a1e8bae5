"""``spikelm eval``: measure checkpoints on text, on tasks, on long contexts; verify what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spikelm.cli._common import JsonOption, counted, warn, write_json


def evaluate(
    checkpoints: Annotated[
        list[Path] | None, typer.Argument(metavar="CKPT...", help="Checkpoint folders.", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help="Text: a file (also .xz, .gz, .zst), a folder, FILE.jsonl#FIELD, builtin:..., hub:...; or a "
            "standard set: wikitext-2, wikitext-103, enwik8, lambada, pg19, books:PATH.",
        ),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(
            "--data-dir", metavar="DIR", help="Where standard sets lie; the folder in SPIKELM_DATA if absent."
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            help="Any of disjoint,strided,carried (separated by commas), or all; none with --lengths alone.",
        ),
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
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            metavar="N,N,...",
            help="Also by length, the text as one stream with carried state: 1k,16k,1M (k is 1024). With "
            "--long-context: tokens of the prompts.",
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
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", metavar="TASK,...", help="Measure on tasks of lm-evaluation-harness instead."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="With --tasks: examples per task at most.")
    ] = None,
    long_context: Annotated[
        str | None,
        typer.Option(
            "--long-context",
            metavar="KIND,...",
            help="Measure recall over long contexts instead: passkey,needle,mqar,ruler.",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", help="With --long-context: prompts per length and depth.")
    ] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the bootstrap, or of drawn prompts.")] = 0,
    device: Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Dtype of the weights: float32, bfloat16 or float64.")
    ] = "float32",
    verify: Annotated[
        Path | None,
        typer.Option(
            "--verify", metavar="RESULT", help="Run the arguments of a result file again and compare."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="DIR", help="Also write a report (HTML and Markdown) into DIR."),
    ] = None,
    include: Annotated[
        list[Path] | None,
        typer.Option("--include", metavar="RESULT", help="With --report: a further result file to show."),
    ] = None,
    json_file: JsonOption = None,
) -> int | None:
    """Measure checkpoints: bits per byte, perplexity, spike rates; several are compared on the same text.

    Three figures, never mixed: disjoint windows, strided windows, and carried state (whole documents in
    constant memory). Every token is scored once, except a document's first one, which needs a token
    before it (--start).

    Exit code 1 tells that a result does not reproduce (--verify).

    Example: spikelm eval runs/demo/spiking runs/demo/twin --data builtin:python-docs#valid --json eval.json
    """
    from spikelm.cli._evaluation_report import forward, write_pages
    from spikelm.errors import ConfigError
    from spikelm.evaluation.record import read

    folders = list(checkpoints or [])
    chosen = [
        name
        for name, value in (("--data", data), ("--tasks", tasks), ("--long-context", long_context))
        if value is not None
    ]
    if verify is not None:
        if folders or chosen:
            raise ConfigError(
                "--verify takes its arguments from the result file; leave checkpoints and text out"
            )
        from spikelm.cli._verdict import verify_file

        return verify_file(verify, json_file)
    if include and report is None:
        raise ConfigError("--include adds results to a report; give --report DIR as well")
    further = [read(path) for path in include or []]  # before hours are spent on what they go beside
    if report is not None and not folders and not chosen:
        write_pages(report, further)
        return None
    if not folders:
        raise ConfigError("no checkpoint is given; expected spikelm eval CKPT --data SOURCE")
    if len(chosen) != 1:
        raise ConfigError(
            f"{' and '.join(chosen) or 'nothing'} to measure on; expected one of --data, --tasks and "
            "--long-context"
        )
    if data is None:
        record = forward(
            folders,
            json_file,
            tasks=tasks,
            kinds=long_context,
            limit=limit,
            batch_size=batch_size,
            lengths=lengths or "1k,4k",
            samples=samples,
            device=device,
            dtype=dtype,
            seed=seed,
        )
    else:
        record = _measure(
            json_file,
            {
                "checkpoints": [str(folder) for folder in folders],
                "data": data,
                "data_dir": data_dir,
                "mode": mode,
                "length": length,
                "stride": stride,
                "lengths": lengths,
                "batch_size": batch_size,
                "chunk": chunk,
                "max_bytes": max_bytes,
                "start": start,
                "tokenizer": tokenizer,
                "twin": twin,
                "coding": coding,
                "device": device,
                "dtype": dtype,
                "seed": seed,
            },
        )
    if report is not None:
        write_pages(report, [record, *further])
    return None


def _measure(json_file: Path | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Measure on text, print and write."""
    from spikelm.cli._evaluation_tables import print_record
    from spikelm.evaluation.job import Request, run

    record = run(Request(**arguments), progress=counted, warn=warn)
    if str(json_file) != "-":
        print_record(record)
    write_json(json_file, record)
    return record
