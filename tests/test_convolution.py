"""The short convolution against torch's, and its refusals; masks and splits are in the contract tests."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spikelm.convolution import ShortConvolution
from spikelm.errors import ConfigError
from spikelm.recurrence import Context


@pytest.mark.parametrize("kernel", [2, 3, 4, 7])
@pytest.mark.parametrize("activation", ["silu", "none"])
def test_is_a_causal_depthwise_convolution(kernel: int, activation: str) -> None:
    D, T = 5, 11
    part = ShortConvolution(D, kernel, activation, bias=True).double()
    torch.nn.init.normal_(part.bias)
    peer = nn.Conv1d(D, D, kernel, groups=D, padding=kernel - 1).double()
    with torch.no_grad():
        peer.weight.copy_(part.weight[:, None])
        peer.bias.copy_(part.bias)
    x = torch.randn(2, T, D, dtype=torch.float64)
    expected = peer(x.mT)[..., :T].mT
    expected = nn.functional.silu(expected) if activation == "silu" else expected
    y, state = part(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state["window"], x[:, T - kernel + 1 :])


def test_invalid_tokens_are_passed_over_even_if_they_are_nan() -> None:
    part = ShortConvolution(3, 4)
    x = torch.randn(1, 9, 3)
    valid = torch.tensor([[True, False, True, True, False, False, True, True, False]])
    plain, end = part(x[:, valid[0]])
    poisoned = x.masked_fill(~valid[..., None], torch.nan).requires_grad_()
    y, state = part(poisoned, None, Context(valid=valid))
    torch.testing.assert_close(y[:, valid[0]], plain)
    assert (y[~valid] == 0).all()
    torch.testing.assert_close(state["window"], end["window"])
    (gradient,) = torch.autograd.grad(y.sum(), poisoned)
    assert torch.isfinite(gradient).all() and (gradient[~valid] == 0).all()


def test_a_document_shorter_than_the_window_leaves_zeros() -> None:
    part = ShortConvolution(2, 4)
    reset = torch.zeros(1, 6, dtype=torch.bool)
    reset[0, 5] = True
    x = torch.randn(1, 6, 2)
    _, state = part(x, None, Context(reset=reset))
    assert torch.equal(state["window"], torch.cat([torch.zeros(1, 2, 2), x[:, 5:]], 1))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="kernel of a short convolution is 1; expected at least 2"):
        ShortConvolution(4, 1)
    with pytest.raises(ConfigError, match="did you mean 'silu'"):
        ShortConvolution(4, 4, "sulu")
