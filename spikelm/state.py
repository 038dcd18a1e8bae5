"""Recurrent state: a nested dictionary of tensors, batch first.

Everything a model remembers of the past is in such a value and nowhere else, so a sequence is saved, forked
or moved between batches by handling one object.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, cast

import torch
from torch import Tensor

from spikelm.errors import StateError

State: TypeAlias = "dict[str, Tensor | State]"


def tree_map(function: Callable[..., Tensor], *states: State) -> State:
    """Apply ``function`` to the corresponding tensors of one or more states of the same structure."""
    first = states[0]
    result: State = {}
    for name, value in first.items():
        values = [other[name] for other in states]
        if isinstance(value, dict):
            result[name] = tree_map(function, *cast("list[State]", values))
        else:
            result[name] = function(*values)
    return result


def where(mask: Tensor, new: State, old: State) -> State:
    """Rows of ``new`` where ``mask[B]`` is true, rows of ``old`` elsewhere."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(mask.view(-1, *([1] * (a.dim() - 1))), a, b)

    return tree_map(pick, new, old)


def select_rows(state: State, rows: Tensor) -> State:
    """The sequences ``rows`` (int64 [N]) of a state, in that order; a row may occur more than once."""
    return tree_map(lambda value: value.index_select(0, rows), state)


def detach(state: State) -> State:
    """The same values without their history (truncated back-propagation through time)."""
    return tree_map(lambda value: value.detach(), state)


def flatten(state: State, prefix: str = "") -> dict[str, Tensor]:
    """Dotted name -> tensor, for safetensors."""
    flat: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: dict[str, Tensor], like: State) -> State:
    """Inverse of :func:`flatten` with the structure of ``like``.

    Raises:
        StateError: if a name is missing or left over, or a shape or dtype differs.
    """
    expected = flatten(like)
    missing, extra = sorted(expected.keys() - flat.keys()), sorted(flat.keys() - expected.keys())
    if missing or extra:
        raise StateError(
            f"the state does not fit the model: missing {missing or 'none'}, unknown {extra or 'none'}"
        )
    for name, value in expected.items():
        got = flat[name]
        if got.shape != value.shape or got.dtype != value.dtype:
            raise StateError(
                f"state {name!r} is {tuple(got.shape)} {got.dtype}, "
                f"the model expects {tuple(value.shape)} {value.dtype}"
            )

    def build(node: State, prefix: str) -> State:
        return {
            name: build(value, f"{prefix}{name}.") if isinstance(value, dict) else flat[prefix + name]
            for name, value in node.items()
        }

    return build(like, "")


def batch_size(state: State) -> int | None:
    """Sequences a state holds, None for an empty one."""
    for value in state.values():
        rows = batch_size(value) if isinstance(value, dict) else value.shape[0]
        if rows is not None:
            return rows
    return None


def state_bytes(state: State) -> int:
    """Bytes of all tensors of a state (all sequences of the batch together)."""
    return sum(value.numel() * value.element_size() for value in flatten(state).values())
