"""``attention``: softmax attention over all tokens so far. Its memory grows with the text.

Equations and state: :mod:`spikelm.mixers.softmax`. The ring has as many slots as there is room for tokens
(``max_len`` of ``init_state``); it never wraps around, a text that is longer is an error.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from spikelm.errors import StateError
from spikelm.mixers.softmax import SoftmaxMixer
from spikelm.registry import mixers
from spikelm.state import State


@mixers.register("attention")
class Attention(SoftmaxMixer):
    """Full causal softmax attention; options and errors: see :class:`SoftmaxMixer`."""

    grows = True

    def slots(self, max_len: int | None) -> int:
        """Room for ``max_len`` tokens.

        Raises:
            StateError: no length was given.
        """
        if max_len is None or max_len < 1:
            raise StateError(
                f"{self._name()} keeps every token and got max_len={max_len}; give init_state the number of "
                "tokens to make room for"
            )
        return max_len

    def check_room(self, last: Tensor, room: int) -> None:
        """Refuse a text that is longer than the room for it.

        Raises:
            StateError: naming position and capacity.
        """
        longest = int(last.max())
        if longest > room:
            raise StateError(
                f"{self._name()} got a token at position {longest - 1}, and its state has room for {room} "
                f"tokens (capacity); make room with state = model.reserve(state, {longest}), or give "
                "init_state a larger max_len"
            )

    def capacity(self, state: State) -> int | None:
        """Tokens for which there is room."""
        return cast(Tensor, state["keys"]).shape[1]

    def reserve(self, state: State, max_len: int) -> State:
        """The same state with room for ``max_len`` tokens, or the same one where it has that."""
        new = super().reserve(state, max_len)
        for name in ("keys", "values"):
            value = cast(Tensor, new[name])
            missing = max_len - value.shape[1]
            if missing > 0:
                zeros = value.new_zeros(value.shape[0], missing, *value.shape[2:])
                new[name] = torch.cat([value, zeros], 1)
        return new

    def _name(self) -> str:
        return self.path or "attention"
