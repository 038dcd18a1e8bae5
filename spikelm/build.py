"""What a mixer or channel is told when it is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from spikelm.norms import RMSNorm
from spikelm.projection import Projection

if TYPE_CHECKING:
    from spikelm.recurrence import Part


@dataclass(frozen=True, kw_only=True)
class Build:
    """Place of a part in the model, and the factory of its projections.

    Args:
        hidden_size: D.
        layer: index of the block, from 0.
        num_layers: blocks of the model.
        make_projection: (name, in_features, out_features, bias) -> projection with the input neuron that the
            configuration gives it.
        make_child: (``"mixer"`` or ``"channel"``, name, spec) -> part inside this part.
        make_norm: features -> the configuration's norm.
        epsilon: of norms.
        sink_tokens: learned vectors that stand before every text.
    """

    hidden_size: int
    layer: int
    num_layers: int
    make_projection: Callable[[str, int, int, bool], Projection]
    make_child: Callable[[str, str, Mapping[str, Any]], Part]
    make_norm: Callable[[int], nn.Module]
    epsilon: float = 1e-5
    sink_tokens: int = 0

    def projection(
        self,
        name: str,
        in_features: int,
        out_features: int,
        bias: bool = False,
        shard: str | None = None,
    ) -> Projection:
        """A projection called ``name`` in this part, with the input neuron of the configuration.

        Args:
            name: of the attribute that will hold it.
            in_features: D.
            out_features: D'.
            bias: whether to add a bias.
            shard: what tensor parallelism splits: ``column`` the output features, ``row`` the input features,
                None nothing.
        """
        projection = self.make_projection(name, in_features, out_features, bias)
        projection.shard = shard
        return projection

    def child(self, kind: str, name: str, spec: Mapping[str, Any]) -> Part:
        """A mixer or channel inside this part, called ``name`` like the attribute that will hold it."""
        return self.make_child(kind, name, spec)

    def norm(self, features: int) -> nn.Module:
        """The configuration's norm."""
        return self.make_norm(features)

    def rms_norm(self, features: int) -> nn.RMSNorm:
        """An RMSNorm with the configuration's epsilon, whatever the blocks use."""
        return RMSNorm(features, self.epsilon)
