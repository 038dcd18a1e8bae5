"""``spikelm bench``: measure kernels, decoding and training beside this machine's limits and peers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from spikelm.cli._common import JsonOption, console, write_json
from spikelm.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Measure kernels, decoding and training beside this machine's limits and peers.",
)
PeerPython = Annotated[
    Path | None,
    typer.Option("--peer-python", metavar="PYTHON", help="Interpreter of an environment with the peers."),
]
Model = Annotated[str, typer.Option("--model", help="Model preset or YAML file.")]


@app.command()
def kernels(
    repeats: Annotated[int, typer.Option("--repeats", min=3, help="Timed calls of each form.")] = 40,
    peer_python: PeerPython = None,
    json: JsonOption = None,
) -> None:
    """Time the CPU kernels on one thread beside a copy of the same bytes, and the checks before a call.

    The peer is SpikingJelly's LIF node; its environment needs spikingjelly, torch and loguru.

    Example: spikelm bench kernels --repeats 20 --json kernels.json
    """
    from spikelm.bench import checks
    from spikelm.bench import kernels as bench

    figures = bench.measure(repeats, _checked(peer_python))
    check_us = checks.measure_checks()
    _finish([*bench.lines(figures), checks.line(check_us)], figures, json, check_us=check_us)


@app.command()
def decode(
    model: Model = "spikegpt-46m-sd",
    tokens: Annotated[int, typer.Option("--tokens", min=8, help="Tokens of one timed run.")] = 200,
    repeats: Annotated[int, typer.Option("--repeats", min=3, help="Timed runs of each candidate.")] = 5,
    peer_python: PeerPython = None,
    json: JsonOption = None,
) -> None:
    """Time decoding on one thread: float32, dense int8 and event-driven int8 at several silent shares.

    Random weights of the preset's shape: what is read does not depend on their values. The limit is how fast
    one thread reads as many bytes from huge pages in the same run. Peers: llama.cpp with q8_0 weights
    (xllamacpp and gguf) and the rwkv package (rwkv, torch), in an environment of their own.

    Example: spikelm bench decode --tokens 100 --peer-python peers/bin/python
    """
    from spikelm.bench import decode as bench

    figures = bench.measure(model, tokens=tokens, repeats=repeats, peer_python=_checked(peer_python))
    _finish(bench.lines(figures), figures, json)


@app.command()
def train(
    model: Model = "spikegpt-46m",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed steps of each candidate.")] = 3,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences of a step.")] = 2,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of a sequence.")] = 512,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; all cores.")] = None,
    device: Annotated[str, typer.Option("--device", help="Device of the model.")] = "cpu",
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="float32, bfloat16; both.")] = None,
    llama: Annotated[bool, typer.Option("--llama/--no-llama", help="A Llama of equal matrices too.")] = True,
    peer_repo: Annotated[
        Path | None, typer.Option("--peer-repo", help="Checkout of ridgerchu/SpikeGPT, outside this project.")
    ] = None,
    peer_python: PeerPython = None,
    json: JsonOption = None,
) -> None:
    """Time a training step beside the machine's matrix speed, a Llama, and SpikeGPT's own code.

    Example: spikelm bench train --rounds 5 --dtype float32
    """
    import os
    import sys

    import torch

    from spikelm.bench import train as bench

    for name in dtype or []:
        if name not in bench.DTYPES:
            raise ConfigError(f"--dtype is {name!r}; expected {' or '.join(bench.DTYPES)}")
    torch.set_num_threads(threads or os.cpu_count() or 1)
    figures: dict[str, Any] = {"model": model}
    for name in dtype or list(bench.DTYPES):
        figures[name] = bench.against_the_peak(
            model,
            bench.DTYPES[name],
            torch.device(device),
            batch=batch,
            length=length,
            rounds=rounds,
            with_llama=llama,
        )
    if peer_repo is not None:
        figures["spikegpt"] = bench.against_spikegpt(
            model, peer_repo, _checked(peer_python) or Path(sys.executable), rounds
        )
    _finish(bench.lines(figures), figures, json)


def _checked(python: Path | None) -> Path | None:
    if python is not None and not python.is_file():
        raise ConfigError(
            f"--peer-python {python} is no file; give the interpreter of the peers' environment"
        )
    return python


def _finish(lines: Sequence[str], figures: dict[str, Any], json: Path | None, **beside: Any) -> None:
    from spikelm.bench.record import document

    if str(json) != "-":
        out = console()
        for line in lines:
            out.print(line, markup=False)
    write_json(json, {**document(figures), **beside})
