"""Training: trainer, optimisers, schedules. Knows spikelm; nothing in spikelm knows it.

    from spikelm.train import TrainConfig, Trainer

    result = Trainer(TrainConfig.from_yaml("nano-sd", ["steps=100"])).run()

The names are loaded when first used, so that a part of the package can be imported without pydantic.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spikelm.train.config import TrainConfig
    from spikelm.train.evaluation import Evaluation
    from spikelm.train.result import TrainResult
    from spikelm.train.trainer import Trainer

__all__ = ["Evaluation", "TrainConfig", "TrainResult", "Trainer"]

_HOME = {"Evaluation": "evaluation", "TrainConfig": "config", "TrainResult": "result", "Trainer": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
