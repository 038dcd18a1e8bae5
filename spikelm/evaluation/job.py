"""One call of ``spikelm eval`` as a function: arguments in, record out. Verifying calls it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spikelm.checkpoint import load_model, read_config
from spikelm.codings import Coding, build_coding
from spikelm.errors import ConfigError, SpikeLMError
from spikelm.evaluation.compare import Units, compare
from spikelm.evaluation.conventions import other_units
from spikelm.evaluation.corpus import Corpus, read_corpus, tokenizer_for
from spikelm.evaluation.lambada import LastWords, last_words, measure_last_words
from spikelm.evaluation.lengths import check_lengths, measure_lengths, parse_lengths
from spikelm.evaluation.perplexity import Result, Windows, check_vocabulary, measure, parse_modes
from spikelm.evaluation.record import stamp
from spikelm.evaluation.standard import Text, open_text
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

Advance = Callable[[int], None]
Progress = Callable[[str, float], AbstractContextManager[Advance]]
"""Opened with a title and a number of tokens; gives what counts them."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure: the options of ``spikelm eval`` by name, JSON values."""

    checkpoints: Sequence[str]
    data: str
    data_dir: str | None = None
    mode: str = "all"
    length: int = 1024
    stride: int | None = None
    batch_size: int = 8
    chunk: int = 512
    max_bytes: int | None = None
    start: str = "none"
    tokenizer: str | None = None
    twin: bool = False
    coding: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    lengths: str | None = None
    seed: int = 0

    def windows(self) -> Windows | None:
        """How the text is read; None for ``none``.

        Raises:
            ConfigError: unknown modes, or sizes that are not positive.
        """
        stride = min(512, max(1, self.length // 2)) if self.stride is None else self.stride
        windows = Windows(
            modes=("carried",) if self.mode == "none" else parse_modes(self.mode),
            length=self.length,
            stride=stride,
            batch_size=self.batch_size,
            chunk=self.chunk,
        )
        return None if self.mode == "none" else windows


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """One checkpoint's tokens of the text."""

    label: str
    folder: Path
    corpus: Corpus
    tokenizer: Tokenizer
    words: LastWords | None


@contextmanager
def silent(title: str, total: float) -> Iterator[Advance]:
    """Progress that nobody sees."""
    yield lambda _: None


def run(
    request: Request, *, progress: Progress = silent, warn: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure every checkpoint on the same text.

    Args:
        request: what to measure.
        progress: shows how far it is.
        warn: called with sentences that a user should know.

    Returns:
        A record of the kind ``eval`` (:mod:`spikelm.evaluation.record`).

    Raises:
        SpikeLMError: an option, checkpoint, tokenizer or text that cannot be used, or a loss that is not
            finite.
    """
    device, dtype, coding, windows, lengths = _checked(request)
    folders = labels(request.checkpoints)
    words = {label: tokenizer_for(folder, request.tokenizer, warn) for label, folder in folders.items()}
    text = open_text(request.data, data_dir=request.data_dir, max_bytes=request.max_bytes)
    if text.kind == "lambada" and (request.mode != "all" or lengths):
        raise ConfigError("lambada scores last words of whole passages; leave --mode and --lengths out")
    readings = _read(request, folders, words, text, warn)
    if lengths:
        for reading in readings:
            check_lengths(reading.corpus, lengths)

    models: dict[str, Any] = {}
    units: dict[str, Mapping[str, Units]] = {}
    at_lengths: dict[str, Any] = {}
    first_n: int | None = None
    for reading in readings:
        model = _load(reading.folder, device, dtype, request.twin)
        size = model.config.vocab_size
        title = f"measuring {reading.label}" if len(readings) > 1 else "measuring"
        result, extra = _measured(model, reading, request, windows, device, coding, progress, title)
        if coding is not None and result is not None and not result.spikes["codings"]:
            warn("no projection of this model has spikes as its input: nothing was expanded, it is dense")
        if lengths:
            with progress(f"{title} by length", 2 * lengths[-1]) as advance:
                at_lengths[reading.label] = measure_lengths(
                    model,
                    reading.corpus,
                    lengths,
                    vocab_size=size,
                    window=request.length,
                    batch_size=request.batch_size,
                    chunk=request.chunk,
                    device=device,
                    advance=advance,
                )
        models[reading.label] = (
            _entry(result, reading, text)
            | extra
            | {
                "parameters": model.num_parameters(),
                "tokenizer_sha256": reading.tokenizer.sha256,
                "scored_tokens": (reading.words or reading.corpus).predictions,
                "start_token": reading.corpus.start_token,
            }
        )
        if result is not None:
            units[reading.label] = result.units
            first_n = result.figures[0].stderr_n if first_n is None else first_n

    comparisons = compare(units, seed=request.seed) if len(units) > 1 else []
    results: dict[str, Any] = {"models": models, "comparisons": comparisons}
    if lengths:
        results["lengths"] = at_lengths
    hashes = {reading.tokenizer.sha256 for reading in readings}
    return stamp(
        "eval",
        results,
        arguments=dataclasses.asdict(request) | {"checkpoints": list(request.checkpoints)},
        checkpoints=folders,
        data=_about(request, readings[0].corpus, text),
        tokenizer_sha256=hashes.pop() if len(hashes) == 1 else None,
        seed=request.seed,
        n=comparisons[0]["n"] if comparisons else first_n,
    )


def rerun(arguments: Mapping[str, Any], *, progress: Progress = silent) -> dict[str, Any]:
    """The record of the same arguments, measured now; ``progress`` shows how far it is.

    Raises:
        ConfigError: they are not those of ``spikelm eval``.
    """
    known = {field.name for field in dataclasses.fields(Request)}
    unknown = sorted(set(arguments) - known)
    if unknown or not {"checkpoints", "data"} <= set(arguments):
        wrong = f"{unknown[0]!r} is unknown" if unknown else "'checkpoints' or 'data' is missing"
        raise ConfigError(f"the arguments are not those of spikelm eval: {wrong}")
    return run(Request(**arguments), progress=progress)


def labels(checkpoints: Sequence[str]) -> dict[str, Path]:
    """A name for every checkpoint: its folder's, with as many folders above it as make it unique.

    Raises:
        ConfigError: none is given, or one is given twice.
    """
    folders = [Path(name) for name in checkpoints]
    if not folders:
        raise ConfigError("no checkpoint is given; expected at least one folder")
    whole = [folder.resolve().parts for folder in folders]
    # The name as it was typed where it has one: "latest" says more than what the link points to.
    parts = [folder.absolute().parts if folder.name not in ("", "..") else path
             for folder, path in zip(folders, whole, strict=True)]  # fmt: skip
    for index, path in enumerate(parts):
        if path in parts[:index]:
            raise ConfigError(f"checkpoint {folders[index]} is given twice; give each once")
    depth = 1
    while len({path[-depth:] for path in parts}) < len(parts):
        depth += 1
    return {"/".join(path[-depth:]): folder for path, folder in zip(parts, folders, strict=True)}


def _checked(
    request: Request,
) -> tuple[torch.device, torch.dtype, Coding | None, Windows | None, tuple[int, ...]]:
    """Everything that can be wrong before anything is read."""
    if request.dtype not in DTYPES:
        raise ConfigError(f"dtype {request.dtype!r}; expected one of {', '.join(DTYPES)}")
    try:
        target = torch.device(request.device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {request.device!r} cannot be used here: {reason}") from error
    coding = None if request.coding is None else build_coding(request.coding)
    windows = request.windows()
    lengths = () if request.lengths is None else parse_lengths(request.lengths)
    if windows is None and not lengths:
        raise ConfigError("mode 'none' measures nothing by itself; give --lengths, or another mode")
    return target, DTYPES[request.dtype], coding, windows, lengths


def _read(
    request: Request,
    folders: Mapping[str, Path],
    tokenizers: Mapping[str, Tokenizer],
    text: Text,
    warn: Callable[[str], None],
) -> list[_Reading]:
    """The text in every checkpoint's tokens; read once per tokenizer."""
    corpora: dict[str, tuple[Corpus, LastWords | None]] = {}
    readings = []
    for label, folder in folders.items():
        words = tokenizers[label]
        if words.sha256 not in corpora:
            corpus = read_corpus(text.source, words, start=request.start, max_bytes=text.limit)
            ends = None
            if text.prompts is not None:
                ends = last_words(corpus, words, list(text.source.documents()), text.prompts)
            corpora[words.sha256] = corpus, ends
            if corpus.rescaled:
                warn(
                    f"{corpus.rescaled} documents are not the sum of their tokens' bytes under this "
                    "tokenizer; the lengths of their tokens were scaled"
                )
        corpus, ends = corpora[words.sha256]
        check_vocabulary(corpus, read_config(folder).vocab_size)
        readings.append(_Reading(label=label, folder=folder, corpus=corpus, tokenizer=words, words=ends))
    return readings


def _load(folder: Path, device: torch.device, dtype: torch.dtype, twin: bool) -> SpikeLM:
    """The model in evaluation mode, with every neuron off where the twin is asked for."""
    model = load_model(folder, device=str(device), dtype=dtype)
    if twin:
        spiking = model
        with torch.device("meta"):
            model = SpikeLM(spiking.config.twin())
        weights = {name: value for name, value in spiking.state_dict().items() if name in model.state_dict()}
        model.load_state_dict(weights, assign=True)
        model.tie_weights()  # assigning gives the head weights of its own
    return model.eval()


def _measured(
    model: SpikeLM,
    reading: _Reading,
    request: Request,
    windows: Windows | None,
    device: torch.device,
    coding: Coding | None,
    progress: Progress,
    title: str,
) -> tuple[Result | None, dict[str, Any]]:
    """The figures of one model, and what else its entry has."""
    if windows is None:
        return None, {}
    size = model.config.vocab_size
    try:
        if reading.words is not None:
            with progress(title, reading.words.predictions) as advance:
                result, accuracy = measure_last_words(
                    model,
                    reading.words,
                    vocab_size=size,
                    batch_size=windows.batch_size,
                    chunk=windows.chunk,
                    device=device,
                    advance=advance,
                    coding=coding,
                )
            return result, {"last_word": accuracy}
        with progress(title, reading.corpus.predictions * len(windows.modes)) as advance:
            return (
                measure(
                    model,
                    reading.corpus,
                    windows,
                    vocab_size=size,
                    device=device,
                    advance=advance,
                    coding=coding,
                ),
                {},
            )
    except SpikeLMError as error:
        # With several models it must be said which one it was.
        if len(request.checkpoints) > 1:
            raise type(error)(f"{reading.label}: {error}") from error
        raise


def _entry(result: Result | None, reading: _Reading, text: Text) -> dict[str, Any]:
    """What a record holds of one model."""
    if result is None:
        return {"figures": {}, "spikes": Meter().summary(), "by_position": []}
    entry = result.to_dict()
    if reading.words is None:
        for figure in result.figures:
            entry["figures"][figure.label] |= other_units(figure, reading.corpus, text)
    if text.names is not None:
        rows = zip(text.names, result.documents, strict=False)  # reading may have stopped early
        entry["documents"] = [{"name": name, **row} for name, row in rows]
        entry["documents_over"] = result.spikes_over
    return entry


def _about(request: Request, corpus: Corpus, text: Text) -> dict[str, Any]:
    """What was read; the same for every model."""
    about = {
        "source": request.data,
        "name": corpus.name,
        "kind": text.kind,
        "sha256": corpus.sha256,
        "documents": len(corpus.tokens),
        "bytes": corpus.bytes,
        "first_token_scored": request.start != "none",
        "max_bytes": request.max_bytes,
    }
    if text.words is not None:
        about |= {"original_words": text.words, "original_bytes": text.bytes}
    return about
