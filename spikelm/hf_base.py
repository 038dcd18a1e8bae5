"""What the transformers models of both heads share: loading, saving, embeddings, precision, context."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from spikelm.errors import CheckpointError, ConfigError
from spikelm.firing import FIRING, take_firing, write_firing
from spikelm.hf_config import SpikeLMConfig
from spikelm.hf_inputs import document_starts, dropout_source, valid_tokens
from spikelm.hf_training import step_of
from spikelm.model import SpikeLM
from spikelm.recurrence import Context
from spikelm.weights import Int8Linear

_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
"""Arguments of from_pretrained that say where a repository's files are."""


class SpikeLMPreTrainedModel(PreTrainedModel):
    """What both heads share.

    Attributes:
        training_step: optimiser steps done, for firing-rate schedules; :class:`StepCallback` sets it.
        expert_loads: path of a mixture of experts -> tokens that this step sent to each expert so far; None
            where nobody counts (:class:`StepCallback` does).
    """

    config_class = SpikeLMConfig
    config: SpikeLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _is_stateful = True
    training_step: int | None = None
    expert_loads: dict[str, Tensor] | None = None

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, with what the checkpoint says of firing (``model.model.firing``).

        Raises:
            CheckpointError: weights that the checkpoint lacks, or a ``firing.json`` that does not fit.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        source = model.config.name_or_path  # of the model, where an adapter's folder was named
        wanted = {key: value for key, value in kwargs.items() if key in _WHERE}
        if source:
            quiet = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
            found = cached_file(source, FIRING, **wanted, **dict.fromkeys(quiet, False))
            if found is not None:
                take_firing(model.model, Path(found).parent)
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Save as transformers does, and what is known of firing."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process and Path(save_directory).is_dir():
            write_firing(cast(SpikeLM, self.model), Path(save_directory))

    def _finish(self, core: SpikeLM) -> None:
        """Take the core, and tell transformers what stays in float32, parts of other packages included."""
        self.model = core
        self._keep_in_fp32_modules_strict = {f"model.{name}" for name in core.fp32_parameters()}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the core initialises itself (one function, spikelm.initialisation)."""

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Refuse a checkpoint that lacks weights of the core, which would be left undefined.

        Raises:
            CheckpointError: naming the first.
        """
        lacking = sorted(name for name in loading_info.missing_and_mismatched() if name.startswith("model."))
        if lacking:
            raise CheckpointError(
                f"the checkpoint lacks {lacking[0]!r} or holds it in another shape ({len(lacking)} in all); "
                "it is incomplete or its config.json belongs to another model"
            )
        super()._adjust_missing_and_unexpected_keys(loading_info)

    def gradient_checkpointing_enable(  # type: ignore[override]
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute every block in backward (always the non-reentrant form).

        Raises:
            ConfigError: for every_n_layers or offload, which the core does not offer.
        """
        if every_n_layers != 1 or offload:
            raise ConfigError(
                f"activation checkpointing got every_n_layers={every_n_layers}, offload={offload}; "
                "this model recomputes every block and keeps block inputs on the device: use 1 and False"
            )
        cast(SpikeLM, self.model).gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        cast(SpikeLM, self.model).gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in backward."""
        return cast(SpikeLM, self.model).gradient_checkpointing

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return cast(SpikeLM, self.model).embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        cast(SpikeLM, self.model).embedding = cast(nn.Embedding, value)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Change the vocabulary's size everywhere: embedding, head, both configurations.

        Args:
            new_num_tokens: the new size; None for the present one.
            pad_to_multiple_of: round the size up to a multiple.
            mean_resizing: draw new rows around the mean of the old ones; false draws them as the core's
                initialisation would.

        Raises:
            ConfigError: if a special token of the configuration would fall out; nothing is changed then.
        """
        core = cast(SpikeLM, self.model)
        old = core.embedding.num_embeddings
        size = old if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size != old and core.head is not None and isinstance(core.head.linear, Int8Linear):
            raise ConfigError(
                "the head has int8 weights, which cannot grow or shrink; resize the float checkpoint and "
                "quantise that again"
            )
        config = dataclasses.replace(core.config, vocab_size=size)
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        core.config = config
        if size > old and not mean_resizing:
            with torch.no_grad():
                embedding.weight[old:].normal_(std=1e-4)
                if core.head is not None and not config.tie_word_embeddings:
                    cast(Tensor, core.head.linear.weight)[old:].normal_(std=0.5 * config.hidden_size**-0.5)
        return embedding

    def _refuse_training_int8(self, labels: Tensor | None) -> None:
        if self.training and labels is not None and cast(SpikeLM, self.model).config.has_int8:
            raise ConfigError(
                "the model has int8 weights, which cannot be trained; train the float checkpoint it was made "
                "from, and quantise that again (model.eval() to measure a loss)"
            )

    def _supports_default_dynamic_cache(self) -> bool:
        return False

    def _context(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        continued: bool,
        losses: list[Tensor] | None,
    ) -> Context:
        shape = input_ids.shape
        valid = valid_tokens(attention_mask, shape)
        return Context(
            valid=valid,
            reset=document_starts(position_ids, shape, valid, continued),
            random=dropout_source(shape, input_ids.device)
            if self.training and self.config.dropout > 0
            else None,
            losses=losses,
            step=0 if losses is None else step_of(self.model, self.training_step),
            loads=None if losses is None else self.expert_loads,
        )
