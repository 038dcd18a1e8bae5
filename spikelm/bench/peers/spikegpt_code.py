"""Run SpikeGPT's own code on a CPU, in its own environment, without changing a file of it.

``spikelm bench train`` starts this file with the peer's Python on a checkout of ridgerchu/SpikeGPT that lies
outside this project (``--repo``). Three things of the checkout cannot work without CUDA and are replaced in
memory before its model is built: the just-in-time CUDA extension (not built), its WKV function (a
loop over the recurrence in plain torch, differentiated by autograd) and the back-end of its LIF neurons (its
own ``torch`` one instead of CuPy). Everything else, forward, backward and optimiser step, is theirs.

Modes: ``time`` prints step times as JSON; ``record`` writes a golden file for tests/formats::

    python3 -m venv elsewhere/venv && elsewhere/venv/bin/pip install torch==2.13.0 numpy safetensors
    elsewhere/venv/bin/python spikelm/bench/peers/spikegpt_code.py record --repo CHECKOUT \
        --output tests/golden/spikegpt_random.safetensors
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.utils.cpp_extension
from torch import Tensor


def wkv_loop(B: int, T: int, C: int, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """RWKV-4's recurrence token by token, stabilised by a running maximum; k and v are [B, T, C]."""
    decay = -torch.exp(w)
    num, den = torch.zeros(B, C), torch.zeros(B, C)
    top = torch.full((B, C), -1e38)
    out = []
    for t in range(T):
        kt, vt = k[:, t], v[:, t]
        here = torch.maximum(top, u + kt)
        past, now = torch.exp(top - here), torch.exp(u + kt - here)
        out.append((past * num + now * vt) / (past * den + now))
        there = torch.maximum(top + decay, kt)
        past, now = torch.exp(top + decay - there), torch.exp(kt - there)
        num, den, top = past * num + now * vt, past * den + now, there
    return torch.stack(out, 1)


def import_peer(repo: Path) -> tuple[ModuleType, ModuleType]:
    """The checkout's ``src.model`` and its ``functional``, able to run on a CPU."""
    if not (repo / "src" / "model.py").is_file():
        raise SystemExit(f"{repo} is no checkout of SpikeGPT: src/model.py is missing")
    sys.path.insert(0, str(repo))
    sys.modules["deepspeed.ops.adam"] = None  # type: ignore[assignment]  # its fused Adam needs CUDA
    os.environ["RWKV_LOAD_MODEL"] = "False"  # lets the model initialise itself as in training
    build, torch.utils.cpp_extension.load = torch.utils.cpp_extension.load, lambda **_: None
    try:
        model = importlib.import_module("src.model")
    finally:
        torch.utils.cpp_extension.load = build
    neuron = importlib.import_module("src.spikingjelly.clock_driven.neuron")
    functional = importlib.import_module("src.spikingjelly.clock_driven.functional")
    original = neuron.MultiStepLIFNode

    def on_cpu(*args: Any, **options: Any) -> Any:
        return original(*args, **{**options, "backend": "torch"})

    neuron.MultiStepLIFNode = on_cpu
    model.RUN_CUDA = wkv_loop
    return model, functional


def build_peer(repo: Path, layers: int, hidden: int, vocab: int, length: int) -> tuple[Any, ModuleType]:
    """Their GPT with these sizes, and the module whose ``reset_net`` clears the membranes."""
    module, functional = import_peer(repo)
    config = module.GPTConfig(vocab, length, model_type="RWKV", n_layer=layers, n_embd=hidden)
    return module.GPT(config), functional


def time_steps(args: argparse.Namespace) -> None:
    """Print the seconds of each training step, as their trainer takes it."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, functional = build_peer(args.repo, args.layers, args.hidden, args.vocab, args.length)
    options = argparse.Namespace(learning_rate=6e-4, betas=(0.9, 0.99), eps=4e-9)
    optimizer = model.configure_optimizers(options)
    model.train()
    tokens = torch.randint(0, args.vocab, (args.batch, args.length + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    seconds, losses = [], []
    for _ in range(args.warmup + args.steps):
        started = time.perf_counter()
        loss = model(inputs, targets)
        functional.reset_net(model)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    result = {
        "seconds": seconds[args.warmup :],
        "losses": losses,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


def record(args: argparse.Namespace) -> None:
    """Write random weights under their names, tokens, and the logits their code computes for them."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model, functional = build_peer(args.repo, args.layers, args.hidden, args.vocab, args.length)
    generator = torch.Generator().manual_seed(20230227)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "time_mix" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
            elif "ln" in name or "time_" in name:
                parameter.add_(0.3 * noise)
            elif name != "head.weight" and name != "emb.weight":
                parameter.copy_(noise * (2.5 if ".att." in name else 1.5) * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(noise)
    model.eval()
    kept: list[Tensor] = []
    model.head.register_forward_hook(lambda _module, _inputs, logits: kept.append(logits.detach()))
    tokens = torch.randint(0, args.vocab, (args.batch, args.length), generator=generator)
    with torch.no_grad():
        model(tokens, tokens)
    spikes = [m.v_seq.eq(0).float().mean().item() for m in model.modules() if hasattr(m, "v_seq")]
    functional.reset_net(model)
    fixture = {f"weight.{name}": value.contiguous() for name, value in model.state_dict().items()}
    fixture |= {"tokens": tokens, "logits": kept[0].contiguous()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    note = {"made_by": "spikelm/bench/peers/spikegpt_code.py record", "torch": torch.__version__}
    save_file(fixture, args.output, metadata=note)
    print(f"{args.output}: {args.output.stat().st_size} bytes; firing rates {[round(s, 2) for s in spikes]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, layers, hidden, vocab, batch, length in (
        ("time", 12, 512, 256, 4, 256),
        ("record", 2, 32, 64, 2, 40),
    ):
        command = commands.add_parser(name)
        command.add_argument("--repo", type=Path, required=True)
        command.add_argument("--layers", type=int, default=layers)
        command.add_argument("--hidden", type=int, default=hidden)
        command.add_argument("--vocab", type=int, default=vocab)
        command.add_argument("--batch", type=int, default=batch)
        command.add_argument("--length", type=int, default=length)
    commands.choices["time"].add_argument("--threads", type=int, default=1)
    commands.choices["time"].add_argument("--warmup", type=int, default=1)
    commands.choices["time"].add_argument("--steps", type=int, default=3)
    commands.choices["record"].add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    {"time": time_steps, "record": record}[args.command](args)


if __name__ == "__main__":
    main()
