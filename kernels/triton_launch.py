"""How a host function starts Triton kernels: on a device, or on paper, which lists what would be compiled.

The lists of configurations that are compiled ahead of time (``compilations(target)``) are made by the code
that launches, so that they cannot differ from what runs. What is not part of a listed configuration decides
nothing but addresses and the number of turns of a loop: heads, widths K and V (in whole tiles), strides.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from spikelm.errors import KernelError
from spikelm.kernels.ahead import Compilation
from spikelm.kernels.triton_targets import target_of

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
"""Triton's names of the element types."""
ALIGNMENT = 16  # bytes; Triton compiles another kernel for a pointer that is no multiple
SIDES = ("C", "BK", "SUB", "BV", "PARTS", "BLOCK")
"""Constants that are sides of tiles: they name a configuration."""
GATES = ("no gate", "head gates", "channel gates")
FLAGS = ("REVERSE", "STORE", "END", "OUTPUT")
MASKS = {"HAS_RESET", "HAS_VALID", "reset", "valid"}
"""Kernels are listed with both masks; without them they do less."""
COUNTS = {"G", "K", "V", "N", "KEY_BLOCKS", "PART", "PARTS"}
"""Constants that decide addresses and turns of loops; PARTS is also a side where a kernel holds all of K."""


class Device:
    """Where kernels run.

    Args:
        target: a name of TARGETS, which decides the tiles.
        processors: how many blocks run at once, at least.
    """

    def __init__(self, target: str, processors: int) -> None:
        self.target, self.processors = target, processors

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        constants: dict[str, Any],
        warps: int,
        stages: int,
    ) -> None:
        """Start a kernel; constants that it does not take are left out."""
        taken = {name: x for name, x in constants.items() if name in kernel.arg_names}
        kernel[grid](*arguments, num_warps=warps, num_stages=stages, **taken)


class Recorder(Device):
    """A device that runs nothing, and lists the configurations it was asked for in ``found``, by name.

    Args:
        op: first word of the names.
        target: a name of TARGETS.
        processors: see :class:`Device`.
    """

    def __init__(self, op: str, target: str, processors: int = 1) -> None:
        super().__init__(target, processors)
        self.op = op
        self.found: dict[str, Compilation] = {}

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        constants: dict[str, Any],
        warps: int,
        stages: int,
    ) -> None:
        """Note the configuration.

        Raises:
            KernelError: the name stands for another configuration already.
        """
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        signature = {name: _type(x) for name, x in given.items() if x is not None}
        fixed = {name: None for name, x in given.items() if x is None}
        fixed |= {name: x for name, x in constants.items() if name in kernel.arg_names}
        name = f"{self.op}_{kernel.__name__}[{_label(signature, fixed)}]"
        wanted = Compilation(
            kernel=kernel,
            name=name,
            signature=signature,
            constants=fixed,
            num_warps=warps,
            num_stages=stages,
        )
        before = self.found.setdefault(name, wanted)
        if _what_decides(before) != _what_decides(wanted):
            raise KernelError(
                f"{name} stands for two configurations: {_what_decides(before)} and {_what_decides(wanted)}"
            )


def _type(x: Tensor | int | float) -> str:
    if isinstance(x, Tensor):
        return f"*{TYPES[x.dtype]}"
    return "fp32" if isinstance(x, float) else "i32"


def _label(signature: dict[str, str], constants: dict[str, Any]) -> str:
    """Type of the first argument, sides of tiles, and the branches that the kernel takes."""
    words = [next(iter(signature.values()))[1:]]
    blocks = "KEY_BLOCKS" in constants  # then PARTS is a stride
    words += [f"{x}={constants[x]}" for x in SIDES if x in constants and not (blocks and x == "PARTS")]
    if "GATE" in constants:
        words.append(GATES[constants["GATE"]])
    words += [x.lower() for x in FLAGS if constants.get(x)]
    if "slots" in signature:
        words.append(signature["slots"][1:])
    if constants.get("N", 1) > 1:
        words.append("N>1")
    return ",".join(words)


def _what_decides(wanted: Compilation) -> tuple[Any, ...]:
    """All but masks, the sizes that decide addresses and turns, and the element types of what is stored."""
    constants = {name: str(x) for name, x in wanted.constants.items() if name not in COUNTS | MASKS}
    return wanted.num_warps, wanted.num_stages, constants, set(wanted.signature) - MASKS


@cache
def device_of(device: torch.device) -> Device:
    """The device of tensors; the interpreter (CPU tensors) counts as one large processor."""
    if device.type != "cuda":
        return Device(target_of(device), 1)
    return Device(target_of(device), torch.cuda.get_device_properties(device).multi_processor_count)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def compact(x: Tensor) -> Tensor:
    """The tensor, contiguous and at a multiple of 16 bytes: a copy where it is not."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def bytes_of(mask: Tensor | None) -> Tensor | None:
    """A bool mask as uint8, compact."""
    return None if mask is None else compact(mask).view(torch.uint8)


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that holds all of them: kernels are listed for inputs of one dtype."""
    found = tensors[0].dtype
    for x in tensors[1:]:
        found = torch.promote_types(found, x.dtype)
    return found


LARGEST_KEY = 256
WIDTHS = (64, 128, LARGEST_KEY)
"""Key channels, in whole tiles, that configurations are listed for; values come in multiples of the first."""


def refused(what: str, k: Tensor, *others: Tensor | None) -> str | None:
    """Why inputs with keys [.., K] are not for the Triton kernels, or None.

    Args:
        what: subject of the sentence, for example "Triton kernels".
        k: keys.
        others: the other inputs.
    """
    if any(x is not None and x.dtype == torch.float64 for x in (k, *others)):
        return f"{what} compute in float32 and an input is float64; use auto or torch"
    if k.shape[-1] > LARGEST_KEY:
        return f"{what} hold up to {LARGEST_KEY} key channels, got {k.shape[-1]}; use auto or torch"
    return None


def whole_tiles(key_dim: int, value_dim: int) -> tuple[int, int]:
    """K and V of the listed configurations that hold these: zeros are added, which change nothing."""
    key = next((width for width in WIDTHS if width >= key_dim), key_dim)
    return key, -(-value_dim // WIDTHS[0]) * WIDTHS[0]


def both_masks(x: Tensor, reset: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masks bool [B, T] for x [B, T, ..]: those given, else no resets, and all tokens valid."""
    shape = x.shape[:2]
    return (
        x.new_zeros(shape, dtype=torch.bool) if reset is None else reset,
        x.new_ones(shape, dtype=torch.bool) if valid is None else valid,
    )


def listed_dtype(*tensors: Tensor) -> torch.dtype:
    """bfloat16 where all are, else float32."""
    return torch.bfloat16 if {x.dtype for x in tensors} == {torch.bfloat16} else torch.float32


def copied(x: Tensor, dimension: int, copies: int) -> Tensor:
    """Every entry of a dimension this many times in a row."""
    return x if copies == 1 else x.repeat_interleave(copies, dimension)


def widened(x: Tensor, *widths: int) -> Tensor:
    """The tensor with zeros added behind its last dimensions up to these widths."""
    missing = [want - have for want, have in zip(widths, x.shape[-len(widths) :], strict=True)]
    return pad(x, [n for width in reversed(missing) for n in (0, width)]) if any(missing) else x


def listed(record: Callable[[Recorder], None], op: str, target: str) -> list[Compilation]:
    """What ``record`` launches on a device that one row fills, and on one that wants a text in segments."""
    paper = Recorder(op, target)
    for processors in (1, 1 << 16):
        paper.processors = processors
        record(paper)
    return list(paper.found.values())
