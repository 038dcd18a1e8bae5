"""``spikelm plot`` as a user runs it: a picture, its numbers as JSON, and one sentence for bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from spikelm.cli import main

TEXT = "Spikes are rare; silence is cheap. It costs $5 or $6, <b>bold</b>\n\t\x07é."

Make = Callable[[str], Path]


def run(words: list[str], tmp_path: Path, ending: str = "png") -> dict[str, object]:
    """Numbers of a plot, after a look at its picture."""
    out, numbers = tmp_path / f"new/picture.{ending}", tmp_path / "numbers.json"
    assert main(["plot", *words, "--out", str(out), "--json", str(numbers)]) == 0
    content = out.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml") and len(content) > 5000
    found: dict[str, object] = json.loads(numbers.read_text())
    assert found["picture"] == str(out)
    return found


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_raster(ending: str, checkpoints: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "raster",
        str(checkpoints("adaptive")),
        "--text",
        TEXT,
        "--layer",
        "1",
        "--projection",
        "channel.key",
    ]
    found = run(words, tmp_path, ending)
    assert found["path"] == "blocks.1.channel.key" and found["tokens"] == 64 and found["channels"] == 16
    events = found["events"]
    assert isinstance(events, list) and all(0 < abs(count) <= 6 for *_, count in events)
    assert found["firing_rate"] == pytest.approx(len(events) / (64 * 16))
    shown = capsys.readouterr().out
    assert f"blocks.1.channel.key: {found['firing_rate']:.1%} of channels fire\n" in shown
    assert "picture: " in shown
    labels = found["labels"]
    assert isinstance(labels, list) and "".join(labels).startswith("Spikes are rare")


def test_rates_and_counts(checkpoints: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 5)
    source = ["--data", str(tmp_path / "text.txt"), "--tokens", "100"]
    found = run(["rates", str(checkpoints("adaptive")), *source], tmp_path)
    assert found["layers"] == ["0", "1", "2", "outside"] and found["text"]["tokens"] == 100  # type: ignore[index]
    counts = run(["counts", str(checkpoints("adaptive")), *source, "--projection", "channel.key"], tmp_path)
    places = counts["places"]
    assert isinstance(places, dict) and list(places) == [f"blocks.{i}.channel.key" for i in range(3)]
    row = dict(zip(found["kinds"], found["firing_rate"], strict=True))["channel.key"]  # type: ignore[arg-type, call-overload]
    for index, entry in enumerate(places.values()):
        assert entry["total"] == 100 * 16 and entry["cap"] == 6
        assert 1 - entry["silent"] == pytest.approx(row[index])
    assert "weighted by multiply-accumulates" in capsys.readouterr().out


def test_membrane(checkpoints: Make, tmp_path: Path) -> None:
    words = ["membrane", str(checkpoints("soft")), "--text", TEXT, "--tokens", "20"]
    found = run([*words, "--channel", "3", "--channel", "0"], tmp_path)
    rows = found["channels"]
    assert isinstance(rows, list) and [row["channel"] for row in rows] == [3, 0]
    for row in rows:
        assert row["spikes"] == [t for t, h in enumerate(row["membrane"]) if h >= 0.3]
    assert found["path"] == "blocks.1.mixer.key" and found["reset"] == "soft"
    outside = run(["membrane", str(checkpoints("after")), "--text", TEXT], tmp_path)
    assert outside["path"] == "blocks.1.mixer_neuron"


def test_spectrum(checkpoints: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["spectrum", str(checkpoints("lif")), "--text", TEXT * 4, "--segment", "64"]
    own = run(words, tmp_path, "svg")
    assert own["signal"] == "the model's own input" and list(own["neurons"]) == ["lif"]  # type: ignore[call-overload]
    noise = run([*words, "--noise", "--seed", "3", "--layer", "0"], tmp_path)
    entry = noise["neurons"]["lif"]  # type: ignore[index]
    assert noise["signal"] == "white noise (seed 3)" and noise["segment"] == 64
    assert len(entry["frequency"]) == 32 and len(entry["places"]) == 7
    assert "lif: highest against lowest frequencies" in capsys.readouterr().out


def test_pareto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hashes = {"checkpoints": {"[red]m": {"sha256": "x"}}, "format": 1, "arguments": {}}
    figures = {"carried": {"bits_per_byte": 1.25, "stderr_bits_per_byte": 0.1}}
    quality = {**hashes, "kind": "eval", "results": {"models": {"[red]m": {"figures": figures}}}}
    cost = {"operations": {"total": {"effective_macs": 12.0}}}
    energy = {**hashes, "kind": "energy", "results": {"models": {"[red]m": cost}}}
    for name, record in (("eval", quality), ("energy", energy)):
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    words = ["pareto", str(tmp_path / "eval.json"), str(tmp_path / "energy.json")]
    found = run(words, tmp_path, "svg")
    assert found["fronts"] == {"operations": ["[red]m"], "bytes": [], "seconds": []}
    shown = capsys.readouterr().out
    assert "[red]m" in shown and "1.25" in shown and "12" in shown
    assert main(["plot", *words, "--figure", "carryed"]) == 2
    assert "did you mean 'carried'" in capsys.readouterr().err


def test_json_on_standard_output_stands_alone(
    checkpoints: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plot", "raster", str(checkpoints("lif")), "--text", "abc", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["picture"] == "raster.png"
    assert (tmp_path / "raster.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["membrane", "adaptive", "--text", "a"],
            "no neuron with a membrane (if, lif or plif): its neurons are",
        ),
        (["raster", "dense", "--text", "a"], "it is dense, none of its neurons spikes"),
        (["rates", "dense", "--text", "a"], "nothing fires in this model"),
        (["counts", "dense", "--text", "a"], "it is dense"),
        (["spectrum", "lif", "--text", "abc"], "a spectrum over 3 tokens says nothing"),
        (["raster", "lif"], "--text or by --data"),
        (["raster", "lif", "--text", ""], "text has no tokens"),
        (["raster", "lif", "--text", "a", "--tokens", "0"], "tokens is 0"),
        (["raster", "lif", "--text", "a", "--out", "a.gif"], "ends in .png or .svg"),
        (["raster", "lif", "--text", "a", "--layer", "9"], "layer 9 has no spiking neuron"),
        (["raster", "lif", "--text", "a", "--device", "tpu9"], "device 'tpu9'"),
        (["raster", "nowhere", "--text", "a"], "checkpoint folder"),
        (["membrane", "lif", "--text", "a", "--channel", "16"], "channels 0 to 15"),
        (["pareto", "nowhere.json"], "nowhere.json cannot be read as a result"),
        (["rastre", "lif"], "unknown plot 'rastre'; did you mean 'raster'"),
        (["LIF"], "LIF is no kind of plot; to draw a training run use `spikelm plot loss LIF`"),
        (["runs/nowhere"], "use `spikelm plot loss runs/nowhere`"),
        (["--x", "tokens", "LIF"], "No such option"),
    ],
)
def test_bad_input_is_one_sentence(
    checkpoints: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "LIF").mkdir()
    given = [str(checkpoints(word)) if word in ("adaptive", "lif", "dense") else word for word in words]
    assert main(["plot", *given]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("spikelm: error: ") and shown.err.count("\n") == 1 and message in shown.err
    assert not list(tmp_path.glob("*.png"))
