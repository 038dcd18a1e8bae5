"""NeuroBench's SynapticOperations and ActivationSparsity of one of our checkpoints; prints one line of JSON.

    python neurobench_metrics.py ROOT CHECKPOINT TOKENS.json

Its environment has neurobench, torch, numpy and safetensors; ROOT is where the package spikelm lies.
NeuroBench hooks modules: nn.Linear, which our projections hold, and activation modules, which it is told
about. A module that passes on what it gets stands before every nn.Linear, so that both metrics see what
enters the weights.
Everything is computed in float64, because NeuroBench counts by adding floats.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor, nn


class Entering(nn.Module):
    """What enters a weight matrix."""

    def forward(self, x: Tensor) -> Tensor:
        """x [.., D]."""
        return x


def main() -> None:
    root, checkpoint, file = sys.argv[1:]
    sys.path.insert(0, root)
    from neurobench.metrics.workload import ActivationSparsity, SynapticOperations
    from neurobench.models import TorchModel

    from spikelm.checkpoint import load_model
    from spikelm.projection import Projection

    model = load_model(checkpoint, dtype=torch.float64).eval()
    places = {}
    for path, part in model.named_modules():
        if isinstance(part, Projection):
            part.linear = nn.Sequential(Entering(), part.linear)
            places[path] = part.linear[1]
    with open(file) as stream:
        tokens = torch.tensor([json.load(stream)])
    wrapped = TorchModel(model)
    wrapped.add_activation_module(Entering)
    wrapped.register_hooks()
    with torch.no_grad():
        found = wrapped(tokens)
    data = (tokens, tokens)
    operations = SynapticOperations()(wrapped, found, data)
    sparsity = ActivationSparsity()(wrapped, found, data)
    from importlib.metadata import version

    result = {
        "neurobench": version("neurobench"),
        "torch": torch.__version__,
        "layers": len(places),
        "tokens": tokens.shape[1],
        "synaptic_operations": {key: value / tokens.shape[1] for key, value in operations.items()},
        "activation_sparsity": sparsity,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
