"""One token of a whole model: the step from Python beside the captured graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BATCHES = (1, 8)


def decode(
    device: torch.device, tiny: bool, timer: Callable[[Callable[[], object]], float]
) -> dict[str, Any]:
    """Milliseconds of a step by batch, and the largest difference of the logits; a failure is told.

    The model has the sizes of SpikeGPT's 46M one, adaptive neurons and int8 weights.
    """
    from spikelm.config import ModelConfig
    from spikelm.graph_decoding import GraphDecode
    from spikelm.model import SpikeLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}
    if not tiny:
        sizes = {"vocab_size": 50277, "hidden_size": 512, "num_hidden_layers": 12}
    config = ModelConfig(
        **sizes, placement="before", neuron={"name": "adaptive"}, weights={"name": "int8", "group_size": 32}
    )
    model = SpikeLM(config).to(device).eval()
    capture = device.type == "cuda"
    try:
        plan = GraphDecode(model, max(BATCHES), batch_sizes=BATCHES, capture=capture)
    except Exception as error:  # noqa: BLE001  (never run on a device before: whatever it raises is the finding)
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    found: dict[str, Any] = {"captured": capture}
    for batch in BATCHES:
        tokens = torch.arange(batch, device=device) % config.vocab_size
        slots = torch.arange(batch, device=device)
        with torch.no_grad():
            state = model.init_state(batch)
            expected = model(tokens[:, None], state)[0][:, 0]
            got = plan.step(tokens, slots)
            found[f"batch {batch}"] = {
                "largest_difference": float((got - expected).abs().max()),
                "python_ms": round(timer(lambda t=tokens, s=state: model(t[:, None], s)), 4),
                "graph_ms": round(timer(lambda t=tokens, s=slots: plan.step(t, s)), 4),
            }
    return found
