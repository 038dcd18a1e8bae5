"""How much of this machine's matrix speed does a training step reach, and how do peers do beside it?

One run measures, in turn: the GEMM peak (2048^3, and the model's own shapes), a training step of SpikeGPT-46M
at T = 512 in float32 and bfloat16, a Hugging Face Llama with the same matrices on the same tokens with the
same optimiser step, and SpikeGPT's own code (see _peer_spikegpt.py) at B = 4, T = 256 in float32 beside ours.
A step is forward, backward, clipping and AdamW (SpikeGPT's code: its own Adam). FLOPs are 6 x (weights of all
linear layers, head included) x tokens; what the recurrence, the neurons and attention compute is not counted,
so their time lowers the share.

Goals: share of the peak >= 50% in both precisions; >= 2.5 times SpikeGPT's own code.

    python benchmarks/train_step.py --peer-repo /elsewhere/SpikeGPT --peer-python /elsewhere/venv/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _gemm import matmul_parameters, matrices, own_shapes_peak, square_peak, wait
from _record import record
from torch import Tensor, nn

from spikelm.config import ModelConfig
from spikelm.loss import next_token_loss
from spikelm.model import SpikeLM
from spikelm.randomness import CounterRandom
from spikelm.recurrence import Context
from spikelm.train.config import OptimConfig
from spikelm.train.optim import build_optimizers, optimizer_step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEER = Path(__file__).with_name("_peer_spikegpt.py")
Step = Callable[[], None]


def tokens_of(vocab: int, batch: int, length: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab, (batch, length + 1), generator=generator).to(device)


def spikelm_step(model: SpikeLM, tokens: Tensor, dtype: torch.dtype) -> Step:
    """The trainer's step on one micro-batch, dropout included."""
    batch, length = tokens.shape[0], tokens.shape[1] - 1
    optimizers = build_optimizers(model, OptimConfig())
    parameters = list(model.named_parameters())
    random = CounterRandom(
        seed=0,
        stream=torch.arange(batch, device=tokens.device),
        position=torch.arange(length, device=tokens.device).expand(batch, length),
    )
    model.train()

    def step() -> None:
        context = Context(random=random, losses=[])
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = next_token_loss(model, tokens[:, :-1], tokens[:, 1:], None, context)
        output.loss.backward()
        _check(optimizer_step(parameters, optimizers, clip=1.0).applied)

    return step


def llama(config: ModelConfig) -> nn.Module:
    """A Llama with the same width, depth and weights in its matrices: 4 D^2 attention + 9 D^2 MLP a layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    D = config.hidden_size
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=D,
            intermediate_size=3 * D,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=D // 64,
            num_key_value_heads=D // 64,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )


def llama_step(model: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Step:
    """The same optimiser, clipping and precision around the peer's own forward pass."""
    parameters = list(model.named_parameters())
    matrix = [p for _, p in parameters if p.dim() > 1]
    other = [p for _, p in parameters if p.dim() <= 1]
    defaults = OptimConfig()
    optimizer = torch.optim.AdamW(
        [{"params": matrix, "weight_decay": defaults.weight_decay}, {"params": other, "weight_decay": 0.0}],
        lr=defaults.lr,
        betas=defaults.betas,
        eps=defaults.eps,
        fused=True,
    )
    model.train()

    def step() -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(input_ids=tokens[:, :-1]).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        _check(optimizer_step(parameters, [optimizer], clip=1.0).applied)

    return step


def _check(applied: bool) -> None:
    if not applied:
        raise SystemExit("a gradient was not finite: the timing would mean nothing")


def interleaved(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step; the candidates take turns, so that a busy machine is busy for all of them."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            wait(device)
            started = time.perf_counter()
            step()
            wait(device)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def against_the_peak(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Peaks, our step and Llama's in one precision."""
    config = ModelConfig.from_yaml(args.model)
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {"spikelm": SpikeLM(config), "spikelm_twin": SpikeLM(config.twin())}
    if not args.without_llama:
        models["llama"] = llama(config)
    models = {name: model.to(device) for name, model in models.items()}
    tokens = tokens_of(config.vocab_size, args.batch, args.length, device)
    count = args.batch * args.length
    shapes = {name: matrices(model) for name, model in models.items()}
    peak = square_peak(dtype, device)
    own = own_shapes_peak(shapes["spikelm"], count, dtype, device)
    steps = {
        name: llama_step(model, tokens, dtype) if name == "llama" else spikelm_step(model, tokens, dtype)
        for name, model in models.items()
    }
    seconds = interleaved(steps, args.rounds, device)
    # The peak is measured before and after; the larger one is the limit the shares are taken of.
    peak = max(peak, square_peak(dtype, device))
    result: dict[str, Any] = {
        "batch": args.batch,
        "length": args.length,
        "gemm_2048_gflops": peak / 1e9,
        "gemm_own_shapes_gflops": own / 1e9,
    }
    for name, model in models.items():
        weights = matmul_parameters(shapes[name])
        median = statistics.median(seconds[name])
        rate = 6.0 * weights * count / median
        result[name] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "matmul_parameters": weights,
            "step_seconds": median,
            "all_seconds": seconds[name],
            "tokens_per_second": count / median,
            "gflops": rate / 1e9,
            "share_of_gemm_peak": rate / peak,
            "share_of_own_shapes": rate / own,
        }
    return result


def against_spikegpt(args: argparse.Namespace) -> dict[str, Any]:
    """Our step and SpikeGPT's own at B = 4, T = 256, float32, same sizes; ours before and after theirs."""
    config = ModelConfig.from_yaml(args.model)
    batch, length = 4, 256
    torch.manual_seed(0)
    device = torch.device("cpu")
    step = spikelm_step(SpikeLM(config), tokens_of(config.vocab_size, batch, length, device), torch.float32)
    ours = interleaved({"spikelm": step}, args.rounds, device)["spikelm"]
    command = [
        *(str(args.peer_python), str(PEER), "time", "--repo", str(args.peer_repo)),
        *("--layers", str(config.num_hidden_layers), "--hidden", str(config.hidden_size)),
        *("--vocab", str(config.vocab_size), "--batch", str(batch), "--length", str(length)),
        *("--threads", str(torch.get_num_threads()), "--steps", str(args.rounds)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"SpikeGPT's code failed:\n{done.stderr[-2000:]}")
    peer = json.loads(done.stdout.strip().splitlines()[-1])
    ours += interleaved({"spikelm": step}, args.rounds, device)["spikelm"]
    theirs = statistics.median(peer["seconds"])
    return {
        "batch": batch,
        "length": length,
        "dtype": "float32",
        "spikelm_step_seconds": statistics.median(ours),
        "spikelm_all_seconds": ours,
        "spikegpt_step_seconds": theirs,
        "spikegpt_all_seconds": peer["seconds"],
        "spikegpt_parameters": peer["parameters"],
        "spikegpt_losses": peer["losses"],
        "spikegpt_torch": peer["torch"],
        "times_faster": theirs / statistics.median(ours),
    }


def show(figures: dict[str, Any]) -> None:
    """The result as a table of plain lines."""
    for name in DTYPES:
        if name not in figures:
            continue
        part = figures[name]
        print(
            f"{name}, B{part['batch']} T{part['length']}: "
            f"GEMM 2048^3 {part['gemm_2048_gflops']:.0f} GFLOP/s, "
            f"own shapes {part['gemm_own_shapes_gflops']:.0f}"
        )
        for model in ("spikelm", "spikelm_twin", "llama"):
            if model in part:
                row = part[model]
                print(
                    f"  {model:<13} {row['step_seconds']:.3f} s/step, "
                    f"{row['tokens_per_second']:.0f} tokens/s, {row['share_of_gemm_peak']:.1%} of the peak, "
                    f"{row['share_of_own_shapes']:.1%} of own shapes"
                )
    if "spikegpt" in figures:
        part = figures["spikegpt"]
        print(
            f"B{part['batch']} T{part['length']} float32: ours {part['spikelm_step_seconds']:.3f} s/step, "
            f"SpikeGPT's code {part['spikegpt_step_seconds']:.3f}: {part['times_faster']:.2f} times faster"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="spikegpt-46m", help="preset or YAML file")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each candidate")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--without-llama", action="store_true")
    parser.add_argument("--peer-repo", type=Path, help="checkout of ridgerchu/SpikeGPT outside this project")
    parser.add_argument(
        "--peer-python", type=Path, default=Path(sys.executable), help="Python of its environment"
    )
    parser.add_argument("--name", default="train_step", help="name of the file under results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    figures: dict[str, Any] = {"model": args.model}
    for name in args.dtypes:
        figures[name] = against_the_peak(args, DTYPES[name], device)
    if args.peer_repo is not None:
        figures["spikegpt"] = against_spikegpt(args)
    show(figures)
    print(f"written to {record(args.name, figures)}")


if __name__ == "__main__":
    main()
