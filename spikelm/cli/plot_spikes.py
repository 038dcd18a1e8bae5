"""The plots that need a model to read a text: raster, rates, counts, membrane, spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikelm.cli._common import JsonOption, progress, tokenizer_for, write_json

if TYPE_CHECKING:
    from collections.abc import Collection

    from matplotlib.figure import Figure

    from spikelm.meter import Meter
    from spikelm.model import SpikeLM
    from spikelm.plots.reading import Given, Site
    from spikelm.plots.samples import Sample

Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder.")]
Text = Annotated[str | None, typer.Option("--text", help="Text that the model reads.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="SOURCE", help="Read a document of this source instead: a file, builtin:..., ..."
    ),
]
Tokens = Annotated[int, typer.Option("--tokens", help="Tokens that are read at most.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Picture to write, .png or .svg; KIND.png here if absent."),
]
Layer = Annotated[int | None, typer.Option("--layer", help="Only this layer, from 0.")]
Projection = Annotated[
    str | None,
    typer.Option(
        "--projection",
        metavar="NAME",
        help="Only projections, or neurons outside one, whose path is or ends with this: channel.key, key.",
    ),
]
TokenizerOption = Annotated[
    str | None, typer.Option("--tokenizer", help="Tokenizer to use instead of the checkpoint's; or 'bytes'.")
]
Device = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1, ...")]


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A model and the text it is to read."""

    checkpoint: Path
    model: SpikeLM
    text: Sample
    out: Path

    def read(self, meter: Meter | None = None, inputs: Collection[Site] = ()) -> dict[str, Given]:
        from spikelm.plots.reading import read

        with progress("reading", len(self.text.tokens), "tokens") as bar:
            return read(self.model, self.text.tokens, meter=meter, inputs=inputs, advance=bar.advance)

    def finish(self, figure: Figure, numbers: dict[str, Any], said: str, json_file: Path | None) -> None:
        """Write the picture and the numbers, and say what was drawn."""
        from spikelm.plots import canvas

        picture = canvas.save(figure, self.out)
        told = {"picture": picture, "checkpoint": self.checkpoint, "text": self.text.to_dict()}
        write_json(json_file, {**told, **numbers})
        if str(json_file) != "-":
            print(said)
            print(f"picture: {picture}")


def _open(
    kind: str,
    checkpoint: Path,
    *,
    text: str | None,
    data: str | None,
    tokens: int,
    out: Path | None,
    tokenizer: str | None,
    device: str,
) -> _Opened:
    import torch

    from spikelm.checkpoint import load_model
    from spikelm.errors import ConfigError
    from spikelm.plots import canvas
    from spikelm.plots.samples import open_sample

    target = canvas.check_ending(out or Path(f"{kind}.png"))
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    words = tokenizer_for(checkpoint, tokenizer)
    found = open_sample(words, text=text, data=data, most=tokens)
    return _Opened(checkpoint=checkpoint, model=load_model(checkpoint, str(place)), text=found, out=target)


def raster(
    checkpoint: Checkpoint,
    text: Text = None,
    data: Data = None,
    tokens: Tokens = 64,
    layer: Layer = None,
    projection: Projection = None,
    out: Out = None,
    tokenizer: TokenizerOption = None,
    device: Device = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Draw the spikes that enter one projection while a text is read.

    One column for each token, one row for each channel, colour for the count. Of several projections the
    first is drawn; without --layer, the first of the middle layer.

    Example: spikelm plot raster runs/demo/spiking --text "A list is" --projection channel.key --layer 1
    """
    from spikelm.meter import Meter
    from spikelm.plots import raster as plot
    from spikelm.plots.reading import joined

    opened = _open(
        "raster",
        checkpoint,
        text=text,
        data=data,
        tokens=tokens,
        out=out,
        tokenizer=tokenizer,
        device=device,
    )
    site, others = _one(opened.model, layer, projection)
    meter = Meter(raster=[site.path])
    opened.read(meter)
    numbers = plot.raster(joined(meter, site.path), path=site.path, tokens=opened.text.labels)
    said = f"{site.path}: {numbers['firing_rate']:.1%} of channels fire{others}"
    opened.finish(plot.draw(numbers), numbers, said, json_file)


def rates(
    checkpoint: Checkpoint,
    text: Text = None,
    data: Data = None,
    tokens: Tokens = 2048,
    out: Out = None,
    tokenizer: TokenizerOption = None,
    device: Device = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Draw the firing rate of every projection and neuron, by layer and by kind.

    Example: spikelm plot rates runs/demo/spiking --data builtin:python-docs#valid --out rates.svg
    """
    from spikelm.meter import Meter
    from spikelm.plots import rates as plot

    opened = _open(
        "rates", checkpoint, text=text, data=data, tokens=tokens, out=out, tokenizer=tokenizer, device=device
    )
    meter = Meter()
    opened.read(meter)
    summary = meter.summary()
    numbers = plot.rates(summary)
    total = summary["total"]
    said = (
        f"{total['firing_rate']:.1%} of all inputs of projections fire, weighted by multiply-accumulates; "
        f"{total['spiking_share']:.0%} of those have spikes as their input"
    )
    figure = plot.draw(numbers, title=f"firing rate of {checkpoint.name}")
    opened.finish(figure, {**numbers, "total": total}, said, json_file)


def counts(
    checkpoint: Checkpoint,
    text: Text = None,
    data: Data = None,
    tokens: Tokens = 2048,
    layer: Layer = None,
    projection: Projection = None,
    out: Out = None,
    tokenizer: TokenizerOption = None,
    device: Device = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Draw how often every projection was sent which integer, on a logarithmic scale, with the cap.

    Example: spikelm plot counts runs/demo/spiking --data builtin:python-docs#valid --projection key
    """
    from spikelm.plots import counts as plot
    from spikelm.plots.reading import SpikeMeter, choose, sites

    opened = _open(
        "counts", checkpoint, text=text, data=data, tokens=tokens, out=out, tokenizer=tokenizer, device=device
    )
    chosen = choose(sites(opened.model), layer=layer, projection=projection)
    meter = SpikeMeter()
    opened.read(meter)
    wanted = {site.path: meter.histograms[site.path] for site in chosen if site.path in meter.histograms}
    numbers = plot.counts(wanted, {site.path: getattr(site.neuron, "cap", None) for site in chosen})
    places = numbers["places"].values()
    every = sum(entry["total"] for entry in places)
    silent = sum(entry["silent"] * entry["total"] for entry in places) / every
    largest = max(max(map(abs, entry["values"])) for entry in places)
    said = f"{len(places)} places, {silent:.1%} of {every} counts are silent, the largest is {largest}"
    opened.finish(plot.draw(numbers, title=checkpoint.name), numbers, said, json_file)


def membrane(
    checkpoint: Checkpoint,
    text: Text = None,
    data: Data = None,
    tokens: Tokens = 64,
    layer: Layer = None,
    projection: Projection = None,
    channel: Annotated[
        list[int] | None,
        typer.Option(
            "--channel", help="Channel to follow; may be given several times. Four are chosen if absent."
        ),
    ] = None,
    out: Out = None,
    tokenizer: TokenizerOption = None,
    device: Device = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Draw the membrane of integrate-and-fire neurons over tokens, with threshold and spikes.

    For models with neurons that remember (if, lif, plif). Without --channel, four channels are drawn, from
    one that rarely fires to the one that fires most.

    Example: spikelm plot membrane runs/lif --text "A list is" --projection channel.key --channel 3
    """
    from spikelm.neurons.lif import IntegrateAndFire
    from spikelm.plots import membrane as plot

    opened = _open(
        "membrane",
        checkpoint,
        text=text,
        data=data,
        tokens=tokens,
        out=out,
        tokenizer=tokenizer,
        device=device,
    )
    site, others = _one(
        opened.model,
        layer,
        projection,
        accept=lambda site: isinstance(site.neuron, IntegrateAndFire),
        wanted="neuron with a membrane (if, lif or plif)",
    )
    given = _given(opened.read(inputs=[site]), site)
    assert isinstance(site.neuron, IntegrateAndFire)
    numbers = plot.membrane(
        site.neuron, given.x, given.state, path=site.path, channels=channel, tokens=opened.text.labels
    )
    said = f"{site.path}: {numbers['firing_rate']:.1%} of channels fire{others}"
    opened.finish(plot.draw(numbers), numbers, said, json_file)


def spectrum(
    checkpoint: Checkpoint,
    text: Text = None,
    data: Data = None,
    tokens: Tokens = 4096,
    layer: Layer = None,
    projection: Projection = None,
    noise: Annotated[
        bool,
        typer.Option(
            "--noise", help="Drive neurons with white noise of every channel's own mean and deviation."
        ),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the noise.")] = 0,
    segment: Annotated[int, typer.Option("--segment", help="Tokens of a segment of the spectrum.")] = 256,
    out: Out = None,
    tokenizer: TokenizerOption = None,
    device: Device = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Draw how much every neuron kind suppresses high frequencies along the sequence.

    Neurons are driven by what the model gives them while it reads a text (or by white noise), and the power
    of their output is divided by that of their input, frequency by frequency (Welch's periodograms).

    Example: spikelm plot spectrum runs/demo/spiking --data builtin:python-docs#valid --layer 1
    """
    from spikelm.plots import spectrum as plot
    from spikelm.plots.reading import choose, sites
    from spikelm.plots.responses import spectra

    opened = _open(
        "spectrum",
        checkpoint,
        text=text,
        data=data,
        tokens=tokens,
        out=out,
        tokenizer=tokenizer,
        device=device,
    )
    chosen = choose(sites(opened.model), layer=layer, projection=projection)
    length = plot.segment_length(len(opened.text.tokens), segment)
    given = opened.read(inputs=chosen)
    numbers = spectra(chosen, given, length=length, seed=seed if noise else None)
    said = "\n".join(
        f"{name}: highest against lowest frequencies "
        + ("no power" if entry["high_level"] is None else f"{entry['high_level']:+.1f} dB")
        for name, entry in numbers["neurons"].items()
    )
    opened.finish(plot.draw(numbers, title=checkpoint.name), numbers, said, json_file)


def _one(model: SpikeLM, layer: int | None, projection: str | None, **options: Any) -> tuple[Site, str]:
    """The site to draw, and words about others that fit the options, too."""
    from spikelm.plots.reading import choose, middle, sites

    fitting = choose(sites(model), layer=layer, projection=projection, **options)
    site = fitting[0] if layer is not None else middle(fitting)
    return site, f"; {len(fitting) - 1} more fit (--projection, --layer)" if len(fitting) > 1 else ""


def _given(found: dict[str, Given], site: Site) -> Given:
    from spikelm.errors import ConfigError

    if site.path not in found:
        raise ConfigError(
            f"{site.path} does not see every token in turn (an expert, for example); "
            "choose another --projection"
        )
    return found[site.path]
