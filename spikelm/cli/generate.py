"""``spikelm generate``: let a checkpoint continue a prompt."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from spikelm.cli._common import JsonOption, human_bytes, progress, tokenizer_for, write_json


def generate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Text to continue; none starts a document.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="Read the prompt from FILE instead.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens to write at most.")] = 200,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0 takes the most likely token; 1 the model's own chances.")
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Choose among the likeliest tokens of this total probability.")
    ] = 0.95,
    top_k: Annotated[
        int, typer.Option("--top-k", help="Choose among this many likeliest tokens; 0: all.")
    ] = 0,
    min_p: Annotated[
        float, typer.Option("--min-p", help="Leave out tokens less likely than this share of the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1 makes tokens seen before less likely.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option("--seed", help="The same seed gives the same text; drawn if not given.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text; may be given several times.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end of a document.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Show the text while it is written.")] = False,
    spikes: Annotated[bool, typer.Option("--spikes", help="Count spikes at every projection.")] = False,
    chunk: Annotated[
        int, typer.Option("--chunk", help="Prompt tokens read at once; changes speed and memory only.")
    ] = 512,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Tokenizer to use instead of the checkpoint's.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="Dtype of the weights: float32, bfloat16, float64; as stored if absent."
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Let a checkpoint continue a prompt.

    Prints the prompt and its continuation; speed, state size and spike rate go to standard error.

    Example: spikelm generate runs/demo/spiking --prompt "The module" --max-tokens 300 --stream
    """
    import torch

    from spikelm.checkpoint import load_model
    from spikelm.data.compressed import decode_utf8, read_bytes
    from spikelm.errors import ConfigError
    from spikelm.generation import generate as pieces_of
    from spikelm.generation import prompt_tokens
    from spikelm.meter import Meter
    from spikelm.recurrence import Context
    from spikelm.sampling import Sampler
    from spikelm.state import state_bytes

    if prompt is not None and prompt_file is not None:
        raise ConfigError("give the prompt by --prompt or by --prompt-file, not both")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if dtype is not None and dtype not in dtypes:
        raise ConfigError(f"dtype {dtype!r}; expected one of {', '.join(dtypes)}")
    sampler = Sampler(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    text = prompt or ""
    if prompt_file is not None:
        text = decode_utf8(read_bytes(prompt_file), str(prompt_file))
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    words = tokenizer_for(checkpoint, tokenizer)
    tokens = prompt_tokens(words, text)
    model = load_model(checkpoint, target, None if dtype is None else dtypes[dtype])
    meter = Meter() if spikes else None
    show = stream and str(json_file) != "-"

    written: list[Any] = []
    times = [time.perf_counter()]
    finish = "interrupted"
    interrupted = False
    with progress("writing", None if stream else len(tokens) + max_tokens, "tokens") as bar:
        before = 0

        def prefilled(done: int) -> None:
            nonlocal before
            if not stream:
                bar.advance(done - before)
            before = done

        pieces = pieces_of(
            model,
            words,
            tokens,
            max_tokens,
            sampler,
            chunk=chunk,
            stop=stop or (),
            ignore_eos=ignore_eos,
            ctx=Context(meter=meter),
            on_prefill=prefilled,
        )
        if show:
            _write(text)
        try:
            for piece in pieces:
                times.append(time.perf_counter())
                written.append(piece)
                finish = piece.finish_reason or finish
                if show:
                    _write(piece.text)
                elif not stream:
                    bar.advance()
        except KeyboardInterrupt:  # what is written so far is still worth having
            interrupted = True
        finally:
            pieces.close()  # the meter is complete then
    if not written and not interrupted:
        finish = "length"
    continuation = "".join(piece.text for piece in written)
    if str(json_file) != "-":
        _write("\n" if show else f"{text}{continuation}\n")
    result = {
        "checkpoint": str(checkpoint),
        "prompt": text,
        "text": continuation,
        "tokens": [piece.token for piece in written],
        "logprobs": [piece.logprob for piece in written],
        "finish_reason": finish,
        "prompt_tokens": len(tokens),
        "seed": sampler.seed,
        **_speed(times, len(tokens)),
        "state_bytes": state_bytes(model.init_state(1, max_len=len(tokens) + max_tokens)),
        "spikes": meter.summary() if meter is not None else None,
    }
    _report(result)
    write_json(json_file, result)
    if interrupted:
        raise KeyboardInterrupt


def _write(text: str) -> None:
    # What a terminal's encoding lacks is shown as a question mark rather than ending the program.
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def _speed(times: list[float], prompt_tokens: int) -> dict[str, float | None]:
    """Seconds and tokens per second of reading the prompt (with the first token) and of writing the rest."""
    reading = times[1] - times[0] if len(times) > 1 else None
    writing = times[-1] - times[1] if len(times) > 2 else None
    return {
        "prompt_seconds": reading,
        "prompt_tokens_per_second": prompt_tokens / reading if reading else None,
        "tokens_per_second": (len(times) - 2) / writing if writing else None,
    }


def _report(result: dict[str, Any]) -> None:
    parts = [f"{len(result['tokens'])} tokens ({result['finish_reason']})"]
    if result["tokens_per_second"] is not None:
        parts.append(f"{result['tokens_per_second']:.1f} tokens/s")
    if result["prompt_tokens_per_second"] is not None:
        parts.append(f"prompt {result['prompt_tokens_per_second']:.1f} tokens/s")
    parts.append(f"state {human_bytes(result['state_bytes'])}")
    if result["spikes"] is not None:
        parts.append(f"spike rate {result['spikes']['total']['firing_rate']:.1%}")
    parts.append(f"seed {result['seed']}")
    print(", ".join(parts), file=sys.stderr, flush=True)
