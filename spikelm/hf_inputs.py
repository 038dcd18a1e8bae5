"""What transformers passes to a model, checked and translated for the core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spikelm.errors import ConfigError, ShapeError, nearest
from spikelm.randomness import CounterRandom

LOSS_ARGUMENTS = frozenset({"num_items_in_batch", "shift_labels"})
"""Arguments that reach the loss function."""

_PACKING = frozenset({"seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
_KNOWN = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "labels",
    "cache",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
    *sorted(LOSS_ARGUMENTS),
)


def loss_arguments(given: Mapping[str, Any], config: Any, packed: bool) -> dict[str, Any]:
    """The arguments for the loss function among those that a forward pass has no name for.

    Args:
        given: the other keyword arguments; None and False ask for nothing.
        config: its output_hidden_states and output_attentions count where no argument says otherwise.
        packed: whether position_ids say where documents start, so that the same in another form is no news.

    Raises:
        ConfigError: for an argument that would change the result and that this model does not know.
    """
    for name in _OUTPUTS:
        asked = given.get(name)
        if asked or (asked is None and getattr(config, name, False)):
            raise ConfigError(f"{name} is true; this model returns logits and its state only, leave it out")
    for name, value in given.items():
        if name in LOSS_ARGUMENTS or name in _OUTPUTS or value is None:
            continue
        if name in _PACKING:
            if not packed:
                raise ConfigError(
                    f"{name} was passed without position_ids; this model finds packed documents by "
                    "position_ids that are 0 at every start, pass those"
                )
        elif name == "is_causal":
            if not value:
                raise ConfigError("is_causal is false; this model is causal, leave it out")
        elif name in ("inputs_embeds", "token_type_ids"):
            raise ConfigError(f"{name} was passed; this model takes input_ids only")
        else:
            raise ConfigError(nearest("argument of the model", name, _KNOWN))
    return {name: given[name] for name in LOSS_ARGUMENTS if given.get(name) is not None}


def valid_tokens(attention_mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Which tokens are no padding, bool [B, T], or None where all are; the mask's last T columns count."""
    if attention_mask is None:
        return None
    B, T = shape
    if attention_mask.dim() != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
        raise ShapeError(f"attention_mask is {tuple(attention_mask.shape)}; expected [{B}, at least {T}]")
    valid = attention_mask[:, -T:].to(torch.bool)
    return None if bool(valid.all()) else valid


def document_starts(
    position_ids: Tensor | None, shape: torch.Size, valid: Tensor | None, continued: bool
) -> Tensor | None:
    """Where the state starts anew, bool [B, T], or None where nowhere.

    Args:
        position_ids: int64 [B, T] or [1, T], 0 at the first token of every document; None for no packing.
        shape: B and T.
        valid: bool [B, T] or None; the positions of padding mean nothing.
        continued: whether a state comes in; without one the first column begins at the initial state anyway.
    """
    if position_ids is None:
        return None
    B, T = shape
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, B) or position_ids.shape[1] != T:
        raise ShapeError(f"position_ids is {tuple(position_ids.shape)}; expected [{B}, {T}] or [1, {T}]")
    reset = (position_ids == 0).expand(B, T)
    reset = reset.clone() if valid is None else reset & valid
    if not continued:
        reset[:, 0] = False
    return reset if bool(reset.any()) else None


def dropout_source(shape: torch.Size, device: torch.device) -> CounterRandom:
    """Random numbers for one training pass: another seed for every pass, another stream for every row.

    The seed comes from torch's generator on the CPU. Data-parallel processes are often seeded alike, so the
    process's rank is part of the streams.
    """
    B, T = shape
    distributed = torch.distributed
    rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    return CounterRandom(
        seed=int(torch.randint(1 << 31, ())),
        stream=torch.arange(B, device=device) + (rank << 32),
        position=torch.arange(T, device=device).expand(B, T),
    )


def kept_columns(logits: Tensor, keep: int | Tensor, valid: Tensor | None) -> Tensor:
    """The columns of logits [B, T, V] that were asked for.

    Args:
        logits: all of them.
        keep: 0 for all, 1 for every row's last token that is no padding, n > 1 for the last n columns, a
            tensor int64 [n] for these columns.
        valid: bool [B, T] or None.
    """
    if isinstance(keep, Tensor):
        if keep.dim() > 1:
            raise ShapeError(
                f"logits_to_keep is {tuple(keep.shape)}; expected a number or column indices [n]"
            )
        return logits[:, keep.reshape(-1)]
    if keep == 1 and valid is not None:
        last = last_valid(valid)
        return logits.take_along_dim(last[:, None, None], 1)
    return logits[:, -keep:] if keep else logits


def last_valid(valid: Tensor) -> Tensor:
    """Column of every row's last token that is no padding, int64 [B]; the last one where all is padding."""
    columns = torch.arange(valid.shape[1], device=valid.device)
    return torch.where(valid, columns, -1).amax(1) % valid.shape[1]


def batch_share(labels: Tensor, num_items: Tensor | int | None, ignore_index: int = -100) -> Tensor | float:
    """This micro-batch's share of an accumulated batch with ``num_items`` labels; 1 where it stands alone.

    The share is what an auxiliary loss of the micro-batch weighs, as its cross-entropy (a sum divided by
    ``num_items``) does by itself.
    """
    if num_items is None:
        return 1.0
    return (labels != ignore_index).sum() / torch.as_tensor(num_items, device=labels.device)
