"""The CPU emulator of the GPU: each instruction against the tables of the PTX ISA, and bugs that it must catch."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from ctp_kernels.patterns import mask_to_bytes

from . import emulated

DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return emulated.load()


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def registers(matrix: torch.Tensor, place, elements: int) -> torch.Tensor:
    """(32 lanes, elements / 2) registers: element i of a lane is matrix[place(lane / 4, lane % 4, i)]."""
    out = torch.empty(32, elements, dtype=matrix.dtype)
    for lane in range(32):
        for i in range(elements):
            out[lane, i] = matrix[place(lane // 4, lane % 4, i)]
    return out.view(torch.int32).contiguous()


# PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type" and "... for sparse mma.m16n8k32".
def a_place(group: int, thread: int, i: int) -> tuple[int, int]:
    return group + (0 if i < 2 or 4 <= i < 6 else 8), thread * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_place(group: int, thread: int, i: int) -> tuple[int, int]:
    return thread * 2 + (i & 1) + 8 * (i // 2), group


def c_place(group: int, thread: int, i: int) -> tuple[int, int]:
    return group + (8 if i >= 2 else 0), thread * 2 + (i & 1)


def c_registers(matrix: torch.Tensor) -> torch.Tensor:
    return registers(matrix, c_place, 4).view(torch.float32).contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma_against_a_matmul(library, dtype):
    torch.manual_seed(0)
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    sums = c_registers(c)
    a_registers, b_registers = registers(a, a_place, 8), registers(b, b_place, 4)
    library.ctp_emulator_mma(dtype == torch.bfloat16, pointer(a_registers), pointer(b_registers), pointer(sums))
    assert torch.allclose(sums, c_registers((c + a.double() @ b.double()).float()), rtol=1e-6, atol=1e-6)


def random24(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A random 2:4 matrix in which every one of the six patterns comes up."""
    order = torch.rand(rows, columns // 4, 4).argsort(-1)
    return (torch.rand(rows, columns // 4, 4) + 0.5).mul(order < 2).view(rows, columns).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selector", [0, 1])
def test_sparse_mma_with_the_metadata_that_torch_makes(library, dtype, selector):
    """torch's conversion puts rows 0..15 of 32 where SELECTOR 0 reads them, and rows 16..31 where 1 does."""
    torch.manual_seed(selector)
    dense = random24(32, 32, dtype)
    assert len((dense.view(-1, 4) != 0).unique(dim=0)) == 6
    stored, metadata = sparse_semi_structured_from_dense_cutlass(dense)
    metadata = metadata.contiguous().view(-1).view(torch.int32).contiguous()
    rows = slice(16 * selector, 16 * selector + 16)
    b, c = torch.randn(32, 8).to(dtype), torch.randn(16, 8)
    sums = c_registers(c)
    a_registers, b_registers = registers(stored[rows], a_place, 8), registers(b, b_place, 8)
    library.ctp_emulator_mma_sparse(
        *(dtype == torch.bfloat16, selector, pointer(a_registers), pointer(b_registers), pointer(metadata)),
        pointer(sums),
    )
    exact = c + dense[rows].double() @ b.double()
    assert torch.allclose(sums, c_registers(exact.float()), rtol=1e-6, atol=1e-6)


def test_metadata_of_the_kernels_is_what_torch_makes(library):
    """Step i of a tile multiplies quads 2i and 2i + 1 of four spans of 32 inputs, as quads t and t + 4."""
    torch.manual_seed(0)
    dense = random24(16, 128, torch.float16)
    bitmap, words = mask_to_bytes(dense != 0), torch.empty(4, 32, dtype=torch.int32)
    library.ctp_emulator_metadata(pointer(bitmap), pointer(words))
    for step in range(4):
        quads = [8 * (quad % 4) + 2 * step + quad // 4 for quad in range(8)]
        columns = torch.tensor([4 * quad + i for quad in quads for i in range(4)])
        _, metadata = sparse_semi_structured_from_dense_cutlass(dense[:, columns].repeat(2, 1))
        expected = metadata.contiguous().view(-1).view(torch.int32).view(8, 4)[:, :2]
        first = 2 * (step // 2)
        assert torch.equal(words[step].view(8, 4)[:, first : first + 2], expected)


def test_ldmatrix(library):
    matrices = torch.arange(4 * 64, dtype=torch.int16)
    out = torch.empty(32, 4, dtype=torch.int32)
    library.ctp_emulator_ldmatrix(pointer(matrices), pointer(out))
    for lane in range(32):
        for i in range(4):
            first = int(matrices.view(4, 8, 8)[i, lane // 4, 2 * (lane % 4)])
            assert out[lane, i] == first + (first + 1) * 65536


@pytest.mark.parametrize("valid", [0, 6, 16])
def test_asynchronous_copies_fill_with_zeros(library, valid):
    source = torch.randint(1, 256, (2048 + 16,), dtype=torch.uint8)
    source = source[-source.data_ptr() % 16 :][:2048]
    out = torch.full((2048,), 7, dtype=torch.uint8)
    library.ctp_emulator_copy(pointer(source), valid, 0, pointer(out))
    expected = source.view(-1, 16).clone()
    expected[:, valid:] = 0
    assert torch.equal(out.view(-1, 16), expected)


def test_byte_permutation(library):
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (int(v) for v in rng.integers(0, 2**32, 2))
        picks = [int(v) for v in rng.integers(0, 8, 4)]
        source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        expected = int.from_bytes(bytes(source[pick] for pick in picks), "little")
        assert library.ctp_emulator_prmt(a, b, sum(pick << 4 * i for i, pick in enumerate(picks))) == expected


def test_fma_rounds_once(library):
    """numpy rounds fp64 to fp16 once; products and sums of fp16 numbers of like size are exact in fp64."""
    values = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float16)
    for a, b, c in values:
        expected = np.float16(float(a) * float(b) + float(c)).view(np.uint16)
        bits = [int(v.view(np.uint16)) for v in (a, b, c)]
        assert library.ctp_emulator_fma2(0, *(v | v << 16 for v in bits)) == int(expected) * 0x10001
    tie = library.ctp_emulator_fma2(1, 0x3F803F80, 0x3F803F80, 0x3B803B80)  # bf16: 1 + 2^-8 is halfway: to even
    above = library.ctp_emulator_fma2(1, 0x3F803F80, 0x3F803F80, 0x3B813B81)
    assert (tie, above) == (0x3F803F80, 0x3F813F81)


@pytest.mark.parametrize(
    "format,bug",
    [("int4", "swap_fragment"), ("sparse24-int4", "swap_fragment"), ("sparse24", "swap_selector")],
)
def test_seeded_bugs_that_show_in_the_result(library, format, bug):
    packed, x, bias = emulated.problem(format, (32, 256), 3, torch.float16)
    emulated.assert_right(emulated.forward(x, packed, bias), x, packed, bias)
    library.ctp_emulator_configure(emulated.BUGS[bug], 0, 4)
    try:
        with pytest.raises(AssertionError):
            emulated.assert_right(emulated.forward(x, packed, bias), x, packed, bias)
    finally:
        library.ctp_emulator_configure(0, 0, 4)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("bug", "no_barrier", "int4", "forward", "3"), "never written|without a barrier between"),
        (("bug", "no_barrier", "sparse24-int4", "forward", "3"), "never written|without a barrier between"),
        (("bug", "no_barrier", "int4", "backward", "3"), "never written|without a barrier between"),
        (("bug", "no_wait", "int4", "forward", "3"), "asynchronous copy may still write"),
        (("bug", "no_wait", "int3", "backward", "3"), "asynchronous copy may still write"),
        (("bug", "no_barrier", "int4", "forward", "20"), "never written|without a barrier between"),
        (("bug", "no_barrier", "int3-g32", "forward", "40"), "never written|without a barrier between"),
        (("bug", "no_wait", "sparse24-int4", "forward", "20"), "asynchronous copy may still write"),
        (("bug", "no_wait", "unstructured", "forward", "3"), "asynchronous copy may still write"),
        (("bug", "no_convergence", "int4", "forward", "3"), "lanes of a warp meet at different instructions"),
        (("copy", "1"), "asynchronous copy may still write"),
        (("copy", "2"), "never written|without a barrier between"),
        (("overwrite", "0"), "a warp reads what another wrote"),  # the later warp went on first
        (("overwrite", "1"), "a warp writes what another reads"),
        (("diverge", "0"), "others never reach"),
        (("diverge", "1"), "different barriers"),
    ],
)
def test_seeded_bugs_end_the_process(library, arguments, message):
    done = emulated.in_a_process(*arguments)
    assert done.returncode != 0 and re.search(message, done.stderr), done.stdout + done.stderr


def test_no_bank_of_shared_memory_is_asked_twice(library):
    """16-byte reads go through eight lanes at a time, ldmatrix row by row of eight: 32 banks of 4 bytes, each once."""

    def banks(places: list[int]) -> list[int]:
        return sorted(place // 4 % 32 for place in places)

    for octet in range(4):
        for lanes in range(0, 32, 8):
            of = [(lane // 4, lane % 4) for lane in range(lanes, lanes + 8)]
            together = [library.ctp_emulator_dense_place(g, 4 * t + octet) for g, t in of]
            small_groups = [library.ctp_emulator_dense_place(g, 4 * octet + t) for g, t in of]
            assert banks(together) == banks(small_groups) == list(range(0, 32, 4))
        for matrix in range(4):
            rows = [library.ctp_emulator_sparse_row(row, octet, matrix) for row in range(8)]
            assert banks(rows) == list(range(0, 32, 4))


def test_quads_lie_where_ldmatrix_looks_for_them(library):
    """Matrix b of step i: quads 2b and 2b + 1 of the fragment, quad q being quad 2i + q / 4 of lane q % 4's span."""
    for row in (0, 5, 13):
        places = {library.ctp_emulator_sparse_place(row, quad) for quad in range(32)}
        assert places == set(range(256 * row, 256 * row + 256, 8))
        for step in range(4):
            for quad in range(8):
                place = library.ctp_emulator_sparse_place(row, 8 * (quad % 4) + 2 * step + quad // 4)
                assert place == library.ctp_emulator_sparse_row(row, step, quad // 2) + 8 * (quad % 2)
