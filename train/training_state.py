"""What a resumed run needs beside the model: progress, identity, checksums of all files.

Beside the model a checkpoint folder holds ``training.safetensors`` (one for each rank: optimiser memory,
carried states, random state) and ``training.json`` (progress, configuration, sizes and SHA-256 of every file
that resume reads, and a checksum of itself). Only resume reads them, nothing is unpickled, and nothing is
used before its checksum was compared. The model card is for people, who may edit it: it has no checksum.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spikelm.errors import CheckpointError
from spikelm.train.files import Seal, replace_text, sha256

RECORD = "training.json"
FORMAT = 2

FREE_KEYS = frozenset(
    {
        *("backend", "deepspeed", "timeout", "on_bad_step", "bad_step_limit"),
        *("async_checkpoints", "keep_best", "milestone_every"),
        *("loss_spike", "trackers", "measure_mfu"),
        *("out", "resume", "device", "accumulation", "gradient_checkpointing", "keep", "log_every"),
        *("eval_every", "eval_batches", "sample_every", "sample_prompt", "sample_tokens", "checkpoint_every"),
        *("data.train", "data.valid", "data.tokenizer", "data.cache", "steps", "model"),
        *("data.stream", "data.shuffle_buffer", "data.carried", "data.prefetch"),
    }
)
"""Configuration keys that may differ on resume: they do not say which run it is. (``model`` is compared in
its resolved form, text, its options and the tokenizer by their fingerprints, because a file may move;
``steps`` may be changed to make a run longer or shorter.)"""


@dataclass(kw_only=True)
class Progress:
    """Where a run is; the counts are those after ``step`` optimiser steps.

    Attributes:
        step: optimiser steps done.
        samples: samples used; the next batch starts at this global sample index.
        tokens: tokens used.
        seconds: time spent in training steps, over all resumes.
        nats, count, nbytes, aux: sums since the last log line (nats, counted tokens, their UTF-8 bytes,
            auxiliary losses), so that a resumed run logs the same means.
        loads: path of each mixture of experts -> tokens per expert since the last log line.
        interval, clipped: steps since the last log line, and those whose gradient was clipped.
        recent: what the detector of loss spikes remembers (:class:`spikelm.train.loss_spikes.Recent`).
        evaluated: step of the last evaluation (-1: none).
        evaluation: the last evaluation as JSON values, or None.
        best, best_step: lowest held-out bits per byte so far and the step it was measured at (None and -1: no
            evaluation yet).
        sampled: step of the last written sample (-1: none).
        train_loss: mean nats per token at the last log line, or None.
        avoid: first samples of the batches that are passed over, because a loss or gradient of theirs was not
            finite.
        data: where the text is read on (see :meth:`spikelm.data.samples.Samples.state`).
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    nats: float = 0.0
    count: int = 0
    nbytes: int = 0
    aux: float = 0.0
    loads: dict[str, list[int]] = field(default_factory=dict)
    interval: int = 0
    clipped: int = 0
    recent: dict[str, Any] = field(default_factory=dict)
    evaluated: int = -1
    evaluation: dict[str, Any] | None = None
    best: float | None = None
    best_step: int = -1
    sampled: int = -1
    train_loss: float | None = None
    avoid: list[int] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What makes a run this run: two runs with the same identity are the same numbers.

    Attributes:
        config: the training configuration as nested dictionaries.
        model: the resolved model configuration.
        data: name -> fingerprint of tokenizer and training data.
    """

    config: Mapping[str, Any]
    model: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)

    def differences(self, other: Identity) -> list[str]:
        """Sentences ``key is X in the checkpoint and Y now`` for every key that matters."""
        found = []
        mine, theirs = self._flat(), other._flat()
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                carried = key == "batch_size" and self.data.get("data.carried")
                why = ", and every lane of a carried run keeps a state of its own" if carried else ""
                if key.endswith("(fingerprint)"):
                    found.append(self._other_contents(key.split()[0], other))
                    continue
                found.append(f"{key} is {theirs.get(key)!r} in the checkpoint and {mine.get(key)!r} now{why}")
        return found

    def _other_contents(self, key: str, other: Identity) -> str:
        """A text or tokenizer that is not the one of the checkpoint, whatever it is called."""
        section, _, name = key.partition(".")
        was, now = (dict(identity.config.get(section) or {}).get(name) for identity in (other, self))
        if was == now:
            return f"{key} is {now!r} as in the checkpoint, but what it holds has changed since"
        return f"{key} is {was!r} in the checkpoint and {now!r} now, and they do not hold the same"

    def _flat(self) -> dict[str, Any]:
        config = {key: value for key, value in _flatten(self.config).items() if not _is_free(key)}
        model = {f"model.{key}": value for key, value in _flatten(self.model).items()}
        return {**config, **model, **_flatten(self.data)}


@dataclass(frozen=True, kw_only=True)
class Record:
    """Contents of ``training.json``."""

    progress: Progress
    identity: Identity


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; lists are compared as a whole, as JSON would store them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + str(key)] = json.loads(json.dumps(value))
    return flat


def _checksum(values: Mapping[str, Any]) -> str:
    """Checksum of everything in a record except the checksum itself."""
    body = {key: value for key, value in values.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_record(folder: Path, record: Record, files: Mapping[str, Seal]) -> None:
    """Write ``training.json``; the files it names are written and durable already.

    Args:
        folder: the checkpoint.
        record: what it says about the run.
        files: size and SHA-256 of every file that is checked before it is used.
    """
    values: dict[str, Any] = {
        "format": FORMAT,
        "progress": dataclasses.asdict(record.progress),
        "config": record.identity.config,
        "model": record.identity.model,
        "data": record.identity.data,
        "files": {name: dataclasses.asdict(files[name]) for name in sorted(files)},
    }
    values["checksum"] = _checksum(values)
    replace_text(folder / RECORD, json.dumps(values, indent=1) + "\n")


def read_values(folder: Path) -> dict[str, Any]:
    """The JSON values of ``training.json``, compared with their own checksum and with the sizes of the files.

    Raises:
        CheckpointError: the record is missing or was changed, or a file is missing or truncated.
    """
    path = folder / RECORD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if not isinstance(values, dict) or values.get("checksum") != _checksum(values):
        raise CheckpointError(f"{path} was changed after it was written (its checksum does not match)")
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {values.get('format')!r}; this version reads {FORMAT}")
    for name, expected in values["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else -1
        if size < 0:
            raise CheckpointError(f"{file} is missing")
        if size != expected["bytes"]:
            raise CheckpointError(f"{file} has {size} bytes instead of {expected['bytes']}")
    return values


def check_file(file: Path, expected: Mapping[str, Any], name: Path | None = None) -> None:
    """Compare one file with its SHA-256 in the record; an error calls it ``name`` where one is given.

    Raises:
        CheckpointError: it was changed, or cannot be read.
    """
    try:
        found = sha256(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror or error})") from error
    if found != expected["sha256"]:
        raise CheckpointError(f"{name or file} is corrupted (its SHA-256 does not match)")


def record_of(values: Mapping[str, Any]) -> Record:
    """The record that :func:`read_values` found."""
    identity = Identity(config=values["config"], model=values["model"], data=values["data"])
    return Record(progress=Progress(**values["progress"]), identity=identity)


def read_record(folder: Path) -> Record:
    """Read ``training.json`` and compare every checksum in it with the files.

    Raises:
        CheckpointError: a file is missing, truncated or changed, or the record itself is.
    """
    values = read_values(folder)
    for name, expected in values["files"].items():
        check_file(folder / name, expected)
    return record_of(values)
