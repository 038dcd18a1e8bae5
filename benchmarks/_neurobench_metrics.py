"""NeuroBench's SynapticOperations and ActivationSparsity of one of our checkpoints; prints one line of JSON.

    PYTHONPATH=ROOT python -P _neurobench_metrics.py CHECKPOINT TOKENS.json

Run by neurobench.py in an environment with neurobench, torch, numpy and safetensors (Python 3.11 or newer);
ROOT is where the package spikelm lies. NeuroBench hooks modules: nn.Linear, which our projections hold, and
activation modules, which it is told about. A module that passes on what it gets stands before every
nn.Linear, so that both metrics see what enters the weights. Everything is computed in float64, because
NeuroBench counts by adding floats.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import torch
from neurobench.metrics.workload import ActivationSparsity, SynapticOperations
from neurobench.models import TorchModel
from torch import Tensor, nn

from spikelm.checkpoint import load_model
from spikelm.projection import Projection


class Entering(nn.Module):
    """What enters a weight matrix."""

    def forward(self, x: Tensor) -> Tensor:
        """x [.., D]."""
        return x


def main() -> None:
    checkpoint, file = sys.argv[1:]
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
