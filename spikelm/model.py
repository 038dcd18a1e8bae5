"""The core model: embedding, blocks, norm, head, and one state for all of them.

A plain nn.Module: training, evaluation and serving use it, ``hf.py`` wraps it. Features: any registered
mixer and channel per layer, neurons before every projection or after every part, binary or dense embedding,
tied or untied head, learned sink tokens before every text, gradient checkpointing, packed documents (reset),
padding (valid), one function for training and decoding.
"""

from __future__ import annotations

import re
from dataclasses import replace
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spikelm import state as states
from spikelm.block import Block, fire, make_projection
from spikelm.config import ModelConfig
from spikelm.errors import ConfigError, ShapeError, StateError, nearest
from spikelm.initialisation import initialise
from spikelm.neurons.base import build_neuron
from spikelm.norms import make_norm
from spikelm.projection import Projection
from spikelm.recurrence import EMPTY, Context, Part, zero_invalid
from spikelm.segments import in_segments
from spikelm.sinks import Sinks
from spikelm.state import State
from spikelm.weights import Int8Linear


class SpikeLM(nn.Module):
    """Spiking language model.

    Args:
        config: what to build.
        with_head: false for a body without head (classification).

    Attributes:
        gradient_checkpointing: recompute every block in backward instead of keeping its activations.
        firing: path of a projection -> share of its input counts that were silent when that was measured
            (``spikelm convert spike``); what int8 weights are laid out by.
    """

    def __init__(self, config: ModelConfig, with_head: bool = True) -> None:
        """Build and initialise (from torch's global generator); on the meta device nothing is drawn."""
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, D)
        self.embedding_neuron = build_neuron(config.embedding_neuron, D)
        self.embedding_norm = make_norm(config, D) if config.embedding_norm else None
        self.sinks = Sinks(config.sink_tokens, D) if config.sink_tokens else None
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = make_norm(config, D)
        self.head = make_projection(config, "", "head", D, config.vocab_size, False) if with_head else None
        self.gradient_checkpointing = False
        self.firing: dict[str, float] = {}
        for name, module in self.named_modules():
            if isinstance(module, Part):
                module.path = name
        self._check_overrides()
        self._check_causal(with_head)
        initialise(self)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head use the embedding's weights where the configuration says so."""
        if self.head is not None and self.config.tie_word_embeddings:
            self.head.linear.weight = self.embedding.weight

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        """State before the first token, on the weights' device, in float32 (float64 for float64 weights).

        With sink tokens it is the state after them: gradients reach them through it.

        Args:
            batch: number of sequences.
            device: of the tensors.
            dtype: of the memory.
            max_len: tokens to make room for where memory grows (see :attr:`grows`), sinks not counted.
        """
        if self.sinks is None:
            return self.empty_state(batch, device, dtype, max_len)
        state = self.empty_state(1, device, dtype, max_len)
        x, ctx = self.sinks(), replace(EMPTY, sinks=True)
        for (block, own), name in zip(self._blocks_with(state), _names(self.blocks), strict=True):
            x, state[name] = block(x, own, ctx)
        return states.select_rows(state, torch.zeros(batch, dtype=torch.int64, device=x.device))

    def empty_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_len: int | None = None,
    ) -> State:
        """The shapes of a state, without the sinks: what ``init_state`` gives where there are none."""
        weight = self.embedding.weight
        device = weight.device if device is None else device
        dtype = (
            (torch.float64 if weight.dtype == torch.float64 else torch.float32) if dtype is None else dtype
        )
        state: State = {"embedding": self.embedding_neuron.init_state(batch, device, dtype, max_len)}
        for name, block in zip(_names(self.blocks), self.blocks, strict=True):
            state[name] = cast(Block, block).init_state(batch, device, dtype, max_len)
        if self.head is not None:
            state["head"] = self.head.init_state(batch, device, dtype, max_len)
        return state

    @property
    def grows(self) -> bool:
        """Whether some part's memory needs room for every token (full attention)."""
        return any(isinstance(module, Part) and module.grows for module in self.modules())

    def capacity(self, state: State) -> int | None:
        """Tokens for which a state has room; None where nothing grows."""
        found = [block.capacity(own) for block, own in self._blocks_with(state)]
        return min((size for size in found if size is not None), default=None)

    def reserve(self, state: State, max_len: int) -> State:
        """The same state with room for ``max_len`` tokens where memory grows (never less than before)."""
        new = dict(state)
        for name, (block, own) in zip(_names(self.blocks), self._blocks_with(state), strict=True):
            new[name] = block.reserve(own, max_len)
        return new

    def _blocks_with(self, state: State) -> list[tuple[Block, State]]:
        return [
            (cast(Block, block), cast(State, state[name]))
            for name, block in zip(_names(self.blocks), self.blocks, strict=True)
        ]

    def forward(
        self, tokens: Tensor, state: State | None = None, ctx: Context = EMPTY, last_only: bool = False
    ) -> tuple[Tensor, State]:
        """Logits of the next token.

        Args:
            tokens: int64 [B, T], or [B] for a single step.
            state: state before the first token; None for the initial one.
            ctx: reset and valid (in tokens' shape), meter, random source, auxiliary losses.
            last_only: logits of every row's last valid token only, [B, 1, V] (zero for a row without one; a
                head without memory is not run on the others).

        Returns:
            logits [B, T, V] (or [B, V]) and the state after the last token.

        Raises:
            ShapeError: if tokens, reset or valid have another shape.
        """
        if tokens.dim() == 1 and (ctx.reset is not None or ctx.valid is not None):
            self._check(tokens, state, ctx)
            logits, state = self.forward(tokens[:, None], state, _one_column(ctx))
            return logits[:, 0], state
        h, state = self.hidden(tokens, state, ctx)
        if not last_only or h.dim() == 2:
            return self.head_logits(h, state, ctx)
        if not state.get("head"):
            h, ctx = _last_valid(h, ctx), replace(ctx, reset=None, valid=None)
            return self.head_logits(h, state, ctx)
        logits, state = self.head_logits(h, state, ctx)
        return _last_valid(logits, ctx), state

    def hidden(
        self, tokens: Tensor, state: State | None = None, ctx: Context = EMPTY
    ) -> tuple[Tensor, State]:
        """Normalised features before the head, [B, T, D] (or [B, D]); the head's state is passed on."""
        self._check(tokens, state, ctx)
        initial = None
        if state is None:
            initial = self.init_state(tokens.shape[0], tokens.device, max_len=self._length(tokens))
            state = initial
        if self.sinks is not None and tokens.dim() == 2:
            return in_segments(self, tokens, state, ctx, initial)
        return self.features(tokens, state, ctx)

    def features(self, tokens: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """:meth:`hidden` in one pass: for a model without sinks, or tokens without reset."""
        new: State = {}
        try:
            x = self.embedding(tokens)
        except IndexError as error:
            low, high = int(tokens.min()), int(tokens.max())
            raise ShapeError(
                f"token ids from {low} to {high}; expected 0 to {self.config.vocab_size - 1}"
            ) from error
        x, new["embedding"] = fire(self.embedding_neuron, x, state["embedding"], ctx)
        x = x.to(self.embedding.weight.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled() and x.dim() == 3
        for name, (block, before) in zip(_names(self.blocks), self._blocks_with(state), strict=True):
            x, new[name] = _checkpointed(block, x, before, ctx) if recompute else block(x, before, ctx)
            x = self._dropout(x, block.path, ctx)
        if "head" in state:
            new["head"] = state["head"]
        return zero_invalid(self.norm(x), ctx) if x.dim() == 3 else self.norm(x), new

    def head_logits(self, h: Tensor, state: State, ctx: Context = EMPTY) -> tuple[Tensor, State]:
        """Logits [.., V] of features [.., D]; a head with a stateful neuron must see every token in order."""
        if self.head is None:
            raise ShapeError("this model was built without a head; build it with with_head=True")
        logits, head = self.head(h, state["head"], ctx)
        return logits, {**state, "head": head}

    def num_parameters(self) -> int:
        """Parameters, shared ones once, int8 weights (which torch holds as buffers) included."""
        return sum(parameter.numel() for parameter in self.parameters()) + sum(
            module.out_features * module.in_features
            for module in self.modules()
            if isinstance(module, Int8Linear)
        )

    def fp32_parameters(self) -> set[str]:
        """Names of decays, time constants and neuron parameters, which stay float32 in low precision."""
        names: set[str] = set()
        for prefix, module in self.named_modules():
            for name in getattr(module, "full_precision", ()):
                value = attrgetter(name)(module)
                # A router may be int8, a bias be left out.
                if value is not None and value.is_floating_point():
                    names.add(f"{prefix}.{name}")
            if prefix.endswith("neuron"):
                names |= {f"{prefix}.{name}" for name, _ in module.named_parameters()}
        return names

    @staticmethod
    def _length(tokens: Tensor) -> int:
        return tokens.shape[1] if tokens.dim() == 2 else 1

    def _check_causal(self, with_head: bool) -> None:
        """A language model must not see the tokens it predicts."""
        for name, module in self.named_modules():
            if with_head and isinstance(module, Part) and not module.causal:
                raise ConfigError(
                    f"{name} is not causal, and a language model would see the tokens it predicts; set "
                    "causal: true, or build an encoder (with_head=False, text classification)"
                )

    def _check_overrides(self) -> None:
        """Every pattern of neuron_overrides and weight_overrides must name a projection."""
        paths = [name for name, module in self.named_modules() if isinstance(module, Projection)]
        paths += [] if self.head is not None else ["head"]
        for key in ("neuron_overrides", "weight_overrides"):
            for pattern in getattr(self.config, key):
                if not any(fnmatchcase(path, pattern) for path in paths):
                    # One name for all blocks and experts: a large mixture has thousands of projections.
                    known = {re.sub(r"\.\d+(?=\.)", ".*", path) for path in paths}
                    raise ConfigError(nearest(f"projection in {key}", pattern, known))

    def _dropout(self, x: Tensor, path: str, ctx: Context) -> Tensor:
        p = self.config.dropout
        if p == 0.0 or ctx.random is None or not self.training:
            return x
        keep = ctx.random.uniform(f"{path}.dropout", x.shape[-1]) >= p
        return x * keep.to(x.dtype) / (1.0 - p)

    def _check(self, tokens: Tensor, state: State | None, ctx: Context) -> None:
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"tokens are {tokens.dtype}; expected token ids, torch.int64")
        if tokens.dim() not in (1, 2) or tokens.numel() == 0:
            raise ShapeError(
                f"tokens are {tuple(tokens.shape)}; expected [B, T] or [B], with at least one token"
            )
        if state is not None:
            rows = states.batch_size(state)
            if rows is not None and rows != tokens.shape[0]:
                raise StateError(
                    f"the state holds {rows} sequences and tokens {tokens.shape[0]}; expected equal"
                )
        for name, mask in (("reset", ctx.reset), ("valid", ctx.valid)):
            if mask is not None and (mask.shape != tokens.shape or mask.dtype != torch.bool):
                raise ShapeError(
                    f"{name} is {tuple(mask.shape)} {mask.dtype}; expected {tuple(tokens.shape)} torch.bool"
                )


def _names(blocks: nn.ModuleList) -> list[str]:
    """Keys of the blocks' states."""
    return [f"block{layer}" for layer in range(len(blocks))]


def _one_column(ctx: Context) -> Context:
    """The context of a single step, as that of a sequence of one token."""
    random = ctx.random
    return replace(
        ctx,
        reset=None if ctx.reset is None else ctx.reset[:, None],
        valid=None if ctx.valid is None else ctx.valid[:, None],
        random=None if random is None else replace(random, position=random.position[:, None]),
    )


def _last_valid(y: Tensor, ctx: Context) -> Tensor:
    """Every row's last valid column, y [B, T, D] -> [B, 1, D]; the last one (zero) where none is valid."""
    if ctx.valid is None:
        return y[:, -1:]
    columns = torch.arange(y.shape[1], device=y.device)
    last = torch.where(ctx.valid, columns, -1).amax(1) % y.shape[1]
    return y.take_along_dim(last[:, None, None], 1)


def _checkpointed(block: Block, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
    """The block with its activations recomputed in backward; nothing is counted a second time."""
    first = True

    def run(x: Tensor, state: State) -> tuple[Tensor, State, list[Tensor]]:
        nonlocal first
        losses: list[Tensor] = []
        inner = replace(
            ctx,
            meter=ctx.meter if first else None,
            losses=None if ctx.losses is None else losses,
            loads=ctx.loads if first else None,
        )
        first = False
        y, new = block(x, state, inner)
        return y, new, losses

    y, new, losses = checkpoint(run, x, state, use_reentrant=False)
    if ctx.losses is not None:
        ctx.losses.extend(losses)
    return y, new
