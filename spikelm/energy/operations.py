"""Which operations a part does for a token: one formula per class, found by the part's type.

A formula counts the part's own work, with the modules inside it that are no parts (norms, gains), and without
the parts inside it: those are asked themselves. It follows the equation of ``step``; where a formula counts
less than the equation says, it names the kernel that does. Formulas of the parts of this package are in
:mod:`spikelm.energy.formulas`. Another package registers its own::

    @operations.register
    def _(part: MyMixer, activity: Activity) -> Kinds:
        return {"recurrence": macs(part.features)}
"""

from __future__ import annotations

from functools import singledispatch
from importlib import import_module

from torch import nn

from spikelm.energy.activity import Activity
from spikelm.energy.counts import Kinds
from spikelm.errors import ConfigError
from spikelm.recurrence import Part


@singledispatch
def operations(part: nn.Module, activity: Activity) -> Kinds:
    """Operations of one call of a part, one token, by kind.

    Args:
        part: a part of a model, or the model for its own embedding and norms.
        activity: what was measured.

    Raises:
        ConfigError: the part's class has no formula.
    """
    name = getattr(part, "path", "") or type(part).__name__
    raise ConfigError(
        f"{name} ({type(part).__name__}) has no formula for its operations; register one with "
        "spikelm.energy.operations.operations.register (docs/energy.md)"
    )


def counted(part: nn.Module, activity: Activity) -> Kinds:
    """:func:`operations`, after a look whether the formula was written for this part's ``step``.

    Raises:
        ConfigError: there is no formula, or it belongs to a base class whose ``step`` was replaced.
    """
    import_module("spikelm.energy.formulas")
    kind = type(part)
    owner = next((base for base in kind.__mro__ if base in operations.registry and base is not object), None)
    stepping = next((base for base in kind.__mro__ if "step" in vars(base)), None)
    if (
        owner is not None
        and stepping not in (None, Part)
        and kind.__mro__.index(stepping) < kind.__mro__.index(owner)
    ):
        raise ConfigError(
            f"{getattr(part, 'path', '') or 'a part'} ({kind.__name__}) has its own step() and inherits the "
            f"formula of {owner.__name__}; register one for {kind.__name__} (docs/energy.md)"
        )
    return operations(part, activity)
