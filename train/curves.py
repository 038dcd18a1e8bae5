"""The curves of a run, read from its log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spikelm.errors import TrainingError
from spikelm.train.log import RunLog

AXES = {"tokens": "tokens", "steps": "step", "seconds": "seconds"}
"""What may stand on the x axis, and its key in a line of the log (seconds are those of training steps)."""


@dataclass(frozen=True, kw_only=True)
class RunCurves:
    """What the log of one run holds.

    Attributes:
        name: of the run's folder.
        header: the line the run began with (or the last resume).
        steps: lines of training steps.
        evaluations: lines of evaluations on held-out text.
        events: other lines (``warning``, ``loss_spike``, ``bad_step``, ``stopped``, ``resume``, ...).
    """

    name: str
    header: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, run: str | Path) -> RunCurves:
        """Read a run.

        Args:
            run: folder of a run, or its log.jsonl.

        Raises:
            TrainingError: there is no log, or nothing was trained yet.
        """
        path = Path(run)
        file = path / "log.jsonl" if path.is_dir() else path
        if not file.is_file():
            raise TrainingError(f"{run} holds no log.jsonl; expected the folder of a run (its key `out`)")
        lines = RunLog(file).read()
        steps = [line for line in lines if line["event"] == "step" and "step" in line]
        if not steps:
            raise TrainingError(
                f"{file} has no line of a training step ({len(lines)} lines of a run's log); "
                "wait for the first log line of the run"
            )
        headers = [line for line in lines if line["event"] in ("run", "resume")]
        return cls(
            name=file.resolve().parent.name,
            header=headers[-1] if headers else {},
            steps=steps,
            evaluations=[line for line in lines if line["event"] == "evaluation"],
            events=[line for line in lines if line["event"] not in ("step", "evaluation", "sample")],
        )

    def series(self, key: str, lines: Sequence[Mapping[str, Any]] | None = None) -> np.ndarray:
        """Values of a key of the step lines (or others), float64 [lines]; NaN where a line has none."""
        return np.array([_number(line.get(key)) for line in (self.steps if lines is None else lines)])

    def x(self, axis: str, lines: Sequence[Mapping[str, Any]] | None = None) -> np.ndarray:
        """Where lines lie on an axis of :data:`AXES`, float64 [lines].

        Lines other than those of steps know their step alone; between step lines time and tokens are even.
        """
        own = self.series(AXES[axis])
        if lines is None:
            return own
        steps = self.series("step")
        where = self.series("step", lines)
        return np.asarray(np.interp(where, np.append(0.0, steps), np.append(0.0, own)), dtype=np.float64)

    def layers(self) -> tuple[list[str], np.ndarray]:
        """Numbers of the layers and their firing rates, float64 [layers, lines]; empty for a twin."""
        names = sorted({name for line in self.steps for name in line.get("layers", {})}, key=int)
        rates = [
            [_number(line.get("layers", {}).get(name, {}).get("firing_rate")) for line in self.steps]
            for name in names
        ]
        return names, np.array(rates).reshape(len(names), len(self.steps))

    def of(self, event: str) -> list[Mapping[str, Any]]:
        """Lines of one event."""
        return [line for line in self.events if line["event"] == event]

    def summary(self) -> dict[str, Any]:
        """The run in a few numbers (JSON values; None where the log does not tell)."""
        last = self.steps[-1]
        held_out = self.series("bits_per_byte", self.evaluations)
        best = int(np.nanargmin(held_out)) if np.isfinite(held_out).any() else None
        return {
            "run": self.name,
            "step": int(last["step"]),
            "steps": self.header.get("config", {}).get("steps"),
            "tokens": int(last["tokens"]),
            "seconds": float(last["seconds"]),
            "parameters": self.header.get("parameters"),
            "train_loss": _or_none(_number(last.get("loss"))),
            "train_bits_per_byte": _or_none(_number(last.get("bits_per_byte"))),
            "held_out_bits_per_byte": None if best is None else float(held_out[-1]),
            "best_bits_per_byte": None if best is None else float(held_out[best]),
            "best_step": None if best is None else int(self.evaluations[best]["step"]),
            "tokens_per_second": _median(self.series("tokens_per_second")),
            "mfu": _median(self.series("mfu")),
            "grad_norm": _median(self.series("grad_norm")),
            "largest_grad_norm": _largest(self.series("grad_norm")),
            "spike_rate": _or_none(_number(last.get("spike_rate"))),
            "never_fired": _or_none(_number(last.get("never_fired"))),
            "peak_rss": _largest(self.series("rss_peak", [line.get("memory", {}) for line in self.steps])),
            "resumes": len(self.of("resume")),
            "loss_spikes": len(self.of("loss_spike")),
            "bad_steps": len(self.of("bad_step")),
            "warnings": len(self.of("warning")),
        }

    def to_dict(self) -> dict[str, Any]:
        """Summary and curves as JSON values."""
        keys = [
            *("step", "tokens", "seconds", "loss", "bits_per_byte", "lr", "grad_norm", "clipped"),
            *("tokens_per_second", "mfu", "spike_rate", "silent", "mean_count", "at_cap", "never_fired"),
        ]
        names, rates = self.layers()
        return {
            **self.summary(),
            "curves": {key: _finite(self.series(key)) for key in keys},
            "held_out": {
                key: _finite(self.series(key, self.evaluations)) for key in ("step", "loss", "bits_per_byte")
            },
            "spike_rate_of_layers": {name: _finite(row) for name, row in zip(names, rates, strict=True)},
        }


def _number(value: Any) -> float:
    """A logged number; the log has those that are not finite as text."""
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        return math.nan


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite(values: np.ndarray) -> list[float | None]:
    return [_or_none(value) for value in values.tolist()]


def _median(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def _largest(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else None
