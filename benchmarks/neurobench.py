"""Does the energy ledger count what NeuroBench counts, where NeuroBench's definitions apply?

    python benchmarks/neurobench.py --peer-python PYTHON [--tokens 192]

PYTHON belongs to an environment of its own with neurobench, torch, numpy and safetensors. Small models with
random weights (none of them zero: NeuroBench looks at the weights too) read the same random tokens here and
there. Compared per token, over the projections:

- Dense: our dense_macs.
- Effective_MACs + Effective_ACs: our effective_macs.
- Effective_ACs: our accumulates, where all spikes are 0 or 1. Counts that are larger NeuroBench bills as
  multiply-accumulates, once for each count that is not zero, so there its Effective_ACs are not ours: what
  it gives then must be our effective_macs.
- ActivationSparsity: our share of zeros among what enters the weights.

Writes results/neurobench.json; exits with 1 if a figure that must agree does not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import record

from spikelm.checkpoint import save_checkpoint
from spikelm.config import ModelConfig
from spikelm.energy.reading import Reading, read
from spikelm.evaluation.corpus import Corpus
from spikelm.model import SpikeLM

PRESETS = (
    "spikegpt-nano",
    "spikegpt-nano-lif",
    "spikegpt-nano-sd",
    "spikingbrain-nano",
    "spikegpt-nano-twin",
)
ROOT = Path(__file__).resolve().parents[1]


def model_of(preset: str) -> SpikeLM:
    """A preset with weights that are all random."""
    torch.manual_seed(0)
    model = SpikeLM(ModelConfig.from_yaml(preset)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        model.embedding.weight.normal_()
    return model


def corpus_of(tokens: int) -> Corpus:
    """Random bytes."""
    ids = np.random.default_rng(0).integers(0, 256, tokens + 1).astype(np.int32)
    lengths = [np.ones(tokens + 1)]
    return Corpus(
        name="random bytes",
        sha256="",
        bytes=tokens + 1,
        start_token=None,
        tokens=[ids],
        byte_lengths=lengths,
        rescaled=0,
    )


def ours(reading: Reading) -> dict[str, Any]:
    """The ledger's figures over all projections."""
    entries = reading.synapses
    own = [entry.operations() for entry in entries]
    inputs = sum(entry.calls * entry.inputs for entry in entries)
    return {
        "dense_macs": sum(one.dense_macs for one in own),
        "effective_macs": sum(one.effective_macs for one in own),
        "accumulates": sum(one.accumulates for one in own),
        "macs_without_spikes": sum(one.macs_without_spikes for one in own),
        "silent": 1.0 - sum(entry.spikes for entry in entries) / inputs,
        "largest_count": max(entry.largest for entry in entries),
    }


def theirs_of(python: Path, checkpoint: Path, tokens: Path) -> dict[str, Any]:
    """NeuroBench's figures, counted in its own environment."""
    program = Path(__file__).with_name("_neurobench_metrics.py")
    done = subprocess.run(
        # Without -P the folder of the program comes first, and this file would be taken for the package.
        [str(python), "-P", str(program), str(checkpoint), str(tokens)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"NeuroBench failed in {python}: {last}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare(own: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Which figures must agree, and whether they do."""
    operations = theirs["synaptic_operations"]
    effective = operations["Effective_MACs"] + operations["Effective_ACs"]
    agree = {
        "Dense = dense_macs": _same(operations["Dense"], own["dense_macs"]),
        "Effective_MACs + Effective_ACs = effective_macs": _same(effective, own["effective_macs"]),
        "ActivationSparsity = silent": _same(theirs["activation_sparsity"], own["silent"]),
    }
    if own["largest_count"] == 0:
        agree["Effective_ACs = accumulates = 0"] = operations["Effective_ACs"] == own["accumulates"] == 0
        why = "no projection has spikes as its input: both count multiply-accumulates alone"
    elif own["largest_count"] == 1:
        agree["Effective_ACs = accumulates"] = _same(operations["Effective_ACs"], own["accumulates"])
        why = "every spike is 0 or 1: an accumulate there is one here"
    else:
        why = (
            f"counts up to {own['largest_count']}: NeuroBench bills each that is not zero as one "
            f"multiply-accumulate ({operations['Effective_MACs']:.6g} Effective_MACs, "
            f"{operations['Effective_ACs']:.6g} Effective_ACs); here they are {own['accumulates']:.6g} "
            "accumulates in unary events"
        )
    return {"agree": agree, "definitions": why}


def _same(theirs: float, own: float) -> bool:
    return math.isclose(theirs, own, rel_tol=1e-9, abs_tol=1e-9)


def main() -> int:
    """Count twice, compare, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--tokens", type=int, default=192)
    args = parser.parse_args()
    if args.peer_python is None:
        print("nothing is compared: name the Python of an environment with neurobench by --peer-python")
        return 0
    corpus = corpus_of(args.tokens)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.json"
        tokens.write_text(json.dumps(corpus.tokens[0][:-1].tolist()))
        for preset in PRESETS:
            model = model_of(preset)
            checkpoint = save_checkpoint(Path(folder) / preset, model)
            own = ours(read(model.double(), corpus))
            theirs = theirs_of(args.peer_python, checkpoint, tokens)
            figures[preset] = {"ours": own, "neurobench": theirs, **compare(own, theirs)}
            print(f"{preset}: {figures[preset]['definitions']}")
            for name, same in figures[preset]["agree"].items():
                print(f"  {name}: {'agrees' if same else 'DIFFERS'}")
    print(record("neurobench", figures))
    return 0 if all(all(one["agree"].values()) for one in figures.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
