"""Published SpikingBrain folders, built small: converted, loaded, compared with the published equations."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spikelm.checkpoint import load_model, load_tokenizer, read_config
from spikelm.cli import main
from spikelm.config import ModelConfig
from spikelm.errors import CheckpointError
from spikelm.formats.shards import save_streamed
from spikelm.formats.spikingbrain import open_spikingbrain, rounded, to_int8
from spikelm.formats.spikingbrain_config import read_published
from spikelm.formats.spikingbrain_names import Layout, entries
from spikelm.model import SpikeLM
from spikelm.tokenizer import Tokenizer

from . import spikingbrain_release as release

TOKENS = torch.randint(0, 40, (14,), generator=torch.Generator().manual_seed(2))


def convert(folder: Path, out: Path, *words: str) -> dict[str, Any]:
    report = out.with_suffix(".json")
    assert main(["convert", "spikingbrain", str(folder), str(out), "--json", str(report), *words]) == 0
    told: dict[str, Any] = json.loads(report.read_text())
    return told


def check(out: Path, expected: torch.Tensor) -> None:
    """A sequence at once and token by token gives the logits; the window (5) is shorter than the text."""
    model = load_model(out, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS[None])[0][0], expected, atol=1e-10, rtol=0)
        state = None
        for t, token in enumerate(TOKENS):
            logits, state = model(token[None], state)
            torch.testing.assert_close(logits[0], expected[t], atol=1e-10, rtol=0)


@pytest.mark.parametrize("k", [None, 3.0])
@pytest.mark.parametrize("shards", [1, 3])
def test_float_release(tmp_path: Path, shards: int, k: float | None) -> None:
    """Two matrices per gate, bfloat16; no neuron, or the adaptive one that is asked for."""
    tensors = release.weights(quantised=False)
    folder = release.write(tmp_path / "in", tensors, shards=shards)
    told = convert(folder, tmp_path / "out", *([] if k is None else ["--k", str(k)]))
    check(tmp_path / "out", release.logits(tensors, TOKENS.tolist(), k=k))
    assert told["parameters"] == sum(value.numel() for value in tensors.values())
    assert told["layout"] == {"quantised": False, "merged_gate": False}
    config = read_config(tmp_path / "out")
    assert config.neuron["name"] == ("none" if k is None else "adaptive")
    assert [layer["mixer"]["name"] for layer in config.layers] == ["gla", "swa"]
    assert (config.bos_token_id, config.eos_token_id) == (38, 38)
    assert load_model(tmp_path / "out").embedding.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("words", "dense_down"),
    [([], False), (["--weights", "float"], False), (["--dense-down"], True)],
    ids=["int8", "float", "dense-down"],
)
@pytest.mark.parametrize("shards", [1, 4])
def test_w8aspike(tmp_path: Path, words: list[str], dense_down: bool, shards: int) -> None:
    """Merged gates, scales per group: int8 weights and spikes of k = 3, as the published code has them."""
    tensors = release.weights(quantised=True, dtype=torch.float32)
    folder = release.write(tmp_path / "in", tensors, shards=shards)
    told = convert(folder, tmp_path / "out", *words)
    product = torch.float32 if words == ["--weights", "float"] else torch.float64
    expected = release.logits(tensors, TOKENS.tolist(), k=3.0, dense_down=dense_down, product=product)
    check(tmp_path / "out", expected)
    assert told["layout"] == {"quantised": True, "merged_gate": True}
    assert told["quantisation"]["outside_int8"] == 0
    assert told["parameters"] == sum(v.numel() for n, v in tensors.items() if "quantizer" not in n)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {name: value.dtype for name, value in stored.items()}
    int8 = words != ["--weights", "float"]
    query = "model.blocks.0.mixer.query.linear"
    assert kinds[f"{query}.weight"] == (torch.int8 if int8 else torch.float32)
    assert (f"{query}.scales" in kinds) == int8
    down = kinds["model.blocks.0.channel.down.linear.weight"]
    assert down == (torch.int8 if int8 and not dense_down else torch.float32)
    assert read_config(tmp_path / "out").neuron == {"name": "adaptive", "k": 3.0, "dead_zone": 0.0}


def test_integers_beyond_int8() -> None:
    """About 1% of the published integers do not fit int8: their groups get the next scale, others stay."""
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 4 * 32, generator=g)
    grouped = weight.view(6, 4, 32)
    scales = grouped.abs().amax(-1) / 127
    scales[1, 2] *= 0.7
    scales[4, 0] *= 0.6
    integers, new, told = to_int8(weight, scales, 32)
    beyond = (grouped / scales[..., None]).round().abs() > 127
    assert told.outside == int(beyond.sum()) > 0
    assert (told.widened, told.groups, told.weights) == (2, 24, weight.numel())
    assert integers.dtype == torch.int8
    assert int(integers.abs().max()) == 127
    kept = torch.ones(6, 4, dtype=torch.bool)
    kept[1, 2] = kept[4, 0] = False
    assert torch.equal(new[kept], scales[kept])
    value = integers.view(6, 4, 32) * new[..., None]
    assert bool(((value - grouped).abs() <= new[..., None] * 0.5001).all())
    assert torch.equal(value[kept], rounded(weight, scales, 32).view(6, 4, 32)[kept])


def test_scales_that_are_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder like the published one: told, near to the release with int8, and exact with floats."""
    tensors = release.weights(quantised=True, dtype=torch.float32)
    for name, value in tensors.items():
        if name.endswith("scales"):
            tensors[name] = value * 0.75
    folder = release.write(tmp_path / "in", tensors)
    told = convert(folder, tmp_path / "int8")["quantisation"]
    assert told["groups_with_a_larger_scale"] == told["groups"] > 0
    assert 0 < told["outside_int8"] < 0.1 * told["weights"]
    assert "lie beyond int8" in capsys.readouterr().err
    # Without spikes, whose counts jump: the weights alone are compared.
    convert(folder, tmp_path / "float", "--weights", "float", "--k", "0")
    check(tmp_path / "float", release.logits(tensors, TOKENS.tolist(), product=torch.float32))
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("int8", "float"))
    for name, value in b.items():
        scales = a.get(name.removesuffix("weight") + "scales")
        if scales is not None:
            grouped = a[name].unflatten(1, (-1, release.GROUP)) * scales[..., None]
            assert float((grouped.flatten(1) - value).norm() / value.norm()) < 0.01


def test_code_of_the_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hostile modules beside auto_map, a hostile pickle beside the safetensors: none of it is touched."""
    folder = release.write(tmp_path / "in", release.weights(quantised=False))
    marker = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(marker)!r}).write_text('ran')\n"
    for name in ("configuration_gla_swa", "modeling_gla_swa", "__init__", "conftest", "sitecustomize"):
        (folder / f"{name}.py").write_text(code)

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.write_text, (marker, "ran")

    torch.save({"a": Bomb()}, folder / "pytorch_model.bin")
    monkeypatch.chdir(folder)
    convert(folder, tmp_path / "out")
    load_model(tmp_path / "out")
    assert not marker.exists()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_other_patterns(tmp_path: Path) -> None:
    """Attention layers in any place, a tied head, a missing list of layers: the odd ones."""
    config = release.CONFIG | {"attn_layers": [0, 1], "tie_word_embeddings": True}
    tensors = release.weights(quantised=False, config=config)
    convert(release.write(tmp_path / "a", tensors, config), tmp_path / "a-out")
    check(tmp_path / "a-out", release.logits(tensors, TOKENS.tolist(), config=config))
    assert len(read_config(tmp_path / "a-out").layers) == 4
    default = {key: value for key, value in release.CONFIG.items() if key != "attn_layers"}
    tensors = release.weights(quantised=False)
    convert(release.write(tmp_path / "b", tensors, default), tmp_path / "b-out")
    check(tmp_path / "b-out", release.logits(tensors, TOKENS.tolist()))


def test_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That of the folder is kept, another may be named, too large a one is refused."""
    config = release.CONFIG | {"vocab_size": 256}
    folder = release.write(tmp_path / "in", release.weights(quantised=False, config=config), config, shards=2)
    assert convert(folder, tmp_path / "none")["tokenizer"] is None
    Tokenizer.bytes().save(folder)
    told = convert(folder, tmp_path / "kept")
    assert told["tokenizer"] == load_tokenizer(tmp_path / "kept").sha256 == Tokenizer.bytes().sha256
    assert read_config(tmp_path / "kept").eos_token_id == 38
    small = release.write(tmp_path / "small", release.weights(quantised=False))
    refused(capsys, small, tmp_path / "no", ["--tokenizer", "bytes"], "256", "40")


def test_written_in_shards(tmp_path: Path) -> None:
    """A model larger than a shard becomes several files and an index, and loads to the same logits."""
    tensors = release.weights(quantised=False)
    folder = release.write(tmp_path / "in", tensors, shards=3)
    with open_spikingbrain(folder) as opened:
        save_streamed(tmp_path / "out", opened.config, opened.tensors(), shard_bytes=50_000)
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert len(files) > 4
    assert "model.safetensors.index.json" in files
    assert all(p.stat().st_size < 60_000 for p in (tmp_path / "out").glob("model-*"))
    check(tmp_path / "out", release.logits(tensors, TOKENS.tolist()))


def test_a_shard_at_a_time(tmp_path: Path) -> None:
    """Never more tensors in memory than a shard holds, and the one that did not fit."""
    tensors = release.weights(quantised=True, dtype=torch.float32)
    folder = release.write(tmp_path / "in", tensors, shards=2)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    with open_spikingbrain(folder) as opened:

        def watched() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal most
            for name, value in opened.tensors():
                alive.append(weakref.ref(value))
                held = [tensor for ref in alive if (tensor := ref()) is not None]
                most = max(most, sum(tensor.nbytes for tensor in held))
                del held
                yield name, value
                del value

        save_streamed(tmp_path / "out", opened.config, watched(), shard_bytes=30_000)
    largest = max(value.nbytes for value in tensors.values())
    assert 10_000 < most <= 30_000 + largest < sum(value.nbytes for value in tensors.values()) / 3
    check(tmp_path / "out", release.logits(tensors, TOKENS.tolist(), k=3.0))


@pytest.mark.parametrize("quantised", [False, True])
def test_the_published_sizes(tmp_path: Path, quantised: bool) -> None:
    """The 7B's own configuration: every tensor has its place in the preset's model, by name and by shape."""
    sizes = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "attn_layers": list(range(1, 28, 2)),
        "sliding_window": 4096,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    }
    (tmp_path / "config.json").write_text(json.dumps(release.CONFIG | sizes))
    published = read_published(tmp_path)
    plan = list(entries(published, Layout(quantised=quantised, merged_gate=quantised)))
    tensors = {e.published for e in plan} | {e.quantiser for e in plan if e.quantiser}
    per_layer = [sum(name.startswith(f"model.layers.{i}.") for name in tensors) for i in (14, 15)]
    # 23: what others report of the published W8ASpike file's layer 14
    assert per_layer == ([23, 19] if quantised else [16, 12])
    config = published.model(
        gate_rank=None if quantised else 16,
        neuron={"name": "adaptive", "k": 3.0, "dead_zone": 0.0, "cap": 127},
        weights={"name": "float"},
        neuron_overrides={},
        weight_overrides={},
    )
    with torch.device("meta"):
        model = SpikeLM(config)
    assert {e.ours: e.shape for e in plan} == {n: tuple(v.shape) for n, v in model.state_dict().items()}
    if not quantised:
        assert config == ModelConfig.from_yaml("spikingbrain-7b")
        assert sum(math.prod(e.shape) for e in plan) == 7_616_542_976


def test_an_interrupted_conversion_leaves_the_old_folder(tmp_path: Path) -> None:
    """A value that is not finite in the last tensor: the error comes late, and nothing is left behind."""
    tensors = release.weights(quantised=False)
    release.write(tmp_path / "good", tensors)
    convert(tmp_path / "good", tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_text()
    tensors["lm_head.weight"][3, 3] = math.nan
    bad = release.write(tmp_path / "bad", tensors)
    with open_spikingbrain(bad) as opened, pytest.raises(CheckpointError, match="not finite"):
        save_streamed(tmp_path / "out", opened.config, opened.tensors())
    assert (tmp_path / "out" / "config.json").read_text() == before
    assert sorted(os.listdir(tmp_path)) == ["bad", "good", "out", "out.json"]


def refused(
    capsys: pytest.CaptureFixture[str], folder: Path, out: Path, words: list[str], *parts: str
) -> None:
    """One sentence, exit code 2, nothing written."""
    capsys.readouterr()
    assert main(["convert", "spikingbrain", str(folder), str(out), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for part in parts:
        assert part in error, error
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"model_type": "qwen2"}, ("model_type 'qwen2'", "gla_swa")),
        ({"sliding_windw": 7}, ("unknown key 'sliding_windw'", "did you mean 'sliding_window'")),
        ({"use_short_conv": True}, ("use_short_conv", "false")),
        ({"rope_scaling": {"type": "yarn"}}, ("rope_scaling", "null")),
        ({"hidden_act": "gelu"}, ("hidden_act is 'gelu'", "swish")),
        ({"num_key_value_heads": 3}, ("num_key_value_heads is 3", "divisor")),
        ({"attn_layers": [1, 9]}, ("attn_layers", "0 to 3")),
        ({"norm_eps": "small"}, ("norm_eps is 'small'", "positive")),
        ({"hidden_size": 128}, ("model.embeddings.weight", "[40, 64]", "[40, 128]")),
        ({"num_hidden_layers": 3, "attn_layers": [1]}, ("model.layers.3.", "unknown")),
        ({"num_hidden_layers": 5}, ("model.layers.4.", "missing")),
        ({"attn_layers": [1]}, ("model.layers.3.attn.gk_proj", "missing")),
        ({"eos_token_id": 99}, ("eos_token_id is 99", "0 to 39")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_configurations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], parts: tuple[str, ...]
) -> None:
    config = release.CONFIG | change
    folder = release.write(tmp_path / "in", release.weights(quantised=False), config)
    refused(capsys, folder, tmp_path / "out", [], *parts)


def test_bad_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, out = release.weights(quantised=False), tmp_path / "out"
    q = "model.layers.0.attn.q_proj.weight"

    def folder(name: str, change: dict[str, Any], **options: Any) -> Path:
        changed = {n: v for n, v in {**tensors, **change}.items() if v is not None}
        return release.write(tmp_path / name, changed, **options)

    refused(capsys, tmp_path / "absent", out, [], "absent", "no folder")
    refused(capsys, folder("lacks", {q: None}), out, [], q, "missing")
    refused(capsys, folder("shape", {q: torch.zeros(64, 63)}), out, [], q, "[64, 63]", "[64, 64]")
    refused(capsys, folder("int", {q: torch.zeros(64, 64).char()}), out, [], q, "int8", "floats")
    more = {"model.layers.0.attn.q_norm.weight": torch.ones(16)}
    refused(capsys, folder("more", more), out, [], "q_norm.weight", "unknown")
    refused(capsys, folder("nan", {q: torch.full((64, 64), math.nan)}), out, [], q, "finite")
    plain = folder("plain", {})
    refused(capsys, plain, out, ["--weights", "int8"], "without scales")
    refused(capsys, plain, out, ["--weights", "int4"], "int4", "int8")
    (plain / "config.json").write_text("{")
    refused(capsys, plain, out, [], "config.json", "JSON")
    (plain / "config.json").unlink()
    refused(capsys, plain, out, [], "config.json", "missing")
    damaged = folder("damaged", {})
    whole = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(capsys, damaged, out, [], "model.safetensors", "cannot be read")
    for name in ("pytorch_model.bin", "model.pth"):
        pickled = folder(name, {})
        (pickled / "model.safetensors").unlink()
        torch.save(tensors, pickled / name)
        refused(capsys, pickled, out, [], name, "pickled", "convert them to safetensors")


def test_bad_indices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An index may not name files elsewhere, nor tell untruths."""
    tensors, out = release.weights(quantised=False), tmp_path / "out"
    folder = release.write(tmp_path / "in", tensors, shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    q = "model.layers.0.attn.q_proj.weight"
    outside = tmp_path / "outside.safetensors"
    save_file({q: tensors[q]}, outside)
    for bad in ("../outside.safetensors", str(outside), "weights.bin", 7):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | {q: bad}}))
        refused(capsys, folder, out, [], q, "same folder")
    path.write_text(
        json.dumps({"weight_map": index["weight_map"] | {"ghost": sorted(index["weight_map"].values())[0]}})
    )
    refused(capsys, folder, out, [], "ghost", "does not hold it")
    path.write_text(json.dumps({"weight_map": {}}))
    refused(capsys, folder, out, [], "weight_map")
    path.write_text(json.dumps(index))
    first = folder / sorted(index["weight_map"].values())[0]
    save_file({**load_file(first), "lm_head.weight": tensors["lm_head.weight"]}, first)
    second = sorted(set(index["weight_map"].values()))[1]
    save_file({**load_file(folder / second), "lm_head.weight": tensors["lm_head.weight"]}, folder / second)
    refused(capsys, folder, out, [], "lm_head.weight", "expected it once")
    first.unlink()
    refused(capsys, folder, out, [], first.name, "missing")


def test_bad_scales(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, out = release.weights(quantised=True, dtype=torch.float32), tmp_path / "out"
    scales = "model.layers.0.attn.q_proj.weight_quantizer.scales"

    def folder(name: str, value: torch.Tensor | None) -> Path:
        changed = {n: v for n, v in {**tensors, scales: value}.items() if v is not None}
        return release.write(tmp_path / name, changed)

    refused(capsys, folder("lacks", None), out, [], scales, "missing")
    refused(capsys, folder("flat", torch.ones(64, 2)), out, [], scales, "[64, 2]", "[64, groups, 1]")
    refused(capsys, folder("other", torch.ones(64, 4, 1)), out, [], scales, "16", "32", "one size")
    refused(capsys, folder("zero", torch.zeros(64, 2, 1)), out, [], scales, "positive")
    good = release.write(tmp_path / "good", tensors)
    refused(capsys, good, out, ["--k", "0"], "--k above 0")
    config = release.CONFIG | {"quant_weight_group_size": 64}
    refused(capsys, release.write(tmp_path / "told", tensors, config), out, [], "64", "32", "one size")
