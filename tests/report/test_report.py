"""A report holds what was measured, names what was not, and needs nothing but itself."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spikelm.cli import main
from spikelm.errors import ConfigError, DataError
from spikelm.evaluation.record import read
from spikelm.report import write_report
from spikelm.report.document import ABSENT, number, with_error
from tests.report.conftest import HOSTILE, TEXT
from tests.report.pages import Page

TITLES = [
    "Bits per byte",
    "Comparisons",
    "Bits per byte against costs",
    "Loss by position",
    "Perplexity by length",
    "Tasks",
    "Long context",
    "Firing rate by layer",
    "Rasters and spike counts",
    "Operations, bytes and seconds",
    "Provenance",
]


def test_everything(everything: list[dict[str, Any]], folders: dict[str, Path], tmp_path: Path) -> None:
    written = write_report(tmp_path / "a" / "out", everything, checkpoints=folders, text_sample=TEXT)
    assert written == tmp_path / "a" / "out" / "report.html"
    page = Page.read(written)
    assert page.titles == [*TITLES, "Not measured"]
    figure = everything[0]["results"]["models"]["spiking"]["figures"]["carried"]
    row = next(row for row in page.rows if row[:2] == ["spiking", "carried"])
    assert row[2] == f"{figure['bits_per_byte']:.4f} ± {figure['stderr_bits_per_byte']:.4f}"
    assert ["twin", "spiking", "carried", "-0.0200", "-0.0300 to -0.0100", "95%", "9", "better"] in page.rows
    assert ["spiking", "64", "5.0000 ± 0.1000", "148.4", "7.2000", "+0.1250 ± 0.0625", "512"] in page.rows
    assert ["piqa", "acc", "40", "0.5000 ± 0.0200", "0.6250"] in page.rows
    assert ["arc", "acc", "8", ABSENT, "0.2500"] in page.rows
    assert ["spiking", "passkey", "128", "50%", "0.500 ± 0.050", "20"] in page.rows
    assert ["spiking", "90,000", "30,000", "10", "77", "90.0%", "70.0%"] in page.rows
    assert ["twin", "horowitz-45nm", "dense", "400,000", "1,000,000", "2,000,000"] in page.rows
    assert ["spiking", "horowitz-45nm", "spikes, unary", "50,000", ABSENT, ABSENT] in page.rows
    assert ["spiking", "horowitz-45nm", "quantised, int8 weights", "4", ABSENT, ABSENT] in page.rows
    assert not [row for row in page.rows if "spikes, ternary" in row], "a coding that does not apply"
    assert ["twin", "1", "nothing", "9000", "18,000", "3"] in page.rows
    assert "It reads 4000 bytes." in page.text
    # The dense model has no raster; everything else is there.
    (missing,) = [line for line in page.text.splitlines() if "Raster of" in line and "twin:" in line]
    assert "Raster of twin: it is dense, nothing in it spikes." in missing
    alts = [alt for alt, _ in page.images]
    assert [
        alt.split(" ")[0] for alt in alts
    ] == "Bits Loss Perplexity Accuracy Firing Raster Histograms".split()
    assert "operations: spiking, twin" in alts[0] or "operations: spiking" in alts[0]
    assert "blocks.1.mixer.key, over 64 tokens" in alts[5]
    # Pictures differ between papers, and stand beside the Markdown.
    assert all(light != dark for (_, light), dark in zip(page.images, page.dark, strict=True))
    folder = written.parent
    text = (folder / "report.md").read_text()
    beside = sorted(path.name for path in (folder / "pictures").iterdir())
    assert len(beside) == 7 and all(f"](pictures/{name})" in text for name in beside)
    assert {(folder / "pictures" / name).read_bytes() for name in beside} == {svg for _, svg in page.images}
    for title in [*TITLES, "Not measured"]:
        assert f"\n## {title}\n" in text


def test_provenance(everything: list[dict[str, Any]], folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "my report"
    page = Page.read(write_report(folder, everything, checkpoints={}, text_sample=None))
    record = everything[0]
    for label in folders:
        entry = record["checkpoints"][label]
        row = next(row for row in page.rows if row[:2] == [label, str(folders[label])])
        assert row[2] == entry["sha256"] and row[3].split(", ")[0] == "records/eval.json"
    for what, value in (
        ("date", record["machine"]["date"]),
        ("SHA-256 of the text", record["data"]["sha256"]),
        ("SHA-256 of the tokenizer", record["tokenizer_sha256"]),
        ("seed", "3"),
        ("units (n)", "9"),
        ("kind", "long-context"),
    ):
        assert [what, value] in page.rows
    assert (
        record["machine"]["cpu"] in page.text
        and f"torch {record['machine']['versions']['torch']}" in page.text
    )
    assert f"spikelm eval --verify '{folder}/records/energy.json'" in page.text
    for name, given in zip(("eval", "energy", "tasks", "long-context"), everything, strict=True):
        assert read(folder / "records" / f"{name}.json") == json.loads(json.dumps(given))
    assert "Rasters and spike counts: no checkpoint was given" in page.text


def test_what_was_not_measured_is_named(record: dict[str, Any], tmp_path: Path) -> None:
    del record["results"]["comparisons"]
    for model in record["results"]["models"].values():
        model["by_position"] = []
    page = Page.read(write_report(tmp_path, [record, record], checkpoints={}, text_sample="x"))
    assert page.titles == ["Bits per byte", "Firing rate by layer", "Provenance", "Not measured"]
    for words in (
        "Comparisons between models: no record",
        "Bits per byte against costs: no checkpoint has a record",
        "Loss by position: no record",
        "Perplexity by length: no record",
        "Tasks: no record",
        "Long context: no record",
        "Operations, bytes, energy and seconds: no record",
    ):
        assert words in page.text
    assert (tmp_path / "records" / "eval-2.json").is_file()


def test_hostile_names(
    renamed: Callable[[str], dict[str, Any]], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Labels, tokens, file names, data names and options that look like markup are shown as text."""
    record = renamed(HOSTILE)
    record["data"] = {"source": HOSTILE, "name": HOSTILE, "sha256": HOSTILE, "bytes": 5}
    record["arguments"] = {"data": HOSTILE, HOSTILE: '"><img src=x onerror=alert(1)>'}
    record["machine"]["versions"] = {HOSTILE: HOSTILE}
    folder = shutil.copytree(folders["spiking"], tmp_path / "<b>$weird$")
    tokens = "<script>\n$x^$\x07\u2028</script>"
    page = Page.read(
        write_report(tmp_path / "<i>out", [record], checkpoints={HOSTILE: folder}, text_sample=tokens)
    )
    assert "<script>alert" in page.text and HOSTILE in {row[0] for row in page.rows}
    assert any(HOSTILE in alt for alt, _ in page.images)
    content = (tmp_path / "<i>out" / "report.html").read_text()
    assert "<script" not in content and "onerror=alert(1)>" not in content.replace("&gt;", "")
    text = (tmp_path / "<i>out" / "report.md").read_text()
    outside = text.split("```")[0::2]
    assert all("<" not in part for part in outside), "raw HTML in the Markdown"
    rows = [line for line in text.splitlines() if line.startswith("| ") and "alert" in line]
    assert rows and all("\\|" in row and "\\$" in row and "\\*c\\*" in row for row in rows)


def test_a_hostile_kind_names_no_other_file(record: dict[str, Any], tmp_path: Path) -> None:
    record["kind"] = "../../evil"
    with pytest.raises(DataError, match="kind '../../evil'"):
        write_report(tmp_path / "out", [record], checkpoints={}, text_sample=None)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_none(everything: list[dict[str, Any]], tmp_path: Path) -> None:
    """Wherever a number may stand there may be none: NaN, infinity, null, or nothing."""

    def without(value: Any, gap: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(item, gap) for key, item in value.items()}
        if isinstance(value, list):
            return [without(item, gap) for item in value]
        return gap if isinstance(value, float) else value

    for index, gap in enumerate((float("nan"), float("inf"), None)):
        records = [{**record, "results": without(record["results"], gap)} for record in everything]
        for record in records[:1]:  # the meter's own figures are finite by their making
            for label, model in record["results"]["models"].items():
                model["spikes"] = copy.deepcopy(everything[0]["results"]["models"][label]["spikes"])
        page = Page.read(write_report(tmp_path / str(index), records, checkpoints={}, text_sample=None))
        assert "nan" not in page.text.lower().split() and "inf" not in page.text.split()
        row = next(row for row in page.rows if row[:2] == ["spiking", "carried"])
        assert row[2:6] == [ABSENT] * 4
        for path in (tmp_path / str(index) / "records").iterdir():
            json.loads(path.read_text(), parse_constant=pytest.fail)


def test_a_twin_has_no_raster(record: dict[str, Any], folders: dict[str, Path], tmp_path: Path) -> None:
    record["arguments"]["twin"] = True
    spiking = {"spiking": folders["spiking"]}
    page = Page.read(write_report(tmp_path, [record], checkpoints=spiking, text_sample=TEXT))
    assert "Raster of spiking: it was measured with its neurons off." in page.text
    assert "Rasters and spike counts" not in page.titles


def test_a_checkpoint_that_cannot_be_read_costs_its_raster_alone(
    record: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    broken = shutil.copytree(folders["spiking"], tmp_path / "broken")
    (broken / "tokenizer.json").unlink()
    page = Page.read(
        write_report(
            tmp_path / "out",
            [record],
            checkpoints={"broken": broken, "spiking": folders["spiking"]},
            text_sample=TEXT,
        )
    )
    assert "Raster of broken: " in page.text and "Rasters and spike counts" in page.titles


def test_the_same_records_give_the_same_page(
    record: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    pages = []
    for _ in range(2):
        path = write_report(tmp_path / "out", [record], checkpoints=folders, text_sample=TEXT)
        pages.append((path.read_bytes(), path.with_suffix(".md").read_bytes()))
    assert pages[0] == pages[1]


def test_bad_input(record: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one record"):
        write_report(tmp_path, [], checkpoints={}, text_sample=None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the report"):
        write_report(tmp_path / "file", [record], checkpoints={}, text_sample=None)


def test_number() -> None:
    assert [number(v) for v in (1234567.8, 0.00012345, None, float("nan"), True, "7")] == [
        "1,234,568",
        "0.0001234",
        ABSENT,
        ABSENT,
        ABSENT,
        ABSENT,
    ]
    assert with_error(1.0, None) == "1.0000" and with_error(None, 1.0) == ABSENT
    assert with_error(-1.0, 0.5, "+.1f") == "-1.0 ± 0.5"


def test_command(
    everything: list[dict[str, Any]],
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = []
    for record in everything:
        files.append(tmp_path / f"{record['kind']}.json")
        files[-1].write_text(json.dumps(record))
    copied = shutil.copytree(folders["spiking"], tmp_path / "copy")
    words = ["report", str(tmp_path / "out"), *map(str, files)]
    assert (
        main([*words, "--checkpoint", str(copied), "--text", "abc", "--json", str(tmp_path / "r.json")]) == 0
    )
    assert capsys.readouterr().out == f"report: {tmp_path / 'out' / 'report.html'}\n"
    # The folder has another name than in the records; its weights say which model it is.
    assert json.loads((tmp_path / "r.json").read_text())["checkpoints"] == {"spiking": str(copied)}
    page = Page.read(tmp_path / "out" / "report.html")
    assert any(alt.startswith("Raster of spiking") and "over 3 tokens" in alt for alt, _ in page.images)
    # A report of a report's own records is the same but for the raster.
    again = tmp_path / "again"
    assert (
        main(["report", str(again), *(str(p) for p in sorted((tmp_path / "out" / "records").iterdir()))]) == 0
    )
    same = [title for title in page.titles if not title.startswith("Rasters")]
    assert Page.read(again / "report.html").titles == [*same, "Not measured"]
    (tmp_path / "text.txt").write_text("from a file")
    source = ["--data", str(tmp_path / "text.txt")]
    assert main([*words, "--checkpoint", str(copied), *source]) == 0
    assert "over 11 tokens" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out"], "Missing argument"),
        (["out", "nowhere.json"], "nowhere.json cannot be read as a result"),
        (["out", "demo.json"], "is no result of a measurement"),
        (["out", "eval.json", "--checkpoint", "spiking"], "give --text or --data"),
        (["out", "eval.json", "--text", "a", "--data", "b"], "not both"),
        (["out", "eval.json", "--checkpoint", "nowhere", "--text", "a"], "checkpoint folder"),
        (["eval.json", "eval.json"], "cannot write the report eval.json"),
    ],
)
def test_bad_words_are_one_sentence(
    record: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval.json").write_text(json.dumps(record))
    (tmp_path / "demo.json").write_text('{"models": {}}')
    assert main(["report", *words]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("spikelm: error: ") and shown.err.count("\n") == 1 and message in shown.err
    assert shown.out == "" and not (tmp_path / "out").exists()
