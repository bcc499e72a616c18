"""The C++ kernels with compute="int8": activations rounded to 8 bits (ctp.h)."""

from __future__ import annotations

import pytest
import torch

from ctp_kernels import CTPError, PackedWeight, parse_format
from ctp_kernels.backends import cpu, reference

from .cpu_kernels import DTYPES, isas, needs_library, packed_weight, random
from .cpu_kernels import one_thread as one_thread

pytestmark = needs_library

INT8 = [
    *("int4", "int3", "int2", "int8", "int4-asym", "int4-g8", "int3-g64", "int4-g256", "int4-g192-asym", "int2-row"),
    *("sparse24-int4", "sparse24-int8-row-asym", "unstructured-int3", "unstructured-int4-asym"),
    *("unstructured-int8-g24-asym", "int3-g24-asym"),
]


def grid_rounding(packed: PackedWeight, x: torch.Tensor) -> torch.Tensor:
    """(M, N) fp64: what summing codes and zeros apart in fp32 may cost: they cancel, down to the zero of a pruned row.

    Two roundings of the sum of |x| scale (code + zero), where no code and no zero exceeds 2^bits.
    """
    size = packed.format.group_size or packed.shape[1]
    scales = packed.buffers["scales"].double().abs().repeat_interleave(size, 1)[:, : packed.shape[1]]
    return 2 * torch.finfo(torch.float32).eps * 2 ** (packed.format.bits + 1) * (x.double().abs() @ scales.T)


def int8_matmul(packed: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return cpu.matmul(x, packed.tensors, packed.format, packed.shape[0], bias, "int8")


@pytest.mark.parametrize(
    "m, shape",
    [
        (1, (5, 100)),
        (3, (70, 264)),
        (4, (33, 1028)),
        (5, (40, 1000)),
        (33, (67, 520)),
        (270, (300, 640)),
        (530, (40, 200)),
    ],
)
@pytest.mark.parametrize("name", INT8)
def test_int8_activations(name: str, m: int, shape: tuple[int, int]) -> None:
    """As near to the product of the rounded activations as fp32 sums allow, no further from the exact one than ctp.h
    says."""
    (n, k), (packed, weight) = shape, packed_weight(name, shape)
    x, bias = random(m, k, dtype=torch.float32), random(n, dtype=torch.float32)
    x[0, : k // 2] *= 1e3  # a row whose segments differ
    rounded = reference.round_activations(x, packed.format)
    product, exact = (a.double() @ weight.T + bias.double() for a in (rounded, x))
    rounding = grid_rounding(packed, rounded)
    allowed = (rounded - x).double().abs() @ weight.T.abs() + rounding
    for isa in isas():
        y = int8_matmul(packed, x, bias)
        assert ((y.double() - product).abs() <= rounding).all(), isa
        assert ((y.double() - exact).abs() <= allowed).all(), isa


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_activations_of_every_dtype_and_stride(dtype: str) -> None:
    packed, weight = packed_weight("unstructured-int4", (33, 520))
    for m in (2, 20):
        x = random(2 * m, 700, dtype=DTYPES[dtype])[::2, 100:620]
        rounded = reference.round_activations(x.float(), packed.format)
        product, rounding = rounded.double() @ weight.T, grid_rounding(packed, rounded)
        for isa in isas():
            y = int8_matmul(packed, x)
            assert y.dtype == x.dtype
            eps = torch.finfo(x.dtype).eps * product.abs()
            assert ((y.double() - product).abs() <= rounding + eps).all(), isa


def test_round_activations_stays_within_half_a_step() -> None:
    format = parse_format("int4-g64")
    x = random(7, 200, dtype=torch.float32)
    x[3, :64], x[4, 64:128] = 0, 1e-40
    parts = torch.nn.functional.pad(x, (0, 56)).view(7, 4, 64)
    step = (parts.abs().amax(-1, keepdim=True) / 127).expand_as(parts).reshape(7, 256)[:, :200]
    rounded = reference.round_activations(x, format)
    assert ((rounded - x).abs() <= step * 0.5001 + 1e-36).all()
    assert torch.equal(rounded[3, :64], torch.zeros(64))


@pytest.mark.parametrize("m, shape", [
    (1, (256, 520)), (3, (256, 520)), (17, (96, 520)), (300, (33, 1040)), (3, (1100, 136)), (17, (1100, 136)),
])  # fmt: skip  # the last two have more parts than threads
@pytest.mark.parametrize("name", ["int4", "int8-asym", "unstructured-int3"])
def test_thread_count_does_not_change_the_bits_of_int8(name: str, m: int, shape: tuple[int, int]) -> None:
    packed, _ = packed_weight(name, shape)
    x = random(m, shape[1], dtype=torch.float32)
    for isa in isas():
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(int8_matmul(packed, x))
        assert all(torch.equal(y, found[0]) for y in found), isa


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [1, 20])
def test_int8_makes_the_row_of_a_nan_nan(m: int, bad: float) -> None:
    packed, _ = packed_weight("sparse24-int4", (33, 172))
    x = random(m, 172, dtype=torch.float32)
    x[0, 170] = bad
    for isa in isas():
        y = int8_matmul(packed, x)
        assert y[0].isnan().all() and y[1:].isfinite().all(), isa


def test_int8_needs_codes() -> None:
    packed, _ = packed_weight("unstructured-bf16", (33, 172))
    x = random(2, 172, dtype=torch.float32)
    with pytest.raises(CTPError, match='compute="int8" multiplies codes, and unstructured-bf16 stores floating'):
        torch.ops.ctp.matmul(x, packed.tensors, None, "unstructured-bf16", 33, "auto", "int8")
    with pytest.raises(CTPError, match="unknown compute 'int7'"):
        torch.ops.ctp.matmul(x, packed.tensors, None, "unstructured-bf16", 33, "auto", "int7")
