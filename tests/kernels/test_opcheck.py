"""Every registered custom op passes torch's own checks, with arguments as the public functions give them.

The ops are found in torch's registry, and their arguments by listening to calls of every public function,
forward and backward: a new op that no call here reaches fails.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from spikelm.errors import KernelError
from spikelm.kernels import dispatch
from spikelm.kernels.compile import compiler_command
from spikelm.kernels.dispatch import use_backend
from spikelm.kernels.event_linear import event_linear
from spikelm.kernels.gated_delta import gated_delta, gated_delta_decode
from spikelm.kernels.gla import gla, gla_decode
from spikelm.kernels.int8_linear import int8_linear
from spikelm.kernels.int8_linear.packing import LAYOUTS, PackedInt8
from spikelm.kernels.lif import lif, lif_decode
from spikelm.kernels.wkv4 import initial_state, wkv4, wkv4_decode

from . import test_library_rules as rules
from .conftest import skip_without_c

STEPS = 4


def _load_all() -> bool:
    """Import every file of every op, which registers its custom ops; whether Triton's were among them."""
    folder = Path(dispatch.__file__).parent
    with_triton = importlib.util.find_spec("triton") is not None
    for file in sorted(folder.rglob("*.py")):
        if file.stem.startswith("triton") and not with_triton:
            continue
        path = file.relative_to(folder).with_suffix("").parts
        importlib.import_module(
            ".".join(("spikelm", "kernels", *(part for part in path if part != "__init__")))
        )
    return with_triton


TRITON = _load_all()
REGISTERED = sorted(
    name.removeprefix("spikelm::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("spikelm::")
)


class Listener(TorchDispatchMode):
    """Keeps the arguments of the first calls of every op of ours, as they were before the call."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: dict[str, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "spikelm":
            calls = self.heard.setdefault(func._schema.name.removeprefix("spikelm::"), [])
            calls.append((func, tree_map(_copy, args), tree_map(_copy, kwargs)))
        return func(*args, **kwargs)


def _copy(x: Any) -> Any:
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def _without_gradient(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _call_everything(form: str, device: str) -> None:
    """Every public function on one back-end, with gradients where there are any, with and without masks."""
    reset, valid = torch.zeros(rules.B, STEPS, dtype=torch.bool), torch.ones(rules.B, STEPS, dtype=torch.bool)
    reset[0, 2] = valid[-1, -1] = True
    valid[0, 0] = False
    masks = {"reset": reset.to(device), "valid": valid.to(device)}
    masked = {
        "lif": lambda *x: lif(*x, **masks),
        "wkv4": lambda *x: wkv4(*x, **masks),
        "gla": lambda *x: gla(*x, scale=0.5, **masks),
        "gated_delta": lambda *x: gated_delta(*x, scale=0.5, **masks),
    }
    table = rules.calls(STEPS)
    head = table["gla"]
    table["gla_of_heads"] = ("gla", head[1], (*head[2][:3], head[2][3][..., :1], head[2][4]))
    table |= {f"{name} masked": (name, call, table[name][2]) for name, call in masked.items()}
    for op, call, given in table.values():
        if form not in dispatch.OPS[op]:
            continue
        learns = op not in ("rowwise", "shift_encode")
        leaves = [x.to(device).requires_grad_(learns and x.is_floating_point()) for x in given]
        outputs = [y for y in rules.tensors_of(call(*leaves)) if y.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
    _decode(device)
    counts, weight, scales = rules.counts(3, 20), rules.counts(8, 20), torch.rand(8, 2)
    int8_linear(*(x.to(device) for x in (counts, weight, scales)), 16)
    if form == "triton":
        event_linear(torch.randn(1, 10).to(device), torch.randn(10, 24).to(device))
    if form == "c":  # where nothing traces them the public functions take a shorter way than these
        ours = torch.ops.spikelm
        ours.int8_linear(counts, weight, scales, 16)
        ours.int8_sums(counts, weight, 16)
        for layout in LAYOUTS:
            packed = PackedInt8(weight, scales, 16, layout)
            sizes = (8, 20, 16, layout, True)
            ours.int8_packed(counts, packed.memory, *sizes, torch.rand(3, 1), torch.rand(8))


@torch.no_grad()
def _decode(device: str) -> None:
    """One token on a pool of states."""
    B, H, K, C = rules.B, rules.H, rules.K, rules.C
    slots, pool = torch.tensor([2, -1][:B]).to(device), torch.randn(3, H, K, K).to(device)
    q, k, v = (torch.randn(B, H, K).to(device) for _ in range(3))
    gla_decode(q, k, v, -torch.rand_like(q), pool, slots, scale=0.5)
    strength = torch.rand(B, H).to(device)
    gated_delta_decode(q, k, v, -strength, strength, pool, slots, scale=0.5)
    x, rate = torch.randn(B, C).to(device), torch.rand(C).to(device)
    lif_decode(x, torch.zeros(3, C).to(device), slots, rate)
    wkv4_decode(rate, rate, x, x, initial_state(3, C).to(device), slots)


@pytest.fixture(scope="module")
def heard() -> Iterator[dict[str, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]]:
    """Arguments of every op that the public functions reach on this machine."""
    forms = [("torch", "cpu")]
    try:
        compiler_command()
        forms.append(("c", "cpu"))
    except KernelError:
        pass
    if TRITON:
        forms.append(("triton", "cuda" if torch.cuda.is_available() else "cpu"))
    sizes = {"B": 2, "C": 10, "H": 2, "K": 16}
    before = {name: getattr(rules, name) for name in sizes}
    for name, value in sizes.items():
        setattr(rules, name, value)
    listener = Listener()
    try:
        for form, device in forms:
            with use_backend(form), torch.enable_grad(), listener:
                _call_everything(form, device)
    finally:
        for name, value in before.items():
            setattr(rules, name, value)
    yield listener.heard


def test_there_are_ops() -> None:
    assert {"encode_int8", "decode_int8", "planes_expand", "shift_encode", "wkv4_backward"} <= set(REGISTERED)


def test_every_op_is_reached(heard: dict[str, list[Any]]) -> None:
    """A new op without a public call here fails."""
    skip_without_c("lif")
    missing = set(REGISTERED) - set(heard)
    assert not missing, f"no call here reaches {sorted(missing)}: add a public call that does"


INTERPRETED = pytest.mark.slow  # the interpreter takes seconds for each


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=INTERPRETED) if "triton" in name else name for name in REGISTERED]
)
def test_opcheck(name: str, heard: dict[str, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]) -> None:
    if name not in heard:
        pytest.skip("not reached: test_every_op_is_reached tells whether it should be")
    calls = heard[name]
    learns = OPDEFS[f"spikelm::{name}"]._backward_fn is not None
    for func, args, kwargs in (calls[0], calls[-1])[: len(calls)]:
        # A backward pass is given leaves of the forward one; it is not differentiated itself.
        args, kwargs = (args, kwargs) if learns else tree_map(_without_gradient, (args, kwargs))
        torch.library.opcheck(func, args, kwargs)
