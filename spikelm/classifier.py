"""A text classifier: the core without its language head, masked pooling, one linear layer.

Its folder is that of :class:`spikelm.hf.SpikeLMForSequenceClassification` (config.json with ``id2label`` and
``classifier_pooling``, model.safetensors with ``score.weight``), which gives the same scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spikelm.checkpoint import (
    CONFIG,
    PREFIX,
    check_weights,
    config_json,
    read_config,
    read_weights,
    resolve_folder,
    write_whole,
)
from spikelm.config import ModelConfig
from spikelm.errors import CheckpointError, ConfigError
from spikelm.model import SpikeLM
from spikelm.pooling import check_pooling, pool
from spikelm.recurrence import EMPTY, Context

if TYPE_CHECKING:
    from spikelm.tokenizer import Tokenizer

SCORE = "score.weight"


class Classifier(SpikeLM):
    """Class scores of texts.

    Args:
        config: of the core.
        labels: names of the classes, in the order of the scores.
        pooling: ``mean``, ``last`` or ``max`` (see :func:`spikelm.pooling.pool`).
        score_dropout: share of the pooled features dropped in training.

    Raises:
        ConfigError: fewer than two classes, a name twice, or another pooling.
    """

    def __init__(
        self,
        config: ModelConfig,
        labels: Sequence[str],
        *,
        pooling: str = "mean",
        score_dropout: float = 0.0,
    ) -> None:
        """Build and initialise (from torch's global generator)."""
        super().__init__(config, with_head=False)
        check_pooling(pooling)
        if len(labels) < 2 or len(set(labels)) != len(labels):
            raise ConfigError(
                f"the classes are {list(labels)}; a classifier needs two or more different ones"
            )
        self.labels = tuple(labels)
        self.pooling = pooling
        self.score_dropout = score_dropout
        self.score = nn.Linear(config.hidden_size, len(labels), bias=False)
        # Small, so that the first scores are nearly equal: the pooled features are of order one.
        nn.init.normal_(self.score.weight, std=0.1 * config.hidden_size**-0.5)

    def classify(self, tokens: Tensor, ctx: Context = EMPTY) -> Tensor:
        """Scores (logits) of every class.

        Args:
            tokens: int64 [B, T].
            ctx: ``valid`` [B, T] is false for padding; ``random`` and training mode switch dropout on.

        Returns:
            [B, number of classes], float32 (float64 for float64 weights).
        """
        features, _ = self.hidden(tokens, None, ctx)
        pooled = pool(features, ctx.valid, self.pooling, ctx.reset)
        if self.score_dropout > 0.0 and self.training and ctx.random is not None:
            first = replace(ctx.random, position=ctx.random.position[:, :1])
            keep = first.uniform("score.dropout", pooled.shape[-1])[:, 0] >= self.score_dropout
            pooled = pooled * keep.to(pooled.dtype) / (1.0 - self.score_dropout)
        scores: Tensor = self.score(pooled)
        return scores if scores.dtype == torch.float64 else scores.float()


def classifier_json(model: Classifier) -> dict[str, Any]:
    """Content of config.json."""
    return {
        **config_json(model.config, model.embedding.weight.dtype),
        "architectures": ["SpikeLMForSequenceClassification"],
        "classifier_pooling": model.pooling,
        "id2label": {str(index): label for index, label in enumerate(model.labels)},
        "label2id": {label: index for index, label in enumerate(model.labels)},
        "problem_type": "single_label_classification",
    }


def save_classifier(
    folder: str | Path,
    model: Classifier,
    tokenizer: Tokenizer | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a classifier's folder whole, replacing an older one.

    Args:
        folder: where to.
        model: its weights are written in their own dtype.
        tokenizer: written beside, if given.
        extra: more files, name -> content.

    Raises:
        CheckpointError: if the disk refuses; an older folder is then left as it was.
    """
    weights = {
        name if name == SCORE else PREFIX + name: value.contiguous()
        for name, value in model.state_dict().items()
    }
    return write_whole(folder, "classifier", classifier_json(model), weights, tokenizer, extra or {})


def load_classifier(folder: str | Path, device: torch.device | str = "cpu") -> Classifier:
    """The classifier of a folder, in evaluation mode.

    Raises:
        CheckpointError: missing or damaged files, or a folder that holds no classifier.
    """
    config = read_config(folder)
    values = json.loads((resolve_folder(folder) / CONFIG).read_text(encoding="utf-8"))
    names = values.get("id2label")
    weights = read_weights(folder)
    if not isinstance(names, dict) or SCORE not in weights:
        raise CheckpointError(
            f"{folder} holds a language model, not a classifier; spikelm finetune makes one of it"
        )
    labels = [str(names.get(str(index))) for index in range(len(names))]
    with torch.device("meta"):
        model = Classifier(config, labels, pooling=values.get("classifier_pooling", "last"))
    check_weights(model, weights, str(folder))
    model.load_state_dict({name: value.to(device) for name, value in weights.items()}, assign=True)
    return model.eval()


def load_body(model: Classifier, folder: str | Path) -> None:
    """Take the body's weights from a language model's folder, in float32; the scores stay as they are.

    Raises:
        CheckpointError: missing, left-over or misshapen weights, damaged files.
    """
    own = {SCORE: model.score.weight.detach()}
    stored = {
        name: value.float() if value.is_floating_point() else value
        for name, value in read_weights(folder).items()
        if not name.startswith("head.") and name != SCORE
    }
    check_weights(model, {**stored, **own}, str(folder))
    model.load_state_dict({**stored, **own})
