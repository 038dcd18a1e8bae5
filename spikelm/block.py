"""A block: pre-norm, mixer, channel, two residual additions, and where the neuron stands.

``before``: the projections inside mixer and channel carry the neuron, the residual stream stays continuous::

    x = x + mixer(norm(x));  x = x + channel(norm(x))

``after`` (SpikeGPT, arXiv 2302.13939, equations 7 and 8): spikes enter the residual stream::

    x = x + neuron(mixer(norm(x)));  x = x + neuron(channel(norm(x)))

State: {"mixer", "channel", "mixer_neuron", "channel_neuron"}.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spikelm.build import Build
from spikelm.config import NO_NEURON, ModelConfig, Spec
from spikelm.neurons.base import Neuron, build_neuron, build_part
from spikelm.projection import Projection
from spikelm.recurrence import Context, Part
from spikelm.registry import Registry, channels, mixers
from spikelm.state import State

CHILDREN = ("mixer", "channel", "mixer_neuron", "channel_neuron")


def make_projection(
    config: ModelConfig, prefix: str, name: str, inputs: int, outputs: int, bias: bool
) -> Projection:
    """The projection at ``prefix.name`` with the input neuron that the configuration gives it."""
    neuron = build_neuron(config.input_neuron(f"{prefix}{name}"), inputs)
    return Projection(inputs, outputs, neuron, bias)


def fire(neuron: Neuron, x: Tensor, state: Tensor | State, ctx: Context) -> tuple[Tensor, State]:
    """Call a neuron that stands outside a projection, and tell the meter."""
    y, new = neuron(x, state, ctx)
    if ctx.meter is not None:
        ctx.meter.record_neuron(neuron.path, y, spiking=neuron.spiking, valid=ctx.valid)
    return y, new


class Block(Part):
    """One layer of the model.

    Args:
        config: the model's configuration.
        layer: index of the block, from 0.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Build the parts named by the configuration."""
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_epsilon
        specs = config.layer(layer)
        self.mixer_norm = nn.LayerNorm(D, eps)
        self.mixer = _build(mixers, specs["mixer"], config, layer, "mixer")
        self.channel_norm = nn.LayerNorm(D, eps)
        self.channel = _build(channels, specs["channel"], config, layer, "channel")
        after = config.neuron if config.placement == "after" else NO_NEURON
        self.mixer_neuron = build_neuron(after, D)
        self.channel_neuron = build_neuron(after, D)

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        """States of the four children."""
        return {name: getattr(self, name).init_state(batch, device, dtype, max_len) for name in CHILDREN}

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One token: x [B, D] -> [B, D]."""
        return self._residual(x, state, ctx)

    def sequence(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """T tokens: [B, T, D]; invalid ones keep what came in on the residual stream."""
        return self._residual(x, state, ctx)

    def _residual(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        new: State = {}
        y, new["mixer"] = self.mixer(self.mixer_norm(x), state["mixer"], ctx)
        y, new["mixer_neuron"] = fire(self.mixer_neuron, y, state["mixer_neuron"], ctx)
        x = x + y.to(x.dtype)
        y, new["channel"] = self.channel(self.channel_norm(x), state["channel"], ctx)
        y, new["channel_neuron"] = fire(self.channel_neuron, y, state["channel_neuron"], ctx)
        return x + y.to(x.dtype), new


def _build(registry: Registry[type[Any]], spec: Spec, config: ModelConfig, layer: int, kind: str) -> Part:
    options = dict(spec)
    name = options.pop("name")
    build = Build(
        hidden_size=config.hidden_size,
        layer=layer,
        num_layers=config.num_hidden_layers,
        make_projection=partial(make_projection, config, f"blocks.{layer}.{kind}."),
    )
    part: Part = build_part(f"{kind} {name!r}", registry.get(name), options, build)
    return part
