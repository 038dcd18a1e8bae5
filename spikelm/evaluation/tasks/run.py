"""Running tasks of lm-evaluation-harness and sifting what it returns."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import logging
import os
import random
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spikelm.data.source import open_source
from spikelm.errors import ConfigError, DataError, nearest
from spikelm.evaluation.longcontext.harness import config as long_context
from spikelm.evaluation.longcontext.harness import is_ours, kind_and_length
from spikelm.evaluation.longcontext.prompt import HAYSTACK, Haystack
from spikelm.evaluation.tasks import offline

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from spikelm.evaluation.tasks.language_model import HarnessModel
    from spikelm.evaluation.tasks.reader import Reader
    from spikelm.tokenizer import Tokenizer

_ONE_PROCESS = "DISABLE_MULTIPROC"  # the harness's own variable
_OPTIONS = "Custom kwargs can be passed"  # a hint for users of the harness's own command line

RESAMPLES = 1000
"""Bootstrap samples for the standard errors that have no formula (perplexity); their seed is fixed."""


def check_installed() -> None:
    """Raise :class:`ConfigError` where the harness is missing."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "tasks need lm-evaluation-harness, which is not installed; pip install 'spikelm[eval]'"
        ) from error


def parse(text: str) -> dict[str, int]:
    """``"piqa_local,arc_easy_local@5"`` -> {"piqa_local": -1, "arc_easy_local@5": 5}; -1: as the task says.

    ``local`` stands for all offline tasks. ``@K`` puts K examples before every question.

    Raises:
        ConfigError: nothing is named, a task is named twice, or K is no whole number from 0 on.
    """
    found: dict[str, int] = {}
    for word in (part.strip() for part in text.split(",") if part.strip()):
        name, at, shots = word.partition("@")
        if at and not shots.isdecimal():
            raise ConfigError(f"task {word!r}; expected NAME or NAME@K with a number K of examples")
        for task in (f"{one}{at}{shots}" for one in (offline.names() if name == "local" else [name])):
            if task in found:
                raise ConfigError(f"task {task!r} is named twice; name it once")
            found[task] = int(shots) if at else -1
    if not found:
        raise ConfigError(f"no task is named; offline ones are {', '.join(offline.names())}")
    return found


def run(
    model: HarnessModel, tasks: dict[str, int], *, limit: int | None = None, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Ask a model the questions of some tasks.

    Args:
        model: who answers.
        tasks: name -> examples before every question, see :func:`parse`. Offline tasks (and
            ``ruler_KIND_LENGTH``, whose prompts are made here) need no network, others are the harness's own.
        limit: at most so many documents of each task.
        seed: of the examples' choice (where a task draws them) and of the global generators.

    Returns:
        task -> {metric: value, metric_stderr: value or None, "n": documents}, a task with examples under its
        name with @K. Groups have their aggregate.

    Raises:
        ConfigError: an unknown task (the nearest is named), a limit below 1, the harness is not installed.
        DataError: documents that are not there.
    """
    check_installed()
    manager = _manager([bare(name) for name in tasks])
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; expected at least 1 document")
    results: dict[str, dict[str, Any]] = {}
    for shots in dict.fromkeys(tasks.values()):
        mine = [bare(name) for name in tasks if tasks[name] == shots]
        found = _evaluate(model, mine, None if shots < 0 else shots, limit, seed, manager)
        results |= {name if shots < 0 else f"{name}@{shots}": row for name, row in found.items()}
    order = [name for name in tasks if name in results]
    return {name: results[name] for name in [*order, *(name for name in results if name not in tasks)]}


def bare(name: str) -> str:
    """The name of a task without its number of examples."""
    return name.partition("@")[0]


def check_names(tasks: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for a task that does not exist, before any model is loaded."""
    _manager([bare(name) for name in tasks])


@functools.lru_cache(maxsize=1)
def _index() -> TaskManager:
    """The index of the harness's own tasks, thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _manager(tasks: Sequence[str]) -> TaskManager:
    """The harness's index of tasks; its own thousands are looked through only where one is named."""
    from lm_eval.tasks import TaskManager

    for name in tasks:
        if is_ours(name):
            kind_and_length(name)
    foreign = [name for name in tasks if name not in offline.names() and not is_ours(name)]
    for name in foreign:  # a slip in an offline name is told without looking through the harness
        if difflib.get_close_matches(name, offline.names(), n=1, cutoff=0.85):
            raise ConfigError(_unknown(name, []))
    if not foreign:
        return TaskManager(include_defaults=False)
    manager = _index()
    for name in foreign:
        if name not in manager.all_tasks:
            raise ConfigError(_unknown(name, manager.all_tasks))
    return manager


def _unknown(name: str, known: Sequence[str]) -> str:
    """The sentence about an unknown task; of thousands of names only the nearest and the offline ones."""
    sentence = nearest("task", name, [*offline.names(), *known]).partition(" known:")[0]
    return (
        f"{sentence} offline ones are {', '.join(offline.names())} and ruler_KIND_LENGTH, all others are the "
        "harness's own (lm_eval ls tasks)"
    )


def _evaluate(
    model: HarnessModel,
    tasks: list[str],
    shots: int | None,
    limit: int | None,
    seed: int,
    manager: TaskManager,
) -> dict[str, dict[str, Any]]:
    from lm_eval.evaluator import evaluate
    from lm_eval.utils import set_torch_seed

    random.seed(seed)
    np.random.seed(seed)
    set_torch_seed(seed)
    with _quiet(model.reader):
        loaded = _loaded(tasks, shots, manager, model.words, limit, seed)
        for task in loaded["tasks"].values():
            if shots is not None or task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=seed)
        # Not simple_evaluate: it looks for git and drivers, while the record tells of the machine itself.
        found = evaluate(
            lm=model, task_dict=loaded, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False
        )
    return _sifted(found)


def _loaded(
    tasks: list[str],
    shots: int | None,
    manager: TaskManager,
    words: Tokenizer,
    limit: int | None,
    seed: int,
) -> dict[str, Any]:
    """The tasks with their documents."""
    local, haystack = offline.names(), Haystack(open_source(HAYSTACK))
    asked: list[str | dict[str, Any]] = []
    for name in tasks:
        if is_ours(name):
            if shots:
                raise ConfigError(f"task {name!r} takes no examples; leave @{shots} out")
            asked.append(long_context(name, words, haystack, samples=limit, seed=seed))
        else:
            asked.append(offline.config(name, shots or 0) if name in local else name)
    try:
        loaded: dict[str, Any] = manager.load(asked)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        # What is raised differs by cause: no network, no such data set, a script, a missing package.
        foreign = ", ".join(name for name in tasks if name not in local)
        raise DataError(
            f"the documents of {foreign or ', '.join(tasks)} cannot be had: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    return loaded


def _sifted(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """``{"acc,none": x, "acc_stderr,none": e, ...}`` -> ``{"acc": x, "acc_stderr": e, "n": n}``."""
    sifted: dict[str, dict[str, Any]] = {}
    for task, values in found["results"].items():
        row: dict[str, Any] = {}
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma:
                continue  # alias and the like
            name = metric if kind == "none" else f"{metric},{kind}"
            row[name] = value if isinstance(value, (int, float)) else None
        counted = found["n-samples"].get(task)
        row["n"] = values.get("sample_len") if counted is None else counted["effective"]
        sifted[task] = row
    return sifted


@contextlib.contextmanager
def _quiet(reader: Reader) -> Iterator[None]:
    """Without the harness's own prints and bars (its warnings stay), and without processes for its bootstrap.

    Those bars ignore every switch, so their stream is taken away; our progress keeps it.
    """
    stream, advance = sys.stderr, reader.advance

    def loud(tokens: int) -> None:
        if advance is not None:
            with contextlib.redirect_stderr(stream):
                advance(tokens)

    import datasets

    bars = datasets.is_progress_bar_enabled()
    before = os.environ.get(_ONE_PROCESS)
    warnings = logging.StreamHandler(stream)
    warnings.setLevel(logging.WARNING)
    warnings.addFilter(lambda record: _OPTIONS not in record.getMessage())
    logging.getLogger("lm_eval").addHandler(warnings)
    datasets.disable_progress_bars()
    os.environ[_ONE_PROCESS] = "1"
    reader.advance = loud
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        reader.advance = advance
        logging.getLogger("lm_eval").removeHandler(warnings)
        os.environ.pop(_ONE_PROCESS)
        if before is not None:
            os.environ[_ONE_PROCESS] = before
        if bars:
            datasets.enable_progress_bars()
