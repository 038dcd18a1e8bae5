"""A block: pre-norm, mixer, channel, two residual additions, and where the neuron stands.

``before``: the projections inside mixer and channel carry the neuron, the residual stream stays continuous::

    x = x + mixer(norm(x));  x = x + channel(norm(x))

``after`` (SpikeGPT, arXiv 2302.13939, equations 7 and 8): spikes enter the residual stream::

    x = x + neuron(mixer(norm(x)));  x = x + neuron(channel(norm(x)))

State: {"mixer", "channel", "mixer_neuron", "channel_neuron"}.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikelm.build import Build
from spikelm.config import NO_NEURON, ModelConfig, Spec, check_spec
from spikelm.errors import ConfigError
from spikelm.kernels.plan.observation import Observation
from spikelm.neurons.base import Neuron, build_neuron, build_part
from spikelm.norms import make_norm
from spikelm.projection import Projection
from spikelm.recurrence import Context, Part
from spikelm.registry import channels, mixers
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Field, Fields, Register

CHILDREN = ("mixer", "channel", "mixer_neuron", "channel_neuron")


def make_projection(
    config: ModelConfig, prefix: str, name: str, inputs: int, outputs: int, bias: bool
) -> Projection:
    """The projection at ``prefix.name`` with the input neuron that the configuration gives it."""
    neuron = build_neuron(config.input_neuron(f"{prefix}{name}"), inputs)
    return Projection(inputs, outputs, neuron, bias, config.projection_weights(f"{prefix}{name}"))


def fire(neuron: Neuron, x: Tensor, state: Tensor | State, ctx: Context) -> tuple[Tensor, State]:
    """Call a neuron that stands outside a projection, and tell the meter."""
    y, new = neuron(x, state, ctx)
    if ctx.meter is not None:
        ctx.meter.record_neuron(neuron.path, y, spiking=neuron.spiking, valid=ctx.valid)
    return y, new


def lower_fire(plan: Builder, neuron: Neuron, x: Register, state: Field | Fields) -> Register:
    """The records of :func:`fire`."""
    y = plan.child(neuron, x, state)
    if neuron.spiking:
        seen = Observation(
            path=neuron.path, spiking=True, in_features=neuron.features, out_features=0, cap=None
        )
        plan.observe(seen, y)
    return y


class Block(Part):
    """One layer of the model.

    Args:
        config: the model's configuration.
        layer: index of the block, from 0.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Build the parts named by the configuration."""
        super().__init__()
        D = config.hidden_size
        specs = config.layer(layer)
        self.mixer_norm = make_norm(config, D)
        self.mixer = build_child(config, layer, f"blocks.{layer}.", "mixer", "mixer", specs["mixer"])
        self.channel_norm = make_norm(config, D)
        self.channel = build_child(config, layer, f"blocks.{layer}.", "channel", "channel", specs["channel"])
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

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """The four children and two additions."""
        for name in ("mixer", "channel"):
            y = plan.norm(getattr(self, f"{name}_norm"), x)
            y = plan.child(getattr(self, name), y, state[name])
            y = lower_fire(plan, getattr(self, f"{name}_neuron"), y, state[f"{name}_neuron"])
            x = plan.add(x, y)
        return x


def build_child(config: ModelConfig, layer: int, prefix: str, kind: str, name: str, spec: Spec) -> Part:
    """The mixer or channel at path ``prefix + name``, which may build others inside itself.

    Args:
        config: the model's configuration.
        layer: index of the block.
        prefix: dotted path of the parent, with its dot.
        kind: ``mixer`` or ``channel``.
        name: of the attribute that will hold the part.
        spec: name and options of the part.

    Raises:
        ConfigError: an unknown part or option.
    """
    check_spec(f"{prefix}{name}", spec)
    options = dict(spec)
    part_name = options.pop("name")
    path = f"{prefix}{name}."
    build = Build(
        hidden_size=config.hidden_size,
        layer=layer,
        num_layers=config.num_hidden_layers,
        make_projection=partial(make_projection, config, path),
        make_child=partial(build_child, config, layer, path),
        make_norm=partial(make_norm, config),
        epsilon=config.layer_norm_epsilon,
        sink_tokens=config.sink_tokens,
    )
    registry = mixers if kind == "mixer" else channels
    try:
        part: Part = build_part(f"{kind} {part_name!r}", registry.get(part_name), options, build)
    except ConfigError as error:
        if str(error).startswith(f"{prefix}{name}"):  # said by a part inside this one, or by this one
            raise
        raise ConfigError(f"{prefix}{name}: {error}") from error
    return part
