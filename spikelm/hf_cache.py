"""The recurrent state in the place where transformers keeps a key-value cache, and that place's two names.

transformers 5.13 calls the argument and the output's field ``past_key_values``, 5.24 calls both ``cache``.
This package takes either name with either release, and answers under the name of the release that is
installed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from spikelm import state as states
from spikelm.errors import ConfigError, StateError
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.model import SpikeLM

_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}

CACHE_NAME = "cache" if "cache" in _FIELDS else "past_key_values"
"""What the installed release of transformers calls the argument and the output's field."""


@dataclass
class RecurrentCache:
    """The model's state, in the place where transformers keeps a key-value cache.

    Args:
        state: nested dict of tensors, batch first.
        length: tokens seen.
    """

    state: State
    length: int = 0

    is_compileable: ClassVar[bool] = False
    """Asked by generate(): whether steps may be compiled as for a cache of fixed addresses."""

    is_croppable: ClassVar[bool] = False
    """Asked by generate(): whether the last tokens can be taken back."""

    is_linear: ClassVar[tuple[bool, ...]] = (False,)
    """Asked by generate(): where all are true it feeds a continued text whole, seen tokens too."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue from row ``beam_idx[i]`` (beam search)."""
        self.state = states.select_rows(self.state, beam_idx)

    def crop(self, *_: Any) -> NoReturn:
        """Refuse to take tokens back, which assisted decoding asks for.

        Raises:
            StateError: always.
        """
        raise StateError(
            "assisted decoding asks the cache to take tokens back; a recurrent state holds no earlier one, "
            "so this model cannot be an assistant: call generate() without assistant_model"
        )

    def activate_past_recording(self) -> NoReturn:
        """Refuse to keep what :meth:`crop` would need.

        Raises:
            StateError: always.
        """
        self.crop()


def given_cache(cache: Any, past_key_values: Any) -> RecurrentCache | None:
    """The one state that was given under either name, or None.

    Raises:
        ConfigError: if both names were given, with different values.
        StateError: if it is no :class:`RecurrentCache`.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ConfigError(
            "cache and past_key_values were both passed and are different; they are two names of one "
            "argument, pass one of them"
        )
    given = past_key_values if cache is None else cache
    if given is not None and not isinstance(given, RecurrentCache):
        raise StateError(
            f"the cache is a {type(given).__name__}; expected a RecurrentCache, as an earlier output of this "
            "model holds it"
        )
    return given


def with_room(model: SpikeLM, cache: RecurrentCache, tokens: int) -> State:
    """The state of ``cache`` with room for ``tokens`` more.

    Where memory grows its room is at least doubled when it is used up, so that a text of n tokens, one at a
    time, is copied as often as log n.
    """
    room, needed = model.capacity(cache.state), cache.length + tokens
    if room is None or room >= needed:
        return cache.state
    return model.reserve(cache.state, max(needed, 2 * room))
