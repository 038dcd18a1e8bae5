"""``ssa`` and ``sdsa``: the papers' equations token by token, spikes of 0 and 1, sums that are counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikelm.block import build_child
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError
from spikelm.kernels.dispatch import choose, use_backend
from spikelm.mixers.sdsa import SDSA
from spikelm.mixers.spiking_attention import SpikingAttention, over_documents
from spikelm.mixers.ssa import SSA
from spikelm.recurrence import Context
from spikelm.state import flatten

D, HEADS, DIM = 16, 2, 8
HEAVISIDE = {"name": "heaviside", "threshold": 0.2}


def build(name: str, *, width: int = D, **options: Any) -> Any:
    """A mixer in float64 whose projections take the input as it is, with random weights and norms."""
    torch.manual_seed(3)
    config = ModelConfig(vocab_size=11, hidden_size=width, num_hidden_layers=2, neuron={"name": "none"})
    options = {"num_heads": HEADS, "neuron": HEAVISIDE, **options}
    mixer = build_child(config, 1, "blocks.1.", "mixer", "mixer", {"name": name, **options}).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def text(rows: int = 2, steps: int = 21, width: int = D) -> Tensor:
    return torch.randn(rows, steps, width, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@contextmanager
def heard(mixer: nn.Module, *names: str) -> Iterator[dict[str, Tensor]]:
    """Outputs of children, by name, of the calls inside."""
    seen: dict[str, Tensor] = {}
    handles = [
        mixer.get_submodule(name).register_forward_hook(
            lambda _m, _i, result, name=name: seen.update({name: result[0]})
        )
        for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def fired(mixer: SpikingAttention, x: Tensor, name: str) -> Tensor:
    """Spikes of an input without neuron state, by hand: linear, LayerNorm, threshold; bool [B, T, H, dim]."""
    weight = mixer.get_submodule(f"{name}.linear").weight
    norm = mixer.get_submodule(f"{name}_norm")
    y = x @ weight.T
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-3).sqrt()
    y = y * norm.weight + norm.bias
    return (y >= HEAVISIDE["threshold"]).unflatten(-1, (HEADS, DIM))


@pytest.mark.parametrize("options", [{}, {"mean": False, "scale": 0.125}, {"decay": "fixed"}])
def test_ssa_is_the_equations(options: dict[str, Any]) -> None:
    mixer, x = build("ssa", **options), text()
    y, _ = mixer(x)
    q, k, v = (fired(mixer, x, name) for name in ("query", "key", "value"))
    gammas = [1 - 2**-1, 1 - 2**-8] if "decay" in options else [1.0, 1.0]
    expected = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            read = torch.zeros(HEADS, DIM, dtype=x.dtype)
            for h, gamma in enumerate(gammas):
                for j in range(t + 1):
                    overlap = int((q[b, t, h] & k[b, j, h]).sum())  # q k^T of spikes: how many are in both
                    read[h] += gamma ** (t - j) * overlap * v[b, j, h].double()
                if options.get("mean", True):
                    read[h] /= sum(gamma**i for i in range(t + 1))
            expected[b, t] = mixer.output.linear.weight @ (options.get("scale", 1.0) * read).flatten()
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_sdsa_is_masks_and_additions(version: int, causal: bool) -> None:
    threshold = 0.15 if version == 1 else 0.35
    neuron = {"name": "heaviside", "threshold": threshold}
    mixer = build("sdsa", version=version, causal=causal, attention_neuron=neuron)
    x = text()
    y, _ = mixer(x)
    q, v = fired(mixer, x, "query"), fired(mixer, x, "value")
    added = q if version == 2 else fired(mixer, x, "key") & v
    masked = q if version == 1 else v
    expected = torch.zeros_like(x)
    share = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            past = added[b, : t + 1] if causal else added[b]
            mask = past.sum(0) >= threshold * len(
                past
            )  # integers against a threshold that grows by additions
            spikes = (mask & masked[b, t]).flatten()
            share.append(mask.double().mean())
            expected[b, t] = mixer.output.linear.weight[:, spikes].sum(1)  # the columns of spikes, added
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert 0.1 < torch.stack(share).mean() < 0.9  # the mask is no constant


@pytest.mark.parametrize("name", ["ssa", "sdsa"])
@pytest.mark.parametrize("neuron", [None, {"name": "lif", "threshold": 0.3}, {"name": "if"}, HEAVISIDE])
def test_queries_keys_values_are_binary_and_memory_counts(name: str, neuron: dict[str, Any] | None) -> None:
    config = ModelConfig(vocab_size=11, hidden_size=D, num_hidden_layers=2, neuron={"name": "plif"})
    spec = {"name": name, "num_heads": HEADS, "neuron": neuron}
    mixer = build_child(config, 1, "blocks.1.", "mixer", "mixer", spec)
    names = ("query_neuron", "key_neuron", "value_neuron")
    x = 3 * text(steps=200).float()
    with heard(mixer, *names) as spikes:
        _, state = mixer(x)
    for spike in spikes.values():
        assert set(spike.unique().tolist()) == {0.0, 1.0}
        assert 0.02 < spike.mean() < 0.9
    memory, count = state["memory"], state["count"]
    assert memory.dtype == count.dtype == torch.float32
    assert torch.equal(memory, memory.round()) and memory.max() > 1
    assert torch.equal(count, torch.full((2, HEADS), 200.0))
    q, k, v = (spikes[n].unflatten(-1, (HEADS, DIM)).bool() for n in names)
    for h in range(HEADS):
        for i in range(DIM):
            # Additions only: an entry is the number of tokens at which both fired.
            rows = k[:, :, h, i, None] & v[:, :, h] if name == "ssa" else (k & v)[:, :, h]
            assert torch.equal(memory[:, h, i if name == "ssa" else 0], rows.sum(1).float())


def test_reading_needs_no_multiplication() -> None:
    """What reaches the output projection is a sum of rows of the memory, the rows picked by the query."""
    mixer, x = build("ssa", mean=False), text()
    with heard(mixer, "query_neuron", "attention_neuron") as seen:
        mixer(x[:, :-1])
        _, before = mixer(x[:, :-1])
        y, state = mixer(x[:, -1], before)
    query = seen["query_neuron"].unflatten(-1, (HEADS, DIM)).bool()
    for b in range(2):
        rows = [state["memory"][b, h][query[b, h]].sum(0) for h in range(HEADS)]
        assert torch.equal(seen["attention_neuron"][b], torch.cat(rows))


@pytest.mark.parametrize("name", ["ssa", "sdsa"])
def test_the_last_token_sees_what_an_encoder_sees(name: str) -> None:
    x = text()
    made = [build(name, causal=causal) for causal in (True, False)]
    made[1].load_state_dict(made[0].state_dict())
    (forward, _), (both, state) = (mixer(x) for mixer in made)
    torch.testing.assert_close(forward[:, -1], both[:, -1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(forward[:, 0], both[:, 0])
    assert "memory" not in state


def test_documents_and_padding_of_an_encoder_are_apart() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.rand(2, 11, HEADS, DIM) < 0.4 for _ in range(3))
    reset = torch.zeros(2, 11, dtype=torch.bool)
    reset[0, 4] = reset[0, 9] = reset[1, 0] = reset[1, 6] = True
    valid = torch.rand(2, 11) < 0.7
    poisoned = k.float().masked_fill(~valid[..., None, None], math.nan)
    o = over_documents(q.float(), poisoned, v.float(), Context(reset=reset, valid=valid))
    for b, cuts in enumerate(([0, 4, 9, 11], [0, 6, 11])):
        for start, stop in zip(cuts, cuts[1:], strict=False):
            for t in range(start, stop):
                seen = [j for j in range(start, stop) if valid[b, j]] if valid[b, t] else []
                expected = torch.zeros(HEADS, DIM)
                for j in seen:
                    expected += (q[b, t] & k[b, j]).sum(-1, keepdim=True) * v[b, j]
                assert torch.equal(o[b, t], expected)


@pytest.mark.parametrize("form", ["torch", "auto"])
@pytest.mark.parametrize("name", ["ssa", "sdsa"])
def test_counts_are_exact_below_2_to_the_24_and_stop_there(name: str, form: str) -> None:
    """Float32 holds every integer to 2**24; there one more token changes nothing, and float64 goes on.

    The torch form adds whole chunks and goes on a little further; the C form adds token after token.
    """
    with use_backend(form):
        check_where_counts_stop(name, one_by_one=choose("gla", torch.device("cpu")) == "c")


def check_where_counts_stop(name: str, one_by_one: bool) -> None:
    limit = 2**24
    for dtype, exact in ((torch.float32, False), (torch.float64, True)):
        mixer = build(name, mean=False).to(dtype)
        with heard(mixer, "key_neuron", "value_neuron") as seen:
            state = mixer.init_state(1, dtype=dtype)
            state["memory"] += limit - 40
            x = text(1, 240).to(dtype)
            _, whole = mixer(x[:, :40], state)
            both = (seen["key_neuron"] * seen["value_neuron"]).sum(1) if name == "sdsa" else None
            pieces = state
            for t in range(40):
                _, pieces = mixer(x[:, t], pieces)
            assert torch.equal(
                whole["memory"], pieces["memory"]
            )  # chunked == token by token, to the last count
            if both is not None:
                assert torch.equal(whole["memory"].flatten(), limit - 40 + both.flatten())
            _, end = mixer(x, state)
            for t in range(40, 240):
                _, pieces = mixer(x[:, t], pieces)
        assert bool((pieces["memory"] > limit).any()) == exact
        assert torch.equal(end["memory"], pieces["memory"]) == (exact or one_by_one)


def test_a_long_text_is_counted_exactly() -> None:
    """100,000 tokens in float32, against a sum of int64; split anywhere."""
    mixer = build("ssa", mean=True).float()
    x = torch.randn(1, 100_000, D, generator=torch.Generator().manual_seed(1))
    with (
        torch.no_grad(),
        heard(mixer, "query_neuron", "key_neuron", "value_neuron", "attention_neuron") as seen,
    ):
        y, state = mixer(x)
        q, k, v = (
            seen[f"{name}_neuron"][0].unflatten(-1, (HEADS, DIM)).long() for name in ("query", "key", "value")
        )
        last = seen["attention_neuron"][0, -1]
        first, middle = mixer(x[:, :31_234])
        second, end = mixer(x[:, 31_234:], middle)
    memory = torch.einsum("thk,thv->hkv", k, v)
    assert torch.equal(state["memory"][0].long(), memory) and memory.max() > 2**13
    assert torch.equal(end["memory"], state["memory"]) and torch.equal(end["count"], state["count"])
    read = torch.einsum("hk,hkv->hv", q[-1], memory).flatten()
    assert torch.equal(last, read.float() / 100_000)
    torch.testing.assert_close(torch.cat([first, second], 1), y)


@pytest.mark.parametrize("decay", [None, "fixed", "learned"])
@pytest.mark.parametrize("name", ["ssa", "sdsa"])
def test_the_mean_keeps_its_size_over_a_text(name: str, decay: str | None) -> None:
    """What reaches the neuron at the end of a text is as large as at its beginning; the sum alone is not."""
    x = text(4, 1024)
    sizes = {}
    for mean in (True, False):
        mixer = build(
            name, decay=decay, mean=mean, attention_neuron={"name": "none"} if name == "ssa" else HEAVISIDE
        )
        with torch.no_grad():
            inner = mixer.attention_neuron
            inputs: list[Tensor] = []
            inner.register_forward_pre_hook(lambda _m, args, inputs=inputs: inputs.append(args[0]))
            mixer(x)
        size = inputs[0].unflatten(-1, (HEADS, DIM))[:, :, -1]  # the slowest head
        sizes[mean] = float(size[:, -64:].mean() / size[:, :64].mean())
    assert 0.7 < sizes[True] < 1.4
    assert sizes[False] > 4.0


def test_gradients_reach_everything() -> None:
    for name in ("ssa", "sdsa"):
        mixer = build(name, decay="learned", token_shift=True, neuron={"name": "plif", "threshold": 0.3})
        mixer(text())[0].square().sum().backward()
        for path, parameter in mixer.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, path


def test_autocast_does_not_round_counts() -> None:
    """Bfloat16 holds integers to 256 only."""
    for causal in (True, False):
        mixer = build("ssa", mean=False, causal=causal).float()
        x = text(1, 2000).float()
        with torch.no_grad(), heard(mixer, "attention_neuron") as seen, torch.autocast("cpu", torch.bfloat16):
            mixer(x)
        o = seen["attention_neuron"]
        assert o.dtype == torch.float32 and o.max() > 512
        assert torch.equal(o, o.round()) and (o % 2).any()


def test_defaults_follow_the_model() -> None:
    """Spikes by default; none in a continuous twin, whose mixer is linear attention."""
    config = ModelConfig(vocab_size=11, hidden_size=D, num_hidden_layers=2, neuron={"name": "plif"})
    for spec in ({"name": "ssa"}, {"name": "sdsa"}, {"name": "ssa", "neuron": {"name": "lif"}}):
        layer = {"mixer": spec, "channel": {"name": "mlp"}}
        for made, spiking in ((config, True), (config.twin(), False)):
            whole = ModelConfig.from_dict({**made.to_dict(), "layers": [layer]})
            whole = whole if spiking else whole.twin()
            mixer = build_child(whole, 0, "blocks.0.", "mixer", "mixer", whole.layer(0)["mixer"])
            assert isinstance(mixer, (SSA, SDSA))
            assert all(
                mixer.get_submodule(f"{name}_neuron").spiking == spiking for name in ("query", "key", "value")
            )
            assert mixer.attention_neuron.spiking == (spiking and spec["name"] == "sdsa")


def test_decays_are_shifts() -> None:
    for heads, expected in ((1, [5]), (2, [1, 8]), (8, [1, 2, 3, 4, 5, 6, 7, 8])):
        mixer = build("ssa", num_heads=heads, decay="fixed")
        decays = mixer.log_decay(torch.zeros((), dtype=torch.float64)).exp()
        torch.testing.assert_close(decays, 1 - 2.0 ** -torch.tensor(expected, dtype=torch.float64))
        learned = build("ssa", num_heads=heads, decay="learned")
        with torch.no_grad():
            learned.decay_logit.copy_(build("ssa", num_heads=heads, decay="learned").decay_logit * 0 + 2)
        assert torch.allclose(learned.log_decay(decays), F.logsigmoid(torch.tensor(2.0).double()))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ssa", {"neuron": {"name": "adaptive"}}, "adaptive.*0 or 1.*heaviside"),
        ("ssa", {"decay": "slow"}, "decay is 'slow'; expected fixed, learned or null"),
        ("ssa", {"decay": "fixed", "causal": False}, "needs an order"),
        ("ssa", {"scale": 0.0}, "scale is 0.0; expected a positive"),
        ("ssa", {"num_heads": 3}, "num_heads 3 does not divide"),
        ("sdsa", {"version": 3}, "SDSA-3 and SDSA-4 are the mixer ssa"),
        ("sdsa", {"versoin": 1}, "versoin.*version"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(name, **options)


def test_an_encoder_has_no_step() -> None:
    mixer = build("ssa", causal=False)
    with pytest.raises(ConfigError, match="not causal"):
        mixer(text()[:, 0])
    assert all("memory" not in key for key in flatten(mixer.init_state(1)))
