"""int8_linear: exact integer sums, the same bits in both forms, in any batch, with any number of threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spikelm.errors import ShapeError
from spikelm.kernels.compile import load, processor
from spikelm.kernels.dispatch import available, choose, use_backend
from spikelm.kernels.int8_linear import (
    LONGEST,
    c,
    dequantised,
    eager,
    int8_linear,
    integer_sums,
    packing,
    scaled_sums,
)
from spikelm.kernels.int8_linear.packing import PackedInt8, int8_linear_packed
from spikelm.kernels.memory import HUGE, Arena

CASES = [  # D, outs, group
    (1, 1, None),
    (7, 5, 3),
    (64, 33, 64),
    (130, 40, 128),
    (300, 17, 128),
    (1040, 9, None),
    (1041, 9, None),
    (3000, 11, None),
    (2500, 8, 1100),
]


def make(D: int, outs: int, group: int | None, rows: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, weights over the whole range, and scales of several magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(-127, 128, (rows, D), generator=generator).float()
    weight = torch.randint(-127, 128, (outs, D), generator=generator, dtype=torch.int8)
    groups = 1 if group is None else -(-D // group)
    scales = torch.randn(outs, groups, generator=generator).exp() * 1e-2
    return counts, weight, scales


@pytest.mark.parametrize(("D", "outs", "group"), CASES)
def test_the_torch_form_has_the_bits_of_the_integers(D: int, outs: int, group: int | None) -> None:
    counts, weight, scales = make(D, outs, group)
    with use_backend("reference"):
        expected = int8_linear(counts, weight, scales, group)
    with use_backend("torch"):
        got = int8_linear(counts, weight, scales, group)
    assert got.dtype == torch.float32 and torch.equal(got.view(torch.int32), expected.view(torch.int32))
    sums = integer_sums(counts, weight, group)
    assert sums.dtype == torch.int32 and torch.equal(scaled_sums(sums, scales), expected)
    exact = counts.double() @ dequantised(weight, scales.double(), group).t()
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-3)
    with use_backend("torch"):
        for dtype in (torch.int8, torch.int64, torch.bfloat16, torch.float64):
            assert torch.equal(int8_linear(counts.to(dtype), weight, scales, group), expected)
        double = int8_linear(counts, weight, scales.double(), group)
    torch.testing.assert_close(double, exact, rtol=1e-13, atol=1e-12)


def test_float32_holds_the_largest_sum_of_1040_terms_and_not_of_more() -> None:
    """127 * 127 * 1040 < 2^24: every partial sum is a whole number that float32 represents."""
    assert eager.EXACT == 1040 and 1040 * 127**2 < 2**24 <= 1041 * 127**2
    for width in (1040, 1041, 5000, LONGEST):
        counts, weight = torch.full((1, width), 127.0), torch.full((2, width), 127, dtype=torch.int8)
        weight[1, 0] = 126  # an odd sum: not representable beyond 2^24
        sums = eager._sums(counts, weight.float())
        assert sums.tolist() == [[127.0 * 127 * width, 127.0 * 127 * width - 127]]
    # What the split is for: a plain float32 sum of this length is wrong.
    ones = torch.full((1, 5000), 127.0)
    assert (ones @ weight[1:, :5000].float().t()).item() != 127 * 127 * 5000 - 127


def test_the_worst_case_is_exact_in_every_order() -> None:
    """All sums of permutations of extreme terms are equal, which an inexact sum would not give."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.where(torch.rand(1, 1040, generator=generator) < 0.5, -127.0, 127.0)
    weight = torch.where(torch.rand(3, 1040, generator=generator) < 0.9, 127, -126).to(torch.int8)
    exact = (counts.long() @ weight.long().t()).float()
    for _ in range(20):
        order = torch.randperm(1040, generator=generator)
        assert torch.equal(eager._sums(counts[:, order], weight[:, order].float()), exact)


@pytest.mark.parametrize("form", ["reference", "torch", "c"])
@pytest.mark.parametrize(("D", "outs", "group"), [(300, 65, 128), (515, 200, None), (1500, 64, None)])
def test_rows_have_the_same_bits_in_any_batch_and_chunk(
    form: str, D: int, outs: int, group: int | None
) -> None:
    counts, weight, scales = make(D, outs, group, rows=4 * 16)
    with use_backend(form):
        whole = int8_linear(counts, weight, scales, group)
        assert torch.equal(int8_linear(counts.view(4, 16, D), weight, scales, group).view(-1, outs), whole)
        for rows in (slice(0, 1), slice(63, 64), slice(10, 13), slice(0, 33)):
            assert torch.equal(int8_linear(counts[rows], weight, scales, group), whole[rows])
        assert torch.equal(int8_linear(counts[7], weight, scales, group), whole[7])
        scattered = counts.t().contiguous().t()  # another memory layout
        assert torch.equal(int8_linear(scattered, weight, scales, group), whole)


@pytest.mark.parametrize(("D", "outs", "group"), [(300, 700, 128), (2000, 333, None)])
def test_threads_do_not_change_a_bit(D: int, outs: int, group: int | None) -> None:
    counts, weight, scales = make(D, outs, group, rows=65)
    one = int8_linear(counts, weight, scales, group)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(int8_linear(counts, weight, scales, group), one)
            assert torch.equal(int8_linear(counts[3:4], weight, scales, group), one[3:4])
    finally:
        torch.set_num_threads(before)


def test_autocast_does_not_round() -> None:
    counts, weight, scales = make(300, 16, 128)
    plain = int8_linear(counts, weight, scales, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int8_linear(counts, weight, scales, 128), plain)


def test_gradient_is_that_of_the_dequantised_product() -> None:
    counts, weight, scales = make(300, 16, 128)
    scales = scales.double()
    for name in ("reference", "torch"):
        leaf = counts.double().requires_grad_()
        with use_backend(name):
            y = int8_linear(leaf, weight, scales, 128)
        gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (got,) = torch.autograd.grad(y, leaf, gradient)
        torch.testing.assert_close(got, gradient @ dequantised(weight, scales, 128), rtol=1e-12, atol=1e-12)


def test_nan_is_not_hidden() -> None:
    for D, group in ((300, 128), (1500, None)):
        counts, weight, scales = make(D, 16, group)
        counts[2, D - 1] = float("nan")
        with use_backend("torch"):
            y = int8_linear(counts, weight, scales, group)
        assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()


def test_nothing_to_do_and_meta_tensors() -> None:
    counts, weight, scales = make(8, 4, None)
    assert int8_linear(counts[:0], weight, scales).shape == (0, 4)
    assert choose("int8_linear", torch.device("cpu")) == "c"
    y = int8_linear(counts.to("meta").view(1, 5, 8), weight.to("meta"), scales.to("meta"))
    assert y.shape == (1, 5, 4) and y.is_meta


def test_wrong_inputs_are_refused() -> None:
    counts, weight, scales = make(8, 4, None)
    with pytest.raises(ShapeError, match=r"count of magnitude 128; expected at most 127"):
        int8_linear(torch.full((1, 8), -128, dtype=torch.int16), weight, scales)
    with pytest.raises(ShapeError, match=r"int8 weights \[O, D\], got torch.float32"):
        int8_linear(counts, weight.float(), scales)
    with pytest.raises(ShapeError, match=r"counts \[\.\., 8\] of a signed dtype, got torch.float32 \[5, 7\]"):
        int8_linear(counts[:, :7], weight, scales)
    with pytest.raises(
        ShapeError, match=r"scales \[4, 2\] of float32 or float64, got torch.float32 \[4, 1\]"
    ):
        int8_linear(counts, weight, scales, 4)
    with pytest.raises(ShapeError, match="group size is 0"):
        int8_linear(counts, weight, scales, 0)


LAYOUTS = ("out_in", "in_out")


def skip_without_c(op: str) -> None:
    """Skip where this machine cannot compile C."""
    problem = available()[op]["c"]
    if problem is not True:
        pytest.skip(f"no C kernels: {problem}")


VARIANTS = {
    "native": (),
    "portable": ("SPIKELM_PORTABLE",),
    "avx2": ("SPIKELM_AVX2",),
    "avx512-vnni": ("SPIKELM_SIMDE_AVX512",),
    "avx-vnni": ("SPIKELM_SIMDE_AVXVNNI",),
    "neon": ("SPIKELM_SIMDE_NEON",),
}
KINDS = ("full", "extreme", "small", "binary", "silent", "sparse", "one")


def counts_of(kind: str, rows: int, D: int) -> Tensor:
    """Counts int8 [rows, D] of one kind."""
    if kind == "full":
        return torch.randint(-127, 128, (rows, D), dtype=torch.int8)
    if kind == "extreme":
        return torch.where(torch.rand(rows, D) < 0.3, -127, 127).to(torch.int8)
    if kind == "small":
        return torch.randn(rows, D).mul(4).round().to(torch.int8)
    if kind == "binary":
        return (torch.rand(rows, D) < 0.4).to(torch.int8)
    counts = torch.zeros(rows, D, dtype=torch.int8)
    if kind == "sparse":
        counts = torch.where(torch.rand(rows, D) < 0.1, counts_of("full", rows, D), counts)
    if kind == "one":  # the last input alone
        counts[:, -1] = -127
    return counts


@pytest.fixture
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One variant of the C code in place of this processor's own."""
    name: str = request.param
    skip_without_c("int8_linear")
    if "SIMDE" in "".join(VARIANTS[name]) and not Path("/usr/include/simde").is_dir():
        pytest.skip("no /usr/include/simde to emulate other processors' instructions with (libsimde-dev)")
    if name == "avx2" and " avx2 " not in processor():
        pytest.skip("this processor has no AVX2")
    if name != "native":
        library = c.typed(load(Path(c.__file__).with_name("op.c"), VARIANTS[name]))
        assert library.int8_variant().decode() == name
        monkeypatch.setattr(c, "library", lambda: library)
    return name


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize(
    ("D", "outs", "group"),
    [(1, 1, None), (7, 5, 3), (130, 129, 128), (300, 70, 100), (515, 200, None), (1041, 65, 101)],
)
def test_every_variant_has_the_bits_of_the_reference(
    variant: str, D: int, outs: int, group: int | None, poisoned: None
) -> None:
    _, weight, scales = make(D, outs, group)
    weight[0] = 127
    weight[-1] = -127
    bias = torch.randn(outs)
    packed = [PackedInt8(weight, scales, group, layout) for layout in LAYOUTS]
    for matrix in packed:
        assert torch.equal(matrix.weight(), weight) and torch.equal(matrix.scales(), scales)
    for kind in KINDS:
        for rows in (1, 2, 5, 37):
            counts = counts_of(kind, rows, D)
            threshold = torch.rand(rows, 1)
            with use_backend("reference"):
                plain = int8_linear(counts, weight, scales, group)
            expected = plain * threshold + bias
            with use_backend("c"):
                assert same_bits(int8_linear(counts, weight, scales, group), plain)
                sums = integer_sums(counts, weight, group)
            assert torch.equal(scaled_sums(sums, scales), plain)
            for matrix in packed:
                assert same_bits(int8_linear_packed(counts, matrix), plain)
                got = int8_linear_packed(counts, matrix, threshold=threshold, bias=bias)
                assert same_bits(got, expected), (kind, rows, matrix)
                assert torch.equal(matrix.integer_sums(counts), sums)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two float32 tensors are the same, the sign of zero included."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("D", "outs", "group"), [(515, 1100, 128), (2050, 300, None)])
def test_threads_and_batches_do_not_change_a_packed_bit(
    layout: str, D: int, outs: int, group: int | None
) -> None:
    skip_without_c("int8_linear")
    _, weight, scales = make(D, outs, group)
    packed = PackedInt8(weight, scales, group, layout)
    before = torch.get_num_threads()
    # Row blocks of every kind of path: few and many events, dense, a last block that is not full.
    counts = torch.cat([counts_of(kind, 14, D) for kind in ("sparse", "small", "binary", "full", "silent")])
    one = int8_linear_packed(counts, packed)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert same_bits(int8_linear_packed(counts, packed), one)
            for rows in (slice(0, 1), slice(13, 15), slice(5, 40), slice(69, 70)):
                assert same_bits(int8_linear_packed(counts[rows], packed), one[rows])
    finally:
        torch.set_num_threads(before)
    assert same_bits(int8_linear_packed(counts.view(5, 14, D), packed).view(-1, outs), one)
    assert same_bits(int8_linear_packed(counts.t().contiguous().t(), packed), one)
    assert same_bits(int8_linear_packed(counts.float(), packed), one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_silence_hides_no_broken_scale(layout: str) -> None:
    """0 times an infinite scale is NaN, in a group without events, too."""
    skip_without_c("int8_linear")
    counts, weight, scales = make(300, 70, 100)
    counts[:, 100:200] = 0
    scales[3, 1] = torch.inf
    scales[4, 1] = torch.nan
    with use_backend("reference"):
        expected = int8_linear(counts, weight, scales, 100)
    got = int8_linear_packed(counts, PackedInt8(weight, scales, 100, layout))
    assert expected[:, 3:5].isnan().all()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_what_is_no_count_is_refused_by_the_c_form() -> None:
    skip_without_c("int8_linear")
    counts, weight, scales = make(8, 4, None)
    packed = PackedInt8(weight, scales)
    for wrong, said in ((128, "magnitude 128"), (0.5, "no whole numbers"), (-torch.inf, "magnitude inf")):
        bad = counts.clone()
        bad[1, 3] = wrong
        for dtype in (torch.float32, torch.float64, torch.float16):
            with use_backend("c"), pytest.raises(ShapeError, match=said):
                int8_linear(bad.to(dtype), weight, scales)
            with pytest.raises(ShapeError, match=said):
                int8_linear_packed(bad.to(dtype), packed)
    for large in (1000, -(2**40)):
        with pytest.raises(ShapeError, match="magnitude"):
            int8_linear_packed(torch.full((1, 8), large), packed)
    with pytest.raises(ShapeError, match=r"counts \[\.\., 8\] of a signed dtype"):
        int8_linear_packed(counts[:, :7], packed)
    with pytest.raises(ShapeError, match=r"threshold is \[5\]; expected \[5, 1\]"):
        int8_linear_packed(counts, packed, threshold=torch.ones(5))
    with pytest.raises(ShapeError, match=r"bias is \[5\]; expected \[4\]"):
        int8_linear_packed(counts, packed, bias=torch.ones(5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_and_no_graph_breaks_on_packed_weights(layout: str) -> None:
    skip_without_c("int8_linear")
    counts, weight, scales = make(40, 70, 16)
    packed = PackedInt8(weight, scales, 16, layout)
    whole, threshold = counts.to(torch.int8), torch.rand(5, 1)
    arguments = (whole, packed.memory, 70, 40, 16, layout, True, threshold, torch.ones(70))
    torch.library.opcheck(packing._packed, arguments)
    torch.library.opcheck(c._int8_linear_op, (whole, weight, scales, 16))
    torch.library.opcheck(c._int8_sums_op, (whole, weight, 16))

    def product(counts: Tensor) -> Tensor:
        return int8_linear_packed(counts, packed, threshold=threshold) + 1

    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(whole), product(whole))


def test_large_weights_lie_on_huge_pages() -> None:
    arena = Arena(3 * HUGE)
    first, second = arena.tensor((HUGE,), torch.int8), arena.tensor((10, 3), torch.float32)
    assert first.data_ptr() % HUGE == 0 and second.data_ptr() % 64 == 0 and not second.any()
    with pytest.raises(MemoryError, match="has .* left"):
        arena.tensor((3 * HUGE,), torch.int8)
    assert Arena(0).tensor((0, 3), torch.float32).shape == (0, 3)
    first.fill_(1)
    del arena  # the tensors keep the pages
    assert bool((first == 1).all())
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.is_file() or "[never]" in enabled.read_text():
        pytest.skip("this kernel gives no huge pages")
    maps = Path("/proc/self/smaps").read_text().split("VmFlags")
    here = [m for m in maps if _holds(m, first.data_ptr())]
    assert len(here) == 1 and "AnonHugePages:" in here[0]
    assert "hg" in maps[maps.index(here[0]) + 1].splitlines()[0]  # advised; the kernel may be short of them


def _holds(mapping: str, address: int) -> bool:
    for line in mapping.splitlines():
        start, dash, rest = line.partition("-")
        if dash and " " in rest and all(ch in "0123456789abcdef" for ch in start) and start:
            return int(start, 16) <= address < int(rest.split()[0], 16)
    return False
