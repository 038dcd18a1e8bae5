"""Decode plans: a model's step for one token of a batch as one C call, on CPUs.

The model lowers itself into an array of op records (:mod:`spikelm.kernels.plan`); the recurrent state lies in
a pool of slots, and a batch is a list of slots. See docs/decoding.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref
from typing import cast

import torch
from torch import Tensor, nn

from spikelm import state as states
from spikelm.block import lower_fire
from spikelm.errors import KernelError, PlanError
from spikelm.kernels.memory import Arena, aligned
from spikelm.kernels.plan.builder import Builder, Field, Fields, Register, fields
from spikelm.kernels.plan.observation import NUMBERS, Observation
from spikelm.kernels.plan.overrides import check_overrides
from spikelm.kernels.plan.records import STATISTICS, Plan, library
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.plan_weights import move_weights, pack_weights
from spikelm.recurrence import Part
from spikelm.state import State
from spikelm.weights import Int8Linear

_PROBLEMS = (
    "",
    "row {row} has token {token}; expected ids from 0 to {last_token}",
    "row {row} has slot {slot}; the plan has slots 0 to {last_slot} (a negative one leaves the row out)",
    "row {row} has slot {slot}, which an earlier row of the batch has too; a slot holds one sequence",
)
"""Sentences of the C enumeration ``problem``; what is full says so itself."""
_FULL = 4


class DecodePlan:
    """A model compiled for decoding.

    The model's float parameters move into one allocation of huge pages; they stay ordinary parameters. The
    plan holds their addresses: after they were changed or moved, :attr:`stale` is true and a new plan is
    needed. One plan is used by one thread at a time.

    Args:
        model: float32 (or int8) model on the CPU, in evaluation mode.
        slots: sequences that the pool holds, and the largest batch.
        max_len: tokens to make room for where memory grows (full attention).
        threads: threads inside projections; None for torch's number.

    Attributes:
        pool: uint8 [slots, bytes], everything the sequences remember.
        max_len: as given; None where no memory grows.

    Raises:
        PlanError: the model has a part that cannot be lowered; the message names it.
    """

    def __init__(
        self, model: SpikeLM, slots: int, max_len: int | None = None, threads: int | None = None
    ) -> None:
        """Lower the model, allocate the pool and put every slot into the initial state."""
        if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
            raise PlanError(f"slots is {slots!r}; expected a whole number of at least 1")
        self._threads = torch.get_num_threads() if threads is None else threads
        if isinstance(self._threads, bool) or not isinstance(self._threads, int) or self._threads < 1:
            raise PlanError(f"threads is {threads!r}; expected a whole number of at least 1")
        try:
            self._library = library()
        except KernelError as error:
            raise PlanError(f"decode plans are C: {error}") from error
        _check_model(model)
        self.slots, self.vocab_size = slots, model.config.vocab_size
        self.max_len = max_len if model.grows else None
        # Tensors of inference mode could not be trained, and the parameters are moved here.
        with torch.inference_mode(False), torch.no_grad():
            move_weights(model)
            pack_weights(model)
            initial = states.detach(model.init_state(1, max_len=max_len))
            self._template = initial
            state_fields, state_bytes = _layout(initial)
            builder = Builder(slots=slots, threads=self._threads)
            _lower(model, builder, state_fields)
            self._fields = {value.name: value for value in _leaves(state_fields)}
            self._weights = _weights(model)
            self._allocate(builder, state_bytes)
            for slot in range(slots):
                self.reset(slot)

    def _allocate(self, builder: Builder, state_bytes: int) -> None:
        records, limits, width = builder.finish()
        self._projections, self._kept = builder.projections, builder.kept
        self._refusals, self._observations = builder.refusals, builder.observations
        slots, workspaces = self.slots, 2 if builder.gathers else 1
        arena = Arena(aligned(slots * state_bytes) + aligned(4 * workspaces * slots * width))
        self.pool = arena.tensor((slots, state_bytes), torch.uint8)
        self._workspace = arena.tensor((workspaces * slots, width), torch.float32)
        self._statistics = torch.zeros(len(builder.projections), len(STATISTICS), dtype=torch.int64)
        self._scratch = torch.zeros(builder.scratch + 64, dtype=torch.uint8)
        self._seen = torch.zeros(slots, dtype=torch.int64)
        self._rows = torch.zeros(5, max(slots, 2), dtype=torch.int64)
        self._logits = torch.zeros(slots, self.vocab_size)
        self._plan = Plan(
            records=len(records),
            width=width,
            state_bytes=state_bytes,
            slots=slots,
            vocabulary=self.vocab_size,
            limits=builder.limits,
            outputs=self.vocab_size,
            record=records,
            limit=limits,
            workspace=self._workspace.data_ptr(),
            pool=self.pool.data_ptr(),
            statistics=self._statistics.data_ptr(),
            scratch=-(-self._scratch.data_ptr() // 64) * 64,
            seen=self._seen.data_ptr(),
            rows=self._rows.data_ptr(),
        )

    def step(self, tokens: Tensor, slots: Tensor | None = None) -> Tensor:
        """One token of every row; the slots' states go on by it.

        Args:
            tokens: int64 [B].
            slots: int64 [B], where each row's sequence is, every slot at most once; a negative slot is a row
                that does nothing and gets logits of zero. None for 0 to B - 1.

        Returns:
            logits float32 [B, V], overwritten by the next call.

        Raises:
            PlanError: tokens or slots that do not fit; no state has changed.
            StateError: a sequence has no room for another token; no state has changed.
        """
        batch = self._check(tokens, slots)
        problem = self._library.plan_step(
            byref(self._plan),
            batch,
            tokens.data_ptr(),
            None if slots is None else slots.data_ptr(),
            self._logits.data_ptr(),
            self._threads,
        )
        if problem == _FULL:
            self._refusals[int(self._rows[0, 1])]()
        if problem:
            raise PlanError(self._sentence(problem, tokens, slots))
        return self._logits[:batch]

    @property
    def threads(self) -> int:
        """Threads inside projections; fixed, because memory is reserved for so many."""
        return self._threads

    def write(self, slot: int, state: State) -> None:
        """Put a state of one sequence (batch 1, as the model returns it) into a slot.

        Raises:
            StateError: the state does not fit the model.
        """
        views = self._views(slot)
        flat = states.flatten(states.unflatten(states.flatten(state), self._template))
        for name, view in views.items():
            view.copy_(flat[name].detach()[0])

    def read(self, slot: int) -> State:
        """A copy of the state in a slot, as the model takes it (batch 1)."""
        flat = {name: view.clone()[None] for name, view in self._views(slot).items()}
        return states.unflatten(flat, self._template)

    def reset(self, slot: int) -> None:
        """Put a slot into the state before the first token."""
        self.write(slot, self._template)

    def statistics(self) -> dict[str, dict[str, int]]:
        """Per projection, since the plan was built: exact sums over all tokens of all rows.

        Returns:
            path -> calls (tokens), silent (inputs that were zero), magnitude (sum of |count|, 0 without
            spikes), bytes (of weights that were read), in_features, out_features.
        """
        return {
            entry.path: {
                **dict(zip(STATISTICS, numbers, strict=True)),
                "in_features": entry.in_features,
                "out_features": entry.out_features,
            }
            for entry, numbers in zip(self._projections, self._statistics.tolist(), strict=True)
        }

    def clear_statistics(self) -> None:
        """Begin counting again."""
        self._statistics.zero_()

    @contextmanager
    def metered(self, meter: Meter | None) -> Iterator[None]:
        """Count for a meter what the steps inside the block do; it is told when the block ends.

        Its figures are those of the model's own steps. Counting is one more pass over every input.

        Args:
            meter: to be told; None counts nothing. Rasters and subclasses of the meter want the model.
        """
        if meter is None:
            yield
            return
        for seen in self._observations:
            seen.clear()
        self._plan.observing = 1
        try:
            yield
        finally:
            self._plan.observing = 0
            for seen in self._observations:
                _tell(meter, seen)

    def stale(self, model: SpikeLM) -> bool:
        """Whether the model's weights were changed or moved since the plan was built."""
        return _weights(model) != self._weights

    def _check(self, tokens: Tensor, slots: Tensor | None) -> int:
        """Size of the batch."""
        for name, value in (("tokens", tokens), ("slots", slots)):
            if value is None:
                continue
            if value.dtype != torch.int64 or value.dim() != 1 or value.device.type != "cpu":
                raise PlanError(
                    f"{name} are {value.dtype} {list(value.shape)} on {value.device.type}; "
                    "expected int64 [B] on the CPU"
                )
            if not value.is_contiguous():
                raise PlanError(f"{name} are not contiguous; call .contiguous()")
        batch = tokens.shape[0]
        if slots is None and batch > self.slots:
            raise PlanError(f"{batch} rows for a plan of {self.slots} slots; build one with more slots")
        if slots is not None and slots.shape[0] != batch:
            raise PlanError(f"{slots.shape[0]} slots for {batch} tokens; expected one for each")
        if batch > self._logits.shape[0]:  # rows that are left out may exceed the slots
            self._logits = torch.zeros(batch, self.vocab_size)
        return batch

    def _sentence(self, problem: int, tokens: Tensor, slots: Tensor | None) -> str:
        row = int(self._rows[0, 0])
        return _PROBLEMS[problem].format(
            row=row,
            token=int(tokens[row]),
            slot=row if slots is None else int(slots[row]),
            last_token=self.vocab_size - 1,
            last_slot=self.slots - 1,
        )

    def _views(self, slot: int) -> dict[str, Tensor]:
        """The fields of a slot as tensors."""
        if isinstance(slot, bool) or not isinstance(slot, int) or not 0 <= slot < self.slots:
            raise PlanError(f"slot is {slot!r}; the plan has slots 0 to {self.slots - 1}")
        views: dict[str, Tensor] = {}
        for name, entry in self._fields.items():
            size = torch.Size(entry.shape).numel() * entry.dtype.itemsize
            data = self.pool[slot, entry.offset : entry.offset + size]
            views[name] = data.view(entry.dtype).view(entry.shape)
        return views


def _tell(meter: Meter, seen: Observation) -> None:
    """Add what was counted to a meter; nothing where no token came by (an expert that nobody chose)."""
    numbers = dict(zip(NUMBERS, seen.numbers.tolist(), strict=True))
    if numbers["tokens"]:
        meter.add(
            seen.path,
            spiking=seen.spiking,
            in_features=seen.in_features,
            out_features=seen.out_features,
            magnitude=float(seen.magnitude),
            fired=seen.fired.clone(),
            **numbers,
        )


def _check_model(model: SpikeLM) -> None:
    if type(model) is not SpikeLM:
        raise PlanError(f"the model is a {type(model).__name__}; decode plans are written for SpikeLM itself")
    if model.head is None:
        raise PlanError("the model has no head, so there are no tokens to decode")
    if model.training and model.config.dropout:
        raise PlanError("the model is in training mode with dropout; call model.eval() first")
    weight = model.embedding.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise PlanError(
            f"the model is {weight.dtype} on {weight.device.type}; "
            "decode plans run float32 and int8 models on the CPU"
        )
    for module in model.modules():
        check_overrides(module)


def _lower(model: SpikeLM, plan: Builder, state: Fields) -> None:
    """The records of a whole model."""
    D = model.config.hidden_size
    x = plan.register(D)
    plan.record("embed", x, D, p=(model.embedding.weight,))
    x = lower_fire(plan, model.embedding_neuron, x, state["embedding"])
    if model.embedding_norm is not None:
        x = plan.norm(model.embedding_norm, x)
    for layer, block in enumerate(model.blocks):
        x = plan.child(block, x, state[f"block{layer}"])
    head = cast(Part, model.head)
    logits: Register = plan.child(head, plan.norm(model.norm, x), state["head"])
    plan.record("output", logits, model.config.vocab_size)


def _layout(state: State) -> tuple[Fields, int]:
    """A field for every tensor of a state of one sequence, and the bytes of a slot."""
    used = 0

    def place(node: State, prefix: str) -> Fields:
        nonlocal used
        tree: dict[str, Field | Fields] = {}
        for name, value in node.items():
            if isinstance(value, dict):
                tree[name] = place(value, f"{prefix}{name}.")
                continue
            shape = tuple(value.shape[1:])
            tree[name] = Field(f"{prefix}{name}", used, shape, value.dtype)
            used += aligned(value[0].numel() * value.element_size())
        return tree

    tree = place(state, "")
    return tree, max(used, 64)


def _leaves(tree: Fields) -> list[Field]:
    found: list[Field] = []
    for value in tree.values():
        found += [value] if isinstance(value, Field) else _leaves(fields(value))
    return found


def _weights(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Address and version of every parameter and buffer."""
    tensors = [*model.parameters(), *model.buffers()]
    packed = (module.packed for module in model.modules() if isinstance(module, Int8Linear))
    return (
        *((tensor.data_ptr(), tensor._version) for tensor in tensors),
        *((matrix.pointer, 0) for matrix in packed if matrix is not None),
    )
