"""Hugging Face transformers around the core: configuration, causal LM, sequence classification, Auto classes.

Importing this module registers ``model_type: spikelm`` with AutoConfig, AutoModelForCausalLM and
AutoModelForSequenceClassification. ``generate()`` carries our recurrent state (:class:`RecurrentCache`), not
a DynamicCache, so its memory does not grow with the length.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast

from spikelm import state as states
from spikelm.config import FORMAT_VERSION, NO_NEURON, ModelConfig
from spikelm.errors import CheckpointError, ConfigError, ShapeError, nearest
from spikelm.model import SpikeLM
from spikelm.randomness import CounterRandom
from spikelm.recurrence import Context
from spikelm.state import State

_OURS = [f.name for f in fields(ModelConfig)]
_STANDARD_EXTRAS = frozenset(
    {  # fmt: skip
        "torch_dtype",
        "name_or_path",
        "num_labels",
        "transformers_version",
        "model_type",
        "auto_map",
        "attn_implementation",
        "output_attentions",
        "experts_implementation",
        "_commit_hash",
        "quantization_config",
    }
)
"""Keys that transformers itself passes or writes besides the fields of PreTrainedConfig."""


@strict
class SpikeLMConfig(PreTrainedConfig):
    """:class:`spikelm.config.ModelConfig` as a transformers configuration; the fields have the same names.

    Raises:
        ConfigError: for a key that neither this model nor transformers knows, or a bad value.
    """

    model_type = "spikelm"
    keys_to_ignore_at_inference = ["past_key_values"]

    format_version: int = FORMAT_VERSION
    vocab_size: int = 256
    hidden_size: int = 512
    num_hidden_layers: int = 12
    layers: list[Any] | tuple[Any, ...] = field(default_factory=lambda: ModelConfig().to_dict()["layers"])
    placement: str = "before"
    neuron: dict[str, Any] = field(default_factory=lambda: ModelConfig().to_dict()["neuron"])
    neuron_overrides: dict[str, Any] = field(default_factory=dict)
    embedding_neuron: dict[str, Any] = field(default_factory=lambda: dict(NO_NEURON))
    head_neuron: dict[str, Any] = field(default_factory=lambda: dict(NO_NEURON))
    tie_word_embeddings: bool = False
    layer_norm_epsilon: float = 1e-5
    dropout: float | int = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse unknown keys, a newer format, and values the core refuses."""
        for key in kwargs:
            if key not in _STANDARD_EXTRAS:
                raise ConfigError(nearest("model configuration key", key, _OURS))
        if self.format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format version {self.format_version}, this release reads up to "
                f"{FORMAT_VERSION}; upgrade spikelm"
            )
        self.to_core()
        super().__post_init__(**kwargs)

    def to_core(self) -> ModelConfig:
        """The core's configuration."""
        return ModelConfig.from_dict({name: getattr(self, name) for name in _OURS})

    @classmethod
    def from_core(cls, config: ModelConfig, **extra: Any) -> SpikeLMConfig:
        """The transformers configuration of a core configuration."""
        return cls(**config.to_dict(), **extra)


@dataclass
class RecurrentCache:
    """The model's state, in the place where transformers keeps a key-value cache.

    Args:
        state: nested dict of tensors, batch first.
        length: tokens seen.
    """

    state: State
    length: int = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue from row ``beam_idx[i]`` (beam search)."""
        self.state = states.select_rows(self.state, beam_idx)


class SpikeLMPreTrainedModel(PreTrainedModel):
    """What both heads share."""

    config_class = SpikeLMConfig
    config: SpikeLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the core initialises itself (one function, spikelm.initialisation)."""

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

    def _supports_default_dynamic_cache(self) -> bool:
        return False

    def _context(
        self, input_ids: Tensor, attention_mask: Tensor | None, losses: list[Tensor] | None
    ) -> Context:
        B, T = input_ids.shape
        valid = None
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[1] < T:
                raise ShapeError(
                    f"attention_mask is {tuple(attention_mask.shape)}; expected [{B}, at least {T}]"
                )
            valid = attention_mask[:, -T:].to(torch.bool)
            valid = None if bool(valid.all()) else valid
        random = None
        if self.training and self.config.dropout > 0:
            seed = int(torch.randint(1 << 31, ()))
            rows = torch.arange(B, device=input_ids.device)
            random = CounterRandom(
                seed=seed, stream=rows, position=torch.arange(T, device=input_ids.device).expand(B, T)
            )
        return Context(valid=valid, random=random, losses=losses)


class SpikeLMForCausalLM(SpikeLMPreTrainedModel, GenerationMixin):
    """Spiking language model with its head."""

    _tied_weights_keys = {"model.head.linear.weight": "model.embedding.weight"}

    def __init__(self, config: SpikeLMConfig) -> None:
        """Build the core."""
        super().__init__(config)
        self.model = SpikeLM(config.to_core())
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The linear layer of the head."""
        head = self.model.head
        if head is None:
            raise ShapeError("this causal language model has no head")
        return cast(nn.Module, head.linear)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits and, with labels, the loss.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, >= T], 0 for padding (left or right); the last T columns count.
            labels: int64 [B, T], shifted inside; -100 is ignored.
            past_key_values: state of the tokens before; None for none.
            use_cache: whether to return the state.
            logits_to_keep: only the last so many columns; 0 for all.
            return_dict: false for a tuple.
            kwargs: passed to the loss (``num_items_in_batch``).
        """
        losses: list[Tensor] = []
        ctx = self._context(
            input_ids, attention_mask, losses if self.training and labels is not None else None
        )
        state = None if past_key_values is None else past_key_values.state
        logits, state = self.model(input_ids, state, ctx, last_only=logits_to_keep == 1 and labels is None)
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            for extra in losses:
                loss = loss + extra
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        seen = 0 if past_key_values is None else past_key_values.length
        cache = RecurrentCache(state, seen + input_ids.shape[1]) if use_cache else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cast(Any, cache))
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Only the tokens that the state has not seen; embeddings in place of tokens are refused."""
        if inputs_embeds is not None:
            raise ConfigError("generate got inputs_embeds; this model takes input_ids only")
        if past_key_values is not None:
            input_ids = input_ids[:, past_key_values.length :]
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": 1,
        }


class SpikeLMForSequenceClassification(SpikeLMPreTrainedModel):
    """Classifier on the features of the last token that is not padding."""

    _keys_to_ignore_on_load_unexpected = [r"^model\.head\."]

    def __init__(self, config: SpikeLMConfig) -> None:
        """Build the core without its head, and a linear classifier."""
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        self.model = SpikeLM(config.to_core(), with_head=False)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.score:
            nn.init.normal_(self.score.weight, std=self.config.hidden_size**-0.5)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Class scores [B, num_labels] and, with labels [B], the loss (see config.problem_type)."""
        losses: list[Tensor] = []
        ctx = self._context(
            input_ids, attention_mask, losses if self.training and labels is not None else None
        )
        h, _ = self.model.hidden(input_ids, None, ctx)
        if ctx.valid is None:
            last = torch.full((input_ids.shape[0],), input_ids.shape[1] - 1, device=h.device)
        else:
            columns = torch.arange(input_ids.shape[1], device=h.device)
            last = (ctx.valid * columns).amax(1)
        logits = self.score(h[torch.arange(h.shape[0], device=h.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            for extra in losses:
                loss = loss + extra
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
