"""llama.cpp decoding a Llama in q8_0 on one thread, in an environment of its own.

Usage: python llamacpp.py WIDTH LAYERS HIDDEN VOCABULARY TOKENS REPEATS FOLDER.
Writes a Llama with random weights to FOLDER as GGUF (untied head, so that it reads 4 D^2 + 3 D HIDDEN weights
a layer and VOCABULARY * D for the head, each token), lets llama.cpp decode, and prints one JSON line with its
own timings. The environment needs xllamacpp, gguf and numpy.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

HEAD = 64
"""Features of an attention head."""


def write(path: Path, width: int, layers: int, hidden: int, vocabulary: int) -> None:
    """A GGUF file of a Llama with random q8_0 weights and a tokenizer of one token a byte."""
    import gguf
    import numpy as np

    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(width // HEAD)
    writer.add_head_count_kv(width // HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    special = [b"<unk>", b"<s>", b"</s>"]
    tokens = special + [f"<0x{byte:02X}>".encode() for byte in range(256)]
    tokens += [f"word{i}".encode() for i in range(len(tokens), vocabulary)]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * vocabulary
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens[:vocabulary])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types(kinds[:vocabulary])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    def matrix(name: str, outputs: int, inputs: int) -> None:
        weight = generator.standard_normal((outputs, inputs), dtype=np.float32) * inputs**-0.5
        packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(width, dtype=np.float32))

    matrix("token_embd.weight", vocabulary, width)
    matrix("output.weight", vocabulary, width)
    ones("output_norm.weight")
    for layer in range(layers):
        prefix = f"blk.{layer}."
        ones(prefix + "attn_norm.weight")
        ones(prefix + "ffn_norm.weight")
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"{prefix}{name}.weight", width, width)
        matrix(prefix + "ffn_gate.weight", hidden, width)
        matrix(prefix + "ffn_up.weight", hidden, width)
        matrix(prefix + "ffn_down.weight", width, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    width, layers, hidden, vocabulary, tokens, repeats = map(int, sys.argv[1:7])
    path = Path(sys.argv[7]) / f"llama-{width}-{layers}-{hidden}-{vocabulary}.gguf"
    if not path.exists():
        write(path, width, layers, hidden, vocabulary)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 2 * tokens + 64
    params.n_parallel = 1
    params.warmup = True
    for threads in (params.cpuparams, params.cpuparams_batch):
        threads.n_threads = 1
    # llama.cpp's own log goes nowhere, also what its threads write at the end.
    printed, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    server = xllamacpp.Server(params)
    rates = []
    for _ in range(repeats):
        request = {"prompt": "ab", "n_predict": tokens, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions({**request, "temperature": 0})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        rates.append(answer["timings"]["predicted_per_second"])
    weights = layers * (4 * width * width + 3 * width * hidden) + vocabulary * width
    figures = {
        "version": version("xllamacpp"),
        "system": xllamacpp.get_system_info(),
        "weights_read": weights,
        "bytes_read": weights * 34 // 32,
        "tokens_per_second": rates,
    }
    os.write(printed, json.dumps(figures).encode() + b"\n")
    os._exit(0)  # the server's threads would keep the process


if __name__ == "__main__":
    main()
