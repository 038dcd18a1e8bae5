"""The model card of a checkpoint: what it is, what it saw, how good it is, and how to make it again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

from spikelm.provenance import versions
from spikelm.train.training_state import Record

CARD = "README.md"
_ROWS = 12
_BARS = "▁▂▃▄▅▆▇█"
_FOLDERS = ("out", "data.cache", "resume")
"""Keys that say where something lies on one machine: a reader chooses their own."""


def model_card(
    record: Record,
    log: Sequence[Mapping[str, Any]],
    *,
    parameters: int,
    backend: str,
    world_size: int,
) -> str:
    """README.md of a checkpoint, with the metadata that the Hugging Face Hub reads.

    Args:
        record: progress and configuration.
        log: lines of the run's log; those after the checkpoint's step are left out.
        parameters: of the model.
        backend: what trained it.
        world_size: number of ranks.
    """
    import yaml

    progress, config = record.progress, public(record.identity.config)
    data = config["data"]
    name = f"{_model_name(record)} after {progress.step} steps"
    sections = [
        f"---\n{yaml.safe_dump(_metadata(record, config, name), sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        _summary(record, parameters),
        "## Use",
        _USE,
        "## Data",
        _bullets(
            {
                "training text": f"`{_words(data.get('train'))}`",
                "held-out text": f"`{_words(data.get('valid'))}`" if data.get("valid") else "none",
                "tokenizer": f"`{_words(data.get('tokenizer'))}`, {record.identity.model.get('vocab_size')} "
                "entries in the vocabulary",
                "tokens seen": f"{progress.tokens:,} in {progress.samples:,} samples",
                **{key: f"`{value}`" for key, value in record.identity.data.items()},
            }
        ),
        "## Training",
        _curve([line for line in log if line.get("step", 0) <= progress.step]),
        "## Held out",
        _held_out(progress.evaluation),
        "## Spikes",
        _spikes(progress.evaluation),
        "## Make it again",
        f"Save this as `train.yaml`, put the texts where `data` names them, and run `spikelm train train.yaml"
        f"` (it was trained with {backend} on {_ranks(world_size)}). The same command resumes a run that was "
        "interrupted, on any number of ranks (`spikelm launch`).",
        f"```yaml\n{yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}```",
        "## Versions",
        _bullets(versions()),
        "## Licence",
        "None is stated: these weights have no licence until whoever publishes them chooses one, which the "
        "texts they were trained on may limit. SpikeLM, which made them, is under Apache-2.0.",
    ]
    return "\n\n".join(sections) + "\n"


_USE = """```python
import spikelm.hf  # registers the architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

or `spikelm generate FOLDER --prompt "The "`."""


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A training configuration without what concerns one machine: folders, absolute paths, credentials."""
    return {
        key: _public(value, key) for key, value in config.items() if key not in _FOLDERS and value is not None
    }


def _public(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return {
            str(key): _public(item, f"{path}.{key}")
            for key, item in value.items()
            if f"{path}.{key}" not in _FOLDERS and item is not None
        }
    if isinstance(value, (list, tuple)):
        return [_public(item, path) for item in value]
    return _without_place(value) if isinstance(value, str) else value


def _without_place(text: str) -> str:
    """A source or file name without the folders above it and without a password."""
    if "://" in text:
        parts = urlsplit(text)
        # What follows the question mark of a URL is often a key.
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
    if text.startswith(("/", "~", "..")) or re.match(r"^[A-Za-z]:[\\/]", text):
        return PurePath(text.replace("\\", "/")).name
    return text


def _metadata(record: Record, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Front matter; figures in the form of a model index."""
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["spikelm", "spiking-neural-network", "language-model"],
    }
    evaluation = record.progress.evaluation
    if evaluation is not None:
        text = _words(config["data"].get("valid"))
        values["model-index"] = [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"type": "text", "name": text},
                        "metrics": [
                            {"type": kind, "name": f"{words} (held out)", "value": evaluation[kind]}
                            for kind, words in (
                                ("bits_per_byte", "bits per byte"),
                                ("perplexity", "perplexity per token"),
                            )
                        ],
                    }
                ],
            }
        ]
    return values


def _model_name(record: Record) -> str:
    model = record.identity.config.get("model")
    preset = model.get("preset") if isinstance(model, Mapping) else model
    return _without_place(str(preset)) if preset else "spiking language model"


def _summary(record: Record, parameters: int) -> str:
    model, progress = record.identity.model, record.progress
    size = (
        f"{parameters:,} parameters, {model.get('num_hidden_layers')} layers of {model.get('hidden_size')} "
        f"features, trained in blocks of {record.identity.config['data'].get('block_length')} tokens"
    )
    done = f"step {progress.step} of {record.identity.config.get('steps')}, {progress.tokens:,} tokens"
    return f"A language model trained with SpikeLM: {size}. This is {done}."


def _curve(log: Sequence[Mapping[str, Any]]) -> str:
    """Training and held-out figures at a few steps, and the whole curve as one line of bars."""
    steps = [line for line in log if line.get("event") == "step"]
    if not steps:
        return "No step was logged yet."
    held_out = {line["step"]: line for line in log if line.get("event") == "evaluation"}
    count = min(_ROWS, len(steps))
    chosen = [steps[(i + 1) * len(steps) // count - 1] for i in range(count)]
    rows = ["| step | tokens | loss | bits per byte | held out |", "| ---: | ---: | ---: | ---: | ---: |"]
    before = 0
    for line in chosen:
        between = [found for step, found in held_out.items() if before < step <= line["step"]]
        value = _figure(between[-1]["bits_per_byte"]) if between else ""
        rows.append(
            f"| {line['step']} | {line['tokens']:,} | {_figure(line['loss'])} | "
            f"{_figure(line['bits_per_byte'])} | {value} |"
        )
        before = line["step"]
    bars = sparkline([float(line["loss"]) for line in steps])
    return "\n".join(rows) + f"\n\nLoss over the steps (nats per token): `{bars}`"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A curve as one line of bars; each stands for the mean of a stretch."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if not finite:
        return ""
    count = min(width, len(finite))
    parts = [finite[i * len(finite) // count : (i + 1) * len(finite) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in parts]
    low, span = min(means), max(max(means) - min(means), 1e-12)
    return "".join(_BARS[min(int((mean - low) / span * len(_BARS)), len(_BARS) - 1)] for mean in means)


def _held_out(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "Not measured."
    return (
        f"{_figure(evaluation['bits_per_byte'])} bits per byte, perplexity "
        f"{_figure(evaluation['perplexity'])} per token over {evaluation['tokens']:,} tokens at step "
        f"{evaluation['step']}, in independent blocks; `spikelm eval` measures with context."
    )


def _spikes(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None or evaluation.get("spike_rate") is None:
        return "None: no input of this model is a spike." if evaluation is not None else "Not measured."
    spikes = evaluation["spikes"]
    rows = [
        f"{evaluation['spike_rate']:.1%} of the inputs of spiking projections fire (weighted by their "
        f"multiply-accumulates); {float(spikes['silent']):.1%} of all inputs are zero.",
        "",
        "| projection | firing rate | mean count | channels that never fired |",
        "| --- | ---: | ---: | ---: |",
    ]
    for path, entry in spikes["projections"].items():
        rate, never = f"{entry['firing_rate']:.1%}", f"{entry['never_fired']:.1%}"
        rows.append(f"| {path} | {rate} | {entry['mean_count']:.3f} | {never} |")
    return "\n".join(rows)


def _bullets(values: Mapping[str, Any]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in values.items())


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _ranks(world_size: int) -> str:
    return "one process" if world_size == 1 else f"{world_size} ranks"


def _words(value: Any) -> str:
    """A source in one line."""
    return value if isinstance(value, str) else str(value)
