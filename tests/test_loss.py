"""The loss against plain cross-entropy: value and every gradient, chunked or not, with every option."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spikelm import loss as loss_module
from spikelm.config import ModelConfig
from spikelm.errors import ShapeError
from spikelm.loss import LossOutput, next_token_loss
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.randomness import CounterRandom
from spikelm.recurrence import Context
from spikelm.state import flatten

B, T, V, D = 3, 13, 37, 8
LIF = {"name": "lif", "tau": 2.0, "threshold": 0.3}


def model(**options: Any) -> SpikeLM:
    torch.manual_seed(1)
    built = SpikeLM(ModelConfig(vocab_size=V, hidden_size=D, num_hidden_layers=1, **options)).double()
    for parameter in built.parameters():  # nothing stays zero, so every gradient says something
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return built


def batch(ignored: float = 0.0) -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    return tokens, torch.where(torch.rand(B, T) < ignored, -100, targets)


def gradients(built: SpikeLM, loss: Tensor) -> dict[str, Tensor]:
    built.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in built.named_parameters()
    }


def plain(built: SpikeLM, tokens: Tensor, targets: Tensor, ctx: Context, l2wrap: float) -> Tensor:
    """The reference: all logits at once; L2Wrap as a loss that has its published gradient."""
    logits, _ = built(tokens, None, ctx)
    value = F.cross_entropy(logits.reshape(-1, V), targets.reshape(-1), ignore_index=-100)
    counted = targets != -100
    pull = 0.5 * l2wrap * (logits.max(-1).values ** 2 * counted).sum() / counted.sum()
    return value + pull - pull.detach()


@pytest.mark.parametrize("chunk", [0, 1, 4, 5, 13, 50])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("l2wrap", [0.0, 1e-2])
@pytest.mark.parametrize("options", [{}, {"head_neuron": LIF}, {"tie_word_embeddings": True}])
def test_value_and_gradients(chunk: int, ignored: float, l2wrap: float, options: dict[str, Any]) -> None:
    built = model(**options)
    tokens, targets = batch(ignored)
    ctx = Context(reset=torch.rand(B, T) < 0.2, valid=torch.rand(B, T) < 0.9)
    expected = plain(built, tokens, targets, ctx, l2wrap)
    wanted = gradients(built, expected)

    output = next_token_loss(built, tokens, targets, None, ctx, l2wrap=l2wrap, chunk_tokens=chunk)
    got = gradients(built, output.loss)

    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert int(output.count) == int((targets != -100).sum())
    assert output.nats.item() == pytest.approx(expected.item() * int(output.count), abs=1e-10)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert got["head.linear.weight" if "tie_word_embeddings" not in options else "embedding.weight"].any()


def test_state_after_chunks_is_the_whole_pass() -> None:
    built = model(head_neuron=LIF)
    tokens, targets = batch()
    _, state = built(tokens)
    chunked = next_token_loss(built, tokens, targets, chunk_tokens=4)
    expected, got = flatten(state), flatten(chunked.state)
    assert any(name.startswith("head.") for name in expected)
    torch.testing.assert_close(got, expected)


def test_incoming_state_is_used() -> None:
    built = model()
    tokens, targets = batch()
    first = next_token_loss(built, tokens[:, :6], targets[:, :6])
    second = next_token_loss(built, tokens[:, 6:], targets[:, 6:], first.state)
    whole = next_token_loss(built, tokens, targets)
    assert (first.nats + second.nats).item() == pytest.approx(whole.nats.item(), abs=1e-10)


@pytest.mark.parametrize("chunk", [0, 5])
def test_auxiliary_losses_are_added_and_handed_out(chunk: int) -> None:
    target = {"target": 0.2, "weight": 0.5}
    built = model(
        neuron={"name": "heaviside", "rate_target": target}, head_neuron={**LIF, "rate_target": target}
    )
    tokens, targets = batch()
    without = next_token_loss(built, tokens, targets, chunk_tokens=chunk)
    losses: list[Tensor] = []
    output = next_token_loss(built, tokens, targets, None, Context(losses=losses), chunk_tokens=chunk)
    assert without.aux.item() == 0.0
    assert losses and output.aux.item() == pytest.approx(sum(x.item() for x in losses))
    assert output.loss.item() == pytest.approx(without.loss.item() + output.aux.item())
    assert gradients(built, output.loss)["head.linear.weight"].isfinite().all()


@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_auxiliary_losses_of_chunks_are_weighted_by_length(chunk: int) -> None:
    """A loss that is linear in the tokens comes out the same, also where the last chunk is shorter."""
    built = model(head_neuron={"name": "heaviside"})
    original = built.head_logits

    def with_loss(h: Tensor, state: Any, ctx: Context) -> Any:
        logits, after = original(h, state, ctx)
        if ctx.losses is not None:
            ctx.losses.append((logits**2).mean())
        return logits, after

    built.head_logits = with_loss  # type: ignore[method-assign]
    tokens, targets = batch()
    found = []
    for width in (0, chunk):
        output = next_token_loss(built, tokens, targets, None, Context(losses=[]), chunk_tokens=width)
        found.append((output.aux.item(), gradients(built, output.loss)["head.linear.weight"]))
    assert found[0][0] > 0.0 and found[1][0] == pytest.approx(found[0][0], rel=1e-12)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-9, atol=1e-12)


def test_recomputation_is_not_metered() -> None:
    built = model(head_neuron={"name": "heaviside"})
    tokens, targets = batch()
    seen = {}
    for chunk in (0, 4):
        meter = Meter()
        next_token_loss(
            built, tokens, targets, None, Context(meter=meter), chunk_tokens=chunk
        ).loss.backward()
        seen[chunk] = meter.summary()["projections"]["head"]
    assert seen[0]["tokens"] == seen[4]["tokens"] == B * T
    assert seen[0]["firing_rate"] == pytest.approx(seen[4]["firing_rate"])


def test_nothing_to_predict_is_zero() -> None:
    built = model()
    tokens, targets = batch()
    output = next_token_loss(built, tokens, torch.full_like(targets, -100), l2wrap=1e-4)
    assert output.loss.item() == 0.0 and int(output.count) == 0
    assert all(not value.any() for value in gradients(built, output.loss).values())


def test_chunks_are_chosen_by_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    built = model()
    tokens, targets = batch()
    widths: list[int] = []
    original = built.head_logits

    def spy(h: Tensor, state: Any, ctx: Context) -> Any:
        widths.append(h.shape[1])
        return original(h, state, ctx)

    monkeypatch.setattr(built, "head_logits", spy)
    next_token_loss(built, tokens, targets)
    assert widths == [T]
    widths.clear()
    monkeypatch.setattr(loss_module, "LARGE_VOCABULARY", V - 1)
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 5 * V * B)
    with torch.no_grad():
        next_token_loss(built, tokens, targets)
    assert widths == [5, 5, 3]


def test_chunks_bound_the_memory_of_backward() -> None:
    """No tensor of [B * T, V] elements may be saved for backward."""
    built = model()
    tokens, targets = batch()
    sizes: list[int] = []

    def pack(value: Tensor) -> Tensor:
        sizes.append(value.numel())
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        next_token_loss(built, tokens, targets, chunk_tokens=4, l2wrap=1e-4)
    assert max(sizes) < B * T * V


def test_low_precision_logits_are_summed_in_fp32() -> None:
    built = model().float()
    tokens, targets = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output: LossOutput = next_token_loss(built, tokens, targets)
    assert output.loss.dtype == torch.float32 and math.isfinite(output.loss.item())


def test_dropout_does_not_depend_on_chunks() -> None:
    built = model(dropout=0.3)
    tokens, targets = batch()
    source = CounterRandom(seed=3, stream=torch.arange(B), position=torch.arange(T).expand(B, T))
    losses = [
        next_token_loss(built, tokens, targets, None, Context(random=source), chunk_tokens=chunk).loss.item()
        for chunk in (0, 3)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    assert losses[0] != next_token_loss(built, tokens, targets).loss.item()


def test_shapes_are_checked() -> None:
    tokens, targets = batch()
    with pytest.raises(ShapeError, match=r"\(3, 13\).*\(3, 12\)"):
        next_token_loss(model(), tokens, targets[:, :-1])
