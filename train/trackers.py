"""Curves outside the log: TensorBoard, Weights & Biases, Trackio, through the tracker classes of Accelerate.

Trackers follow the log (:class:`spikelm.train.log.RunLog`): what is written there is sent on, and where the
log goes back (a resumed run, a rollback) so do they. TensorBoard hides what came after that step
(``purge_step``); the other two cannot take anything back, so they are sent a step only once. A tracker that
fails is reported once and left out from then on: no disk and no network of theirs may end a run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikelm.errors import ConfigError

if TYPE_CHECKING:
    from spikelm.train.config import TrainConfig

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
"""Tracker -> packages of which one must be installed; the first is what pip installs."""
FOLDER, RECORD = "tensorboard", "trackers.json"

_GROUPS = {
    "train": ("loss", "bits_per_byte", "aux_loss"),
    "optim": ("lr", "grad_norm", "clipped"),
    "speed": ("tokens_per_second", "step_seconds", "data_seconds", "mfu", "tokens", "seconds"),
    "spikes": ("spike_rate", "silent", "mean_count", "at_cap", "never_fired"),
}
_HELD_OUT = ("loss", "bits_per_byte", "perplexity", "spike_rate")
# What a launcher tells Accelerate: with it, a PartialState would form a process group and choose a GPU.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_TORCH_DEVICE")
_LAUNCHER_PREFIXES = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "ACCELERATE_USE_", "ACCELERATE_CPU_")


def chosen(names: str | Sequence[str]) -> tuple[list[str], str | None]:
    """The trackers of a configuration, and a line of information about what ``auto`` did not find.

    Raises:
        ConfigError: a tracker's package is not installed.
    """
    if names == "auto":
        if _installed("tensorboard"):
            return ["tensorboard"], None
        return (
            [],
            "no TensorBoard curves are written; `pip install tensorboard` adds them, trackers=[] says no",
        )
    for name in names:
        if not _installed(name):
            package = PACKAGES[name][0]
            raise ConfigError(
                f"tracker {name!r} needs the package {package}, which is not installed; "
                f"run `pip install {package}`, or leave {name} out of trackers"
            )
    return list(names), None


def _installed(name: str) -> bool:
    return any(importlib.util.find_spec(package) is not None for package in PACKAGES[name])


class Trackers:
    """The trackers of one run; only the process that logs has any.

    Args:
        config: names the trackers and the run's folder.
        main: whether this process logs.
        warn: shows and logs a warning.

    Attributes:
        information: a line to show at the start, or None.

    Raises:
        ConfigError: a tracker's package is not installed (on every rank, so that none waits for another).
    """

    def __init__(self, config: TrainConfig, main: bool, warn: Callable[[str], None]) -> None:
        names, self.information = chosen(config.trackers)
        self._names = names if main else []
        self._config, self._warn = config, warn
        self._out = Path(config.out)
        self._open: dict[str, Any] = {}
        self._failed: set[str] = set()
        self._told: dict[str, int] = {}
        """Last step that was sent to a tracker that cannot take it back."""
        self._ids: dict[str, str] = {}
        self._skip: dict[str, int] = {}
        """Steps up to here were sent before the log went back."""
        self._owns_state = False

    # --- following the log ----------------------------------------------------------------------------------

    def rewind(self, step: int) -> None:
        """The log goes on after ``step``: open what is not open, and take back what came later."""
        for name in self._names:
            if name in self._failed:
                continue
            with self._guarded(name):
                if name == "tensorboard":
                    before = self._open.pop(name, None)
                    if before is not None:
                        before.finish()
                    self._start(name, self._tensorboard(step))
                elif name not in self._open:
                    record = self._read_record().get(name) if step > 0 else None
                    self._start(name, self._online(name, record))
                    self._told[name] = self._skip[name] = 0 if record is None else int(record["step"])
                else:
                    self._skip[name] = self._told[name]

    def tell(self, event: str, values: Mapping[str, Any]) -> None:
        """Send a line of the log on."""
        if not self._open:
            return
        step = int(values.get("step", 0))
        found = curves(event, values)
        for name, tracker in list(self._open.items()):
            if event in ("run", "resume"):
                if name == "tensorboard" and event == "run":
                    with self._guarded(name):
                        tracker.log({"configuration": _as_text(values)}, step=step)
                continue
            if not found or (name in self._skip and step <= self._skip[name]):
                continue
            with self._guarded(name):
                tracker.log(found, step=step)
                if name in self._told:
                    self._told[name] = step
                    self._write_record()

    def close(self) -> None:
        """Finish every tracker; a later :meth:`rewind` opens them again."""
        for name in list(self._open):
            with self._guarded(name):
                self._open[name].finish()
        self._open, self._skip = {}, {}
        if self._owns_state:
            from accelerate.state import PartialState

            # What runs later in this process may use Accelerate with ranks and a GPU of its own.
            PartialState._reset_state()
            self._owns_state = False

    # --- one tracker ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Whatever a tracker raises turns it off; what it prints does not get into our output."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # foreign code on foreign disks and networks: it may raise anything
            self._open.pop(name, None)
            self._failed.add(name)
            lines = str(error).strip().splitlines()
            why = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            self._warn(f"the tracker {name} failed and is off from here on ({why}); training goes on")

    def _start(self, name: str, tracker: Any) -> None:
        # This process is the one that logs; asked itself, Accelerate would find out by forming a group.
        tracker.main_process_only = False
        tracker.start()
        self._open[name] = tracker

    def _tensorboard(self, step: int) -> Any:
        self._accelerate()
        from accelerate.tracking import TensorBoardTracker

        _hush()
        folder = self._out / FOLDER
        _wait_for_a_later_name(folder)
        # A queue that holds a whole line, so that the training thread does not wait for the writing one.
        return TensorBoardTracker("", folder, purge_step=step + 1, max_queue=1000)

    def _online(self, name: str, record: Mapping[str, Any] | None) -> Any:
        self._accelerate()
        from accelerate import tracking

        run = secrets.token_hex(4) if record is None else str(record["id"])
        label = f"{self._out.name}-{run}"
        options: dict[str, Any] = {
            "name": label,
            "resume": "allow",
            "config": self._config.model_dump(mode="json"),
        }
        project = os.environ.get(f"{name.upper()}_PROJECT", "spikelm")
        if name == "wandb":
            tracker: Any = tracking.WandBTracker(project, id=run, dir=str(self._out), **options)
        else:
            tracker = tracking.TrackioTracker(project, **options)
        self._ids[name] = run
        return tracker

    def _accelerate(self) -> None:
        """Accelerate's logger wants a PartialState: give it one that knows this process alone, on the CPU."""
        from accelerate.state import PartialState

        if PartialState._shared_state:
            return
        hidden = {
            key: os.environ.pop(key)
            for key in list(os.environ)
            if key in _LAUNCHER or key.startswith(_LAUNCHER_PREFIXES)
        }
        try:
            PartialState(cpu=True)
            self._owns_state = True
        finally:
            os.environ.update(hidden)

    # --- what a resumed run needs ---------------------------------------------------------------------------

    def _read_record(self) -> dict[str, Any]:
        try:
            found = json.loads((self._out / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write_record(self) -> None:
        record = {name: {"id": self._ids[name], "step": step} for name, step in self._told.items()}
        temporary = self._out / f".{RECORD}.partial"
        temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
        temporary.replace(self._out / RECORD)


def curves(event: str, values: Mapping[str, Any]) -> dict[str, float | str]:
    """Numbers of a log line under the names that trackers show, grouped by what is before the slash."""
    found: dict[str, Any] = {}
    if event == "step":
        for group, keys in _GROUPS.items():
            found |= {f"{group}/{key}": values.get(key) for key in keys}
        found |= {f"memory/{key}": value for key, value in values.get("memory", {}).items()}
        for index, layer in values.get("layers", {}).items():
            found |= {f"layer_{int(index):02d}/{key}": value for key, value in layer.items()}
        for path, entry in values.get("projections", {}).items():
            found[f"projections/{path}"] = entry["firing_rate"]
        for path, entry in values.get("experts", {}).items():
            found |= {f"moe/{path}/{key}": entry[key] for key in ("max_share", "min_share", "entropy")}
    elif event == "evaluation":
        found = {f"held_out/{key}": values.get(key) for key in _HELD_OUT}
    elif event in ("loss_spike", "bad_step"):
        found = {f"events/{event}": 1}
    elif event == "sample":
        return {"sample": f"{values['prompt']}{values['text']}"}
    return {
        key: value for key, value in found.items() if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _as_text(values: Mapping[str, Any]) -> str:
    """The configuration as a block of preformatted text (Markdown)."""
    lines = json.dumps({key: values.get(key) for key in ("config", "model", "data")}, indent=2, default=str)
    return "\n".join(f"    {line}" for line in lines.splitlines())


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait for the next second if a file of curves was begun in this one.

    Readers take the files in the order of their names, which begin with the second and go on with the
    process: a run that is killed and goes on within a second would be read in the wrong order.
    """
    # The name is events.out.tfevents.SECOND.HOST.PROCESS.NUMBER; a clock that was set back is not waited for.
    seconds = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    latest = max((int(second) for second in seconds if second.isdigit()), default=0)
    while latest == int(time.time()):
        time.sleep(0.05)


def _hush() -> None:
    """TensorBoard's writing thread fails with a traceback of its own; the warning about it is ours."""
    before = threading.excepthook
    if getattr(before, "hushed", False):
        return

    def hook(told: threading.ExceptHookArgs) -> None:
        if not type(told.thread).__module__.startswith("tensorboard"):
            before(told)

    hook.hushed = True  # type: ignore[attr-defined]
    threading.excepthook = hook
