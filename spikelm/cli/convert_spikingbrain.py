"""``spikelm convert spikingbrain``: a published SpikingBrain folder becomes a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spikelm.cli._common import JsonOption, console, human_bytes, warn, write_json

if TYPE_CHECKING:
    from spikelm.tokenizer import Tokenizer


def spikingbrain(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Published folder: config.json (gla_swa) and safetensors."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Checkpoint folder to write.")],
    k: Annotated[
        float | None,
        typer.Option(
            "--k",
            min=0.0,
            help="k of the adaptive neuron before every projection; 0: none. "
            "Default: 3 for W8ASpike, none for the float release.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="int8|float",
            help="W8ASpike: keep int8 weights (default), or the floats they stand for.",
        ),
    ] = None,
    dense_down: Annotated[
        bool,
        typer.Option(
            "--dense-down",
            help="W8ASpike: no neuron and float weights in SwiGLU's down projection, as its code runs it.",
        ),
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer", metavar="PATH", help="Tokenizer to keep in place of the folder's, or 'bytes'."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Convert a SpikingBrain-7B folder (float or W8ASpike); code in the folder is never run.

    Example: spikelm convert spikingbrain V1-7B-base runs/spikingbrain-7b --k 3
    """
    from spikelm.cli.convert import check_target, check_tokenizer
    from spikelm.formats.shards import save_streamed
    from spikelm.formats.spikingbrain import open_spikingbrain
    from spikelm.inspection import describe, inspect_config

    check_target(folder, out, overwrite)
    with open_spikingbrain(folder, k=k, weights=weights, dense_down=dense_down) as release:
        config = release.config
        words = _tokenizer(folder, tokenizer)
        if words is not None:
            check_tokenizer(words, config)
        save_streamed(out, config, release.tensors(), words)
        told, layout, parameters = release.quantisation, release.layout, release.parameters
    inspection = inspect_config(config)
    result = {
        "source": folder.name,
        "checkpoint": str(out),
        "parameters": parameters,
        "state_bytes": inspection.state_bytes,
        "tokenizer": None if words is None else words.sha256,
        "layout": {"quantised": layout.quantised, "merged_gate": layout.merged_gate},
        "quantisation": {
            "weights": told.weights,
            "outside_int8": told.outside,
            "groups": told.groups,
            "groups_with_a_larger_scale": told.widened,
        },
        "config": config.to_dict(),
    }
    if str(json_file) != "-":
        console().print(
            f"{out}: {config.num_hidden_layers} layers x {config.hidden_size}, {config.vocab_size:,} tokens, "
            f"{parameters:,} parameters, {human_bytes(inspection.state_bytes)} of state per "
            f"sequence, neuron {describe(config.neuron)}, weights {describe(config.weights)}"
            + ("" if words is not None else "; no tokenizer (pass --tokenizer to text commands)")
        )
    if told.outside:
        warn(
            f"{told.outside:,} of {told.weights:,} published integers lie beyond int8; "
            f"{told.widened:,} of {told.groups:,} groups were rounded again with a larger scale "
            "(--weights float keeps the published values)"
        )
    write_json(json_file, result)


def _tokenizer(folder: Path, choice: str | None) -> Tokenizer | None:
    """The tokenizer that was named, or the folder's own where it has one."""
    from spikelm.data.vocabulary import find
    from spikelm.tokenizer import Tokenizer

    if choice is not None:
        return Tokenizer.load(choice)
    own = find(folder, "tokenizer.json") or (find(folder, "vocab.json") and find(folder, "merges.txt"))
    return Tokenizer.from_folder(folder) if own else None
