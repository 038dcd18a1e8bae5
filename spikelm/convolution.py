"""Short convolution: every feature mixes its own last few tokens, before the heads of linear attention.

    y_t = act(sum_{j=0}^{n-1} w_j * x_{t-j} + b),   x before the first token of a document = 0

depthwise and causal, over the last n = ``kernel`` valid tokens (H3, arXiv 2212.14052; Mamba, arXiv
2312.00752). State: {"window": [B, n - 1, D]}, the last tokens, oldest first. Deviation: none; the weights lie
as [D, n] with w_j in column n - 1 - j, as ``nn.Conv1d`` holds them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikelm.activations import silu
from spikelm.errors import ConfigError, nearest
from spikelm.kernels.plan.builder import a_field
from spikelm.recurrence import Context, Part, compacted, memory_dtype, zero_invalid
from spikelm.state import State

if TYPE_CHECKING:
    from spikelm.kernels.plan.builder import Builder, Fields, Register

ACTIVATIONS = ("silu", "none")


class ShortConvolution(Part):
    """Depthwise causal convolution.

    Args:
        features: D.
        kernel: tokens that are mixed, the current one included; at least 2.
        activation: ``silu`` or ``none``.
        bias: whether to add a bias before the activation.

    Raises:
        ConfigError: a kernel below 2 or an unknown activation.
    """

    shard = "column"
    """Tensor parallelism splits the features with the projection in front."""
    vector_parameters = ("weight",)
    """Optimisers treat them as vectors: a filter per feature."""

    def __init__(self, features: int, kernel: int, activation: str = "silu", bias: bool = False) -> None:
        """Weights as ``nn.Conv1d`` draws them, uniform in +-kernel^-1/2; a bias of zero."""
        super().__init__()
        if kernel < 2:
            raise ConfigError(f"the kernel of a short convolution is {kernel}; expected at least 2 tokens")
        if activation not in ACTIVATIONS:
            raise ConfigError(nearest("activation of a short convolution", activation, ACTIVATIONS))
        self.kernel, self.activation = kernel, activation
        self.weight = nn.Parameter(torch.empty(features, kernel).uniform_(-(kernel**-0.5), kernel**-0.5))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        """No tokens yet: zeros."""
        shape = (batch, self.kernel - 1, self.weight.shape[0])
        return {"window": torch.zeros(shape, device=device, dtype=dtype or torch.float32)}

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One token, [B, D] -> [B, D]: the weighted sum over the window and the token."""
        window = torch.cat([cast(Tensor, state["window"]), x[:, None].to(memory_dtype(x))], 1)
        y = (window.to(x.dtype) * self.weight.to(x.dtype).T).sum(1)
        return self._activate(y), {"window": window[:, 1:]}

    def sequence(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """T tokens, [B, T, D] -> [B, T, D], a sum of ``kernel`` shifted copies."""
        if x.shape[1] == 0:
            return x, state
        batch, device, dtype = x.shape[0], x.device, memory_dtype(x)
        return compacted(self._run, x, state, ctx, lambda: self.init_state(batch, device, dtype))

    def _run(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """With invalid tokens only at the right end."""
        B, T, _ = x.shape
        if ctx.valid is not None:
            x = zero_invalid(x, ctx)
        past = self.kernel - 1
        memory = memory_dtype(x)
        tokens = torch.cat([cast(Tensor, state["window"]).to(memory), x.to(memory)], 1)
        document = None
        if ctx.reset is not None:
            # Documents are numbered; the window belongs to the one that was under way.
            document = F.pad(ctx.reset.long().cumsum(1), (past, 0))
        weight = self.weight.to(x.dtype)
        y = x * weight[:, past]
        for back in range(1, self.kernel):
            shifted = tokens[:, past - back : past - back + T].to(x.dtype)
            if document is not None:
                other = document[:, past - back : past - back + T] != document[:, past:]
                shifted = shifted.masked_fill(other[..., None], 0.0)
            y = y + shifted * weight[:, past - back]
        y = self._activate(y)
        count = x.new_full((B,), T, dtype=torch.long) if ctx.valid is None else ctx.valid.sum(1)
        last = count[:, None] + torch.arange(past, device=x.device)
        window = tokens.gather(1, last[..., None].expand(B, past, tokens.shape[-1]))
        if document is not None:
            other = document.gather(1, last) != document[:, -1:]
            window = window.masked_fill(other[..., None], 0.0)
        return zero_invalid(y, ctx), {"window": window}

    def lower(self, plan: Builder, x: Register, state: Fields) -> Register:
        """One token."""
        y = plan.register(x.width)
        plan.record(
            "convolve",
            x,
            y,
            x.width,
            self.kernel - 1,
            a_field(state["window"]),
            p=(self.weight.T, self.bias),
            flags=int(self.activation == "silu"),
        )
        return y

    def _activate(self, y: Tensor) -> Tensor:
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return silu(y) if self.activation == "silu" else y
