"""The model configuration as transformers knows it (:mod:`spikelm.hf` registers it)."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from spikelm.config import FLOAT, FORMAT_VERSION, NO_NEURON, ModelConfig
from spikelm.errors import CheckpointError, ConfigError, nearest
from spikelm.pooling import check_pooling

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
class SpikeLMConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """:class:`spikelm.config.ModelConfig` as a transformers configuration; the fields have the same names.

    ``eos_token_id`` may be a list. The core and config.json then hold its first entry; the whole list stands
    in the model's generation configuration, which transformers saves beside the weights
    (generation_config.json). ``classifier_pooling`` (``last``, ``mean``, ``max``) says what a sequence
    classifier reads of a text.

    Raises:
        ConfigError: for a key that neither this model nor transformers knows, or a bad value.
    """

    model_type = "spikelm"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    auto_map: ClassVar[dict[str, str]] = {}
    """No code of a checkpoint is ever run; TRL reads this attribute without asking whether it exists."""

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
    norm: str = "layernorm"
    embedding_norm: bool = True
    layer_norm_epsilon: float = 1e-5
    initializer_range: float | int | None = None
    sink_tokens: int = 0
    weights: dict[str, Any] = field(default_factory=lambda: dict(FLOAT))
    weight_overrides: dict[str, Any] = field(default_factory=dict)
    dropout: float | int = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True
    classifier_pooling: str = "last"

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
        check_pooling(self.classifier_pooling)
        self.to_core()
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def to_core(self) -> ModelConfig:
        """The core's configuration."""
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        values = {name: getattr(self, name) for name in _OURS}
        for end in reversed(ends):  # the first comes last, so that it is kept and all are checked
            values["eos_token_id"] = end
            core = ModelConfig.from_dict(values)
        return core if ends else ModelConfig.from_dict({**values, "eos_token_id": None})

    @classmethod
    def from_core(cls, config: ModelConfig, **extra: Any) -> SpikeLMConfig:
        """The transformers configuration of a core configuration."""
        return cls(**config.to_dict(), **extra)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json, with one end token: the core reads this file too."""
        values: dict[str, Any] = super().to_diff_dict()
        if isinstance(self.eos_token_id, list):
            values["eos_token_id"] = self.to_core().eos_token_id
        return values
