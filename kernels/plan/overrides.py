"""Parts whose records are not those of their ``step``."""

from __future__ import annotations

from torch import nn

from spikelm.errors import PlanError

_RECORDS_OF = (("step", "lower"), ("encode", "lower_spikes"), ("gate", "lower_gate"))
"""Methods of parts, and those that write the same as records."""


def check_overrides(part: nn.Module) -> None:
    """Refuse a part whose class has another ``step`` than the one its inherited records were written for.

    Raises:
        PlanError: naming the part and both methods.
    """
    kinds = type(part).__mro__
    for method, records in _RECORDS_OF:
        place = next((i for i, kind in enumerate(kinds) if method in vars(kind)), len(kinds))
        written = next((i for i, kind in enumerate(kinds) if records in vars(kind)), len(kinds))
        # What has no records at all says so itself.
        if place < written < len(kinds) and kinds[written].__name__ not in ("Part", "Neuron"):
            raise PlanError(
                f"{getattr(part, 'path', '') or 'a part'} ({type(part).__name__}) has its own {method}() and "
                f"inherits {records}() from {kinds[written].__name__}; a decode plan needs its own of both"
            )
