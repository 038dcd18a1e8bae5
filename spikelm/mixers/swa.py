"""``swa``: sliding-window softmax attention; a token sees exactly ``window`` tokens, itself included.

Equations and state: :mod:`spikelm.mixers.softmax`, the ring having R = window slots. Sinks are not counted.
The released SpikingBrain code sees one key more in its flash-attention path (it passes the window as the
number of keys to the left of a token, 4097 keys for 4096) and 4096 elsewhere; here it is always the window.
"""

from __future__ import annotations

from typing import Any

from spikelm.build import Build
from spikelm.errors import ConfigError
from spikelm.mixers.softmax import SoftmaxMixer
from spikelm.registry import mixers


@mixers.register("swa")
class SlidingWindowAttention(SoftmaxMixer):
    """Softmax attention over the last ``window`` tokens, in constant memory.

    Args:
        build: place in the model.
        window: W, tokens that are seen, the present one included.
        options: see :class:`SoftmaxMixer`.

    Raises:
        ConfigError: a window below 1.
    """

    def __init__(self, build: Build, *, window: int = 4096, **options: Any) -> None:
        """Build the projections."""
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ConfigError(f"window is {window!r}; expected a whole number of at least 1")
        super().__init__(build, **options)
        self.window = window

    def slots(self, max_len: int | None) -> int:
        """The window, whatever the length of the text."""
        return self.window
