"""Two real ranks see the samples that one process sees: mixtures, streams and carried lanes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spikelm.train.ranks import Ranks

WORKER = Path(__file__).with_name("steps.py")
LONG = "".join(chr(97 + (7 * i * i + i // 5) % 26) for i in range(1000))


def data(folder: Path, kind: str) -> dict[str, Any]:
    """Values of the ``data`` section."""
    path = folder / "long.jsonl"
    if not path.exists():
        texts = [LONG, *("spike " * (1 + i) for i in range(9))]
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    other = str(folder / "valid.txt")
    return {
        "carried": {"data__train": str(path), "data__carried": True},
        "mixture": {"data__train": [{"source": str(path), "weight": 2}, {"source": other, "weight": 1}]},
        "stream": {"data__train": str(path), "data__stream": True, "data__shuffle_buffer": 7},
    }[kind]


@pytest.mark.slow
def test_two_ranks_are_one_process(make_values: Any, tmp_path: Path) -> None:
    """Losses of the twin while it learns; lanes that one process left go on on two ranks."""
    twin = {"model__twin": True, "model__dropout": 0.0, "schedule__warmup": 0}
    still = {
        "optim__lr": 1e-60,
        "optim__min_lr": 0.0,
        "optim__weight_decay": 0.0,
    }  # no optimiser state to move
    legs = [
        {"values": make_values(**twin, **data(tmp_path, kind)), "steps": 8, "alone": 0}
        for kind in ("carried", "mixture", "stream")
    ]
    resumed = make_values(**twin, **still, **data(tmp_path, "carried"))
    legs.append({"values": {**resumed, "accumulation": 2}, "steps": 8, "alone": 5})
    file = tmp_path / "legs.json"
    file.write_text(json.dumps(legs))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *(str(WORKER), str(file)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("steps", WORKER)
    assert spec is not None and spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    found = json.loads((tmp_path / "nats.json").read_text())
    for leg, two in zip(legs, found, strict=True):
        one = worker.nats(leg, Ranks())
        assert len(set(one)) == 8 and two == pytest.approx(one, rel=1e-10)
