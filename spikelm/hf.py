"""Hugging Face transformers around the core: configuration, causal LM, sequence classification, Auto classes.

Importing this module registers ``model_type: spikelm`` with AutoConfig, AutoModelForCausalLM and
AutoModelForSequenceClassification; without ``import spikelm.hf`` those say that they do not know the model
type, and no checkpoint can change that. ``generate()`` carries our recurrent state (:class:`RecurrentCache`),
not a DynamicCache, so its memory does not grow with the length (except for ``attention`` layers, whose room
is doubled when it is used up).

Precision: ``from_pretrained(folder, dtype=torch.bfloat16)`` keeps decays, time constants and neuron
parameters in float32. ``model.to(torch.bfloat16)``, ``.bfloat16()`` and ``.half()`` are torch's own and cast
these too, which coarsens slow decays; so does what calls them (DeepSpeed's bf16, the Trainer's
``bf16_full_eval``). To train in bfloat16 keep float32 weights and use autocast
(``TrainingArguments(bf16=True)``).

Training: firing-rate schedules need ``callbacks=[StepCallback()]``. Auxiliary losses are part of the loss
that the model returns; a loss computed outside it (``label_smoothing_factor``, ``compute_loss_func``) lacks
them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast

from spikelm.errors import ShapeError
from spikelm.hf_backbone import Backbone
from spikelm.hf_base import SpikeLMPreTrainedModel
from spikelm.hf_cache import CACHE_NAME, RecurrentCache, given_cache, with_room
from spikelm.hf_config import SpikeLMConfig
from spikelm.hf_inputs import (
    batch_share,
    kept_columns,
    loss_arguments,
)
from spikelm.hf_training import StepCallback
from spikelm.model import SpikeLM
from spikelm.pooling import pool

__all__ = [
    "RecurrentCache",
    "SpikeLMConfig",
    "SpikeLMForCausalLM",
    "SpikeLMForSequenceClassification",
    "SpikeLMPreTrainedModel",
    "StepCallback",
    "register",
]


class SpikeLMForCausalLM(SpikeLMPreTrainedModel, GenerationMixin):
    """Spiking language model with its head."""

    _tied_weights_keys = {"model.head.linear.weight": "model.embedding.weight"}

    def __init__(self, config: SpikeLMConfig) -> None:
        """Build the core."""
        super().__init__(config)
        self._finish(SpikeLM(config.to_core()))

    @property
    def base_model(self) -> nn.Module:
        """The core, called as transformers calls a base model."""
        return cast(nn.Module, Backbone(self))

    def get_output_embeddings(self) -> nn.Module:
        """The linear layer of the head."""
        head = self.model.head
        if head is None:
            raise ShapeError("this causal language model has no head")
        return cast(nn.Module, head.linear)

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the linear layer of the head."""
        head = self.model.head
        if head is None:
            raise ShapeError("this causal language model has no head")
        head.linear = cast(nn.Linear, value)
        head.out_features = head.linear.out_features

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits and, with labels, the loss.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, >= T], 0 for padding (left or right); the last T columns count.
            position_ids: int64 [B, T] or [1, T]; where they are 0 a document starts and the state is reset
                (packed documents). Other values mean nothing here.
            labels: int64 [B, T], shifted inside; -100 is ignored.
            past_key_values: state of the tokens before (:class:`RecurrentCache`); None for none.
            use_cache: whether to return the state.
            logits_to_keep: 0 for all columns, 1 for every row's last token that is no padding, n for the last
                n columns, a tensor [n] for these columns. The loss is always that of all columns.
            return_dict: false for a tuple.
            cache: another name of past_key_values; which of them the output's field has, too, depends on the
                release of transformers (``output.past_key_values`` works with all).
            kwargs: ``num_items_in_batch`` (labels of the whole accumulated batch) and ``shift_labels`` reach
                the loss; None and False ask for nothing.

        Raises:
            ConfigError: for any other argument, none is dropped silently; for two different states.
            ShapeError: if a mask, positions or columns do not fit input_ids.
            StateError: if the state is no RecurrentCache.
        """
        loss_kwargs = loss_arguments(kwargs, self.config, position_ids is not None)
        self._refuse_training_int8(labels)
        losses: list[Tensor] | None = [] if self.training and labels is not None else None
        cache = given_cache(cache, past_key_values)
        ctx = self._context(input_ids, attention_mask, position_ids, cache is not None, losses)
        one = isinstance(logits_to_keep, int) and logits_to_keep == 1 and labels is None
        before = None if cache is None else with_room(self.model, cache, input_ids.shape[1])
        logits, state = self.model(input_ids, before, ctx, last_only=one)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_kwargs)
            if losses:
                counted = loss_kwargs.get("shift_labels", labels[:, 1:])
                share = batch_share(counted, loss_kwargs.get("num_items_in_batch"))
                loss = loss + share * torch.stack(losses).sum()
        if not one:
            logits = kept_columns(logits, logits_to_keep, ctx.valid)
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        seen = input_ids.shape[1] + (0 if cache is None else cache.length)
        kept: dict[str, Any] = {CACHE_NAME: RecurrentCache(state, seen) if use_cache else None}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **kept)
        return output if return_dict is not False else output.to_tuple()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; the state to go on from is ``cache`` or ``past_key_values``.

        Raises:
            ConfigError: for two different states.
            StateError: if the state is no RecurrentCache.
        """
        # An old release takes the new name for an argument of the model alone, and feeds seen tokens again.
        cache = given_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        return super().generate(*args, **kwargs if cache is None else {**kwargs, CACHE_NAME: cache})

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Only the tokens that the state has not seen, with their positions.

        transformers says how many are new, except where it passes nothing but new ones. Other arguments go on
        to :meth:`forward`, which refuses what it does not know.
        """
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        positions = kwargs.get("position_ids")
        dropped = ("labels", "position_ids", "logits_to_keep", "return_dict")
        return {
            **{key: value for key, value in kwargs.items() if key not in dropped},
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            CACHE_NAME: given_cache(cache, past_key_values),
            "attention_mask": attention_mask,
            "position_ids": None if positions is None else positions[:, -input_ids.shape[1] :],
            "logits_to_keep": 1,
        }


class SpikeLMForSequenceClassification(SpikeLMPreTrainedModel):
    """Linear classifier on pooled features.

    ``config.classifier_pooling`` says which: of the last token that is not padding (``last``, as transformers
    does with causal models), or the mean or maximum over the tokens that are not.
    """

    _keys_to_ignore_on_load_unexpected = [r"^model\.head\."]

    def __init__(self, config: SpikeLMConfig) -> None:
        """Build the core without its head, and a linear classifier."""
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self._finish(SpikeLM(config.to_core(), with_head=False))

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.score:
            nn.init.normal_(self.score.weight, std=self.config.hidden_size**-0.5)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Class scores [B, num_labels] and, with labels [B], the loss (see config.problem_type).

        Of rows with several documents (position_ids) the last one is classified; see the causal model for the
        arguments and errors.
        """
        loss_kwargs = loss_arguments(kwargs, self.config, position_ids is not None)
        self._refuse_training_int8(labels)
        losses: list[Tensor] | None = [] if self.training and labels is not None else None
        ctx = self._context(input_ids, attention_mask, position_ids, False, losses)
        h, _ = self.model.hidden(input_ids, None, ctx)
        logits = self.score(pool(h, ctx.valid, self.config.classifier_pooling, ctx.reset))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
            if losses:
                loss = loss + torch.stack(losses).sum()
            # transformers divides by num_items_in_batch for one of its three kinds of labels only.
            loss = loss * batch_share(labels, loss_kwargs.get("num_items_in_batch"))
        output = SequenceClassifierOutputWithPast(loss=loss, logits=logits)
        return output if return_dict is not False else output.to_tuple()


def register() -> None:
    """Make the Auto classes know this model; harmless when called again."""
    AutoConfig.register("spikelm", SpikeLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(SpikeLMConfig, SpikeLMForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(
        SpikeLMConfig, SpikeLMForSequenceClassification, exist_ok=True
    )


register()
