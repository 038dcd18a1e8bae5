"""``spikelm demo`` as a user runs it: a real process, a few steps, everything it promises to leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spikelm.checkpoint import load_model
from spikelm.errors import ShapeError
from spikelm.plots.raster import draw_raster


def spikelm(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPIKELM_CACHE": str(cwd / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "spikelm", *words], cwd=cwd, env=environment, text=True, capture_output=True
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("demo")
    done = spikelm("demo", "--out", "demo", "--steps", "6", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_it_leaves_what_it_promises(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = demo
    report = json.loads((folder / "demo" / "demo.json").read_text())
    spiking, twin = report["models"]["spiking"], report["models"]["twin"]
    assert spiking["parameters"] == twin["parameters"]
    assert spiking["spikes"]["total"]["spiking_share"] > 0.8
    assert twin["spikes"]["total"]["spiking_share"] == 0
    assert 2.0 < report["compressors"]["lzma -9e"] < report["compressors"]["zlib -9"] < 3.0
    # Six steps beat a uniform guess over the bytes; the real run is benchmarks/demo.py.
    assert spiking["held_out"]["bits_per_byte"] < 6 and twin["held_out"]["bits_per_byte"] < 6
    assert (folder / "demo" / "raster.png").read_bytes().startswith(b"\x89PNG")
    assert load_model(folder / "demo" / "spiking").config.neuron["name"] == "adaptive"
    assert load_model(folder / "demo" / "twin").config.neuron["name"] == "none"
    for word in ("bits/byte", "zlib -9", "lzma -9e", "silent inputs", "tokens/s", "mean |count|"):
        assert word in done.stdout
    assert report["sample"] in done.stdout


def test_generate_uses_its_checkpoint(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = demo
    words = ("generate", "demo/spiking", "--prompt", "A list", "--max-tokens", "8", "--seed", "3")
    first, again = (spikelm(*words, cwd=folder) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("A list") and first.stdout == again.stdout


def test_a_second_call_trains_nothing_and_says_the_same(
    demo: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = demo
    before = json.loads((folder / "demo" / "demo.json").read_text())
    done = spikelm("demo", "--out", "demo", "--steps", "6", cwd=folder)
    assert done.returncode == 0, done.stderr
    after = json.loads((folder / "demo" / "demo.json").read_text())
    assert after["models"] == before["models"], "figures of a finished run are kept"
    assert after["sample"] == before["sample"]


def test_json_on_standard_output_stands_alone_and_other_steps_begin_anew(
    demo: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = demo
    done = spikelm("demo", "--out", "demo", "--steps", "2", "--json", "-", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["models"]["twin"]["parameters"] > 0


def test_raster_shows_spikes_and_refuses_other_shapes(tmp_path: Path) -> None:
    from matplotlib import image

    silent = draw_raster(tmp_path / "a" / "silent.png", torch.zeros(20, 30), title="silent")
    counts = torch.zeros(20, 30)
    counts[3:9, 5:25] = 7
    loud = draw_raster(tmp_path / "loud.png", counts, title="loud", tokens=["$x$\n"] * 20)
    assert image.imread(loud).shape[0] > 300
    dark = [(image.imread(path)[..., :3].sum(-1) < 1.0).mean() for path in (silent, loud)]
    assert dark[1] > dark[0] + 0.02
    with pytest.raises(ShapeError, match="T, D"):
        draw_raster(tmp_path / "c.png", torch.zeros(3), title="flat")
