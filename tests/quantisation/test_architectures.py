"""Conversion knows projections and configurations only: every nano preset converts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spikelm import presets
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError
from spikelm.evaluation.segments import disjoint
from spikelm.model import SpikeLM
from spikelm.projection import Projection
from spikelm.quantisation.calibration import calibrate
from spikelm.quantisation.spiking import (
    Request,
    check_convertible,
    convert,
    convertible,
    in_full_precision,
    int8_weights,
    plan,
)
from spikelm.weights import Int8Linear

NANO = [
    name
    for name in presets.names("models")
    if "nano" in name and ModelConfig.from_yaml(name).placement == "before"
]


@pytest.mark.parametrize("name", NANO)
def test_nano_presets(name: str) -> None:
    probe = ModelConfig.from_yaml(name)
    fields = {key: None for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields |= {"num_hidden_layers": max(2, len(probe.layers)), "vocab_size": 64, "initializer_range": 0.1}
    torch.manual_seed(0)
    model = SpikeLM(ModelConfig.from_yaml(name, **fields)).eval()
    request = Request(k=3.0, group_size=64)
    if name == "spikformer-lm-nano-twin":
        with pytest.raises(ConfigError, match="convert the spiking model, not its continuous twin"):
            check_convertible(model.config)
        return
    check_convertible(model.config)
    projections, kept = convertible(model)
    tokens = torch.randint(0, 64, (80,), dtype=torch.int32).numpy()
    samples = calibrate(model, projections, list(disjoint([tokens], 16)), batch_size=3)
    int8 = int8_weights(model, samples, request)
    chosen = plan(model, samples, int8, request)
    assert set(chosen.choices) | set(chosen.unseen) == set(projections)
    new = convert(model, int8, chosen, request)
    for path, module in new.named_modules():
        if isinstance(module, Projection) and path.startswith("blocks."):
            if path in in_full_precision(model):  # routers
                assert path.endswith(".router") and isinstance(module.linear, nn.Linear)
                assert module.neuron.spiking == model.get_submodule(f"{path}.neuron").spiking
                continue
            assert isinstance(module.linear, Int8Linear)
            assert module.neuron.spiking
            assert (path in kept) == (not hasattr(module.neuron, "cap"))
    assert bool(in_full_precision(model)) == ("moe" in name)
    with torch.no_grad():
        logits, _ = new(torch.from_numpy(tokens).long()[None, :16])
    assert logits.isfinite().all() and logits.std() > 0
