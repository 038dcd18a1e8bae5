"""Where the weights of a model lie that a decode plan reads: huge pages, and packed int8 matrices."""

from __future__ import annotations

from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from spikelm.kernels.memory import Arena, aligned
from spikelm.model import SpikeLM
from spikelm.projection import Projection
from spikelm.weights import Int8Linear, choose_layout, pack_model

_moved: WeakKeyDictionary[nn.Module, tuple[int, ...]] = WeakKeyDictionary()
"""Where the parameters of a model are, for models whose parameters have been moved."""


def move_weights(model: nn.Module) -> None:
    """Put the float32 parameters of a model into one allocation of huge pages; they stay the same objects.

    Left where they are: parameters that share their memory with something else (flat buffers of a distributed
    optimiser, other processes, other parameters).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.dtype == torch.float32]
    places = [parameter.data_ptr() for parameter in parameters]
    if _moved.get(model) == tuple(places):
        return
    own = [
        parameter
        for parameter in parameters
        if parameter.untyped_storage().nbytes() == 4 * parameter.numel()
        and not parameter.is_shared()
        and places.count(parameter.data_ptr()) == 1
    ]
    arena = Arena(sum(aligned(4 * parameter.numel()) for parameter in own))
    for parameter in own:
        home = arena.tensor(tuple(parameter.shape), torch.float32)
        home.copy_(parameter.data)
        parameter.data = home
    _moved[model] = tuple(parameter.data_ptr() for parameter in parameters)


def pack_weights(model: SpikeLM) -> None:
    """Pack the int8 matrices of a model that are not packed yet; see :func:`spikelm.weights.pack_model`."""
    counted = [
        module
        for module in model.modules()
        if isinstance(module, Projection) and isinstance(module.linear, Int8Linear) and module.neuron.spiking
    ]
    waiting = [module for module in counted if cast(Int8Linear, module.linear).packed is None]
    if waiting and len(waiting) == len(counted):
        pack_model(model)
        return
    for module in waiting:
        cast(Int8Linear, module.linear).pack_(choose_layout(model.firing.get(module.path)))
