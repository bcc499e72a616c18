"""The C++ kernels against the unpacked weight in fp64: every format, direction, dtype and instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctp_kernels import FORMATS, CTPError, PackedWeight, pack, pack_codes, parse_format
from ctp_kernels.backends import c_interface, cpu

from .cpu_kernels import DTYPES, Bound, isas, needs_library, packed_weight, random
from .cpu_kernels import one_thread as one_thread
from .helpers import weight_for

pytestmark = needs_library

GROUPED = [name for name, format in FORMATS.items() if format.quantized]
NAMES = [*FORMATS, *(name + suffix for name in GROUPED for suffix in ("-g64-asym", "-row", "-g72", "-g32", "-g24"))]
#: Every pattern, and every way a value is read; for the tests that do not need the whole product.
SOME = [
    "int4",
    "int3-g24",
    "int2-row",
    "fp16",
    "sparse24-bf16",
    "sparse24-int8",
    "unstructured-fp32",
    "unstructured-int3",
]
#: hazard -> rows of x, (N, K)
HAZARDS = {
    "m1": (1, (36, 136)),
    "m3": (3, (36, 136)),
    "m17": (17, (36, 136)),
    "m130": (130, (20, 72)),
    "ragged_k": (2, (9, 172)),
    "ragged_k_panel": (10, (9, 172)),
    "n1": (9, (1, 64)),
    "n33": (9, (33, 40)),
    "tiny": (1, (2, 4)),
    "blocks_m1": (1, (7, 712)),
    "blocks_m2": (2, (5, 712)),
    "blocks_m4": (3, (6, 1160)),
    "blocks_m8": (7, (5, 712)),
    "blocks_panel": (40, (7, 712)),
    "pairs_m6": (6, (7, 1452)),
    "pairs_m21": (21, (6, 1180)),
    "tiles": (270, (37, 616)),
    "digits": (1, (7, 1032)),
    "digits_in_chunks": (1, (5, 4360)),
}


@pytest.mark.parametrize("m", [1, 3, 8, 20, 150])
@pytest.mark.parametrize("name", ["int4", "int3-row", "sparse24-bf16", "unstructured-bf16", "unstructured-int4-asym"])
def test_deep_sums(name: str, m: int) -> None:
    """Thousands of terms, where a sum in one chain would lose more than a dense product does."""
    for n, k, direction in ((64, 4096, "forward"), (4096, 64, "backward")):
        packed, weight = packed_weight(name, (n, k))
        x = random(m, 4096, dtype=torch.float32)
        forward = direction == "forward"
        bound = Bound(x, weight.T if forward else weight, None, 2 if forward else 3, floor=0.05)
        for isa in isas():
            if forward:
                bound.check(cpu.matmul(x, packed.tensors, packed.format, n, None), f"{direction} {isa}")
            else:
                bound.check(cpu.matmul_t(x, packed.tensors, packed.format, k), f"{direction} {isa}")


def check_both_directions(name: str, m: int, shape: tuple[int, int], dtypes: Iterable[str]) -> None:
    (n, k), (packed, weight) = shape, packed_weight(name, shape)
    for dtype in dtypes:
        kind = DTYPES[dtype]
        x, dy, bias = random(m, k, dtype=kind), random(m, n, dtype=kind), random(n, dtype=kind)
        forward, backward = Bound(x, weight.T, bias, 2), Bound(dy, weight, None, 3)
        for isa in isas():
            forward.check(cpu.matmul(x, packed.tensors, packed.format, n, bias), f"forward {dtype} {isa}")
            backward.check(cpu.matmul_t(dy, packed.tensors, packed.format, k), f"dX {dtype} {isa}")


@pytest.mark.parametrize("hazard", HAZARDS)
@pytest.mark.parametrize("name", NAMES)
def test_as_exact_as_dense(name: str, hazard: str) -> None:
    check_both_directions(name, *HAZARDS[hazard], dtypes=DTYPES)


@pytest.mark.parametrize(
    "m, shape", [(1, (6, 2500)), (6, (6, 1200)), (20, (270, 300)), (40, (70, 1160)), (1030, (40, 260))]
)
@pytest.mark.parametrize("name", SOME)
def test_shapes_larger_than_every_block(name: str, m: int, shape: tuple[int, int]) -> None:
    check_both_directions(name, m, shape, dtypes=["fp32", "bf16"])


THINNED = [
    *("unstructured-bf16", "unstructured-fp32", "unstructured-int4", "unstructured-int3-g24-asym"),
    *("sparse24-fp16", "sparse24-int8-row", "sparse24-int4-g64-asym", "unstructured-int2-row"),
]


def thinned(name: str, shape: tuple[int, int], share: float) -> tuple[PackedWeight, torch.Tensor]:
    """A packed weight of which about `share` of the entries are stored, and what it unpacks to in fp64."""
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(*shape, generator=generator) * (torch.rand(*shape, generator=generator) < share)
    packed = pack(weight, name)
    return packed, packed.unpack(torch.float32).double()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_zeros_are_skipped(data: st.DataObject) -> None:
    """Rows enough, and zeros enough, for skip.h: slices of every height, ragged ends, groups that split a list."""
    name = data.draw(st.sampled_from(THINNED))
    share = 0.5 if name.startswith("sparse24") else data.draw(st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.5]))
    m = data.draw(st.sampled_from([9, 13, 16, 25, 33, 48, 49, 64, 96, 97, 130, 200, 385]))
    n, k = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 130)) * 4
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    threads = data.draw(st.integers(1, 3))
    packed, weight = thinned(name, (n, k), share)
    x, dy, bias = random(m, k, dtype=dtype), random(m, n, dtype=dtype), random(n, dtype=dtype)
    forward, backward = Bound(x, weight.T, bias, 2), Bound(dy, weight, None, 3)
    torch.set_num_threads(threads)
    for isa in isas():
        forward.check(cpu.matmul(x, packed.tensors, packed.format, n, bias), f"forward {isa}")
        backward.check(cpu.matmul_t(dy, packed.tensors, packed.format, k), f"dX {isa}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_skipped_zeros_hide_nothing(bad: float) -> None:
    """0 times NaN or infinity is NaN, as in a dense matmul, wherever W is pruned."""
    n, k, m = 40, 200, 130
    packed, weight = thinned("unstructured-bf16", (n, k), 0.25)
    x, dy = random(m, k, dtype=torch.float32), random(m, n, dtype=torch.float32)
    x[77, 150], dy[77, 30] = bad, bad
    for isa in isas():
        y = cpu.matmul(x, packed.tensors, packed.format, n, None)
        dx = cpu.matmul_t(dy, packed.tensors, packed.format, k)
        assert torch.equal(y.isnan(), (x @ weight.T.float()).isnan()), isa
        assert torch.equal(dx.isnan(), (dy @ weight.float()).isnan()), isa


@pytest.mark.parametrize("m", [9, 40, 130])
def test_infinite_entries_meet_their_own_input_only(m: int) -> None:
    """Lists are read four entries at a time: those past an end must not meet x, not even times zero."""
    n, k = 64, 600
    weight = torch.randn(n, k) * (torch.rand(n, k) < 0.25)
    for start in (128, 256, 512):  # where lists of any width begin
        weight[range(n), start + (weight[:, start:] != 0).int().argmax(1)] = 1e30
    packed = pack(weight, "unstructured-bf16")
    stored = packed.tensors[0]
    stored[stored > 1e29] = float("inf")
    x = random(m, k, dtype=torch.float32).abs()
    x[:, ::2] *= -1
    weight = packed.unpack(torch.float32)
    assert weight.isinf().sum() == 3 * n
    expected = torch.where(weight.isinf()[None], weight.sign() * x[:, None], 0.0).sign() * float("inf")
    expected = expected.nan_to_num(0.0, float("inf"), -float("inf")).sum(-1)  # NaN where both signs meet
    for isa in isas():
        y = cpu.matmul(x, packed.tensors, packed.format, n, None)
        assert torch.equal(y.isnan(), expected.isnan()), isa
        assert torch.equal(y.nan_to_num(0.0), expected.nan_to_num(0.0)), isa


@pytest.mark.parametrize("size", [2.0**118, 2.0**-120])
@pytest.mark.parametrize("name", ["int8-g32", "sparse24-bf16", "unstructured-int4-g32"])
def test_many_rows_of_huge_and_tiny_activations(name: str, size: float) -> None:
    """Sums of codes, before their scale, would pass what fp32 holds; parts of tiny numbers would fall below it."""
    n, k, m = 40, 200, 70
    packed, weight = packed_weight(name, (n, k))
    x, dy = random(m, k, dtype=torch.float32), random(m, n, dtype=torch.float32)
    for isa in isas():
        y = cpu.matmul(x * size, packed.tensors, packed.format, n, None).double() / size
        dx = cpu.matmul_t(dy * size, packed.tensors, packed.format, k).double() / size
        assert torch.allclose(y, x.double() @ weight.double().T, atol=1e-4, rtol=1e-4), isa
        assert torch.allclose(dx, dy.double() @ weight.double(), atol=1e-4, rtol=1e-4), isa


@pytest.mark.parametrize("name", NAMES)
def test_one_hot_rows_return_the_decoded_weight(name: str) -> None:
    n, k = 35, 264
    packed, weight = packed_weight(name, (n, k))
    for dtype in DTYPES.values():
        x, dy, rounded = torch.eye(k, dtype=dtype), torch.eye(n, dtype=dtype), weight.float().to(dtype)
        for isa in isas():
            for rows in (slice(None), slice(k - 1, k), slice(20, 21), slice(20, 23), slice(200, 201)):
                y = cpu.matmul(x[rows], packed.tensors, packed.format, n, None)
                assert torch.equal(y, rounded.T[rows]), f"forward {dtype} {isa}"
            assert torch.equal(cpu.matmul_t(dy, packed.tensors, packed.format, k), rounded), f"dX {dtype} {isa}"


def some_rows(kind: str, m: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x that are hard to keep in integers of one scale per 128 inputs, and which inputs are the largest."""
    x = random(m, k, dtype=torch.float32)
    every = torch.arange(k) % (8 if kind.startswith("many") else 128) == 5
    factors = {"outliers": 1e3, "extreme": 1e6, "many outliers": 1e2, "many extreme": 1e5}
    sizes = {"denormal": 1e-39, "tiny": 1e-25, "small": 2.0**-38, "large": 2.0**57, "huge": 1e33}
    if kind == "alone":
        x = torch.where(every, x, torch.zeros(()))
    elif kind == "spread":
        x = x * torch.exp(4 * random(m, k + 1, dtype=torch.float32)[:, :k])
    elif kind in factors:
        x = torch.where(every, x.sign() * (1 + x.abs()) * factors[kind], x)
    return x * sizes.get(kind, 1.0), every


KINDS = ["outliers", "extreme", "many outliers", "many extreme", "alone", "spread"]
KINDS += ["denormal", "tiny", "small", "large", "huge"]


@pytest.mark.parametrize("m, dtype", [(1, "fp32"), (6, "fp32"), (6, "bf16")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name + suffix for name in GROUPED for suffix in ("", "-asym", "-g32")])
def test_few_rows_of_any_range(name: str, kind: str, m: int, dtype: str) -> None:
    """Also where the weights of the largest inputs are zero, so that only the small ones count."""
    n, k = 24, 1032
    weight = weight_for(parse_format(name), n, k)
    x, every = some_rows(kind, m, k)
    x = x.to(DTYPES[dtype])
    for empty in (False, True):
        packed = pack(torch.where(every, 0, weight) if empty else weight, name)
        bound = Bound(x, packed.unpack(torch.float32).double().T, None, 2)
        for isa in isas():
            bound.check(cpu.matmul(x, packed.tensors, packed.format, n, None), f"{kind} {empty} {isa}")


@pytest.mark.parametrize("m", [1, 3, 20, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_identity_returns_x(dtype: str, m: int) -> None:
    """Every output is one input, however small beside its neighbours."""
    k = 512
    codes = 8 + torch.eye(k, dtype=torch.int64)
    packed = pack_codes(codes, torch.ones(k, k // 128), None, "int4")
    x = random(m, k, dtype=DTYPES[dtype])
    bound = Bound(x, torch.eye(k, dtype=torch.float64), None, 2)
    for isa in isas():
        bound.check(cpu.matmul(x, packed.tensors, packed.format, k, None), isa)


@pytest.mark.parametrize("m", [1, 6])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_few_rows_that_are_no_numbers(bad: float, m: int) -> None:
    n, k = 24, 1024
    packed, weight = packed_weight("int4", (n, k))
    x = random(m, k, dtype=torch.float32)
    x[0, 300] = bad
    for isa in isas():
        y = cpu.matmul(x, packed.tensors, packed.format, n, None)
        assert torch.equal(y.isnan(), (x @ weight.T.float()).isnan()), isa


@pytest.mark.parametrize("m", [1, 5, 12])
@pytest.mark.parametrize("name", SOME)
def test_strided(name: str, m: int) -> None:
    n, k = 34, 172
    packed, _ = packed_weight(name, (n, k))
    for dtype in DTYPES.values():
        wide_x, wide_dy = random(m, k + 20, dtype=dtype), random(m, n + 20, dtype=dtype)
        for x, dy in (
            (wide_x[:, 5 : 5 + k], wide_dy[:, 5 : 5 + n]),  # rows further apart than they are long
            (wide_x.flatten()[: m * (k + 19)].view(m, -1)[:, :k], wide_dy.flatten()[: m * (n + 19)].view(m, -1)[:, :n]),
            (wide_x[:1, :k].expand(m, k), wide_dy[:1, :n].expand(m, n)),  # all rows in one place
            (wide_x[:, :k].T.contiguous().T, wide_dy[:, :n].T.contiguous().T),  # neighbours far apart
        ):
            y, dx = (
                cpu.matmul(x, packed.tensors, packed.format, n, None),
                cpu.matmul_t(dy, packed.tensors, packed.format, k),
            )
            assert torch.equal(y, cpu.matmul(x.clone().contiguous(), packed.tensors, packed.format, n, None))
            assert torch.equal(dx, cpu.matmul_t(dy.clone().contiguous(), packed.tensors, packed.format, k))


@pytest.mark.parametrize("name", SOME)
def test_empty(name: str) -> None:
    packed, _ = packed_weight(name, (33, 172))
    assert cpu.matmul(torch.empty(0, 172), packed.tensors, packed.format, 33, None).shape == (0, 33)
    assert cpu.matmul_t(torch.empty(0, 33), packed.tensors, packed.format, 172).shape == (0, 172)


def test_weight_without_entries() -> None:
    packed = pack(torch.zeros(3, 24), "unstructured-int4")
    bias = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(cpu.matmul(torch.ones(2, 24), packed.tensors, packed.format, 3, bias), bias.expand(2, 3))
    assert torch.equal(cpu.matmul_t(torch.ones(2, 3), packed.tensors, packed.format, 24), torch.zeros(2, 24))


@pytest.mark.parametrize("m, shape", [
    (1, (256, 520)), (6, (256, 520)), (30, (96, 520)), (200, (33, 1040)), *((m, (1100, 2112)) for m in (1, 5, 40)),
])  # fmt: skip  # the last have more parts than threads
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_thread_count_does_not_change_the_bits(dtype: str, name: str, m: int, shape: tuple[int, int]) -> None:
    n, k = shape
    packed, _ = packed_weight(name, shape)
    x, dy = random(m, k, dtype=DTYPES[dtype]), random(m, n, dtype=DTYPES[dtype])
    for isa in isas():
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = cpu.matmul(x, packed.tensors, packed.format, n, None)
            found.append((y, cpu.matmul_t(dy, packed.tensors, packed.format, k)))
        assert all(torch.equal(y, found[0][0]) and torch.equal(dx, found[0][1]) for y, dx in found), isa


@pytest.mark.parametrize("m", [96, 130, 400])
@pytest.mark.parametrize("name", ["unstructured-bf16", "sparse24-int4"])
def test_thread_count_does_not_change_the_bits_of_skipped_zeros(name: str, m: int) -> None:
    """Few columns, so that threads share out rows: how a sum is cut must not depend on a thread's share of them."""
    packed, _ = thinned(name, (20, 800), 0.25)
    x, dy = random(m, 800, dtype=torch.float32), random(m, 20, dtype=torch.float32)
    for isa in isas():
        found = []
        for threads in (1, 4, 12):
            torch.set_num_threads(threads)
            y = cpu.matmul(x, packed.tensors, packed.format, 20, None)
            found.append((y, cpu.matmul_t(dy, packed.tensors, packed.format, 800)))
        assert all(torch.equal(y, found[0][0]) and torch.equal(dx, found[0][1]) for y, dx in found), isa


@pytest.mark.parametrize("name", SOME)
def test_nothing_is_written_around_the_output(name: str) -> None:
    n, k, edge = 33, 172, 64
    packed, _ = packed_weight(name, (n, k))
    weight = c_interface.weight_of(packed.tensors, packed.format, n, k, torch.device("cpu"))
    library = cpu._loaded()
    kinds = list(itertools.product((1, 2, 9, 30), c_interface.DTYPES.items()))
    for isa in isas():
        for m, (dtype, code) in kinds:
            x, dy = random(m, k, dtype=dtype), random(m, n, dtype=dtype)
            y, dx = (torch.full((m * width + 2 * edge,), 77.0, dtype=dtype) for width in (n, k))
            start_y, start_dx = y[edge:].data_ptr(), dx[edge:].data_ptr()
            for compute in (0, 1) if packed.format.quantized else (0,):
                y.fill_(77)
                assert library.ctp_cpu_matmul(weight, x.data_ptr(), k, m, None, start_y, code, compute, 1) == 0
                assert (y[:edge] == 77).all() and (y[-edge:] == 77).all() and (y[edge:-edge] != 77).all(), isa
            assert library.ctp_cpu_matmul_t(weight, dy.data_ptr(), n, m, start_dx, code, 1) == 0
            assert (dx[:edge] == 77).all() and (dx[-edge:] == 77).all() and (dx[edge:-edge] != 77).all(), isa


@pytest.mark.parametrize("m", [1, 4, 20])
@pytest.mark.parametrize("name", ["int4", "sparse24-int4", "unstructured-bf16"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_nan_propagates_as_in_a_dense_matmul(dtype: str, name: str, m: int) -> None:
    n, k = 34, 172
    packed, _ = packed_weight(name, (n, k))
    x, dy = random(m, k, dtype=DTYPES[dtype]), random(m, n, dtype=DTYPES[dtype])
    x[0, 170], dy[0, 31] = float("nan"), float("nan")
    for isa in isas():
        y = cpu.matmul(x, packed.tensors, packed.format, n, None)
        dx = cpu.matmul_t(dy, packed.tensors, packed.format, k)
        assert y[0].isnan().all() and dx[0].isnan().all(), isa  # also through pruned entries: NaN times zero
        assert y[1:].isfinite().all() and dx[1:].isfinite().all(), isa


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounds_as_torch_does(dtype: str) -> None:
    """A 1 x 1 weight of one copies x: every fp16 or bf16 pattern comes back, and fp32 sums round to nearest even."""
    kind = DTYPES[dtype]
    one = pack(torch.ones(1, 1), "fp32")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(kind)[:, None]
    powers = 2.0 ** torch.arange(-28, 20).repeat(86)
    sums = random(powers.numel(), dtype=torch.float32) * powers
    weight = pack(sums[:, None], "fp32")
    for isa in isas():
        found = cpu.matmul(every, one.tensors, one.format, 1, None)
        assert torch.equal(found.nan_to_num(7.0), every.nan_to_num(7.0)), isa
        assert torch.equal(found.isnan(), every.isnan()), isa
        rounded = cpu.matmul(torch.ones(1, 1, dtype=kind), weight.tensors, weight.format, len(sums), None)
        assert torch.equal(rounded[0], sums.to(kind)), isa


def test_activations_of_another_width_are_refused() -> None:
    packed, _ = packed_weight("int4", (33, 172))
    with pytest.raises(CTPError, match="say that the int4 weight is"):
        cpu.matmul(torch.ones(2, 300), packed.tensors, packed.format, 33, None)
    with pytest.raises(CTPError, match="bias"):
        cpu.matmul(torch.ones(2, 172), packed.tensors, packed.format, 33, torch.ones(32))


def test_unsupported_says_why() -> None:
    format, shape, device = parse_format("int4"), (8, 64), torch.device("cpu")
    assert cpu.unsupported(format, shape, torch.float32, device, "forward") is None
    assert "float64" in str(cpu.unsupported(format, shape, torch.float64, device, "forward"))
    assert "cuda" in str(cpu.unsupported(format, shape, torch.float32, torch.device("cuda"), "forward"))
