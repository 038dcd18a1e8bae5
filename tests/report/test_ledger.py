"""A record that ``spikelm energy`` really wrote, in a report and in the picture of costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spikelm.cli import main
from tests.report.conftest import TEXT
from tests.report.pages import Page


def test_costs_are_those_of_the_record(
    record: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    quality, costs, out = tmp_path / "eval.json", tmp_path / "energy.json", tmp_path / "out"
    quality.write_text(json.dumps(record))
    (tmp_path / "text.txt").write_text(TEXT)
    words = [*map(str, folders.values()), "--data", str(tmp_path / "text.txt"), "--max-bytes", "300"]
    assert (
        main(["energy", *words, "--on-chip", "0.001", "--timed", "8", "--repeats", "1", "--json", str(costs)])
        == 0
    )
    assert main(["report", str(out), str(quality), str(costs)]) == 0
    assert main(["plot", "pareto", str(quality), str(costs), "--out", str(tmp_path / "p.png"), "--json",
                 str(tmp_path / "p.json")]) == 0  # fmt: skip
    models = json.loads(costs.read_text())["results"]["models"]
    drawn = {model["label"]: model for model in json.loads((tmp_path / "p.json").read_text())["models"]}
    assert drawn.keys() == models.keys() == folders.keys()
    page = Page.read(out / "report.html")
    assert "Operations, bytes and seconds" in page.titles and "Bits per byte against costs" in page.titles
    for label, model in models.items():
        total = model["operations"]["total"]
        assert drawn[label]["operations"] == total["effective_macs"] > 0
        assert drawn[label]["accumulates"] == total["accumulates"]
        assert drawn[label]["bytes"] == model["bytes"]["batch_1"]["dram_per_token"] > 0
        assert drawn[label]["seconds"] == model["measured"]["seconds_per_token"]
        figure = record["results"]["models"][label]["figures"]["disjoint@64"]
        assert drawn[label]["bits_per_byte"] == figure["bits_per_byte"]
        assert all(sentence in page.text for sentence in model["verdict"])
        for table, prices in model["energy"].items():
            dense = next(row for row in page.rows if row[:3] == [label, table, "dense"])
            assert float(dense[3].replace(",", "")) == float(f"{prices['compute']['dense']:.4g}") or (
                abs(float(dense[3].replace(",", "")) - prices["compute"]["dense"]) <= 0.5
            )
    # The spiking model turns multiply-accumulates into accumulates; the dense one has none.
    assert drawn["spiking"]["accumulates"] > 0 == drawn["twin"]["accumulates"]
