"""``spikelm demo``: from text to text on this machine, with nothing downloaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikelm.cli._common import (
    JsonOption,
    console,
    human_bytes,
    human_count,
    human_time,
    progress,
    write_json,
)

if TYPE_CHECKING:
    from rich.console import Console

    from spikelm.data.source import Source
    from spikelm.evaluation.perplexity import Result
    from spikelm.model import SpikeLM
    from spikelm.tokenizer import Tokenizer

TEXT = "builtin:python-docs"
VOCABULARY = 1024
DESIGNS = {"spiking": "spikegpt-nano-sd", "twin": "spikegpt-nano-twin"}
"""Folder of the checkpoint -> model preset."""

RASTER = "blocks.1.channel.key"
PROMPT = "The "


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One of the two models, measured."""

    model: SpikeLM
    folder: Path
    result: Result
    tokens_per_second: float
    seconds: float
    state_bytes: int


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for checkpoints, picture and figures.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[
        int | None, typer.Option("--steps", help="Training steps per model; fewer is faster and worse.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of weights, order and sample.")] = 0,
    json_file: JsonOption = None,
) -> int:
    """Train a small spiking language model and its continuous twin, measure both, let the first one write.

    The text is Python's own documentation, so nothing is downloaded. The two models are equal but for the
    neurons: in the spiking one, integer spike counts enter every projection of its blocks. Takes about
    eight minutes on two cores; the same command continues an interrupted demo. Leaves checkpoints in
    OUT/spiking and OUT/twin, a spike raster in OUT/raster.png and all figures in OUT/demo.json.

    Example: spikelm demo --out runs/demo
    """
    from spikelm.data.source import open_source
    from spikelm.evaluation.corpus import read_corpus

    started = time.perf_counter()
    screen = console(stderr=str(json_file) == "-")
    train_text, held_out = open_source(f"{TEXT}#train"), open_source(f"{TEXT}#valid")
    tokenizer = _tokenizer(out, train_text)
    precision = _remembered(out / "precision", _faster_precision)
    corpus = read_corpus(held_out, tokenizer)
    trained: dict[str, Trained] = {}
    for name, preset in DESIGNS.items():
        found = _train(name, preset, out, tokenizer, corpus, precision=precision, steps=steps, seed=seed)
        if found is None:
            return 130
        trained[name] = found
    baselines = _compressors(held_out)
    picture = _raster(trained["spiking"].model, tokenizer, held_out, out / "raster.png")
    sample = _sample(trained["spiking"].model, tokenizer, seed)
    seconds = time.perf_counter() - started
    _print(screen, trained, baselines, corpus.bytes)
    screen.print(f"\nspike raster: {picture}")
    screen.print(f'\nthe spiking model continues "{PROMPT.strip()}":\n', highlight=False)
    screen.print(PROMPT + sample, markup=False, highlight=False)
    folder = trained["spiking"].folder
    screen.print(f"\n{human_time(seconds)} in all. Go on with:")
    screen.print(f'  spikelm generate {folder} --prompt "A list is" --stream', markup=False)
    screen.print(f"  spikelm eval {folder} --data {TEXT}#valid", markup=False)
    report = _report(trained, baselines, corpus.bytes, precision=precision, sample=sample, seconds=seconds)
    write_json(out / "demo.json", report)
    write_json(json_file, report)
    return 0


def _remembered(path: Path, choose: Callable[[], str]) -> str:
    """What was chosen here the first time, so that a continued demo goes on with it."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(choose() + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _run_name(name: str, steps: int | None, seed: int) -> str:
    """A folder per run: other steps or another seed begin anew."""
    return "-".join([name, *([] if steps is None else [f"{steps}steps"]), *([f"seed{seed}"] if seed else [])])


def _tokenizer(out: Path, text: Source) -> Tokenizer:
    """A byte-level BPE of the training text, trained once."""
    from spikelm.tokenizer import Tokenizer

    folder = out / "tokenizer"
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder)
    tokenizer = Tokenizer.train_bpe(text.documents(), VOCABULARY)
    tokenizer.save(folder)
    return tokenizer


def _faster_precision() -> str:
    """``bf16`` where this machine multiplies bfloat16 matrices faster than float32, else ``fp32``."""
    import torch

    if torch.cuda.is_available():
        return "bf16"

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(1024, 512).to(dtype)
        b = torch.randn(512, 512).to(dtype)
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - start)
        return best

    return "bf16" if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else "fp32"


def _train(
    name: str,
    preset: str,
    out: Path,
    tokenizer: Tokenizer,
    corpus: Any,
    *,
    precision: str,
    steps: int | None,
    seed: int,
) -> Trained | None:
    """Train and measure one model; None if it was interrupted (the same command continues)."""
    from spikelm.checkpoint import save_checkpoint
    from spikelm.evaluation.perplexity import Windows, measure
    from spikelm.state import state_bytes
    from spikelm.train.config import TrainConfig
    from spikelm.train.trainer import Trainer

    overrides = [
        f"model={preset}",
        f"data.tokenizer={out / 'tokenizer'}",
        f"out={out / 'training' / _run_name(name, steps, seed)}",
        f"precision={precision}",
        f"seed={seed}",
    ]
    if steps is not None:
        overrides += [f"steps={steps}", f"schedule.warmup={min(20, steps)}"]
    config = TrainConfig.from_yaml("demo", overrides)
    trainer = Trainer(config, progress=progress, title=f"train {name}")
    done = trainer.run()
    if done.interrupted is not None:
        return None
    model = trainer.model.cpu().float().eval()
    folder = save_checkpoint(out / name, model, tokenizer)
    windows = Windows(modes=("carried",), batch_size=8, chunk=256)
    with progress(f"measure {name}", corpus.predictions, "tokens") as bar:
        result = measure(model, corpus, windows, vocab_size=model.config.vocab_size, advance=bar.advance)
    return Trained(
        model=model,
        folder=folder,
        result=result,
        tokens_per_second=done.tokens_per_second,
        seconds=done.seconds,
        state_bytes=state_bytes(model.init_state(1)),
    )


def _compressors(text: Source) -> dict[str, float]:
    """Bits per byte of general-purpose compressors on the held-out bytes (they have seen nothing else)."""
    import lzma
    import zlib

    raw = "".join(text.documents()).encode("utf-8")
    return {
        "zlib -9": 8 * len(zlib.compress(raw, 9)) / len(raw),
        "lzma -9e": 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw),
    }


def _raster(model: SpikeLM, tokenizer: Tokenizer, text: Source, path: Path) -> Path:
    """The counts that enter one projection while a held-out document is read."""
    import torch

    from spikelm.meter import Meter
    from spikelm.plots.raster import draw_raster
    from spikelm.recurrence import Context

    longest = max(text.documents(), key=len)
    ids = tokenizer.encode(longest[:2000])[:64]
    meter = Meter(raster=[RASTER])
    with torch.inference_mode():
        model(torch.tensor([ids]), ctx=Context(meter=meter))
    counts = meter.rasters[RASTER][0][0]
    return draw_raster(path, counts, title=f"input of {RASTER}", tokens=[tokenizer.decode([i]) for i in ids])


def _sample(model: SpikeLM, tokenizer: Tokenizer, seed: int) -> str:
    from spikelm.generation import generate
    from spikelm.sampling import Sampler

    sampler = Sampler(temperature=0.7, top_p=0.95, seed=seed)
    return "".join(piece.text for piece in generate(model, tokenizer, PROMPT, 160, sampler, ignore_eos=True))


def _print(screen: Console, trained: dict[str, Trained], baselines: dict[str, float], nbytes: int) -> None:
    from rich.table import Table

    table = Table(title=f"{TEXT}, {nbytes:,} bytes held out")
    headings = ("", "bits/byte", "± s.e.", "silent inputs", "mean |count|", "trained at", "state")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "" else "right")
    for name, entry in trained.items():
        figure, total = entry.result.figures[0], entry.result.spikes["total"]
        error = figure.stderr_bits_per_byte
        spiking = total["spiking_share"] > 0
        table.add_row(
            f"{name} ({human_count(entry.model.num_parameters())} parameters)",
            f"{figure.bits_per_byte:.3f}",
            "-" if error is None else f"{error:.3f}",
            f"{total['silent']:.1%}" + ("" if spiking else " (dense)"),
            f"{total['mean_count']:.2f}" if spiking else "-",
            f"{human_count(entry.tokens_per_second)} tokens/s",
            human_bytes(entry.state_bytes),
        )
    for name, value in baselines.items():
        table.add_row(f"{name}, the same bytes", f"{value:.3f}", *["-"] * 5)
    screen.print(table)


def _report(
    trained: dict[str, Trained],
    baselines: dict[str, float],
    nbytes: int,
    *,
    precision: str,
    sample: str,
    seconds: float,
) -> dict[str, Any]:
    """Everything the table shows, and what is needed to read it later."""
    from spikelm.provenance import git_revision, versions

    return {
        "models": {
            name: {
                "checkpoint": entry.folder,
                "preset": DESIGNS[name],
                "parameters": entry.model.num_parameters(),
                "held_out": entry.result.figures[0].to_dict(),
                "spikes": entry.result.spikes,
                "tokens_per_second": entry.tokens_per_second,
                "training_seconds": entry.seconds,
                "state_bytes": entry.state_bytes,
            }
            for name, entry in trained.items()
        },
        "compressors": baselines,
        "held_out_bytes": nbytes,
        "precision": precision,
        "sample": PROMPT + sample,
        "seconds": seconds,
        "versions": versions(),
        "git_revision": git_revision(),
    }
