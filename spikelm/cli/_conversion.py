"""What the conversions to spikes share: checks, calibration, and one measured conversion."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikelm.cli._common import progress, tokenizer_for, warn

if TYPE_CHECKING:
    import torch

    from spikelm.model import SpikeLM
    from spikelm.quantisation.calibration import Sample
    from spikelm.quantisation.spiking import Int8Weights, Plan, Request
    from spikelm.quantisation.text import HeldOut
    from spikelm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A model as it was trained, measured and calibrated.

    Args:
        checkpoint: folder it came from.
        model: float32.
        dtypes: parameter name -> dtype in the checkpoint.
        samples: the calibration of every projection.
        int8: weights as they will be, where they become int8.
        held_out: what is measured on.
        before: its figure there.
        words: tokenizer.
        has_tokenizer: whether the tokenizer belongs to the checkpoint.
        about: which texts were read.
    """

    checkpoint: Path
    model: SpikeLM
    dtypes: Mapping[str, torch.dtype]
    samples: Mapping[str, Sample]
    int8: Int8Weights
    held_out: HeldOut
    before: dict[str, Any]
    words: Tokenizer
    has_tokenizer: bool
    about: dict[str, Any]


def prepare(
    checkpoint: Path,
    out: Path,
    request: Request,
    calibration: str,
    evaluation: str | None,
    samples: int,
    length: int,
    max_bytes: int,
    batch_size: int,
    start: str,
    tokenizer: str | None,
    overwrite: bool,
    sweep: bool,
) -> Work:
    """Check everything, then load, measure and calibrate the model as it was trained."""
    from spikelm.checkpoint import load_model, load_tokenizer, read_config
    from spikelm.data.source import open_source
    from spikelm.errors import SpikeLMError
    from spikelm.evaluation.corpus import read_corpus
    from spikelm.evaluation.perplexity import check_vocabulary
    from spikelm.quantisation.calibration import calibrate
    from spikelm.quantisation.spiking import check_convertible, convertible, int8_weights
    from spikelm.quantisation.text import split

    config = read_config(checkpoint)
    check_convertible(config)
    check_out(out, checkpoint, overwrite, "sweep.json" if sweep else "config.json")
    words = tokenizer_for(checkpoint, tokenizer)
    corpus = read_corpus(open_source(calibration), words, start=start, max_bytes=max_bytes)
    other = None
    if evaluation is not None:
        other = read_corpus(open_source(evaluation), words, start=start, max_bytes=max_bytes)
        check_vocabulary(other, config.vocab_size)
    check_vocabulary(corpus, config.vocab_size)
    windows, held_out = split(corpus, other, samples=samples, length=length, batch_size=batch_size)
    model = load_model(checkpoint)
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    model = model.float()
    projections, _ = convertible(model, request.head)
    before = held_out.measure(model).to_dict()
    tokens = sum(len(window.inputs) for window in windows)
    with progress("calibrating", tokens, "tokens") as bar:
        found = calibrate(model, projections, windows, batch_size=batch_size, advance=bar.advance)
    try:
        load_tokenizer(checkpoint)
        has_tokenizer = True
    except SpikeLMError:  # converted weights may have none
        has_tokenizer = tokenizer is not None
    about = {
        "calibration": {
            "source": calibration, "name": corpus.name, "sha256": corpus.sha256,
            "windows": len(windows), "tokens": tokens, "length": length,
        },
        "evaluation": {
            "source": evaluation or calibration,
            "name": held_out.corpus.name if other is not None else f"{corpus.name} (its last windows)",
            "sha256": held_out.corpus.sha256, "tokens": held_out.tokens,
        },
    }  # fmt: skip
    return Work(
        checkpoint=checkpoint,
        model=model,
        dtypes=dtypes,
        samples=found,
        int8=int8_weights(model, found, request),
        held_out=held_out,
        before=before,
        words=words,
        has_tokenizer=has_tokenizer,
        about=about,
    )


def measured(work: Work, request: Request) -> tuple[dict[str, Any], Plan, SpikeLM]:
    """Search, convert and measure; the report so far, the plan, and the converted model."""
    from spikelm.codings.meter import CountMeter
    from spikelm.provenance import git_revision, versions
    from spikelm.quantisation.report import projection_rows, totals
    from spikelm.quantisation.spiking import convert, plan

    with progress("searching", len(work.samples), "projections") as bar:
        chosen = plan(work.model, work.samples, work.int8, request, bar.advance)
    model = convert(work.model, work.int8, chosen, request)
    if request.head and request.weights == "int8" and model.config.tie_word_embeddings:
        warn("the head shares the embedding's weights, which stay float")
    meter = CountMeter()
    after = work.held_out.measure(model, meter).to_dict()
    rows = projection_rows(work.model, model, chosen, meter)
    model.firing = {path: row["silent"] for path, row in rows.items() if "silent" in row}
    report = {
        "source": str(work.checkpoint),
        "request": dataclasses.asdict(request),
        **work.about,
        "bits_per_byte": {"as trained": work.before, "converted": after},
        "totals": totals(rows, chosen, meter),
        "projections": rows,
        "config": model.config.to_dict(),
        "versions": versions(),
        "git_revision": git_revision(),
    }
    return report, chosen, model


def measured_alike(work: Work, chosen: Plan, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
    """Spikes and bits per byte of the same weights with one k for all, which the search is to better."""
    from spikelm.codings.meter import CountMeter
    from spikelm.quantisation.report import projection_rows, totals
    from spikelm.quantisation.spiking import convert

    alike = dataclasses.replace(chosen, choices=chosen.uniform)
    model = convert(work.model, work.int8, alike, request)
    meter = CountMeter()
    figure = work.held_out.measure(model, meter).to_dict()
    return totals(projection_rows(work.model, model, alike, meter), alike, meter), figure


def check_out(out: Path, checkpoint: Path, overwrite: bool, marker: str) -> None:
    from spikelm.errors import ConfigError

    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give the path of a new folder")
    if not (out.is_dir() and any(out.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{out} exists and is not empty; choose another folder or say --overwrite")
    if not (out / marker).is_file():
        raise ConfigError(f"{out} was not written by this command (no {marker}), so it is not overwritten")
    if checkpoint.resolve().is_relative_to(out.resolve()):
        raise ConfigError(
            f"{checkpoint} lies in {out}, which --overwrite would remove; choose another folder"
        )
