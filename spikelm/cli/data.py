"""``spikelm data``: look at text, count it, turn it into tokens, check what is on disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from spikelm.cli._common import Bar, JsonOption, console, human_bytes, human_count, progress, warn, write_json

if TYPE_CHECKING:
    from spikelm.data.source import Source
    from spikelm.data.store import TokenStore
    from spikelm.tokenizer import Tokenizer

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Look at training text, turn it into tokens, check them."
)

_SPEC_HELP = (
    "Text or tokens: a file (.txt, .jsonl#FIELD, .parquet#FIELD, .arrow#FIELD, also compressed), a folder, "
    "a glob, a URL, hub:OWNER/NAME#SPLIT.FIELD, builtin:python-docs, a token store, name.bin with name.idx."
)
SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help=_SPEC_HELP)]
WorkersOption = Annotated[int, typer.Option("--workers", help="Processes; 0 is one per core.")]
_TOKENIZER_HELP = "'bytes', a tokenizer.json, or a folder with one."
TokenizerOption = Annotated[
    str | None, typer.Option("--tokenizer", metavar="TOKENIZER", help=_TOKENIZER_HELP)
]
_SHOWN = 200  # characters of a document


@app.command("inspect")
def inspect(
    spec: SpecArgument,
    documents: Annotated[int, typer.Option("--documents", help="How many documents to show.")] = 3,
    tokenizer: TokenizerOption = None,
    json_file: JsonOption = None,
) -> None:
    """Show what a source is, its fields and its first documents; with a tokenizer also their tokens.

    Example: spikelm data inspect corpus.jsonl#text --documents 2
    """
    from spikelm.data.source import TokenSource
    from spikelm.errors import ConfigError

    if documents < 0:
        raise ConfigError(f"--documents is {documents}; expected 0 or more")
    source, words = _open(spec, tokenizer)
    result: dict[str, Any] = {"source": source.name, "kind": source.kind, "fields": source.fields()}
    if isinstance(source, TokenSource):
        store = _store(source, words, workers=1)
        result |= _index(store)
        result["first"] = [_document(store, i, words) for i in range(min(documents, len(store.starts)))]
    else:
        result["first"] = []
        for text in islice(source.documents(), documents):
            shown = {"bytes": len(text.encode("utf-8", errors="surrogatepass")), "text": text[:_SHOWN]}
            if words is not None:
                shown["tokens"] = len(words.encode_array(text))
            result["first"].append(shown)
    if str(json_file) != "-":
        _show_source(result)
    write_json(json_file, result)


@app.command("stats")
def stats(
    spec: SpecArgument,
    tokenizer: TokenizerOption = None,
    workers: WorkersOption = 0,
    json_file: JsonOption = None,
) -> None:
    """Count documents, bytes, lengths and duplicates; with a tokenizer also tokens and the vocabulary used.

    The tokens are kept in the cache, where training finds them.

    Example: spikelm data stats builtin:python-docs --tokenizer bytes
    """
    from spikelm.data.source import TokenSource
    from spikelm.data.statistics import text_statistics, token_statistics

    source, words = _open(spec, tokenizer)
    result: dict[str, Any] = {"source": source.name, "kind": source.kind}
    if not isinstance(source, TokenSource):
        with progress(f"reading {source.name}", None, "bytes") as bar:
            result["text"] = text = asdict(text_statistics(source.documents(), bar.advance))
        result |= {"documents": text["lengths"]["count"], "bytes": text["lengths"]["total"]}
    if words is not None or isinstance(source, TokenSource):
        store = _store(source, words, workers)
        with progress("counting tokens", 2 * store.index.num_tokens, "tokens") as bar:
            tokens = token_statistics(store, bar.advance)
        result["tokens"] = asdict(tokens) | {"bytes_per_token": tokens.num_bytes / tokens.lengths.total}
        result |= {"documents": tokens.lengths.count, "bytes": tokens.num_bytes}
        if words is not None:
            result["tokens"]["frequent"] = [
                {"id": i, "text": words.decode([i], skip_special=False), "count": count}
                for i, count in tokens.frequent
            ]
    if str(json_file) != "-":
        _show_statistics(result)
    write_json(json_file, result)


@app.command("tokenize")
def tokenize(
    spec: SpecArgument,
    tokenizer: Annotated[str, typer.Option("--tokenizer", metavar="TOKENIZER", help=_TOKENIZER_HELP)],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder of the token store.")],
    workers: WorkersOption = 0,
    shard_tokens: Annotated[
        int, typer.Option("--shard-tokens", help="Tokens of a file; an interruption costs at most these.")
    ] = 100_000_000,
    json_file: JsonOption = None,
) -> None:
    """Turn text into a token store, which training opens by the name of its folder.

    After an interruption the same command goes on behind the last whole shard.

    Example: spikelm data tokenize 'shards/*.jsonl' --tokenizer runs/tokenizer --out runs/tokens
    """
    from spikelm.data.store import tokenise_into
    from spikelm.tokenizer import Tokenizer

    words = Tokenizer.load(tokenizer)
    source, _ = _open(spec, None)
    started = time.monotonic()
    try:
        with progress(f"tokenise {source.name}", None, "bytes") as bar:
            store = tokenise_into(
                out, source, words, _absolute(bar), workers=workers, shard_tokens=shard_tokens
            )
    except KeyboardInterrupt:
        warn("the whole shards are kept; give the same command again to go on")
        raise
    result = {"folder": str(out)} | _index(store) | {"seconds": time.monotonic() - started}
    if str(json_file) != "-":
        _show_index(result)
    write_json(json_file, result)


@app.command("verify")
def verify(
    spec: Annotated[str, typer.Argument(metavar="FOLDER|SPEC", help=f"A token store or: {_SPEC_HELP}")],
    tokenizer: TokenizerOption = None,
    json_file: JsonOption = None,
) -> None:
    """Read everything: every checksum, every token in the vocabulary, every document's place.

    Of text it is every file that must be whole and valid, and with a tokenizer its tokens in the cache.
    Damage ends with exit code 2 and one sentence that names the file and the place.

    Example: spikelm data verify runs/tokens
    """
    from spikelm.data.source import TokenSource
    from spikelm.data.statistics import text_statistics

    source, words = _open(spec, tokenizer)
    result: dict[str, Any] = {"source": source.name, "kind": source.kind, "verified": True}
    if not isinstance(source, TokenSource):
        with progress(f"reading {source.name}", None, "bytes") as bar:
            text = text_statistics(source.documents(), bar.advance)
        result |= {"documents": text.lengths.count, "bytes": text.lengths.total}
    if words is not None or isinstance(source, TokenSource):
        store = _store(source, words, workers=0)
        with progress("checking tokens", store.index.num_tokens, "tokens") as bar:
            store.verify(_absolute(bar))
        result |= _index(store)
    if str(json_file) != "-":
        counts = f"{result['documents']:,} documents, {result['bytes']:,} bytes"
        tokens = f", {result['tokens']:,} tokens in {result['shards']} shards" if "tokens" in result else ""
        verdict = "everything is as it was written" if tokens else "everything can be read"
        console().print(f"{source.name}: {counts}{tokens}: {verdict}", markup=False)
    write_json(json_file, result)


def _open(spec: str, tokenizer: str | None) -> tuple[Source, Tokenizer | None]:
    from spikelm.data.source import open_source
    from spikelm.tokenizer import Tokenizer

    words = None if tokenizer is None else Tokenizer.load(tokenizer)
    return open_source(spec), words


def _store(source: Source, words: Tokenizer | None, workers: int) -> TokenStore:
    """The tokens of a source; a store says itself which tokenizer made it."""
    from spikelm.data.store import tokenise
    from spikelm.data.stored import StoredTokens
    from spikelm.errors import ConfigError

    if words is None:
        if isinstance(source, StoredTokens):
            return source.store
        raise ConfigError(f"{source.name} does not say which tokenizer made it; name it with --tokenizer")
    with progress(f"tokenise {source.name}", None, "bytes") as bar:
        return tokenise(source, words, None, _absolute(bar), workers=workers)


def _absolute(bar: Bar) -> Callable[[int], None]:
    """Moves a bar to what is done in all."""
    last = 0

    def move(done: int) -> None:
        nonlocal last
        bar.advance(done - last)
        last = done

    return move


def _index(store: TokenStore) -> dict[str, Any]:
    index = store.index
    return {
        "path": store.where,
        "made_from": index.source,
        "documents": index.num_documents,
        "bytes": index.num_bytes,
        "tokens": index.num_tokens,
        "bytes_per_token": index.num_bytes / index.num_tokens,
        "dtype": index.dtype,
        "shards": max(1, len(index.shards)),
        "shard_tokens": index.shard_tokens or index.num_tokens,
        "tokenizer": index.tokenizer,
        "vocab_size": index.vocab_size,
        "eos_id": index.eos_id,
        "tokens_sha256": index.tokens_sha256,
    }


def _document(store: TokenStore, number: int, words: Tokenizer | None) -> dict[str, Any]:
    begin = int(store.starts[number])
    end = int(store.starts[number + 1]) if number + 1 < len(store.starts) else store.index.num_tokens
    first = store.read(begin, min(end, begin + _SHOWN)).tolist()
    shown: dict[str, Any] = {"tokens": end - begin, "ids": first[:20]}
    if words is not None:
        shown["text"] = words.decode(first)[:_SHOWN]
    return shown


# --- on the screen ----------------------------------------------------------------------------------------


def _show_source(result: dict[str, Any]) -> None:
    out = console()
    out.print(Text.assemble((result["source"], "bold"), f": {result['kind']}"))
    if result["fields"]:
        out.print(Text("fields: " + ", ".join(f"{name} ({kind})" for name, kind in result["fields"].items())))
    if "tokens" in result:
        _show_index(result)
    for number, document in enumerate(result["first"]):
        sizes = ", ".join(f"{document[key]:,} {key}" for key in ("bytes", "tokens") if key in document)
        out.print(Text(f"document {number}: {sizes}", style="bold"))
        out.print(Text(repr(document["text"]) if "text" in document else f"ids {document['ids']}"))


def _show_index(result: dict[str, Any]) -> None:
    out = console()
    counts = (
        f"{result['tokens']:,} tokens in {result['documents']:,} documents, {human_bytes(result['bytes'])}"
    )
    out.print(Text(f"{result['path']}: {counts} of text, {result['bytes_per_token']:.3f} bytes per token"))
    ending = "no end-of-document token" if result["eos_id"] is None else f"end of document {result['eos_id']}"
    files = f"{result['shards']} of at most {result['shard_tokens']:,} tokens"
    out.print(Text(f"  shards: {files}, {result['dtype']}; {ending}; tokenizer {result['tokenizer'][:12]}"))


def _show_statistics(result: dict[str, Any]) -> None:
    out = console()
    out.print(Text.assemble((result["source"], "bold"), f": {result['kind']}"))
    table = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
    table.add_column("")
    columns = [name for name in ("text", "tokens") if name in result]
    for name in columns:
        table.add_column({"text": "bytes", "tokens": "tokens"}[name], justify="right")
    lengths: list[dict[str, Any]] = [result[name]["lengths"] for name in columns]
    rows: list[tuple[str, str]] = [("documents", "count"), ("in all", "total"), ("mean", "mean")]
    rows += [("shortest", "shortest"), ("longest", "longest"), ("longest is document", "longest_document")]
    for title, key in rows:
        table.add_row(title, *(f"{round(length[key]):,}" for length in lengths))
    for percent in lengths[0]["quantiles"]:
        values = (f"{length['quantiles'][percent]:,}" for length in lengths)
        table.add_row(f"{percent}% are at most", *values)
    table.add_row("equal to an earlier one", *(f"{result[name]['duplicates']:,}" for name in columns))
    out.print(table)
    if "text" in result:
        text = result["text"]
        out.print(Text(f"{text['characters']:,} characters, {text['lines']:,} line breaks"))
    if "tokens" in result:
        tokens = result["tokens"]
        used = f"{tokens['used']:,} of {tokens['vocab_size']:,} tokens used"
        out.print(Text(f"{tokens['bytes_per_token']:.3f} bytes per token; {used}"))
        frequent = [item for item in tokens["frequent"] if isinstance(item, dict)]
        if frequent:
            shown = ", ".join(f"{item['text']!r} {human_count(item['count'])}" for item in frequent)
            out.print(Text(f"most frequent: {shown}"))
