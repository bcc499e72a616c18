"""Every packed linear against cuBLAS on a GPU: format x rows x shape, forward and dX, eagerly and in a CUDA graph."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from bench.gpu import copies_to_overflow, race
from bench.machine import machine
from bench.test_kernels import CASES, EXTRA, SHAPES, ids
from ctp_kernels import pack, parse_format
from ctp_kernels.backends import choose, row_class

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytestmark = pytest.mark.gpu
EXACT = [case for case in CASES + EXTRA if len(case) == 3]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: The selection of a short run (eagerly: the first shape only); --benchmark-full runs the whole product.
QUICK = {
    "shapes": {"graph": SHAPES[:1] + SHAPES[2:3], "eager": SHAPES[:1]},
    "rows": {"forward": [1, 16, 64, 256], "dX": [16, 64, 256]},
    "dtype": "bf16",
}


@lru_cache(maxsize=1)
def weight(format: str, zeros: float, shape: tuple[int, int], dtype: torch.dtype):
    """Copies of one weight, packed and dense, each kind more than the L2 cache holds."""
    generator = torch.Generator("cuda").manual_seed(0)
    dense = torch.randn(*shape, generator=generator, device="cuda")
    parsed = parse_format(format)
    if parsed.pattern == "unstructured":
        dense *= torch.rand(*shape, generator=generator, device="cuda") >= zeros
    packed = pack(dense, parsed.with_dtype(dtype))
    unpacked = packed.unpack(dtype)
    copies = [[t.clone() for t in packed.tensors] for _ in range(copies_to_overflow(packed.nbytes))]
    return packed, copies, [unpacked.clone() for _ in range(copies_to_overflow(unpacked.nbytes))]


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("direction", ["forward", "dX"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", EXACT, ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@torch.no_grad()
def test_gpu_kernels(table, request, shape, case, dtype, direction, rows, mode):
    quick = (
        case in CASES
        and shape in QUICK["shapes"][mode]
        and rows in QUICK["rows"][direction]
        and dtype == QUICK["dtype"]
    )
    if not quick and not request.config.getoption("--benchmark-full"):
        pytest.skip("only with --benchmark-full")
    label, format, zeros = case
    number, (n, k) = DTYPES[dtype], shape
    packed, copies, dense = weight(format, zeros, shape, number)
    chosen = packed.format
    x = torch.randn(rows, k if direction == "forward" else n, device="cuda").to(number)
    if direction == "forward":
        packed_calls = [lambda w=w: torch.ops.ctp.matmul(x, w, None, chosen.name, n, "auto") for w in copies]
        dense_calls = [lambda w=w: torch.nn.functional.linear(x, w) for w in dense]
    else:
        packed_calls = [lambda w=w: torch.ops.ctp.matmul_t(x, w, chosen.name, k, "auto") for w in copies]
        dense_calls = [lambda w=w: x @ w for w in dense]
    expected, got = dense_calls[0]().float(), packed_calls[0]().float()
    error = ((got - expected).norm() / expected.norm()).item()
    assert error < 1e-2, f"{label} {direction} is wrong before it is timed: relative error {error:.2e}"

    times = race({"dense": dense_calls, "packed": packed_calls}, graph=mode == "graph")
    roof, seconds = machine("cuda"), times["packed"]["median"]
    nbytes, flop = packed.nbytes + x.nbytes + got.numel() * x.element_size(), 2 * rows * n * k
    way = "forward" if direction == "forward" else "backward"
    table.add("cuda", "gpu_kernels", {
        "format": label, "dtype": dtype, "direction": direction, "n": n, "k": k, "rows": rows, "mode": mode,
        "backend": choose(chosen, shape, number, "cuda", way, rows=row_class(rows)).backend,
        "dense_us": times["dense"]["median"] * 1e6, "packed_us": seconds * 1e6,
        "packed_us_p20": times["packed"]["low"] * 1e6, "packed_us_p80": times["packed"]["high"] * 1e6,
        "speedup": times["dense"]["median"] / seconds, "gb_per_s": nbytes / seconds / 1e9,
        "gflop_per_s": flop / seconds / 1e9,
        "share_of_limit": max(nbytes / (roof.gb_per_s * 1e9), flop / (roof.gflop_per_s * 1e9)) / seconds,
    })  # fmt: skip
