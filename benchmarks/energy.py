"""The energy ledger of presets at 46M parameters, beside each other.

    python benchmarks/energy.py [--max-bytes 4096] [--tokens 64] [--repeats 5]

Writes results/energy.json. Nothing is trained: every matrix is drawn at random, so what the neurons send
comes from the presets' own thresholds (the dead zone of spikegpt-46m-sd silences 74 to 80% of its inputs) and
not from learning. A trained model fires otherwise: `spikelm energy CKPT` tells. The text is the Python
documentation's held-out part. Tables of single projections are left out of the file.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from _record import record

from spikelm.config import ModelConfig
from spikelm.data.source import open_source
from spikelm.energy.ledger import Question, ledger
from spikelm.energy.prices import load_prices
from spikelm.evaluation.corpus import read_corpus
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer
from spikelm.weights import Int8Linear

SOURCE = "builtin:python-docs#valid"
INT8 = {"name": "int8", "group_size": 128}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "spikegpt-46m, as published": ("spikegpt-46m", {}),
    "spikegpt-46m-twin, continuous": ("spikegpt-46m-twin", {}),
    "spikegpt-46m-lif, LIF before every projection": ("spikegpt-46m-lif", {}),
    "spikegpt-46m-sd, float weights": ("spikegpt-46m-sd", {}),
    "spikegpt-46m-sd, int8 weights": ("spikegpt-46m-sd", {"weights": INT8}),
    "spikingbrain-nano, int8 weights": ("spikingbrain-nano", {"weights": INT8}),
}


def model_of(preset: str, options: dict[str, Any]) -> SpikeLM:
    """A preset whose matrices are all drawn at random (the initialisation has zeros, which train away)."""
    torch.manual_seed(0)
    model = SpikeLM(replace(ModelConfig.from_yaml(preset), **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        model.embedding.weight.normal_()
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.load_float(
                    torch.randn(module.out_features, module.in_features) * module.in_features**-0.5
                )
    return model


def main() -> int:
    """Count, time, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max-bytes", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shown, tables = load_prices()
    question = Question(tables=tables, shown=shown, timed=args.tokens, repeats=args.repeats)
    corpus = read_corpus(open_source(SOURCE), Tokenizer.bytes(), max_bytes=args.max_bytes)
    figures: dict[str, Any] = {
        "weights": "random: nothing is trained",
        "text": {"source": SOURCE, "sha256": corpus.sha256, "bytes": corpus.bytes},
        "models": {},
    }
    for name, (preset, options) in MODELS.items():
        found = ledger(model_of(preset, options), corpus, question)
        for key in ("projections", "parts"):
            del found["operations"][key]
        figures["models"][name] = found
        print(name)
        for sentence in found["verdict"]:
            print(f"  {sentence}")
    print(record("energy", figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
