"""``spikelm convert``: published weights become a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spikelm.cli._common import JsonOption, console, human_bytes, write_json
from spikelm.cli.convert_spike import spike
from spikelm.cli.convert_spikingbrain import spikingbrain

if TYPE_CHECKING:
    from spikelm.config import ModelConfig
    from spikelm.formats.converted import Converted
    from spikelm.tokenizer import Tokenizer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Turn published weights into a checkpoint folder that every command reads, or a trained model into "
    "a spiking one.",
)
app.command()(spike)

OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Checkpoint folder to write.")]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.json (or its folder) to keep with the weights, or 'bytes'.",
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]

app.command()(spikingbrain)


@app.command()
def spikegpt(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.pth", help="Weights as SpikeGPT's training wrote them.")
    ],
    out: OutArgument,
    binary_embedding: Annotated[
        bool | None,
        typer.Option(
            "--binary-embedding/--dense-embedding",
            help="Whether the embedding becomes spikes (as in SpikeGPT's training code) or stays as it is.",
        ),
    ] = None,
    tokenizer: TokenizerOption = None,
    overwrite: OverwriteOption = False,
    json_file: JsonOption = None,
) -> None:
    """Convert SpikeGPT weights.

    Example: spikelm convert spikegpt SpikeGPT-216M.pth runs/216m --binary-embedding --tokenizer 20B.json
    """
    from spikelm.errors import ConfigError
    from spikelm.formats.spikegpt import read_spikegpt

    if binary_embedding is None:
        raise ConfigError(
            "say --binary-embedding (the embedding becomes spikes, as in SpikeGPT's training code) or "
            "--dense-embedding: the tensors do not tell which one the weights were trained with"
        )
    _refuse_folder(file)
    _finish(
        read_spikegpt(file, binary_embedding=binary_embedding), file, out, tokenizer, overwrite, json_file
    )


@app.command()
def rwkv4(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="RWKV-4 .pth, or a float rwkv.cpp file (also .xz).")
    ],
    out: OutArgument,
    tokenizer: TokenizerOption = None,
    overwrite: OverwriteOption = False,
    json_file: JsonOption = None,
) -> None:
    """Convert RWKV-4 weights: the same architecture without neurons.

    Example: spikelm convert rwkv4 RWKV-4-169M.pth runs/rwkv4-169m --tokenizer 20B_tokenizer.json
    """
    from spikelm.formats.rwkv4 import read_rwkv4

    _refuse_folder(file)
    _finish(read_rwkv4(file), file, out, tokenizer, overwrite, json_file)


def _refuse_folder(file: Path) -> None:
    from spikelm.errors import CheckpointError

    if file.is_dir():
        raise CheckpointError(f"{file} is a folder; expected a file of weights")


def check_target(source: Path, out: Path, overwrite: bool) -> None:
    """Refuse a target that is no folder of a checkpoint, or that holds what is to be converted."""
    from spikelm.errors import ConfigError

    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give the path of a new folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise ConfigError(f"{out} exists and is not empty; choose another folder or say --overwrite")
        if not (out / "config.json").is_file():
            raise ConfigError(f"{out} is not a checkpoint folder (no config.json), so it is not overwritten")
        if source.resolve().is_relative_to(out.resolve()):
            raise ConfigError(
                f"{source} lies inside {out}, which --overwrite would remove; choose another folder"
            )


def check_tokenizer(words: Tokenizer, config: ModelConfig) -> None:
    """Refuse a tokenizer with more tokens than the model."""
    from spikelm.errors import ConfigError

    if words.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {words.vocab_size} tokens, the model {config.vocab_size}; "
            f"expected at most as many as the model has"
        )


def _finish(
    converted: Converted,
    file: Path,
    out: Path,
    tokenizer: str | None,
    overwrite: bool,
    json_file: Path | None,
) -> None:
    import dataclasses

    from spikelm.checkpoint import save_checkpoint
    from spikelm.state import state_bytes
    from spikelm.tokenizer import Tokenizer

    check_target(file, out, overwrite)
    words = None if tokenizer is None else Tokenizer.load(tokenizer)
    config = converted.config
    if words is not None:
        check_tokenizer(words, config)
        config = dataclasses.replace(config, bos_token_id=words.bos_id, eos_token_id=words.eos_id)
    model = dataclasses.replace(converted, config=config).model()
    save_checkpoint(out, model, words)
    memory = state_bytes(model.init_state(1))
    result = {
        "source": file.name,
        "checkpoint": str(out),
        "parameters": model.num_parameters(),
        "state_bytes": memory,
        "tokenizer": None if words is None else words.sha256,
        "config": config.to_dict(),
    }
    summary = (
        f"{out}: {config.num_hidden_layers} layers x {config.hidden_size}, {config.vocab_size} tokens, "
        f"{model.num_parameters():,} parameters, {human_bytes(memory)} of state per sequence, "
        f"neuron {config.neuron['name']}, embedding {config.embedding_neuron['name']}"
        + ("" if words is not None else "; no tokenizer (pass --tokenizer to text commands)")
    )
    if str(json_file) != "-":
        console().print(summary)
    write_json(json_file, result)
