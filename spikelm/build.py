"""What a mixer or channel is told when it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from spikelm.projection import Projection


@dataclass(frozen=True, kw_only=True)
class Build:
    """Place of a part in the model, and the factory of its projections.

    Args:
        hidden_size: D.
        layer: index of the block, from 0.
        num_layers: blocks of the model.
        make_projection: (name, in_features, out_features, bias) -> projection with the input neuron that the
            configuration gives it.
    """

    hidden_size: int
    layer: int
    num_layers: int
    make_projection: Callable[[str, int, int, bool], Projection]

    def projection(
        self,
        name: str,
        in_features: int,
        out_features: int,
        bias: bool = False,
        shard: str | None = None,
    ) -> Projection:
        """A projection called ``name`` in this part, with the input neuron of the configuration."""
        return self.make_projection(name, in_features, out_features, bias)
