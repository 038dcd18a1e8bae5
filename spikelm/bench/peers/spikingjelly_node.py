"""SpikingJelly's LIF node, torch back-end, timed in its own environment; run by ``spikelm bench kernels``.

Usage: python spikingjelly_node.py STEPS CHANNELS REPEATS. Prints one JSON line. The
environment needs torch, spikingjelly and loguru only.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version


def main() -> None:
    import torch
    from spikingjelly.activation_based import functional, neuron, surrogate

    steps, channels, repeats = (int(word) for word in sys.argv[1:4])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(1, steps, channels)
    gradient = torch.randn(1, steps, channels)
    x = x.transpose(0, 1).contiguous().requires_grad_()  # [T, B, C], its own layout
    gradient = gradient.transpose(0, 1).contiguous()
    node = neuron.LIFNode(
        tau=2.0, decay_input=True, surrogate_function=surrogate.ATan(alpha=2.0), step_mode="m"
    )
    node.backend = "torch"
    seconds = []
    for _ in range(repeats + 1):
        start, start_cpu = time.perf_counter(), time.process_time()
        functional.reset_net(node)
        spikes = node(x)
        (grad_x,) = torch.autograd.grad(spikes, x, gradient)
        seconds.append((time.perf_counter() - start, time.process_time() - start_cpu))
    figures = {
        "version": version("spikingjelly"),
        "torch": torch.__version__,
        "seconds": seconds[1:],
        "spikes": float(spikes.sum()),
        "gradient_norm": float(grad_x.double().norm()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
