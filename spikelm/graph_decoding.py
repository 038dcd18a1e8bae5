"""Decoding on GPUs: a model's step for a batch of sequences as one captured CUDA graph.

A step of a small batch is hundreds of kernels of a few microseconds, and launching them from Python takes
longer than running them. Captured once for each size of batch, they are replayed by one call. The interface
is that of :class:`spikelm.decoding.DecodePlan`: the state of every sequence lies in a slot of a pool, and a
batch is a list of slots.

A graph reads and writes the same memory in every replay, so tokens, slots and logits are fixed buffers. It
takes the rows of its slots out of the pool, runs the model's own step, and puts the new rows back. The pool
has one row more than slots: rows of a batch without a sequence (a negative slot, or padding up to the next
captured size) work on it and leave it as it was.

What was never run on a device: capturing and replaying. This was written on machines without a GPU, against
the documented interface of ``torch.cuda.graph``; the same class with ``capture=False``, all but those two
calls, is tested on CPUs, as is the search for values that a model reads on the host, which no graph can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from spikelm import state as states
from spikelm.errors import PlanError
from spikelm.kernels.int8_linear import in_out
from spikelm.recurrence import Context, Part
from spikelm.state import State
from spikelm.weights import Int8Linear, choose_layout

if TYPE_CHECKING:
    from spikelm.model import SpikeLM

WARM_UP = 3
"""Steps before a capture: kernels compile and libraries allocate, which a capture does not allow."""
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
CAPTURED = Context(static=True)


class GraphDecode:
    """A model's decode step on a pool of slots, captured per batch size.

    Args:
        model: in evaluation mode; on a CUDA device, or on any with ``capture=False``. Parameters must stay
            where they are (their values may change in place).
        slots: sequences that the pool holds.
        batch_sizes: sizes to capture; a batch runs in the smallest that holds it, the rest of it padding.
        max_len: tokens to make room for where memory grows.
        capture: whether to capture; False runs the same code call by call.

    Attributes:
        pool: the state of all slots, a tree of [slots + 1, ...] tensors; the last row is that of padding.

    Raises:
        PlanError: a model that cannot be captured (the message names the part and why), or sizes that cannot
            be.
    """

    def __init__(
        self,
        model: SpikeLM,
        slots: int,
        batch_sizes: Sequence[int] = BATCH_SIZES,
        max_len: int | None = None,
        capture: bool = True,
    ) -> None:
        """Allocate the pool, put every slot into the initial state, capture the largest batch first."""
        whole = [slots, *batch_sizes]
        if not batch_sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in whole):
            raise PlanError(f"slots is {slots!r}, batch_sizes {batch_sizes!r}; expected whole numbers from 1")
        self.device = next(model.parameters()).device
        if capture and self.device.type != "cuda":
            raise PlanError(
                f"CUDA graphs hold CUDA kernels and the model is on {self.device.type}; move it, use "
                "DecodePlan on CPUs, or capture=False"
            )
        if model.training:
            raise PlanError("the model is in training mode; call model.eval() before it is captured")
        self.slots, self.vocab_size, self._model = slots, model.config.vocab_size, model
        self._sizes = sorted(set(batch_sizes))
        with torch.no_grad():
            self._template = states.detach(model.init_state(1, max_len=max_len))
            self.pool = states.tree_map(
                lambda value: value.repeat(slots + 1, *[1] * (value.dim() - 1)), self._template
            )
            self._room = model.capacity(self._template)
            self._used = [0] * slots
            if capture:
                lay_out(model)
                found = host_read(model, self._template)
                if found is not None:
                    raise PlanError(f"the model's step cannot be captured: {found}")
            self._calls = {size: _Call(self, size) for size in reversed(self._sizes)}
            shared = None
            for call in self._calls.values() if capture else ():
                shared = call.capture(shared)

    def step(self, tokens: Tensor, slots: Tensor | None = None) -> Tensor:
        """One token of every row; the slots' states go on by it.

        Args:
            tokens: int64 [B], on any device.
            slots: int64 [B], where each row's sequence is, every slot at most once; a negative slot is a row
                that does nothing and gets logits of zero. None for 0 to B - 1. Values are checked in tensors
                on the CPU: looking at a GPU's would stop its queue. Where memory grows, slots must be on the
                CPU, because their tokens are counted.

        Returns:
            logits float32 (float64 for float64 models) [B, V], overwritten by the next call.

        Raises:
            PlanError: tokens or slots that do not fit; no state has changed.
        """
        if slots is None:
            slots = torch.arange(tokens.shape[0] if tokens.dim() == 1 else 0)
        used = self._check(tokens, slots)
        batch = tokens.shape[0]
        call = self._calls[min(size for size in self._sizes if size >= batch)]
        with torch.no_grad():
            logits = call(tokens, slots)[:batch]
        for slot in used if self._room is not None else ():
            self._used[slot] += 1
        return logits

    def write(self, slot: int, state: State) -> None:
        """Put a state of one sequence (batch 1, as the model returns it) into a slot.

        Raises:
            StateError: the state does not fit the model.
        """
        self._known(slot)
        state = states.unflatten(states.flatten(state), self._template)
        with torch.no_grad():
            _paired(self.pool, state, lambda pool, value: pool[slot].copy_(value[0]))
        if self._room is not None:
            flat = states.flatten(state)
            self._used[slot] = max(int(flat[name].max()) for name in flat if name.endswith("position"))

    def read(self, slot: int) -> State:
        """A copy of the state in a slot, as the model takes it (batch 1)."""
        self._known(slot)
        return states.tree_map(lambda value: value[slot : slot + 1].clone(), self.pool)

    def reset(self, slot: int) -> None:
        """Put a slot into the state before the first token."""
        self.write(slot, self._template)

    def _known(self, slot: int) -> None:
        if isinstance(slot, bool) or not isinstance(slot, int) or not 0 <= slot < self.slots:
            raise PlanError(f"slot is {slot!r}; the plan has slots 0 to {self.slots - 1}")

    def _check(self, tokens: Tensor, slots: Tensor) -> list[int]:
        """The slots in use, where they are known here."""
        for name, value in (("tokens", tokens), ("slots", slots)):
            if value.dtype != torch.int64 or value.dim() != 1:
                raise PlanError(f"{name} are {value.dtype} {list(value.shape)}; expected int64 [B]")
        if slots.shape != tokens.shape:
            raise PlanError(f"{slots.shape[0]} slots for {tokens.shape[0]} tokens; expected one for each")
        if not 1 <= tokens.shape[0] <= self._sizes[-1]:
            raise PlanError(
                f"a batch of {tokens.shape[0]}; expected 1 to {self._sizes[-1]}, the largest of batch_sizes"
            )
        used: list[int] = []
        if slots.device.type == "cpu":
            used = [slot for slot in slots.tolist() if slot >= 0]
            if max(used, default=0) >= self.slots:
                raise PlanError(f"slot {max(used)}; the plan has slots 0 to {self.slots - 1}")
            if len(set(used)) < len(used):
                raise PlanError(f"slots {slots.tolist()} name one twice; a slot holds one sequence")
        elif self._room is not None:
            raise PlanError(
                "this model's memory grows, so slots must be on the CPU, where tokens are counted"
            )
        for slot in used:
            if self._room is not None and self._used[slot] >= self._room:
                raise PlanError(
                    f"slot {slot} is full: its memory has room for {self._room} tokens; reset it, or build "
                    "the plan with a larger max_len"
                )
        if tokens.device.type == "cpu":
            wrong = (tokens < 0) | (tokens >= self.vocab_size)
            wrong &= slots >= 0 if slots.device.type == "cpu" else True
            if bool(wrong.any()):
                raise PlanError(
                    f"token {int(tokens[wrong][0])}; expected ids from 0 to {self.vocab_size - 1}"
                )
        return used


class _Call:
    """The step for one size of batch on its fixed buffers."""

    def __init__(self, plan: GraphDecode, size: int) -> None:
        self._plan, self._size = plan, size
        self._tokens = torch.zeros(size, dtype=torch.int64, device=plan.device)
        self._slots = torch.full((size,), -1, dtype=torch.int64, device=plan.device)
        self._graph: Any = None
        self._logits: Tensor | None = None

    def __call__(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """Logits [size, V] of a batch of at most ``size`` rows."""
        batch = tokens.shape[0]
        self._tokens[:batch].copy_(tokens, non_blocking=True)
        self._slots[:batch].copy_(slots, non_blocking=True)
        self._slots[batch:].fill_(-1)
        if self._graph is None:
            return self._run()
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def capture(self, shared: Any) -> Any:
        """Record the step; ``shared`` is the memory pool of another graph or None. Gives the pool.

        Every slot is negative meanwhile, so the pool of states stays as it is.
        """
        side = torch.cuda.Stream(self._plan.device)
        side.wait_stream(torch.cuda.current_stream(self._plan.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._run()
        torch.cuda.current_stream(self._plan.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=shared):
                self._logits = self._run()
        except RuntimeError as error:
            raise PlanError(f"the model's step cannot be captured: {error}") from error
        self._graph = graph
        return graph.pool() if shared is None else shared

    def _run(self) -> Tensor:
        """Rows out of the pool, the model's step, new rows back; nothing here looks at a value."""
        plan = self._plan
        active = self._slots >= 0
        rows = torch.where(active, self._slots, plan.slots)
        tokens = torch.where(active, self._tokens, 0)
        old = states.select_rows(plan.pool, rows)
        # A sequence of one token, so that its kernels are those of the prompt: see docs/int8.md.
        logits, new = plan._model(tokens[:, None], old, CAPTURED)
        new = states.where(active, new, old)
        _paired(plan.pool, new, lambda pool, value: pool.index_copy_(0, rows, value.to(pool.dtype)))
        logits = torch.where(active[:, None], logits[:, -1], 0.0)
        return logits if logits.dtype == torch.float64 else logits.float()


def lay_out(model: SpikeLM) -> int:
    """Lay int8 weights whose inputs were mostly silent out by rows of inputs, for event-driven reading.

    By ``model.firing``, what its checkpoint says of each projection. Values, shapes and results stay; there
    is one copy as before, with other strides. Packed weights (CPUs) have their own layout.

    Returns:
        Matrices that were laid out anew.
    """
    found = 0
    for path, silent in model.firing.items():
        linear = getattr(model.get_submodule(path), "linear", None)
        if isinstance(linear, Int8Linear) and linear.packed is None and choose_layout(silent) == "in_out":
            linear.weight = in_out(linear.weight)
            found += 1
    return found


def _paired(pool: State, state: State, action: Any) -> None:
    """Call ``action(pool tensor, state tensor)`` for every field."""
    other = states.flatten(state)
    for name, value in states.flatten(pool).items():
        action(value, other[name])


class _HostRead(Exception):
    """Something reads a value of a tensor on the host."""


class _NoHostReads(TorchDispatchMode):
    """Stops at an operation that waits for the device and gives a value, or a size, to Python."""

    WAITING = frozenset(
        {
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::equal",
            "aten::_unique2",
            "aten::unique_dim",
            "aten::unique_consecutive",
        }
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in self.WAITING:
            raise _HostRead(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


class _NoLists(TorchFunctionMode):
    """Stops at methods that read a tensor's memory without an operation of their own."""

    READING = frozenset({"tolist", "numpy", "cpu"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.READING:
            raise _HostRead(name)
        return func(*args, **(kwargs or {}))


def host_read(model: SpikeLM, state: State) -> str | None:
    """The first place where a step reads a value on the host, in words, or None.

    A graph cannot hold such a step: what is read there decides in Python, once, while capturing.

    Args:
        model: in evaluation mode.
        state: of one sequence; it is not changed.
    """
    token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    with torch.no_grad():
        model(token, state, CAPTURED)  # kernels compile here
        try:
            with _NoLists(), _NoHostReads():  # type: ignore[no-untyped-call]
                model(token, state, CAPTURED)
        except _HostRead as error:
            part, frame = "", error.__traceback__
            while frame is not None:
                owner = frame.tb_frame.f_locals.get("self")
                if isinstance(owner, Part) and owner.path:
                    part = f"{owner.path} ({type(owner).__name__})"
                frame = frame.tb_next
            return f"{part or 'the model'} reads a value on the host ({error})"
    return None
