"""What plots need of a model that reads a text: spikes, and what every neuron was given."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spikelm.codings.statistics import CountHistogram
from spikelm.errors import ConfigError, DataError, nearest
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.neurons.base import Neuron
from spikelm.projection import Projection
from spikelm.recurrence import Context
from spikelm.state import State

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place with a neuron.

    Attributes:
        path: dotted name of the projection, or of the neuron where it stands outside one.
        module: the projection or the neuron.
        neuron: the neuron.
        layer: index of its block; None outside the blocks.
        kind: the path without its block (``mixer.key``).
    """

    path: str
    module: nn.Module
    neuron: Neuron
    layer: int | None
    kind: str


def place(path: str) -> tuple[int | None, str]:
    """Layer (None outside the blocks) and kind of a path: ``blocks.3.mixer.key`` -> (3, ``mixer.key``)."""
    found = _BLOCK.fullmatch(path)
    return (int(found[1]), found[2]) if found else (None, path)


def sites(model: SpikeLM) -> dict[str, Site]:
    """Every place of a model whose neuron spikes, in the model's order."""
    found: dict[str, Site] = {}
    for path, module in model.named_modules():
        if isinstance(module, Projection):
            neuron = module.neuron
        elif isinstance(module, Neuron) and path.removesuffix(".neuron") not in found:
            neuron = module
        else:
            continue
        layer, kind = place(path)
        found[path] = Site(path=path, module=module, neuron=neuron, layer=layer, kind=kind)
    return {path: site for path, site in found.items() if site.neuron.spiking}


def choose(
    found: dict[str, Site],
    *,
    layer: int | None = None,
    projection: str | None = None,
    accept: Callable[[Site], bool] | None = None,
    wanted: str = "spiking neuron",
) -> list[Site]:
    """The sites that options name.

    Args:
        found: those of the model.
        layer: index of a block, from 0, or None for all.
        projection: a path, or the end of one (``key``, ``channel.key``); None for all.
        accept: which sites can be drawn at all.
        wanted: what those are, for the message.

    Raises:
        ConfigError: nothing is left, with what there is.
    """
    usable = {path: site for path, site in found.items() if accept is None or accept(site)}
    if not usable:
        kinds = sorted({_name(site.neuron) for site in found.values()})
        has = f"its neurons are {', '.join(kinds)}" if kinds else "it is dense, none of its neurons spikes"
        raise ConfigError(f"this model has no {wanted}: {has}; choose another checkpoint")
    layers = sorted({site.layer for site in usable.values() if site.layer is not None})
    if layer is not None and layer not in layers:
        raise ConfigError(
            f"layer {layer} has no {wanted}; layers with one: {', '.join(map(str, layers)) or 'none'}"
        )
    inside = [site for site in usable.values() if layer is None or site.layer == layer]
    if projection is None:
        return inside
    exact = [site for site in inside if site.path == projection]
    ends = exact or [site for site in inside if f".{site.path}".endswith(f".{projection}")]
    if not ends:
        raise ConfigError(nearest("projection", projection, {site.kind for site in inside}))
    return ends


def _name(neuron: Neuron) -> str:
    from spikelm.registry import neurons

    return next(
        (name for name in neurons.names() if neurons.get(name) is type(neuron)), type(neuron).__name__
    )


def neuron_name(site: Site) -> str:
    """The name under which a site's neuron is registered (its class's name where it is not)."""
    return _name(site.neuron)


@dataclass
class SpikeMeter(Meter):
    """A meter that also keeps a histogram of counts, of neurons outside projections, too.

    Attributes:
        histograms: path -> counts.
    """

    histograms: dict[str, CountHistogram] = field(default_factory=dict)

    def record(
        self, path: str, x: Tensor, *, spiking: bool, out_features: int, valid: Tensor | None, cap: int | None
    ) -> None:
        """Add one call; see :class:`spikelm.meter.Meter`."""
        super().record(path, x, spiking=spiking, out_features=out_features, valid=valid, cap=cap)
        if spiking:
            rows = x if valid is None or x.dim() != 3 else x[valid]
            self.histograms.setdefault(path, CountHistogram()).add(rows)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a neuron was given.

    Attributes:
        x: input [T, D].
        state: of the neuron before the first token, for one sequence.
    """

    x: Tensor
    state: State


def read(
    model: SpikeLM,
    tokens: Sequence[int],
    *,
    meter: Meter | None = None,
    inputs: Collection[Site] = (),
    chunk: int = 256,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Given]:
    """Let a model read one text from its initial state.

    Args:
        model: in evaluation mode.
        tokens: ids, T of them.
        meter: counts spikes, or None.
        inputs: sites whose neurons' input is wanted.
        chunk: tokens read at once; speed and memory only.
        advance: called with a number of tokens read, for progress.

    Returns:
        path -> what its neuron was given. A site that did not see every token once (an expert) is left out.

    Raises:
        DataError: no tokens, one outside the vocabulary, or activations that are not finite.
    """
    if not tokens:
        raise DataError("the text has no tokens; expected at least one")
    if max(tokens) >= model.config.vocab_size:
        raise DataError(
            f"the text contains token {max(tokens)}, but the model has {model.config.vocab_size} tokens; "
            "use the tokenizer the model was trained with"
        )
    ids = torch.tensor([list(tokens)], device=model.embedding.weight.device)
    taken: dict[str, list[Tensor]] = {site.path: [] for site in inputs}
    first: dict[str, State] = {}
    with torch.inference_mode(), ExitStack() as stack:
        state = model.init_state(1, max_len=len(tokens))  # before the hooks: sink tokens pass through here
        for site in inputs:
            handle = site.module.register_forward_pre_hook(_taker(site.path, taken, first), with_kwargs=True)
            stack.callback(handle.remove)
        for start in range(0, len(tokens), chunk):
            piece = ids[:, start : start + chunk]
            logits, state = model(piece, state, Context(meter=meter))
            if not bool(logits.isfinite().all()):
                raise DataError(
                    f"the model's logits are not finite within tokens {start} to {start + piece.shape[1]}; "
                    "the checkpoint's weights or its dtype cannot be used"
                )
            if advance is not None:
                advance(piece.shape[1])
    given = {}
    for path, pieces in taken.items():
        if all(x.dim() == 3 and x.shape[0] == 1 for x in pieces):
            x = torch.cat(pieces, 1)[0] if pieces else torch.zeros(0, 0)
            if x.shape[0] == len(tokens):
                given[path] = Given(x=x, state=first[path])
    return given


def _taker(path: str, taken: dict[str, list[Tensor]], first: dict[str, State]) -> Any:
    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken[path].append((args[0] if args else kwargs["x"]).detach())
        state = args[1] if len(args) > 1 else kwargs.get("state")
        first.setdefault(path, state if state is not None else {})

    return take


def middle(found: Sequence[Site]) -> Site:
    """The first site of the middle layer, or the first of all where none is in a block."""
    layers = sorted({site.layer for site in found if site.layer is not None})
    if not layers:
        return found[0]
    return next(site for site in found if site.layer == layers[len(layers) // 2])


def joined(meter: Meter, path: str) -> Tensor:
    """The counts [T, D] of a path that a meter kept while one text was read in pieces.

    Raises:
        ConfigError: the path was not reached, or does not see every token in turn.
    """
    pieces = meter.rasters.get(path, [])
    if not pieces or any(piece.dim() != 3 or piece.shape[0] != 1 for piece in pieces):
        raise ConfigError(
            f"{path} does not see every token in turn (an expert, for example); choose another projection"
        )
    return torch.cat(pieces, 1)[0]
