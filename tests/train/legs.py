"""Run by every rank of a test: trains one leg after another in one process group, and tells what it saw.

    python legs.py LEGS.json

Each leg is {"values": training configuration, "out": file for rank 0's result}. (A launch costs seconds of
imports, so one does as much as it can.)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)


def main(file: str) -> None:
    from spikelm.errors import SpikeLMError
    from spikelm.train.config import TrainConfig
    from spikelm.train.ranks import join
    from spikelm.train.trainer import Trainer

    ranks = join(60.0, torch.device("cpu"))
    for leg in json.loads(Path(file).read_text()):
        told: dict[str, Any] = {}
        try:
            trainer = Trainer(TrainConfig.from_dict(leg["values"]), ranks=ranks)
            result = trainer.run()
            told["losses"] = [line["loss"] for line in trainer.log.read("step")] if ranks.main else []
            told["backend"] = trainer._backend.name
            told["resumed"] = result.resumed_from
        except SpikeLMError as error:
            told["error"] = f"{type(error).__name__}: {error}"
        if ranks.main:
            Path(leg["out"]).write_text(json.dumps(told))
    ranks.leave()


if __name__ == "__main__":
    main(sys.argv[1])
