"""Run by every rank of a test: one leg after another in one process group, each telling what it saw.

    python legs.py LEGS.json

A leg is {"do": name of a function below, "values": training configuration, "out": file for rank 0's result,
...}. A launch costs seconds of imports, so one does as much as it can.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)


def make(leg: dict[str, Any], ranks: Any, **changes: Any) -> Any:
    from spikelm.train.config import TrainConfig
    from spikelm.train.trainer import Trainer

    return Trainer(TrainConfig.from_dict({**leg["values"], **changes}), ranks=ranks)


def train(leg: dict[str, Any], ranks: Any) -> dict[str, Any]:
    """A run from its newest checkpoint to its end."""
    trainer = make(leg, ranks)
    result = trainer.run()
    weights = {}
    for name, value in trainer._backend.tensors(lambda name, nbytes: True):
        weights[name] = float(value.double().square().sum())
    return {
        "losses": [line["loss"] for line in trainer.log.read("step")],
        "norms": [line["grad_norm"] for line in trainer.log.read("step")],
        "evaluation": None if result.evaluation is None else result.evaluation.to_dict(),
        "samples": [line["text"] for line in trainer.log.read("sample")],
        "backend": trainer._backend.name,
        "resumed": result.resumed_from,
        "weights": weights,
        "biases": biases(trainer),
        "experts": [line.get("experts") for line in trainer.log.read("step")],
    }


def biases(trainer: Any) -> dict[str, list[float]]:
    """What steers the choice of experts, by name."""
    return {name: value.tolist() for name, value in trainer.model.named_buffers()}


def poison(leg: dict[str, Any], ranks: Any) -> dict[str, Any]:
    """A run whose loss or gradient is bad at one place: ``at`` is rank, step, micro-batch."""
    trainer = make(leg, ranks)
    backend = trainer._backend
    original, seen = backend.loss, {"batch": 0}
    rank, step, micro_batch = leg["at"]

    def loss(inputs: Any, targets: Any, state: Any, ctx: Any, **options: Any) -> Any:
        output = original(inputs, targets, state, ctx, **options)
        if ctx.random is None or trainer._state.step != step or trainer._state.avoid:
            return output
        seen["batch"] += 1
        if ranks.rank != rank or seen["batch"] != micro_batch + 1:
            return output
        if leg["place"] == "loss":
            return dataclasses.replace(output, loss=output.loss * math.nan)
        if leg["place"] == "huge":  # finite, but its square is not
            huge = output.loss * 1e24
            return dataclasses.replace(output, loss=output.loss + (huge - huge.detach()))
        # Zero, with a gradient of infinity times zero.
        return dataclasses.replace(output, loss=output.loss + torch.sqrt(output.loss * 0.0))

    backend.loss = loss
    trainer.run()
    return {
        "losses": [line["loss"] for line in trainer.log.read("step")],
        "bad": trainer.log.read("bad_step"),
        "biases": biases(trainer),
        "backend": backend.name,
    }


def exchange(leg: dict[str, Any], ranks: Any) -> dict[str, Any]:
    """Five steps with one backend, the rest with others that took over its tensors."""
    losses: list[float] = []
    held: dict[str, torch.Tensor] = {}
    names = []
    for number, changes in enumerate(leg["backends"]):
        trainer = make(leg, ranks, **changes)
        if held:
            trainer._backend.restore(held.get)
        for step in range(5 * number, 5 * number + 5):
            outcome = trainer._runner.take(step * trainer.config.batch_size, step, None)
            assert outcome.bad is None
            losses.append(outcome.nats / outcome.count)
        held = {name: value.clone() for name, value in trainer._backend.tensors(lambda name, nbytes: True)}
        names.append(sorted(held))
        # A backend that takes its own tensors back has what it had.
        trainer._backend.restore(held.get)
        again = dict(trainer._backend.tensors(lambda name, nbytes: True))
        assert again.keys() == held.keys()
        assert all(torch.equal(value, held[name]) for name, value in again.items())
    return {"losses": losses, "same_names": all(found == names[0] for found in names), "count": len(names[0])}


def main(file: str) -> None:
    from spikelm.errors import SpikeLMError
    from spikelm.train.ranks import join

    ranks = join(60.0, torch.device("cpu"))
    for leg in json.loads(Path(file).read_text()):
        try:
            told = globals()[leg["do"]](leg, ranks)
        except SpikeLMError as error:
            told = {"error": f"{type(error).__name__}: {error}"}
        if ranks.main:
            Path(leg["out"]).write_text(json.dumps(told))
    ranks.leave()


if __name__ == "__main__":
    main(sys.argv[1])
