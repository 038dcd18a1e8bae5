"""Run by every rank of a test: steps of several kinds of data in float64, without checkpoints.

    python steps.py LEGS.json

Each leg is {"values": training configuration, "steps": how many, "alone": how many of them this process takes
by itself before the ranks go on with its lanes}; rank 0 writes the summed nats of every step beside the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)


def nats(leg: dict[str, Any], ranks: Any) -> list[float]:
    """Nats of each step."""
    from spikelm.train.backend_torch import TorchBackend
    from spikelm.train.config import TrainConfig
    from spikelm.train.ranks import Ranks
    from spikelm.train.setup import build_model, load_text
    from spikelm.train.step import StepRunner

    config = TrainConfig.from_dict(leg["values"])
    text = load_text(config.data, batch_size=config.batch_size)
    found: list[float] = []
    tensors: dict[str, torch.Tensor] = {}
    model = build_model(config, text.tokenizer).double().train()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # the head starts at zero, where every loss is the same
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for among, last in ((Ranks(), leg["alone"]), (ranks, leg["steps"])):
        runner = StepRunner(config, TorchBackend(model, config, torch.device("cpu"), among), text.train)
        runner.restore_lanes(tensors)
        for step in range(len(found), last):
            found.append(runner.take(step * config.batch_size, step, None).nats)
        tensors = runner.lane_tensors()
        runner.close()
    return found


def main(file: str) -> None:
    from spikelm.train.ranks import join

    ranks = join(60.0, torch.device("cpu"))
    found = [nats(leg, ranks) for leg in json.loads(Path(file).read_text())]
    if ranks.main:
        Path(file).with_name("nats.json").write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main(sys.argv[1])
