"""What the tests of the C++ kernels share: instruction sets, weights, and how far a product may be from the truth."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from ctp_kernels import CTPError, PackedWeight, pack, parse_format
from ctp_kernels.backends import cpu

from .helpers import weight_for

needs_library = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def isas() -> Iterator[str]:
    """Each instruction set of this processor, switched on while the loop is at it."""
    try:
        for name in ("amx", "avx512", "avx2", "baseline"):
            try:
                cpu.set_isa(name)
            except CTPError:
                assert name != "baseline"
                continue
            yield name
    finally:
        cpu.set_isa("best")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small shapes on one thread, so that waking threads does not dominate; a test of threads sets its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def packed_weight(name: str, shape: tuple[int, int]) -> tuple[PackedWeight, torch.Tensor]:
    """A packed weight, and what it unpacks to in fp64."""
    packed = pack(weight_for(parse_format(name), *shape), name)
    return packed, packed.unpack(torch.float32).double()


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


class Bound:
    """How far from a @ b + bias in fp64 a kernel may be: `limit` times as far as a dense matmul in a's dtype is.

    Beyond that, for sums that the dense matmul happens to hit, `floor` fp32 roundings of the sum of magnitudes.
    """

    def __init__(
        self, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, limit: float, floor: float = 1
    ) -> None:
        wide, narrow = (0.0, 0.0) if bias is None else (bias.double(), bias)
        self.exact, self.dtype = a.double() @ b + wide, a.dtype
        dense = a @ b.to(a.dtype) + narrow
        rounding = torch.finfo(torch.float32).eps * (a.double().abs() @ b.abs()).max()
        self.allowed = limit * (dense.double() - self.exact).abs().max() + floor * rounding

    def check(self, found: torch.Tensor, what: str) -> None:
        assert found.dtype == self.dtype and found.shape == self.exact.shape
        error = (found.double() - self.exact).abs().max()
        assert error <= self.allowed, f"{what}: error {error:.3e}, allowed {self.allowed:.3e}"
