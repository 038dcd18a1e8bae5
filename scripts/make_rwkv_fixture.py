"""Record what the ``rwkv`` package from PyPI computes for small random RWKV-4 weights.

Run in an environment of its own, so that the project never depends on the package::

    python3 -m venv elsewhere/venv
    elsewhere/venv/bin/pip install rwkv torch==2.13.0 numpy safetensors
    elsewhere/venv/bin/python scripts/make_rwkv_fixture.py tests/golden/rwkv4_random.safetensors

The file holds ``weight.<published name>``, ``tokens`` int64 [T], ``logits`` float32 [T, V] (the package's
sequence path), ``step_logits`` [T, V] (its one-token path) and the state after the last token. Every weight
is non-zero, those of the channel mix included, and the decays span the published range, so that each term of
the model counts.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["RWKV_JIT_ON"] = "0"
os.environ["RWKV_CUDA_ON"] = "0"

import torch  # noqa: E402
from rwkv.model import RWKV  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

LAYERS, HIDDEN, CHANNEL, VOCAB, TOKENS, SEED = 2, 32, 128, 64, 48, 20230228


def random_weights() -> dict[str, torch.Tensor]:
    """Published name -> float32 tensor, all of them random."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return mean + scale * torch.randn(*shape, generator=generator)

    def uniform(*shape: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": normal(HIDDEN, scale=0.3, mean=1.0),
            f"{name}.bias": normal(HIDDEN, scale=0.2),
        }

    weights = {"emb.weight": normal(VOCAB, HIDDEN)} | norm("blocks.0.ln0")
    for i in range(LAYERS):
        block = f"blocks.{i}."
        weights |= norm(block + "ln1") | norm(block + "ln2")
        weights[block + "att.time_decay"] = uniform(HIDDEN, low=-5.0, high=2.0)
        weights[block + "att.time_first"] = normal(HIDDEN)
        for mix in ("att.time_mix_k", "att.time_mix_v", "att.time_mix_r", "ffn.time_mix_k", "ffn.time_mix_r"):
            weights[block + mix] = uniform(1, 1, HIDDEN, low=0.0, high=1.0)
        scale = HIDDEN**-0.5
        for linear in ("att.key", "att.value", "att.receptance", "att.output", "ffn.receptance"):
            weights[f"{block}{linear}.weight"] = normal(HIDDEN, HIDDEN, scale=scale)
        weights[block + "ffn.key.weight"] = normal(CHANNEL, HIDDEN, scale=scale)
        weights[block + "ffn.value.weight"] = normal(HIDDEN, CHANNEL, scale=CHANNEL**-0.5)
    return weights | norm("ln_out") | {"head.weight": normal(VOCAB, HIDDEN, scale=HIDDEN**-0.5)}


def main() -> None:
    """Make the weights, run the package on them, write the fixture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="safetensors file to write")
    output = parser.parse_args().output

    weights = random_weights()
    tokens = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(SEED + 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pth"
        torch.save(weights, path)
        model = RWKV(model=str(path), strategy="cpu fp32", verbose=False)
        logits, state = model.forward(tokens.tolist(), None, full_output=True)
        steps, running = [], None
        for token in tokens.tolist():
            step, running = model.forward([token], running)
            steps.append(step.clone())
    fixture = {f"weight.{name}": value.contiguous() for name, value in weights.items()}
    fixture |= {
        "tokens": tokens,
        "logits": logits.float().contiguous(),
        "step_logits": torch.stack(steps).float(),
    }
    for i in range(LAYERS):
        for j, name in enumerate(("mixer_last", "num", "den", "max", "channel_last")):
            fixture[f"state.{i}.{name}"] = state[5 * i + j].float().contiguous().clone()
    note = {"made_by": "scripts/make_rwkv_fixture.py", "rwkv": version("rwkv"), "torch": torch.__version__}
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(fixture, output, metadata=note)
    difference = (fixture["logits"] - fixture["step_logits"]).abs().max().item()
    print(
        f"{output}: {output.stat().st_size} bytes; the package's two paths differ by at most {difference:.2e}"
    )


if __name__ == "__main__":
    main()
