"""Softmax attention: independent references, published layers, the window's edge, sinks, growing memory."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import spikelm.attend
from spikelm import state as states
from spikelm.block import build_child
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError, ShapeError, StateError
from spikelm.model import SpikeLM
from spikelm.recurrence import Context, Part, scan
from spikelm.rope import rotate

NO_NEURON = {"name": "none"}


def make(name: str, D: int = 16, dtype: torch.dtype = torch.float64, sinks: int = 0, **options: Any) -> Part:
    """A mixer without neurons, with weights that make attention sharp."""
    config = ModelConfig(
        hidden_size=D, neuron=NO_NEURON, norm="rmsnorm", layer_norm_epsilon=1e-6, sink_tokens=sinks
    )
    part = build_child(config, 0, "blocks.0.", "mixer", "mixer", {"name": name, **options}).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in part.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * 1.5 * D**-0.5 if parameter.dim() == 2 else 1 + 0.3 * noise)
    return part


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain(part: Any, x: Tensor, window: int, kv: int, start: int = 0, theta: float = 10000.0) -> Tensor:
    """Masked softmax written out: one loop per head, the whole T x T matrix, repeated key heads."""
    B, T, _ = x.shape
    d = part.head_dim
    q, k, v = (getattr(part, name).linear(x) for name in ("query", "key", "value"))
    q, k, v = (y.view(B, T, -1, d) for y in (q, k, v))
    position = (start + torch.arange(T)).expand(B, T)
    q, k = rotate(q, position, theta=theta), rotate(k, position, theta=theta)
    row, column = torch.arange(T)[:, None], torch.arange(T)[None]
    hidden = (column > row) | (column <= row - window)
    outputs = []
    for head in range(q.shape[2]):
        group = head * kv // q.shape[2]
        score = q[:, :, head] @ k[:, :, group].transpose(1, 2) / math.sqrt(d)
        outputs.append(score.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, :, group])
    return part.output.linear(torch.cat(outputs, -1))


@pytest.mark.parametrize("block", [3, 256])
@pytest.mark.parametrize(
    ("name", "window"), [("swa", 1), ("swa", 5), ("swa", 16), ("swa", 64), ("attention", 10**9)]
)
@torch.no_grad()
def test_an_independent_masked_softmax(
    name: str, window: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spikelm.attend, "BLOCK", block)
    options = {"window": window} if name == "swa" else {}
    part, x = make(name, num_heads=4, num_kv_heads=2, **options), draw(2, 40, 16)
    expected = plain(part, x, window, kv=2)
    torch.testing.assert_close(part(x)[0], expected, rtol=1e-10, atol=1e-10)
    state = part.init_state(2, dtype=torch.float64, max_len=40)
    for start, stop in ((0, 1), (1, 18), (18, 19), (19, 40)):
        y, state = part(x[:, start:stop], state)
        torch.testing.assert_close(y, expected[:, start:stop], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [1, 4, 9])
@torch.no_grad()
def test_the_window_is_exact(window: int) -> None:
    """A token W back changes nothing, one W - 1 back does: over a whole sequence and across calls."""
    part, T = make("swa", window=window, num_heads=2), 24
    x, changed = draw(1, T, 16), 11
    other = x.clone()
    other[:, changed] += 1.0

    def decoded(x: Tensor) -> Tensor:
        state = part.init_state(1, dtype=torch.float64)
        _, state = part(x[:, : changed + 1], state)
        return torch.stack(
            [(r := part(x[:, t], state), state := r[1])[0][0] for t in range(changed + 1, T)], 1
        )

    differs = (part(x)[0] - part(other)[0]).abs().amax((0, 2)) > 1e-9
    assert differs.nonzero().flatten().tolist() == list(range(changed, changed + window))
    stepped = (decoded(x) - decoded(other)).abs().amax((0, 2)) > 1e-9
    assert stepped.nonzero().flatten().tolist() == list(range(window - 1))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# model type -> its theta, its scaling, other options of its configuration and ours
PUBLISHED: dict[str, tuple[float, dict[str, Any] | None, dict[str, Any], dict[str, Any]]] = {
    "qwen2": (1e6, None, {}, {"qkv_bias": True}),
    "qwen3": (1e6, None, {"head_dim": 16}, {"qk_norm": True, "head_dim": 16}),
    "llama": (5e5, LLAMA3, {}, {"rope_scaling": LLAMA3}),
}


@pytest.mark.parametrize("kind", PUBLISHED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@torch.no_grad()
def test_the_layers_of_transformers(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    from transformers import AutoConfig

    theta, scaling, theirs_too, ours_too = PUBLISHED[kind]
    config = AutoConfig.for_model(
        kind,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        attn_implementation="sdpa",  # the eager form takes its softmax in float32
        rope_parameters={**(scaling or {"rope_type": "default"}), "rope_theta": theta},
        **theirs_too,
    )
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    theirs = getattr(module, f"{kind.capitalize()}Attention")(config, 0).to(dtype)
    ours: Any = make("attention", 32, dtype, num_heads=4, num_kv_heads=2, rope_theta=theta, **ours_too)
    for seed, parameter in enumerate(theirs.parameters()):
        parameter.copy_(draw(*parameter.shape, seed=seed) * (0.3 if parameter.dim() == 2 else 1.0))
    for name, foreign in {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}.items():
        mine, linear = getattr(ours, name), getattr(theirs, foreign)
        mine.linear.weight.copy_(linear.weight)
        assert (mine.bias is None) == (linear.bias is None)
        if linear.bias is not None:
            mine.bias.copy_(linear.bias)
    if kind == "qwen3":
        ours.query_norm.weight.copy_(theirs.q_norm.weight)
        ours.key_norm.weight.copy_(theirs.k_norm.weight)
        if dtype == torch.float64:  # their norm computes in float32
            theirs.q_norm, theirs.k_norm = ours.query_norm, ours.key_norm
    T = 29
    x, position = draw(2, T, 32).to(dtype), torch.arange(T)[None]
    if dtype == torch.float64:  # the angles of transformers are float32: its layer is given exact ones
        angle = position[..., None].double() * exact_frequencies(config, scaling)
        turn = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    else:
        turn = getattr(module, f"{kind.capitalize()}RotaryEmbedding")(config)(x, position)
    mask = torch.full((T, T), -torch.inf, dtype=dtype).triu(1)[None, None]
    expected, _ = theirs(x, position_embeddings=turn, attention_mask=mask)
    torch.testing.assert_close(ours(x)[0], expected, rtol=tolerance, atol=tolerance)


def exact_frequencies(config: Any, scaling: dict[str, Any] | None) -> Tensor:
    """Radians per position in float64, from the formula of Llama 3.1 where it is scaled."""
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequency = config.rope_parameters["rope_theta"] ** -(torch.arange(0, d, 2).double() / d)
    if scaling is None:
        return frequency
    length, low, high = (
        scaling["original_max_position_embeddings"],
        scaling["low_freq_factor"],
        scaling["high_freq_factor"],
    )
    wave = 2 * math.pi / frequency
    smooth = (length / wave - low) / (high - low)
    between = (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
    slow = torch.where(wave > length / low, frequency / scaling["factor"], frequency)
    return torch.where((wave <= length / low) & (wave >= length / high), between, slow)


@torch.no_grad()
def test_far_into_a_text_float32_is_as_exact_as_at_its_start() -> None:
    """swa sees differences of positions only: at a million tokens its float32 outputs are those at zero."""
    part, x = make("swa", window=8, num_heads=2, dtype=torch.float32), draw(1, 30, 16).float()
    expected = make("swa", window=8, num_heads=2)(x.double())[0]
    near, _ = part(x)
    state = part.init_state(1)
    state["position"] = torch.tensor([1_000_000])
    _, state = part(draw(1, 8, 16, seed=4).float(), state)  # fills the window
    far, end = part(x, state)
    assert end["position"].item() == 1_000_038
    torch.testing.assert_close(near.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(far[:, 8:].double(), expected[:, 8:], rtol=0, atol=2e-5)


@torch.no_grad()
def test_packed_and_padded_rows_over_many_windows() -> None:
    """T much longer than the window, with documents and padding anywhere, in rows of different places."""
    part, T = make("swa", window=3, num_heads=4, num_kv_heads=1, qkv_bias=True), 70
    x, generator = draw(3, T, 16), torch.Generator().manual_seed(7)
    ctx = Context(
        reset=torch.rand(3, T, generator=generator) < 0.1, valid=torch.rand(3, T, generator=generator) < 0.8
    )
    state = part.init_state(3, dtype=torch.float64)
    state["position"] = torch.tensor([0, 2, 9])
    fast, slow = part(x, state, ctx), scan(part, x, state, ctx)
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-10, atol=1e-10)
    for name, value in states.flatten(fast[1]).items():
        torch.testing.assert_close(value, states.flatten(slow[1])[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["swa", "attention"])
@torch.no_grad()
def test_padding_that_is_not_a_number_reaches_nothing(name: str) -> None:
    part, x = make(name, num_heads=2, qkv_bias=True), draw(2, 9, 16)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, :3], valid[1, 4:6] = False, False
    clean, end = part(x, None, Context(valid=valid))
    dirty, last = part(x.masked_fill(~valid[..., None], torch.nan), None, Context(valid=valid))
    torch.testing.assert_close(clean, dirty)
    assert not dirty[~valid].any()
    assert torch.equal(states.flatten(end)["keys"], states.flatten(last)["keys"])


@torch.no_grad()
def test_the_window_costs_the_same_at_any_length() -> None:
    part = make("swa", window=6, num_heads=2, dtype=torch.float32)
    sizes, shapes = [], []
    state = part.init_state(1)
    for length in (1_000, 100_000):
        for _ in range(length // 1000 - int(state["position"].item()) // 1000):
            _, state = part(draw(1, 1000, 16).float(), state)
        assert state["position"].item() == length
        sizes.append(states.state_bytes(state))
        shapes.append({name: value.shape for name, value in states.flatten(state).items()})
    assert sizes[0] == sizes[1] == 2 * 6 * 16 * 4 + 8
    assert shapes[0] == shapes[1]


def test_scores_of_a_long_text_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """T much longer than the window: no product is wider than the window and a block."""
    widths: list[tuple[int, int]] = []
    product = spikelm.attend.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Tensor:
        widths.append((q.shape[2], k.shape[2]))
        return product(q, k, *rest, **options)

    monkeypatch.setattr(spikelm.attend, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(spikelm.attend, "BLOCK", 64)
    part = make("swa", window=16, num_heads=2, dtype=torch.float32)
    x = draw(1, 2000, 16).float().requires_grad_()
    part(x)[0].sum().backward()
    assert sum(queries for queries, _ in widths) == 2000
    assert max(keys for _, keys in widths) == 64 + 15
    assert x.grad is not None and x.grad.isfinite().all()


@torch.no_grad()
def test_slots_of_an_older_document_are_empty() -> None:
    part = make("swa", window=5, num_heads=2)
    reset = torch.zeros(1, 12, dtype=torch.bool)
    reset[:, 10] = True
    _, state = part(draw(1, 12, 16), None, Context(reset=reset))
    assert state["position"].item() == 2
    assert state["keys"][:, :2].any(-1).all()
    assert not state["keys"][:, 2:].any() and not state["values"][:, 2:].any()


@torch.no_grad()
def test_full_attention_says_when_its_room_is_used_up() -> None:
    part, x = make("attention", num_heads=2), draw(2, 9, 16)
    expected, _ = part(x)
    message = (
        r"token at position 6, and its state has room for 6 tokens \(capacity\); make room with .*reserve"
    )
    state = part.init_state(2, dtype=torch.float64, max_len=6)
    assert part.capacity(state) == 6
    with pytest.raises(StateError, match="position 8, and its state has room for 6"):
        part(x, state)
    y, state = part(x[:, :6], state)
    with pytest.raises(StateError, match=message):
        part(x[:, 6], state)
    with pytest.raises(StateError, match=message):
        part(x[:, 6:7], state)
    padding = Context(valid=torch.zeros(2, 1, dtype=torch.bool))
    part(x[:, 6:7], state, padding)  # takes no room
    larger = part.reserve(state, 9)
    assert part.capacity(larger) == 9 and part.capacity(part.reserve(larger, 3)) == 9
    assert part.capacity(state) == 6
    rest, _ = part(x[:, 6:], larger)
    torch.testing.assert_close(torch.cat([y, rest], 1), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(StateError, match="max_len=None"):
        part.init_state(2)


@torch.no_grad()
def test_a_reset_makes_the_room_free_again() -> None:
    part, x = make("attention", num_heads=2), draw(1, 12, 16)
    reset = torch.zeros(1, 12, dtype=torch.bool)
    reset[:, 6] = True
    y, state = part(x, part.init_state(1, dtype=torch.float64, max_len=6), Context(reset=reset))
    torch.testing.assert_close(y[:, 6:], part(x[:, 6:])[0], rtol=1e-10, atol=1e-10)
    assert state["position"].item() == 6


@pytest.mark.parametrize(("name", "window"), [("swa", 4), ("attention", 10**9)])
@pytest.mark.parametrize("block", [5, 256])
@torch.no_grad()
def test_sinks_see_each_other_and_are_seen_by_all(
    name: str, window: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the whole matrix: no causal mask among the sinks, no window towards them."""
    monkeypatch.setattr(spikelm.attend, "BLOCK", block)
    n, T = 3, 21
    options = {"window": window} if name == "swa" else {}
    part: Any = make(name, sinks=n, num_heads=2, **options)
    x = draw(2, n + T, 16)
    q, k, v = (getattr(part, p).linear(x).view(2, n + T, 2, 8) for p in ("query", "key", "value"))
    place = torch.arange(n + T).expand(2, -1)
    q, k = rotate(q, place), rotate(k, place)
    row, column = place[0][:, None], place[0][None]
    seen = (column < n) | ((row >= n) & (column <= row) & (column > row - window))
    score = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(8)
    o = torch.einsum("bhts,bshd->bthd", score.masked_fill(~seen, -math.inf).softmax(-1), v)
    expected = part.output.linear(o.flatten(2))

    fresh = part.init_state(2, dtype=torch.float64, max_len=T)
    y, state = part(x[:, :n], fresh, Context(sinks=True))
    torch.testing.assert_close(y, expected[:, :n], rtol=1e-10, atol=1e-10)
    assert state["position"].tolist() == [0, 0]
    whole, end = part(x[:, n:], state)
    torch.testing.assert_close(whole, expected[:, n:], rtol=1e-10, atol=1e-10)
    stepped, last = scan(part, x[:, n:], state, Context())
    torch.testing.assert_close(stepped, expected[:, n:], rtol=1e-10, atol=1e-10)
    assert states.flatten(end).keys() == states.flatten(last).keys() == states.flatten(fresh).keys()
    with pytest.raises(ShapeError, match="sink prefix of 2 tokens; expected 3"):
        part(x[:, :2], fresh, Context(sinks=True))


def test_gradients_reach_the_sinks_of_a_model() -> None:
    layers = (
        {"mixer": {"name": "swa", "window": 3, "num_heads": 2}, "channel": {"name": "rwkv"}},
        {"mixer": {"name": "attention", "num_heads": 2}, "channel": {"name": "rwkv"}},
    )
    model = SpikeLM(
        ModelConfig(
            vocab_size=11,
            hidden_size=16,
            num_hidden_layers=2,
            layers=layers,
            sink_tokens=2,
            neuron=NO_NEURON,
            initializer_range=0.5,
        )
    )
    tokens = torch.randint(0, 11, (2, 12))
    logits, _ = model(tokens)
    logits.square().sum().backward()
    assert model.sinks is not None and model.sinks.weight.grad is not None
    assert model.sinks.weight.grad.abs().min() > 0
    assert "sink_keys" in model.init_state(1, max_len=4)["block1"]["mixer"]


def test_without_sinks_there_is_no_place_for_them() -> None:
    assert "sink_keys" not in make("swa").init_state(1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("swa", {"window": 0}, "window is 0; expected a whole number of at least 1"),
        ("swa", {"windw": 4}, "did you mean 'window'"),
        ("attention", {"window": 4}, "unknown option of mixer 'attention' 'window'"),
        ("swa", {"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
        ("attention", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "unknown rope_type"),
        ("attention", {"num_heads": 16}, "1 of 1 features of a head would be rotated.*set rope: false"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, **options)


@torch.no_grad()
def test_bfloat16_in_chunks_and_steps_is_close_to_float32() -> None:
    exact = make("attention", num_heads=4, num_kv_heads=2, dtype=torch.float32)
    x = draw(2, 24, 16).float()
    expected, _ = exact(x)
    part = make("attention", num_heads=4, num_kv_heads=2, dtype=torch.float32).to(torch.bfloat16)
    state = part.init_state(2, max_len=24)
    first, state = part(x[:, :11].bfloat16(), state)
    steps, state = scan(part, x[:, 11:].bfloat16(), state, Context())
    y = torch.cat([first, steps], 1)
    assert y.dtype == torch.bfloat16 and state["keys"].dtype == torch.float32
    assert (y.float() - expected).norm() < 0.02 * expected.norm()
