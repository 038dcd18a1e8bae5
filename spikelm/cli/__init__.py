"""The program ``spikelm``: a table of commands, each imported only when it is called.

``spikelm --help`` imports none of them, so it answers at once. Every :class:`~spikelm.errors.SpikeLMError`
and every wrong option becomes one sentence on standard error and exit code 2; an error that nobody
foresaw keeps its traceback, because it is a fault of the program.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import cleandoc
from typing import Any

from spikelm.errors import SpikeLMError, nearest

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C (128 + SIGINT)
BROKEN_PIPE = 141  # and for one whose reader went away (128 + SIGPIPE)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One entry of the table.

    Attributes:
        target: ``"module:name"`` of a function, or of a typer application with commands of its own.
        summary: what it does, for the list of commands.
    """

    target: str
    summary: str


COMMANDS: dict[str, Command] = {
    "demo": Command(
        target="spikelm.cli.demo:demo",
        summary="Train a small spiking model and its twin, measure both, let them write.",
    ),
    "train": Command(target="spikelm.cli.train:train", summary="Pretrain a model from a configuration."),
    "launch": Command(
        target="spikelm.cli.launch:launch",
        summary="Train on several GPUs or machines, or write a Slurm script.",
    ),
    "plot": Command(
        target="spikelm.cli.plot:app", summary="Draw spikes, training runs and results, as PNG or SVG."
    ),
    "finetune": Command(
        target="spikelm.cli.finetune:finetune",
        summary="Make a text classifier of a checkpoint, or train one from scratch.",
    ),
    "eval": Command(
        target="spikelm.cli.evaluate:evaluate",
        summary="Measure a checkpoint: bits per byte, perplexity, spike rates.",
    ),
    "report": Command(
        target="spikelm.cli.report:report",
        summary="Make an HTML and Markdown report of records of eval and energy.",
    ),
    "energy": Command(
        target="spikelm.cli.energy:energy",
        summary="Count what a token costs: operations, bytes, estimated energy, measured time.",
    ),
    "generate": Command(
        target="spikelm.cli.generate:generate", summary="Let a checkpoint continue a prompt."
    ),
    "export": Command(
        target="spikelm.cli.export:export",
        summary="Copy a checkpoint for others: model, tokenizer and card in the Hugging Face layout.",
    ),
    "convert": Command(target="spikelm.cli.convert:app", summary="Turn published weights into a checkpoint."),
    "data": Command(
        target="spikelm.cli.data:app", summary="Look at training text, turn it into tokens, check them."
    ),
    "tokenizer": Command(target="spikelm.cli.tokenizer:app", summary="Train and look at tokenizers."),
    "inspect": Command(
        target="spikelm.cli.inspect:inspect",
        summary="Show a model's parameters, state and parts, without loading its weights.",
    ),
    "plan": Command(
        target="spikelm.cli.plan:plan",
        summary="Tell what recipes cost: parameters, tokens, FLOPs, hours, disk.",
    ),
    "bench": Command(
        target="spikelm.cli.bench:app",
        summary="Time kernels, decoding and training beside this machine's limits and peers.",
    ),
    "doctor": Command(
        target="spikelm.cli.doctor:doctor",
        summary="Check this machine: what works, what does not, how to mend it.",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the words after ``spikelm``; those of the process when None.

    Returns:
        The exit code: 0, 2 for bad input, 130 after Ctrl-C, 141 when the reader of a pipe went away, or
        what the command chose.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except SpikeLMError as error:
        return _refuse(str(error), error.exit_code)
    except KeyboardInterrupt:
        print("spikelm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output again at exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in {"--help", "-h", "help"}:
        print(_help())
        return 0
    if words[0] in {"--version", "-V"}:
        from spikelm import __version__

        print(f"spikelm {__version__}")
        return 0
    name = words[0]
    if name.startswith("-"):
        return _refuse(f"there is no option {name}; see spikelm --help")
    if name not in COMMANDS:
        return _refuse(nearest("command", name, COMMANDS))
    return _invoke(name, words[1:])


def _invoke(name: str, arguments: list[str]) -> int:
    import typer

    command = typer.main.get_command(_application(name))
    _reflow(command)
    try:
        result: Any = command.main(args=arguments, prog_name=f"spikelm {name}", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        # Click's usage errors: which class they have depends on typer's version, their method does not.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            return 0
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else f"spikelm {name}"
        return _refuse(f"{describe().rstrip('.')}. See {path} --help.")
    code = result if isinstance(result, int) else 0
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code


def _application(name: str) -> Any:
    import typer

    module, _, attribute = COMMANDS[name].target.partition(":")
    target = getattr(importlib.import_module(module), attribute)
    if isinstance(target, typer.Typer):
        return target
    application = typer.Typer(add_completion=False)
    application.command(name)(target)
    return application


def _reflow(command: Any) -> None:
    """Let help texts fill the terminal: lines of a docstring's paragraph become one."""
    if command.help:
        paragraphs = cleandoc(command.help).split("\n\n")
        command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    for child in getattr(command, "commands", {}).values():
        _reflow(child)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "SpikeLM: pretrain, convert, evaluate and serve spiking language models.",
        "",
        "Usage: spikelm COMMAND [OPTIONS]",
        "",
        "Commands:",
        *(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()),
        "",
        "Options:",
        "  --version  Print the version.",
        "  --help     Print this text; spikelm COMMAND --help tells about one command.",
        "",
        "Example: spikelm inspect spikegpt-46m",
    ]
    return "\n".join(lines)


def _refuse(message: str, code: int = 2) -> int:
    print(f"spikelm: error: {' '.join(message.split())}", file=sys.stderr)
    return code
