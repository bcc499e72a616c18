"""Every packed linear on the CPU against the dense one: format x rows x shape, forward and dX.

Dense has the dtype of the activations: fp32 where the name in the table does not say bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import pytest
import torch

from bench.machine import cold_bytes, machine
from ctp_kernels import FORMATS, PackedWeight, pack, parse_format
from ctp_kernels.linear import PackedLinear
from ctp_kernels.memory import in_huge_pages

#: (name in the table, format, share of zeros in the weight[, compute[, activations]])
CASES = [
    ("int4", "int4", 0.0),
    ("int3", "int3", 0.0),
    ("sparse24-bf16", "sparse24-bf16", 0.5),
    ("sparse24-int4", "sparse24-int4", 0.5),
    ("unstructured-bf16 50 %", "unstructured-bf16", 0.5),
    ("unstructured-bf16 75 %", "unstructured-bf16", 0.75),
    ("unstructured-int4 50 %", "unstructured-int4", 0.5),
    ("int4, int8 activations", "int4", 0.0, "int8"),
    ("int3, int8 activations", "int3", 0.0, "int8"),
    ("sparse24-int4, int8 activations", "sparse24-int4", 0.5, "int8"),
    ("unstructured-int4 50 %, int8 activations", "unstructured-int4", 0.5, "int8"),
    ("int4, bf16 activations", "int4", 0.0, "exact", torch.bfloat16),
    ("sparse24-bf16, bf16 activations", "sparse24-bf16", 0.5, "exact", torch.bfloat16),
    ("unstructured-bf16 50 %, bf16 activations", "unstructured-bf16", 0.5, "exact", torch.bfloat16),
    ("unstructured-bf16 75 %, bf16 activations", "unstructured-bf16", 0.75, "exact", torch.bfloat16),
]
EXTRA = [(name, name, 0.5) for name in FORMATS if name not in {case[1] for case in CASES}]
SHAPES = [(4096, 4096), (2048, 2048), (11008, 4096), (4096, 11008)]
ROWS = [1, 2, 4, 8, 16, 24, 32, 64, 128, 256, 512, 1024, 4096]
#: The selection of a short run. --benchmark-full: every row at the first shape, these at the others, other formats.
QUICK = {"forward": [1, 4, 16, 64, 512], "dX": [16, 64, 512]}


@dataclass
class Weight:
    """Copies of one weight, packed and dense."""

    packed: list[PackedWeight]
    dense: list[torch.Tensor]


@lru_cache(maxsize=1)
def weight(format: str, zeros: float, shape: tuple[int, int], dtype: torch.dtype) -> Weight:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(*shape, generator=generator)
    parsed = parse_format(format)
    if parsed.pattern == "unstructured":
        dense *= torch.rand(*shape, generator=generator) >= zeros
    packed = pack(dense, parsed)
    unpacked = packed.unpack(dtype)

    def copies(nbytes: int) -> range:
        return range(1 + cold_bytes() // nbytes)

    clones = [
        PackedWeight(packed.format, packed.shape, dtype, {k: t.clone() for k, t in packed.buffers.items()})
        for _ in copies(packed.nbytes)
    ]
    in_huge_pages(clone.buffers for clone in clones)  # as patch_model does
    return Weight(clones, [unpacked.clone() for _ in copies(unpacked.nbytes)])


def ids(case) -> str:
    return (
        case[0].replace(" ", "").replace("%", "").replace(",", "-")
        if isinstance(case[0], str)
        else "x".join(map(str, case))
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("direction", ["forward", "dX"])
@pytest.mark.parametrize("case", CASES + EXTRA, ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@torch.no_grad()
def test_cpu_kernels(interleave, table, request, shape, case, direction, rows):
    quick = rows in QUICK[direction] and case in CASES
    full = request.config.getoption("--benchmark-full")
    if shape != SHAPES[0] and not (full and quick):
        pytest.skip("the other shapes are for the formats and rows of the table, with --benchmark-full")
    if not quick and not (full and (case in CASES or rows in QUICK[direction])):
        pytest.skip("only with --benchmark-full")
    label, format, zeros, compute, dtype = (*case, *("exact", torch.float32)[len(case) - 3 :])
    if compute == "int8" and direction == "dX":
        pytest.skip("int8 activations are forward only")
    (n, k), held = shape, weight(format, zeros, shape, dtype)
    x = torch.randn(rows, k if direction == "forward" else n, dtype=dtype)
    if direction == "forward":
        packed_calls = [partial(PackedLinear(w, compute=compute), x) for w in held.packed]
        dense_calls = [partial(torch.nn.functional.linear, x, w) for w in held.dense]
    else:
        name, matmul_t = held.packed[0].format.name, torch.ops.ctp.matmul_t
        packed_calls = [partial(matmul_t, x, w.tensors, name, k, "auto") for w in held.packed]
        dense_calls = [partial(torch.matmul, x, w) for w in held.dense]

    expected, got = dense_calls[0]().float(), packed_calls[0]().float()
    tolerance = 2e-2 if compute == "int8" else 1e-4 if dtype == torch.float32 else 1e-2
    error = ((got - expected).norm() / expected.norm()).item()
    assert error < tolerance, f"{label} {direction} is wrong before it is timed: relative error {error:.2e}"

    times = interleave({"dense": dense_calls, "packed": packed_calls})
    roof, seconds = machine("cpu"), times["packed"]["median"]
    nbytes = held.packed[0].nbytes + x.nbytes + expected.numel() * x.element_size()
    flop = 2 * rows * n * k
    limit = max(nbytes / (roof.gb_per_s * 1e9), flop / (roof.gflop_per_s * 1e9))
    table.add("cpu", "kernels", {
        "format": label, "direction": direction, "n": n, "k": k, "rows": rows,
        "dense_ms": times["dense"]["median"] * 1e3, "packed_ms": seconds * 1e3,
        "packed_ms_p20": times["packed"]["low"] * 1e3, "packed_ms_p80": times["packed"]["high"] * 1e3,
        "speedup": times["dense"]["median"] / seconds, "gb_per_s": nbytes / seconds / 1e9,
        "gflop_per_s": flop / seconds / 1e9, "share_of_limit": limit / seconds,
        "bits_per_weight": held.packed[0].bits_per_weight,
    })  # fmt: skip
