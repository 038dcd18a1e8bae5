"""The core as transformers' base model: features for losses that multiply the head's weights themselves.

TRL's trainers score tokens with a fused head of their own: they call ``model.base_model`` for the last hidden
state and take the weights of ``model.get_output_embeddings()``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from spikelm.errors import ConfigError
from spikelm.hf_inputs import loss_arguments

if TYPE_CHECKING:
    from spikelm.hf import SpikeLMForCausalLM


class Backbone:
    """``model.base_model`` of a causal model; other attributes are the core's.

    Args:
        model: the causal model.
    """

    def __init__(self, model: SpikeLMForCausalLM) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model.model, name)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Normalised features before the head, ``last_hidden_state`` [B, T, D]; no state is given back.

        Arguments are those of the causal model.

        Raises:
            ConfigError: for an unknown argument; for a spiking head, whose weights may not be multiplied with
                the features themselves; and in training for auxiliary losses (of a ``rate_target`` or
                mixture of experts), which are part of the model's own loss only.
        """
        model = self._model
        loss_arguments(kwargs, model.config, position_ids is not None)
        if model.config.to_core().input_neuron("head")["name"] != "none":
            raise ConfigError(
                "this model has a neuron before its head, and a loss that multiplies the head's weights "
                "itself passes it over; train with the model's own loss, or set head_neuron to {name: none}"
            )
        learning = model.training and torch.is_grad_enabled()
        losses: list[Tensor] | None = [] if learning else None
        ctx = model._context(input_ids, attention_mask, position_ids, False, losses)
        features, _ = model.model.hidden(input_ids, None, ctx)
        if losses:
            raise ConfigError(
                "this model has auxiliary losses (rate_target of a neuron; balance_loss, z_loss of a moe), "
                "which a loss computed outside the model lacks; train with the model's own loss, or take "
                "them out of the configuration"
            )
        return BaseModelOutputWithPast(last_hidden_state=features)
