"""``spikelm convert spike``: spikes before every projection of a trained model, and int8 weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikelm.cli._common import JsonOption, console, human_bytes, progress, write_json
from spikelm.cli._conversion import Work, measured, measured_alike, prepare

if TYPE_CHECKING:
    from spikelm.codings import Coding
    from spikelm.quantisation.spiking import Request


def spike(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder, spiking or not.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write: a checkpoint, or the sweep's results.")
    ],
    calibrate: Annotated[
        str,
        typer.Option("--calibrate", metavar="SOURCE", help="Text to calibrate on, as spikelm eval takes it."),
    ],
    k: Annotated[
        float, typer.Option("--k", help="Counts of a channel of mean magnitude (threshold = mean|x| / k).")
    ] = 3.0,
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep", metavar="K,K,...", help="Measure these k instead, and write JSON and a picture to OUT."
        ),
    ] = None,
    weights: Annotated[str, typer.Option("--weights", help="int8 or float.")] = "int8",
    group_size: Annotated[
        str, typer.Option("--group-size", help="Inputs that share an int8 scale, or 'channel'.")
    ] = "128",
    dead_zone: Annotated[
        float | None,
        typer.Option(
            "--dead-zone",
            help="Channels below this many mean magnitudes stay silent; the checkpoint's own, else 0.",
        ),
    ] = None,
    head: Annotated[bool, typer.Option("--head", help="Convert the head, too.")] = False,
    search: Annotated[
        bool,
        typer.Option("--search/--no-search", help="Search k, cap and weight clipping for each projection."),
    ] = True,
    coding: Annotated[
        str | None,
        typer.Option(
            "--coding",
            metavar="NAME",
            help="Also measure the result expanded over this coding's micro-steps.",
        ),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="SOURCE",
            help="Held-out text to measure on; the last quarter of --calibrate if absent.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Windows to calibrate on.")] = 128,
    length: Annotated[int, typer.Option("--length", help="Tokens of a window.")] = 512,
    max_bytes: Annotated[
        int, typer.Option("--max-bytes", help="Bytes of text to read of each source, at most.")
    ] = 1_000_000,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Windows read side by side.")] = 4,
    start: Annotated[
        str, typer.Option("--start", help="Token before a document: none, bos or eos.")
    ] = "none",
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Tokenizer instead of the checkpoint's; or 'bytes'.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Put spikes before every projection of a trained model, and make its weights int8.

    Every projection of the blocks gets the adaptive neuron with a k and a cap of its own, found on the
    calibration text for the same number of spikes as one k for all (--no-search: one k for all). OUT also
    gets spike_report.json and spike_report.md: errors, spike rates, sparsity under every coding, bits per
    byte before and after.

    Example: spikelm convert spike runs/twin runs/spiking --k 3 --weights int8 --calibrate book.txt

    Example: spikelm convert spike runs/twin sweep --sweep 2,2.5,3,3.5,4 --calibrate book.txt
    """
    from spikelm.codings import build_coding
    from spikelm.quantisation.spiking import Request

    request = Request(
        k=k,
        dead_zone=dead_zone,
        weights=weights,
        group_size=_group_size(group_size),
        head=head,
        search=search,
    )
    several = None if sweep is None else [dataclasses.replace(request, k=value) for value in _values(sweep)]
    expansion = None if coding is None else build_coding(coding)
    work = prepare(
        checkpoint, out, request, calibrate, evaluation, samples, length, max_bytes, batch_size, start,
        tokenizer, overwrite, several is not None,
    )  # fmt: skip
    if several is not None:
        _sweep(work, out, several, json_file)
    else:
        _convert(work, out, request, expansion, json_file)


def _convert(work: Work, out: Path, request: Request, coding: Coding | None, json_file: Path | None) -> None:
    import json

    from spikelm.checkpoint import save_checkpoint
    from spikelm.quantisation.report import markdown

    report, chosen, model = measured(work, request)
    if request.search:
        report["one_k_for_all"], report["bits_per_byte"]["one k for all"] = measured_alike(
            work, chosen, request
        )
    if coding is not None:
        with progress(f"expanding ({coding.name})", None, "tokens"):
            expanded = work.held_out.measure(model, coding=coding).to_dict()
        report["bits_per_byte"][f"converted, expanded ({coding.name})"] = expanded
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(work.dtypes.get(name, parameter.dtype))
    page = json.dumps(_jsonable(report), indent=2) + "\n"
    extra = {"spike_report.json": page.encode(), "spike_report.md": markdown(report).encode()}
    save_checkpoint(out, model, work.words if work.has_tokenizer else None, extra)
    report["checkpoint"] = str(out)
    if str(json_file) != "-":
        _print(report, out)
    write_json(json_file, report)


def _sweep(work: Work, out: Path, requests: list[Request], json_file: Path | None) -> None:
    import json
    import shutil

    from rich.table import Table

    from spikelm.errors import ConfigError
    from spikelm.quantisation.figure import draw_sweep

    points = []
    with progress("measuring", len(requests), "values of k") as bar:
        for request in requests:
            report, _, _ = measured(work, request)
            after, total = report["bits_per_byte"]["converted"], report["totals"]
            points.append(
                {
                    "k": request.k,
                    "bits_per_byte": after["bits_per_byte"],
                    "stderr_bits_per_byte": after["stderr_bits_per_byte"],
                    **{key: value for key, value in total["mean_over_projections"].items()},
                    "mean_over_multiply_accumulates": total["mean_over_multiply_accumulates"],
                    "codings": total["codings"],
                    "neurons": {path: row["neuron"] for path, row in report["projections"].items()},
                }
            )
            bar.advance()
    shared = dataclasses.asdict(requests[0])
    del shared["k"]
    result = {
        "source": str(work.checkpoint),
        "request": shared,
        **work.about,
        "as_trained": work.before,
        "points": points,
        "versions": report["versions"],
        "git_revision": report["git_revision"],
    }
    temporary = out.with_name(f".{out.name}.writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / "sweep.json").write_text(json.dumps(_jsonable(result), indent=2) + "\n")
        draw_sweep(points, work.before["bits_per_byte"], temporary / "sweep.png")
        from spikelm.checkpoint import replace_folder, sync_folder

        sync_folder(temporary)
        replace_folder(temporary, out)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if str(json_file) != "-":
        table = Table(title=f"as trained: {work.before['bits_per_byte']:.4f} bits per byte")
        names = [name for name in points[0]["codings"] if all("exact" in p["codings"][name] for p in points)]
        for heading in ("k", "bits/byte", "± s.e.", "silent", "ones per count", *names):
            table.add_column(heading, justify="right")
        for point in points:
            error_ = point["stderr_bits_per_byte"]
            table.add_row(
                f"{point['k']:g}",
                f"{point['bits_per_byte']:.4f}",
                "-" if error_ is None else f"{error_:.4f}",
                f"{point['silent']:.4f}",
                f"{point['ones_per_count']:.4f}",
                *(f"{point['codings'][name]['exact']['sparsity']:.4f}" for name in names),
            )
        console().print(table)
        console().print(f"{out}: sweep.json, sweep.png (sparsity above: exact windows)")
    write_json(json_file, result)


def _group_size(text: str) -> int | None:
    from spikelm.errors import ConfigError

    if text == "channel":
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"group-size {text!r}; expected a whole number such as 128, or channel") from None


def _values(text: str) -> list[float]:
    from spikelm.errors import ConfigError

    try:
        values = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise ConfigError(f"sweep {text!r}; expected values of k such as 2,2.5,3,3.5,4") from None
    return values


def _jsonable(value: Any) -> Any:
    """Numbers that are not finite become null."""
    import math

    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(report: Mapping[str, Any], out: Path) -> None:
    from rich.table import Table

    table = Table(title="projections (errors: calibration rows; the rest: held-out text)")
    for heading in (
        "projection",
        "k",
        "cap",
        "error",
        "spike rate",
        "silent",
        "ones",
        "<= 7",
        "clipped",
        "bytes",
    ):
        table.add_column(heading, justify="left" if heading == "projection" else "right")
    for path, row in report["projections"].items():
        neuron = row["neuron"]
        adaptive = neuron["name"] == "adaptive"
        cells = (
            [f"{neuron.get('k', 3.0):.2f}", str(neuron.get("cap", 127))] if adaptive else [neuron["name"], ""]
        )
        for key in ("relative_error", "spike_rate", "silent", "ones_per_count", "counts_up_to_7", "clipped"):
            cells.append(f"{row[key]:.4f}" if key in row else "-")
        table.add_row(path, *cells, human_bytes(row["bytes_after"]))
    console().print(table)
    total = report["totals"]
    figures = ", ".join(
        f"{name} {figure['bits_per_byte']:.4f}" for name, figure in report["bits_per_byte"].items()
    )
    console().print(f"bits per byte on {report['evaluation']['name']}: {figures}")
    console().print(
        f"weights of the projections: {human_bytes(total['bytes_before'])} before, "
        f"{human_bytes(total['bytes_after'])} after"
    )
    console().print(f"{out}: checkpoint, spike_report.json, spike_report.md (sparsity under every coding)")
