"""The ``rwkv`` package decoding RWKV-4 in float32 on one thread, in an environment of its own.

Usage: python rwkv_package.py WIDTH LAYERS VOCABULARY TOKENS REPEATS FOLDER. ``spikelm bench decode`` runs it.
Writes random weights to FOLDER and prints one JSON line. The environment needs rwkv, torch and tokenizers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path


def write(path: Path, width: int, layers: int, vocabulary: int) -> None:
    """RWKV-4 weights under their published names."""
    import torch

    torch.manual_seed(0)

    def matrix(outputs: int, inputs: int) -> torch.Tensor:
        return torch.randn(outputs, inputs) * inputs**-0.5

    weights = {"emb.weight": torch.randn(vocabulary, width), "head.weight": matrix(vocabulary, width)}

    def norm(name: str) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.ones(width), torch.zeros(width)

    norm("ln_out")
    norm("blocks.0.ln0")
    for layer in range(layers):
        prefix = f"blocks.{layer}."
        norm(prefix + "ln1")
        norm(prefix + "ln2")
        for name in ("time_decay", "time_first"):
            weights[f"{prefix}att.{name}"] = torch.randn(width)
        for name in (
            "att.time_mix_k",
            "att.time_mix_v",
            "att.time_mix_r",
            "ffn.time_mix_k",
            "ffn.time_mix_r",
        ):
            weights[prefix + name] = torch.rand(1, 1, width)
        for name in ("key", "value", "receptance", "output"):
            weights[f"{prefix}att.{name}.weight"] = matrix(width, width)
        weights[prefix + "ffn.key.weight"] = matrix(4 * width, width)
        weights[prefix + "ffn.receptance.weight"] = matrix(width, width)
        weights[prefix + "ffn.value.weight"] = matrix(width, 4 * width)
    torch.save(weights, path)


def main() -> None:
    width, layers, vocabulary, tokens, repeats = map(int, sys.argv[1:6])
    path = Path(sys.argv[6]) / f"rwkv4-{width}-{layers}-{vocabulary}"
    os.environ["RWKV_JIT_ON"] = "1"
    os.environ["RWKV_CUDA_ON"] = "0"
    import torch

    torch.set_num_threads(1)
    if not path.with_suffix(".pth").exists():
        write(path.with_suffix(".pth"), width, layers, vocabulary)
    out = sys.stdout
    sys.stdout = sys.stderr
    from rwkv.model import RWKV

    model = RWKV(model=str(path), strategy="cpu fp32")
    _, state = model.forward([1, 2, 3], None)
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        for i in range(tokens):
            _, state = model.forward([i % vocabulary], state)
        rates.append(tokens / (time.perf_counter() - start))
    weights = layers * 13 * width * width + vocabulary * width
    figures = {
        "version": version("rwkv"),
        "torch": torch.__version__,
        "weights_read": weights,
        "bytes_read": 4 * weights,
        "tokens_per_second": rates,
    }
    print(json.dumps(figures), file=out)


if __name__ == "__main__":
    main()
