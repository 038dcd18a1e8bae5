"""The model card of a fine-tuned classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spikelm.train.finetune.run import RunResult
    from spikelm.train.finetune.seeds import Report


def model_card(report: Report, run: RunResult) -> str:
    """README.md of a classifier's folder: data, figures, spikes, how it was made, how to use it."""
    task, config = report.task, report.config
    data = config["data"]
    origin = f"the checkpoint `{config['init_from']}`" if config["init_from"] else "random weights"
    counts = task.counts()
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-classification",
        "tags: [spikelm, spiking-neural-network]",
        "---",
        "# Spiking text classifier",
        f"Classes: {', '.join(task.labels)}. {report.parameters:,} parameters, fine-tuned from {origin}, "
        f"{config['pooling']} pooling over the tokens of a text.",
        "",
        "## Data",
        f"`{data['train']}`" + (f", test `{data['test']}`" if data["test"] else "") + f"; {task.protocol}.",
        "",
        f"| set | {' | '.join(_cell(label) for label in task.labels)} |",
        f"| --- | {' | '.join('---' for _ in task.labels)} |",
        *(
            f"| {part} | {' | '.join(str(counts[part][label]) for label in task.labels)} |"
            for part in ("train", "dev", "test")
        ),
        "",
        "## Figures",
        f"Seed {run.seed}, epoch {run.best_epoch} of {run.epochs} (the best on dev).",
        "",
        "| set | texts | accuracy | standard error | macro F1 | cross-entropy, nats |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_row(part, figures) for part, figures in (("dev", run.dev), ("test", run.test)) if figures),
        "",
        *_several(report),
        *_confusion(task.labels, run),
        *_spikes(run.spikes),
        "## How it was made",
        f"{config['epochs']} epochs at most, patience {config['patience']}, batches of "
        f"{config['batch_size']}, {config['optim']['name']} with learning rate {config['optim']['lr']:g}, "
        f"{config['precision']}; the whole configuration is in `report.json` of the run.",
        "",
        "## Use",
        "```python",
        "import spikelm.hf",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        'model = AutoModelForSequenceClassification.from_pretrained("FOLDER").eval()',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _row(part: str, figures: dict[str, Any]) -> str:
    return (
        f"| {part} | {figures['texts']} | {figures['accuracy']:.4f} | {figures['stderr']:.4f} | "
        f"{figures['macro_f1']:.4f} | {figures['loss']:.4f} |"
    )


def _several(report: Report) -> list[str]:
    """Mean and spread over the seeds, where there are several."""
    if len(report.runs) < 2:
        return []
    lines = []
    for part, figures in report.summary().items():
        accuracy = figures["accuracy"]
        lines.append(
            f"{part}, {len(report.runs)} seeds: accuracy {accuracy['mean']:.4f}, standard deviation "
            f"{accuracy['sd']:.4f}."
        )
    return [*lines, ""]


def _confusion(labels: tuple[str, ...], run: RunResult) -> list[str]:
    part, figures = ("test", run.test) if run.test else ("dev", run.dev)
    if figures is None:
        return []
    return [
        f"Confusion on {part} (rows: truth, columns: answer)",
        "",
        f"| | {' | '.join(map(_cell, labels))} |",
        f"| --- | {' | '.join('---' for _ in labels)} |",
        *(
            f"| {_cell(label)} | {' | '.join(map(str, row))} |"
            for label, row in zip(labels, figures["confusion"], strict=True)
        ),
        "",
    ]


def _spikes(spikes: dict[str, Any] | None) -> list[str]:
    if not spikes or spikes["spike_rate"] is None:
        return ["## Spikes", "Nothing in this model spikes.", ""] if spikes else []
    return [
        "## Spikes",
        f"Firing rate {spikes['spike_rate']:.1%} (weighted by multiply-accumulates), "
        f"{spikes['silent']:.1%} of all inputs of weights are zero.",
        "",
        "| place | firing rate | mean count | channels that never fired |",
        "| --- | --- | --- | --- |",
        *(
            f"| {path} | {entry['firing_rate']:.4f} | {entry['mean_count']:.4f} "
            f"| {entry['never_fired']:.1%} |"
            for path, entry in spikes["projections"].items()
        ),
        "",
    ]


def _cell(text: str) -> str:
    """Text that breaks no table."""
    return text.replace("|", "\\|")
