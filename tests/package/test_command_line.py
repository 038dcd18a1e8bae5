"""The program: help at once, one sentence for bad input, the right exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from spikelm import cli
from spikelm.cli import BROKEN_PIPE, COMMANDS, INTERRUPTED, main
from spikelm.errors import ConfigError


def test_help_is_quick_and_loads_no_torch() -> None:
    code = "import sys; from spikelm.cli import main; main(['--help']); print('torch' in sys.modules)"
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - start < 1
    assert out.splitlines()[-1] == "False"
    assert all(f"  {name}" in out for name in COMMANDS)


def test_python_m_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    out = subprocess.run(
        [sys.executable, "-m", "spikelm", "--version"], capture_output=True, text=True, check=True
    )
    assert out.stdout.startswith("spikelm 0.")
    assert main([]) == 0
    assert "Usage: spikelm COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command: Any = typer.main.get_command(cli._application(name))
    children = list(getattr(command, "commands", {}))
    for words in [[name, child] for child in children] or [[name]]:
        assert main([*words, "--help"]) == 0
        shown = capsys.readouterr().out
        assert "Example" in shown, words
        assert f"spikelm {' '.join(words)}" in shown.split("Example", 1)[1], words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspekt"], "unknown command 'inspekt'; did you mean 'inspect'?"),
        (["--verbose"], "there is no option --verbose"),
        (["inspect", "spikegpt-46"], "did you mean 'spikegpt-46m'?"),
        (["inspect", "nowhere/model.yaml"], "nowhere/model.yaml"),
        (["inspect"], "Missing argument"),
        (["inspect", "spikegpt-46m", "--jsn", "x"], "No such option: --jsn"),
        (["doctor", "--json"], "requires an argument"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("spikelm: error: ") and shown.err.count("\n") == 1
    assert message in shown.err


def use(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    monkeypatch.setattr(cli, "_application", lambda name: _single(function))


def _single(function: Any) -> typer.Typer:
    application = typer.Typer(add_completion=False)
    application.command()(function)
    return application


def test_errors_of_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuses() -> None:
        raise ConfigError("hidden_size is 0;\n expected at least 1")

    use(monkeypatch, refuses)
    assert main(["inspect"]) == 2
    assert capsys.readouterr().err == "spikelm: error: hidden_size is 0; expected at least 1\n"


def test_unforeseen_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks() -> None:
        raise ZeroDivisionError("a fault of the program")

    use(monkeypatch, breaks)
    with pytest.raises(ZeroDivisionError):
        main(["inspect"])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_interruption(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def waits() -> None:
        raise error

    use(monkeypatch, waits)
    assert main(["inspect"]) == INTERRUPTED
    assert capsys.readouterr().err.strip().endswith("interrupted")


def test_exit_code_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def chooses() -> None:
        raise typer.Exit(1)

    use(monkeypatch, chooses)
    assert main(["inspect"]) == 1


def test_control_c_from_outside() -> None:
    code = (
        "import time, typer; from spikelm import cli\n"
        "def waits():\n print('ready', flush=True); time.sleep(30)\n"
        "app = typer.Typer(); app.command()(waits); cli._application = lambda name: app\n"
        "raise SystemExit(cli.main(['inspect']))"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=20)
    assert process.returncode == INTERRUPTED
    assert shown.strip() == "spikelm: interrupted"


def test_reader_that_goes_away() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "spikelm", "--help"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert result.returncode == BROKEN_PIPE
    assert result.stderr == ""


def test_json_of_the_doctor(tmp_path: Path) -> None:
    target = tmp_path / "new" / "doctor.json"
    assert main(["doctor", "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    assert result["ok"] is True
    names = {
        "python",
        "spikelm",
        "torch",
        "libraries",
        "device",
        "threads",
        "memory",
        "huge pages",
        "C compiler",
    }
    assert names | {"kernels", "extras", "DeepSpeed ops", "disk", "cache"} == set(result["checks"])
    for check in result["checks"].values():
        assert check["verdict"] in {"ok", "warn", "fail"} and check["found"]
        assert check["mend"] or check["verdict"] == "ok"
