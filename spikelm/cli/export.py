"""``spikelm export``: copy a checkpoint of a run for other people, in the Hugging Face layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spikelm.cli._common import JsonOption, console, human_bytes, write_json


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or one of its checkpoints.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    step: Annotated[
        int | None, typer.Option("--step", help="The checkpoint after this many steps (else the newest).")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="The one with the lowest held-out bits per byte (keep_best=true).")
    ] = False,
    json_file: JsonOption = None,
) -> int:
    """Copy the model, its tokenizer and its card, without the training state.

    The folder can be loaded by transformers and uploaded to the Hugging Face Hub as it is. Checksums are
    compared on the way.

    Example: spikelm export runs/nano nano-release --best
    """
    from spikelm.errors import ConfigError
    from spikelm.train import export as exports

    if step is not None and best:
        raise ConfigError("--step and --best both choose a checkpoint; give one of them")
    source = exports.export(run, out, step, best)
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    write_json(json_file, {"source": source, "out": out, "files": files})
    if str(json_file) != "-":
        console().print(f"{source} -> {out}: {len(files)} files, {human_bytes(sum(files.values()))}")
    return 0
