"""How much of this machine's matrix speed does a training step reach, and how do peers do beside it?

One run measures, in turn: the GEMM peak (2048^3, and the model's own shapes), a training step of a model in
float32 and bfloat16, a Hugging Face Llama with the same matrices on the same tokens with the same optimiser
step, and SpikeGPT's own code (see peers/spikegpt_code.py) at B = 4, T = 256 in float32 beside ours. A step is
forward, backward, clipping and AdamW (SpikeGPT's code: its own Adam). FLOPs are 6 x (weights of all linear
layers, head included) x tokens; what the recurrence, the neurons and attention compute is not counted, so
their time lowers the share.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikelm.bench.limits import matmul_parameters, matrices, own_shapes_peak, square_peak, wait
from spikelm.bench.peer import run
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError
from spikelm.loss import next_token_loss
from spikelm.model import SpikeLM
from spikelm.randomness import CounterRandom
from spikelm.recurrence import Context
from spikelm.train.config import OptimConfig
from spikelm.train.optim import build_optimizers, optimizer_step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Step = Callable[[], None]


def tokens_of(vocab: int, batch: int, length: int, device: torch.device) -> Tensor:
    """Random token ids [batch, length + 1]."""
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
        LlamaConfig(  # type: ignore[call-arg]
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
    defaults = OptimConfig()
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in parameters if p.dim() > 1], "weight_decay": defaults.weight_decay},
        {"params": [p for _, p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=defaults.lr,
        betas=defaults.betas or (0.9, 0.95),
        eps=defaults.eps or 1e-8,
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
        raise ConfigError("a gradient was not finite: the timing would mean nothing")


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


def against_the_peak(
    preset: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: int = 2,
    length: int = 512,
    rounds: int = 3,
    with_llama: bool = True,
) -> dict[str, Any]:
    """Peaks, our step, our twin's and Llama's in one precision.

    Args:
        preset: model preset or YAML file.
        dtype: float32 or bfloat16 (autocast).
        device: where to run.
        batch: sequences of a step.
        length: tokens of a sequence.
        rounds: timed steps of each candidate.
        with_llama: whether the Llama is measured too.
    """
    config = ModelConfig.from_yaml(preset)
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {"spikelm": SpikeLM(config), "spikelm_twin": SpikeLM(config.twin())}
    if with_llama:
        models["llama"] = llama(config)
    models = {name: model.to(device) for name, model in models.items()}
    tokens = tokens_of(config.vocab_size, batch, length, device)
    count = batch * length
    shapes = {name: matrices(model) for name, model in models.items()}
    peak = square_peak(dtype, device)
    own = own_shapes_peak(shapes["spikelm"], count, dtype, device)
    steps = {
        name: spikelm_step(model, tokens, dtype)
        if isinstance(model, SpikeLM)
        else llama_step(model, tokens, dtype)
        for name, model in models.items()
    }
    seconds = interleaved(steps, rounds, device)
    # The peak is measured before and after; the larger one is the limit the shares are taken of.
    peak = max(peak, square_peak(dtype, device))
    result: dict[str, Any] = {
        "batch": batch,
        "length": length,
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


def against_spikegpt(preset: str, repo: Path, python: Path, rounds: int = 3) -> dict[str, Any]:
    """Our step and SpikeGPT's own at B = 4, T = 256, float32, same sizes; ours before and after theirs.

    Args:
        preset: model preset or YAML file.
        repo: checkout of ridgerchu/SpikeGPT outside this project.
        python: interpreter of its environment.
        rounds: timed steps of each.
    """
    config = ModelConfig.from_yaml(preset)
    batch, length = 4, 256
    torch.manual_seed(0)
    device = torch.device("cpu")
    step = spikelm_step(SpikeLM(config), tokens_of(config.vocab_size, batch, length, device), torch.float32)
    ours = interleaved({"spikelm": step}, rounds, device)["spikelm"]
    arguments = {
        "--repo": repo,
        "--layers": config.num_hidden_layers,
        "--hidden": config.hidden_size,
        "--vocab": config.vocab_size,
        "--batch": batch,
        "--length": length,
        "--threads": torch.get_num_threads(),
        "--steps": rounds,
    }
    words = [word for pair in arguments.items() for word in pair]
    peer = run(python, "spikegpt_code", ["time", *words], torch.get_num_threads())
    ours += interleaved({"spikelm": step}, rounds, device)["spikelm"]
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


def lines(figures: dict[str, Any]) -> list[str]:
    """The result in plain lines."""
    found = []
    for name in DTYPES:
        if name not in figures:
            continue
        part = figures[name]
        found.append(
            f"{name}, B{part['batch']} T{part['length']}: "
            f"GEMM 2048^3 {part['gemm_2048_gflops']:.0f} GFLOP/s, "
            f"own shapes {part['gemm_own_shapes_gflops']:.0f}"
        )
        found += [
            f"  {model:<13} {part[model]['step_seconds']:.3f} s/step, "
            f"{part[model]['tokens_per_second']:.0f} tokens/s, "
            f"{part[model]['share_of_gemm_peak']:.1%} of the peak, "
            f"{part[model]['share_of_own_shapes']:.1%} of own shapes"
            for model in ("spikelm", "spikelm_twin", "llama")
            if model in part
        ]
    if "spikegpt" in figures:
        part = figures["spikegpt"]
        found.append(
            f"B{part['batch']} T{part['length']} float32: ours {part['spikelm_step_seconds']:.3f} s/step, "
            f"SpikeGPT's code {part['spikegpt_step_seconds']:.3f}: {part['times_faster']:.2f} times faster"
        )
    return found
