"""Every packed linear against the dense fp32 (CPU) or fp16 (GPU) one: format x rows x shape, forward and dX."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch

from bench.machine import machine
from ctp_kernels import FORMATS, PackedWeight, pack, parse_format
from ctp_kernels.backends import choose

#: (name in the table, format, share of zeros in the weight[, compute])
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
]
EXTRA = [(name, name, 0.5) for name in FORMATS if name not in {case[1] for case in CASES}]
SHAPES = [(4096, 4096), (2048, 2048), (11008, 4096), (4096, 11008)]
ROWS = [1, 4, 16, 64, 128, 512, 2048]
#: The ten-minute selection. --benchmark-full: CASES at every shape and number of rows, every other format at the first.
QUICK = {"forward": [1, 4, 16, 64, 512], "dX": [16, 64, 512]}
CACHE = 64 * 2**20  # rotate over copies of the weight that together exceed it


@dataclass
class Weight:
    """Copies of one weight, packed and dense, on a device."""

    packed: list[PackedWeight]
    dense: list[torch.Tensor]


@lru_cache(maxsize=1)
def weight(device: str, format: str, zeros: float, shape: tuple[int, int], dtype: torch.dtype) -> Weight:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(*shape, generator=generator)
    parsed = parse_format(format)
    if parsed.pattern == "unstructured":
        dense *= torch.rand(*shape, generator=generator) >= zeros
    packed = pack(dense, parsed).to(device)
    unpacked = packed.unpack(dtype)

    def copies(nbytes: int) -> range:
        return range(1 + CACHE // nbytes)

    clones = [
        PackedWeight(packed.format, packed.shape, dtype, {k: t.clone() for k, t in packed.buffers.items()})
        for _ in copies(packed.nbytes)
    ]
    return Weight(clones, [unpacked.clone() for _ in copies(unpacked.nbytes)])


def run_case(
    interleave, table, request, device: str, dtype: torch.dtype, case, rows: int, shape, direction: str
) -> None:
    if not request.config.getoption("--benchmark-full"):
        if case in EXTRA or shape != SHAPES[0] or rows not in QUICK[direction]:
            pytest.skip("only with --benchmark-full")
    elif case in EXTRA and shape != SHAPES[0]:
        pytest.skip("the other shapes are for the formats of the table")
    label, format, zeros, *mode = case
    compute = mode[0] if mode else "exact"
    if compute == "int8" and (direction == "dX" or device == "cuda"):
        pytest.skip("int8 activations are forward only, on the CPU")
    n, k = shape
    held = weight(device, format, zeros, shape, dtype)
    name = held.packed[0].format.name
    way = "forward" if direction == "forward" else "backward"
    backend = choose(held.packed[0].format, shape, dtype, device, way).backend
    if backend == "reference":
        pytest.skip(f"no kernel for {format} {way} on {device}")
    x = torch.randn(rows, k if direction == "forward" else n, device=device, dtype=dtype)
    if direction == "forward":
        matmul = torch.ops.ctp.matmul
        packed_calls = [lambda w=w: matmul(x, w.tensors, None, name, n, "auto", compute) for w in held.packed]
        dense_calls = [lambda w=w: torch.nn.functional.linear(x, w) for w in held.dense]
    else:
        packed_calls = [lambda w=w: torch.ops.ctp.matmul_t(x, w.tensors, name, k, "auto") for w in held.packed]
        dense_calls = [lambda w=w: x @ w for w in held.dense]

    expected, got = dense_calls[0]().float(), packed_calls[0]().float()
    tolerance = 2e-2 if compute == "int8" else 1e-4 if dtype == torch.float32 else 1e-2
    error = ((got - expected).norm() / expected.norm()).item()
    assert error < tolerance, f"{label} {direction} is wrong before it is timed: relative error {error:.2e}"

    times = interleave({"dense": dense_calls, "packed": packed_calls}, device=device)
    roof, seconds = machine(device), times["packed"]["median"]
    nbytes = held.packed[0].nbytes + x.nbytes + expected.numel() * x.element_size()
    flop = 2 * rows * n * k
    limit = max(nbytes / (roof.gb_per_s * 1e9), flop / (roof.gflop_per_s * 1e9))
    table.add(device, "kernels", {
        "format": label, "direction": direction, "n": n, "k": k, "rows": rows, "backend": backend,
        "dense_ms": times["dense"]["median"] * 1e3, "packed_ms": seconds * 1e3,
        "packed_ms_p20": times["packed"]["low"] * 1e3, "packed_ms_p80": times["packed"]["high"] * 1e3,
        "speedup": times["dense"]["median"] / seconds, "gb_per_s": nbytes / seconds / 1e9,
        "gflop_per_s": flop / seconds / 1e9, "share_of_limit": limit / seconds,
        "bits_per_weight": held.packed[0].bits_per_weight,
    })  # fmt: skip


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
def test_cpu_kernels(interleave, table, request, shape, case, direction, rows):
    run_case(interleave, table, request, "cpu", torch.float32, case, rows, shape, direction)
