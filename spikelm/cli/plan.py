"""``spikelm plan``: what recipes cost, before they are started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikelm.cli._common import JsonOption, console, human_bytes, human_count, warn, write_json
from spikelm.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from spikelm.train.plan import Plan


def plan(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="Preset of configs/train or configs/finetune, or a YAML file; all presets unless given.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's, as steps=2000."),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", help="GPUs of the estimate for H100s.")] = 1,
    gpu_share: Annotated[
        float | None, typer.Option("--gpu-share", help="Share of an H100's peak that a run reaches.")
    ] = None,
    here_share: Annotated[
        float | None, typer.Option("--here-share", help="Share of this machine's peak that a run reaches.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Tell what recipes cost: parameters, tokens, FLOPs, hours here and on H100s, disk, published figure.

    FLOPs are six per weight of the matrix products and token. This machine's peak is measured on the spot;
    how much of a peak a run reaches is an assumption that is printed with the table.

    Example: spikelm plan spikegpt-46m-enwik8 steps=30000 --gpus 8
    """
    from spikelm.train import plan as planning

    gpu_share = planning.H100_SHARE if gpu_share is None else gpu_share
    here_share = planning.HERE_SHARE if here_share is None else here_share
    for name, value in (("--gpu-share", gpu_share), ("--here-share", here_share)):
        if not 0.0 < value <= 1.0:
            raise ConfigError(f"{name} is {value}; expected a share above 0 and up to 1")
    if gpus < 1:
        raise ConfigError(f"--gpus is {gpus}; expected a positive number")
    if source is not None and "=" in source:
        raise ConfigError(f"{source} is no recipe; name one before the pairs: spikelm plan RECIPE {source}")
    if source is None:
        plans = [planning.plan(name, kind=kind) for kind, name in planning.recipes()]
    else:
        plans = [planning.plan(source, overrides or [])]
    peaks = _peaks({"fp32"} | {found.precision for found in plans})
    if "bf16" in peaks and peaks["bf16"]["flops"] < peaks["fp32"]["flops"]:
        slower = peaks["fp32"]["flops"] / peaks["bf16"]["flops"]
        warn(
            f"this machine multiplies bf16 {slower:.0f} times slower than fp32: run recipes that say bf16 "
            "with precision=fp32 here"
        )
    fast = gpus * gpu_share * planning.H100_BF16
    rows = [
        {
            **found.to_dict(),
            "hours_here": found.hours(peaks[found.precision]["flops"] * here_share),
            "hours_h100": found.hours(fast),
        }
        for found in plans
    ]
    speeds = {
        "here": peaks,
        "here_share": here_share,
        "h100_bf16": planning.H100_BF16,
        "gpus": gpus,
        "gpu_share": gpu_share,
    }
    write_json(json_file, {"speeds": speeds, "recipes": rows})
    if str(json_file) != "-":
        _show(plans, rows, speeds, console())


def _peaks(precisions: set[str]) -> dict[str, dict[str, Any]]:
    """Measured FLOP/s of this machine, by precision."""
    import torch

    from spikelm.train.throughput import gemm_peak

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {precision: gemm_peak(device, precision) for precision in sorted(precisions)}
    return {
        precision: {"flops": peak.flops, "device": str(device), "threads": peak.threads, "size": peak.size}
        for precision, peak in found.items()
    }


def _show(plans: list[Plan], rows: list[dict[str, Any]], speeds: dict[str, Any], out: Console) -> None:
    from rich.table import Table

    table = Table(box=None)
    headings = ("recipe", "parameters", "tokens", "FLOPs", "hours here", "hours H100", "disk", "published")
    for heading in headings:
        table.add_column(heading, no_wrap=heading == "recipe")
    for found, row in zip(plans, rows, strict=True):
        table.add_row(
            found.name,
            human_count(found.parameters),
            "-" if found.tokens is None else human_count(found.tokens),
            "-" if found.flops is None else f"{found.flops:.1e}",
            _hours(row["hours_here"]),
            _hours(row["hours_h100"]),
            human_bytes(found.disk_bytes),
            found.published or "-",
        )
    out.print(table)
    measured = ", ".join(
        f"{precision} {peak['flops'] / 1e9:,.0f} GFLOP/s ({peak['device']}, {peak['threads']} threads)"
        for precision, peak in speeds["here"].items()
    )
    out.print(
        f"Here: {measured}, measured just now; assumed share {speeds['here_share']:.0%}. "
        f"H100: {speeds['gpus']} of {speeds['h100_bf16'] / 1e12:.0f} TFLOP/s bf16, assumed share "
        f"{speeds['gpu_share']:.0%} (not measured)."
    )
    if len(plans) == 1:
        (only,) = plans
        out.print(
            f"{human_count(only.matrix_weights)} weights in matrix products; {human_bytes(only.state_bytes)} "
            "for weights, gradients and Adam, activations come on top"
        )
        for note in only.notes:
            out.print(f"note: {note}", markup=False)
        if only.source:
            out.print(f"published in: {only.source}", markup=False)


def _hours(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 0.01:
        return "< 0.01"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
