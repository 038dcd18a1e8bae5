"""``spikelm tokenizer``: train a tokenizer, look at one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikelm.cli._common import JsonOption, console, human_bytes, progress, warn, write_json

if TYPE_CHECKING:
    from spikelm.tokenizer import Tokenizer

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train and look at tokenizers.")

_DATA_HELP = "Text: a file (also .xz, .gz, .zst), a folder, FILE.jsonl#FIELD, builtin:python-docs."
_MEASURED_CHARS = 4_000_000  # enough for three digits of bytes per token


@app.command("train")
def train(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the tokenizer to.")],
    data: Annotated[str, typer.Option("--data", metavar="SOURCE", help=_DATA_HELP)],
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Tokens, special ones included.")],
    special_token: Annotated[
        list[str] | None,
        typer.Option("--special-token", help="Special token (repeatable); <|endoftext|> unless given."),
    ] = None,
    no_special_tokens: Annotated[
        bool, typer.Option("--no-special-tokens", help="Have none, not even an end of document.")
    ] = False,
    min_frequency: Annotated[
        int, typer.Option("--min-frequency", help="Merge only pairs seen this often.")
    ] = 2,
    max_bytes: Annotated[
        int,
        typer.Option("--max-bytes", help="Stop reading after about this much text; it is held in memory."),
    ] = 1_000_000_000,
    json_file: JsonOption = None,
) -> None:
    """Train a byte-level BPE on text.

    Example: spikelm tokenizer train --data builtin:python-docs#train --vocab-size 2048 runs/tokenizer
    """
    from spikelm.data.plain_text import split_lines
    from spikelm.errors import ConfigError
    from spikelm.tokenizer import Tokenizer

    for name, value in (("--min-frequency", min_frequency), ("--max-bytes", max_bytes)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected a positive integer")
    if special_token and no_special_tokens:
        raise ConfigError("give --special-token or --no-special-tokens, not both")
    _check_folder(out)
    special = () if no_special_tokens else tuple(special_token or ("<|endoftext|>",))
    Tokenizer.check_training(vocab_size, special)
    documents, size = _read(data, max_bytes)
    with progress("counting words", sum(map(len, documents)), "characters") as bar:

        def counted() -> Iterator[str]:
            for text in documents:
                for part in split_lines(text):
                    yield part
                    bar.advance(len(part))
            bar.note("merging pairs")

        trained = Tokenizer.train_bpe(
            counted(), vocab_size, special_tokens=special, min_frequency=min_frequency
        )
    _save(trained, out)
    result = _describe(trained) | {"path": str(out), "data": data, "training_bytes": size}
    result |= _measure(trained, documents)
    _show(result, quiet=str(json_file) == "-")
    if trained.vocab_size < vocab_size:
        result["asked_vocab_size"] = vocab_size
        warn(f"the text gave only {trained.vocab_size} of {vocab_size} tokens; give more text")
    write_json(json_file, result)


@app.command("characters")
def characters(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the tokenizer to.")],
    data: Annotated[str, typer.Option("--data", metavar="SOURCE", help=_DATA_HELP)],
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", help="Tokens at most; all characters unless given.")
    ] = None,
    special_token: Annotated[
        list[str] | None,
        typer.Option("--special-token", help="Special token (repeatable); none unless given."),
    ] = None,
    min_frequency: Annotated[
        int, typer.Option("--min-frequency", help="Characters seen less often are written as bytes.")
    ] = 1,
    max_bytes: Annotated[
        int,
        typer.Option("--max-bytes", help="Stop reading after about this much text; it is held in memory."),
    ] = 1_000_000_000,
    json_file: JsonOption = None,
) -> None:
    """Make a tokenizer of the characters of a text.

    Every character is one token; one that is not in the vocabulary becomes its UTF-8 bytes, so that nothing
    is unknown. (SpikeGPT's enwik8 figure is per character of a vocabulary of about 6064.)

    Example: spikelm tokenizer characters --data builtin:python-docs#train runs/characters
    """
    from spikelm.errors import ConfigError
    from spikelm.tokenizer import Tokenizer

    for name, value in (("--min-frequency", min_frequency), ("--max-bytes", max_bytes)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected a positive integer")
    _check_folder(out)
    special = tuple(special_token or ())
    Tokenizer.check_training(256 + len(special) if vocab_size is None else vocab_size, special)
    documents, size = _read(data, max_bytes)
    made = Tokenizer.characters(documents, vocab_size, special_tokens=special, min_frequency=min_frequency)
    _save(made, out)
    result = _describe(made) | {"path": str(out), "data": data, "training_bytes": size}
    result |= _measure(made, documents)
    _show(result, quiet=str(json_file) == "-")
    write_json(json_file, result)


@app.command("info")
def info(
    tokenizer: Annotated[
        str, typer.Argument(metavar="TOKENIZER", help="'bytes', a tokenizer.json, or a folder with one.")
    ],
    data: Annotated[
        str | None, typer.Option("--data", metavar="SOURCE", help=f"Measure bytes per token. {_DATA_HELP}")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="Show the tokens of this text.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Show a tokenizer's size, special tokens and hash, and how it splits text.

    Example: spikelm tokenizer info runs/tokenizer --text "Hello world"
    """
    from spikelm.data.source import open_source
    from spikelm.tokenizer import Tokenizer

    loaded = Tokenizer.load(tokenizer)
    result = _describe(loaded)
    if data is not None:
        result |= {"data": data} | _measure(loaded, open_source(data).documents())
    if text is not None:
        ids = loaded.encode(text)
        result["tokens"] = [{"id": i, "text": loaded.decode([i], skip_special=False)} for i in ids]
    _show(result, quiet=str(json_file) == "-")
    write_json(json_file, result)


def _check_folder(out: Path) -> None:
    from spikelm.errors import ConfigError

    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder to write the tokenizer to")


def _read(data: str, max_bytes: int) -> tuple[list[str], int]:
    """Documents up to about ``max_bytes``, and their bytes."""
    from spikelm.data.source import open_source

    documents: list[str] = []
    size = 0
    with progress("reading", None, "bytes") as bar:
        for text in open_source(data).documents():
            documents.append(text[: max_bytes - size])
            length = len(documents[-1].encode("utf-8", errors="surrogatepass"))
            size += length
            bar.advance(length)
            if size >= max_bytes:
                break
    return documents, size


def _save(tokenizer: Tokenizer, out: Path) -> None:
    from spikelm.errors import DataError

    try:
        tokenizer.save(out)
    except OSError as error:
        raise DataError(f"cannot write the tokenizer to {out}: {error.strerror or error}") from error


def _describe(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "vocab_size": tokenizer.vocab_size,
        "byte_level": tokenizer.is_byte_level,
        "eos_id": tokenizer.eos_id,
        "bos_id": tokenizer.bos_id,
        "sha256": tokenizer.sha256,
    }


def _measure(tokenizer: Tokenizer, documents: Any) -> dict[str, Any]:
    """Bytes per token on the first few megabytes."""
    texts, left = [], _MEASURED_CHARS
    for document in documents:
        texts.append(document[:left])
        left -= len(texts[-1])
        if left <= 0:
            break
    tokens = 0
    with progress("measuring", sum(map(len, texts)), "characters") as bar:
        for document, ids in zip(texts, tokenizer.encode_arrays(texts), strict=True):
            tokens += len(ids)
            bar.advance(len(document))
    size = sum(len(document.encode("utf-8")) for document in texts)
    return {"measured_bytes": size, "measured_tokens": tokens, "bytes_per_token": size / max(tokens, 1)}


def _show(result: dict[str, Any], quiet: bool) -> None:
    if quiet:
        return
    out = console()
    for key, value in result.items():
        if key == "tokens":
            for token in value:
                out.print(f"{token['id']:>8}  {token['text']!r}", markup=False)
        elif key in ("training_bytes", "measured_bytes"):
            out.print(f"{key.replace('_', ' ')}: {human_bytes(value)}", markup=False)
        else:
            shown = f"{value:.3f}" if isinstance(value, float) else "none" if value is None else value
            out.print(f"{key.replace('_', ' ')}: {shown}", markup=False)
