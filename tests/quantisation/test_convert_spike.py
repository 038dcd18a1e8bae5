"""``spikelm convert spike`` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spikelm.checkpoint import load_model, read_config, read_weights
from spikelm.cli import main
from spikelm.registry import codings

SMALL = ["--samples", "8", "--length", "64", "--max-bytes", "6000"]


def convert(checkpoint: Path, out: Path, text: Path, *words: str) -> dict[str, Any]:
    assert (
        main(["convert", "spike", str(checkpoint), str(out), "--calibrate", str(text), *SMALL, *words]) == 0
    )
    report: dict[str, Any] = json.loads((out / "spike_report.json").read_text())
    return report


@pytest.fixture(scope="module")
def converted(trained: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One int8 conversion through a process of its own, as a user's shell runs it."""
    folder = tmp_path_factory.mktemp("converted")
    out, result = folder / "out", folder / "result.json"
    words = ["convert", "spike", str(trained.twin), str(out), "--calibrate", str(trained.text), *SMALL]
    words += ["--eval", str(trained.other), "--coding", "bidirectional", "--json", str(result)]
    done = subprocess.run(
        [sys.executable, "-m", "spikelm", *words], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "spike_report.json").read_text())
    return SimpleNamespace(out=out, report=report, result=json.loads(result.read_text()), stdout=done.stdout)


def test_the_checkpoint(converted: SimpleNamespace, trained: SimpleNamespace) -> None:
    """Int8 weights half the size of bfloat16, a neuron before every projection, the head as it was."""
    config = read_config(converted.out)
    assert config.weights == {"name": "int8", "group_size": 128} and config.placement == "before"
    weights, before = read_weights(converted.out), read_weights(trained.twin)
    paths = [name.removesuffix(".scales") for name in weights if name.endswith(".scales")]
    assert len(paths) == 14
    for path in paths:
        assert weights[f"{path}.weight"].dtype == torch.int8
        scales = weights[f"{path}.scales"].repeat_interleave(128, 1)[:, : weights[f"{path}.weight"].shape[1]]
        error = weights[f"{path}.weight"].float() * scales - before[f"{path}.weight"]
        assert float(error.norm() / before[f"{path}.weight"].norm()) < 0.02
    assert torch.equal(weights["head.linear.weight"], before["head.linear.weight"])
    # What fired on the held-out text is kept for the layout of the weights.
    rows = converted.report["projections"]
    silent = {path: row["silent"] for path, row in rows.items() if "silent" in row}
    assert len(silent) == 14 and load_model(converted.out).firing == silent
    neurons = [config.input_neuron(path.removesuffix(".linear")) for path in paths]
    assert all(neuron["name"] == "adaptive" for neuron in neurons)
    assert len({neuron["k"] for neuron in neurons}) > 2  # each its own
    assert config.input_neuron("head")["name"] == "none"


def test_the_report(converted: SimpleNamespace) -> None:
    report = converted.report
    assert report["projections"] == converted.result["projections"]
    rows = report["projections"]
    assert len(rows) == 15 and rows["head"]["status"] == "dense"
    for path, row in rows.items():
        if path == "head":
            continue
        assert row["status"] == "converted"
        assert 0 < row["relative_error"] < 1
        assert row["silent"] + row["spike_rate"] == pytest.approx(1)
        assert (
            0 < row["ones_per_count"] < 4
            and 0 <= row["clipped"] < 0.1
            and row["beyond_127"] <= row["clipped"]
        )
        assert 0.1 < row["counts_up_to_7"] <= 1
        assert row["bytes_before"] == 2 * row["bytes_bfloat16"]
        assert row["bytes_bfloat16"] / 2 < row["bytes_after"] < row["bytes_bfloat16"]
        assert set(row["codings"]) == set(codings.names())
        signed = row["codings"]["bidirectional"]["exact"]
        assert signed["events_per_channel"] == pytest.approx(row["ones_per_count"])
        assert row["codings"]["ternary"]["exact"]["events_per_channel"] == pytest.approx(row["mean_count"])
        assert row["silent"] <= signed["sparsity"] < 1
    figures = {name: figure["bits_per_byte"] for name, figure in report["bits_per_byte"].items()}
    assert set(figures) == {"as trained", "converted", "one k for all", "converted, expanded (bidirectional)"}
    assert figures["converted"] < figures["as trained"] + 0.3
    # Integer weights: the expanded model differs in the (float) head's products at most.
    assert figures["converted, expanded (bidirectional)"] == figures["converted"]
    page = (converted.out / "spike_report.md").read_text()
    for name in (*codings.names(), "blocks.0.mixer.key", "as trained", "no code"):
        assert name in page
    assert "blocks.1.channel.value" in converted.stdout and "bits per byte" in converted.stdout


def test_budget_is_kept(converted: SimpleNamespace) -> None:
    """The search predicts fewer nats than one k for all, at no more ones per count."""
    total = converted.report["totals"]
    assert total["predicted_nats_per_token"] < total["predicted_nats_per_token_uniform"]
    alike = converted.report["one_k_for_all"]
    ones = [t["mean_over_multiply_accumulates"]["ones_per_count"] for t in (total, alike)]
    assert ones[0] < 1.03 * ones[1]  # counted on the held-out text
    figures = converted.report["bits_per_byte"]
    assert figures["converted"]["bits_per_byte"] < figures["one k for all"]["bits_per_byte"]


def test_figures_are_those_of_eval(
    converted: SimpleNamespace, trained: SimpleNamespace, tmp_path: Path
) -> None:
    """The saved checkpoint, loaded again, has the loss that the report promises."""
    file = tmp_path / "eval.json"
    words = ["--data", str(trained.other), "--mode", "disjoint", "--length", "64", "--json", str(file)]
    assert main(["eval", str(converted.out), *words, "--max-bytes", "6000"]) == 0
    (entry,) = json.loads(file.read_text())["results"]["models"].values()
    figure = entry["figures"]["disjoint@64"]
    promised = converted.report["bits_per_byte"]["converted"]
    assert figure["bits_per_byte"] == pytest.approx(promised["bits_per_byte"], abs=1e-6)
    assert figure["tokens"] == promised["tokens"]


def test_float_weights_and_one_k(trained: SimpleNamespace, tmp_path: Path) -> None:
    words = ["--weights", "float", "--no-search", "--k", "2.5", "--dead-zone", "0.2"]
    report = convert(trained.twin, tmp_path / "out", trained.text, *words)
    config = read_config(tmp_path / "out")
    assert config.neuron == {"name": "adaptive", "k": 2.5, "dead_zone": 0.2} and config.neuron_overrides == {}
    assert config.weights == {
        "name": "float",
    }
    before, after = read_weights(trained.twin), read_weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert set(report["bits_per_byte"]) == {"as trained", "converted"}
    assert "last windows" in report["evaluation"]["name"]


def test_finer_counts_lose_less(trained: SimpleNamespace, tmp_path: Path) -> None:
    """The sweep: one folder with figures and a picture; errors fall with k, spikes rise."""
    out = tmp_path / "sweep"
    words = ["convert", "spike", str(trained.twin), str(out), "--calibrate", str(trained.text), *SMALL]
    assert main([*words, "--sweep", "1,8,3", "--weights", "float"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["sweep.json", "sweep.png"]
    assert (out / "sweep.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    result = json.loads((out / "sweep.json").read_text())
    points = result["points"]
    assert [point["k"] for point in points] == [1, 3, 8]
    for key, sign in (("relative_error", -1), ("ones_per_count", 1), ("silent", -1)):
        values = [sign * point[key] for point in points]
        assert values == sorted(values) and values[0] < values[-1]
    assert points[0]["bits_per_byte"] > points[-1]["bits_per_byte"]
    assert points[-1]["bits_per_byte"] == pytest.approx(result["as_trained"]["bits_per_byte"], abs=0.05)
    assert set(points[0]["codings"]) == set(codings.names())
    assert main([*words, "--sweep", "2", "--no-search", "--overwrite"]) == 0
    assert len(json.loads((out / "sweep.json").read_text())["points"]) == 1


def test_a_spiking_checkpoint(variants: SimpleNamespace, trained: SimpleNamespace, tmp_path: Path) -> None:
    """Its own dead zone and k are found again: with its k and float weights nothing changes."""
    words = ["--k", "2", "--weights", "float", "--no-search"]
    report = convert(variants.adaptive, tmp_path / "same", trained.text, *words)
    figures = report["bits_per_byte"]
    assert figures["converted"]["nats"] == pytest.approx(figures["as trained"]["nats"], rel=1e-6)
    assert read_config(tmp_path / "same").neuron["dead_zone"] == 0.5
    errors = [row["relative_error"] for row in report["projections"].values() if "relative_error" in row]
    assert max(errors) == 0.0


def test_binary_neurons_stay(variants: SimpleNamespace, trained: SimpleNamespace, tmp_path: Path) -> None:
    report = convert(
        variants.mixed, tmp_path / "out", trained.text, "--weights", "int8", "--group-size", "channel"
    )
    rows = report["projections"]
    assert rows["blocks.0.channel.key"]["status"] == "keeps its binary neuron (heaviside)"
    assert "relative_error" not in rows["blocks.0.channel.key"]
    model = load_model(tmp_path / "out")
    assert type(model.get_submodule("blocks.1.channel.key.neuron")).__name__ == "Heaviside"
    assert type(model.get_submodule("blocks.1.channel.value.neuron")).__name__ == "Adaptive"
    assert model.get_submodule("blocks.0.channel.key.linear").scales.shape == (128, 1)  # type: ignore[union-attr]


def test_the_head_when_asked(
    variants: SimpleNamespace, trained: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = convert(trained.twin, tmp_path / "out", trained.text, "--head", "--no-search")
    assert report["projections"]["head"]["status"] == "converted"
    assert read_weights(tmp_path / "out")["head.linear.weight"].dtype == torch.int8
    assert read_config(tmp_path / "out").head_neuron["name"] == "adaptive"
    convert(variants.tied, tmp_path / "tied", trained.text, "--head", "--no-search")
    assert "stay float" in capsys.readouterr().err
    tied = load_model(tmp_path / "tied")
    assert tied.head is not None and tied.head.linear.weight is tied.embedding.weight


def test_bad_input(
    trained: SimpleNamespace,
    variants: SimpleNamespace,
    converted: SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "folder").mkdir()
    text, out = str(trained.text), str(tmp_path / "out")
    good = [str(trained.twin), out, "--calibrate", text]
    for words, part in [
        ([str(tmp_path / "nowhere"), out, "--calibrate", text], "expected a checkpoint folder"),
        ([str(tmp_path / "folder"), out, "--calibrate", text], "holds no config.json"),
        ([str(trained.twin), str(tmp_path / "full"), "--calibrate", text], "exists and is not empty"),
        ([str(trained.twin), str(tmp_path / "full"), "--calibrate", text, "--overwrite"], "not written by"),
        ([str(trained.twin), text, "--calibrate", text], "is a file"),
        ([str(trained.twin), str(trained.twin), "--calibrate", text, "--overwrite"], "lies in"),
        ([str(trained.twin), out, "--calibrate", "/nowhere/text.txt"], "/nowhere/text.txt"),
        ([str(trained.twin), out, "--calibrate", str(tmp_path / "empty.txt")], "holds no text"),
        ([str(trained.twin), out, "--calibrate", str(tmp_path / "short.txt")], "two windows"),
        ([str(converted.out), out, "--calibrate", text], "int8 weights already"),
        ([str(variants.after), out, "--calibrate", text], "after its mixers and channels"),
        ([*good, "--k", "0"], "k is 0"),
        ([*good, "--k", "nan"], "k is nan"),
        ([*good, "--sweep", "2,-1"], "k is -1"),
        ([*good, "--sweep", "two"], "sweep 'two'"),
        ([*good, "--weights", "int4"], "weights 'int4'"),
        ([*good, "--group-size", "0"], "group-size is 0"),
        ([*good, "--group-size", "big"], "group-size 'big'"),
        ([*good, "--dead-zone", "-1"], "dead-zone is -1"),
        ([*good, "--samples", "0"], "samples is 0"),
        ([*good, "--length", "0"], "length is 0"),
        ([*good, "--coding", "morse"], "unknown coding 'morse'"),
        ([str(trained.twin), out], "--calibrate"),
    ]:
        assert main(["convert", "spike", *words]) == 2, words
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and part in error, error
    assert not Path(out).exists()
    assert main(["convert", "spike", "--help"]) == 0
    assert "Example" in capsys.readouterr().out


def test_ctrl_c_leaves_nothing(
    trained: SimpleNamespace, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path / "out"
    text = tmp_path_factory.mktemp("long") / "text.txt"  # long enough for any machine to be still at it
    text.write_text(trained.text.read_text() * max(1, 4_000_000 // trained.text.stat().st_size))
    words = ["convert", "spike", str(trained.twin), str(out), "--calibrate", str(text)]
    words += ["--samples", "100000", "--length", "16", "--batch-size", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "spikelm", *words], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("calibrating"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130, rest
    assert "interrupted" in rest
    time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []


def test_a_published_model(data_dir: Path, tmp_path: Path) -> None:
    """rwkv4-660k: read, converted, measured. Its blocks add little: only the first mixer matters."""
    file = data_dir / "models/rwkv4-660k/tiny-rwkv-4v0-660K-FP32.bin.xz"
    assert main(["convert", "rwkv4", str(file), str(tmp_path / "rwkv"), "--tokenizer", "bytes"]) == 0
    text = data_dir / "lm/novels/valid.txt.xz"
    report = convert(tmp_path / "rwkv", tmp_path / "out", text)
    figures = report["bits_per_byte"]
    assert figures["converted"]["bits_per_byte"] == pytest.approx(
        figures["as trained"]["bits_per_byte"], abs=0.02
    )
    total = report["totals"]
    # All multiply-accumulates of the blocks, in int8 with one float32 scale for 128 inputs.
    blocks = {path: row for path, row in report["projections"].items() if path != "head"}
    assert (
        sum(r["bytes_after"] for r in blocks.values()) * 32
        == sum(r["bytes_bfloat16"] for r in blocks.values()) * 16.5
    )
    assert total["mean_over_projections"]["counts_up_to_7"] > 0.9


def test_tables_of_the_page_are_even(converted: SimpleNamespace) -> None:
    """Every row of a Markdown table has as many cells as its heading."""
    lines = (converted.out / "spike_report.md").read_text().splitlines()
    tables = 0
    for above, line in zip(lines, lines[1:], strict=False):
        if line.startswith("|"):
            if above.startswith("|"):
                assert above.count("|") == line.count("|"), line
            else:
                tables += 1
    assert tables == 4
