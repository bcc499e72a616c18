"""Which kernel with which tiles: the one rule of this backend. Imports no Triton.

    plan_for(format, dtype, m, (n, k), direction) -> Plan

looks into the table of this GPU (measured by `ctp warmup --tune`, or shipped in tuned.json), and otherwise follows a
plain rule. Its tiles were measured on an H200 where a comment says so; the others are by arithmetic and by what the
compiler makes of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import torch

from ...format import FLOAT_DTYPES, Format
from ...patterns import TILE
from . import tuned

#: From this row class on (so from 65 rows): dequantise, then a dense product. Measured on an H200 at 64, 128 and 256
#: rows of 4096 x 4096 and 11008 x 4096.
DENSE_FROM_ROWS = 128
#: Up to this many rows: `decode_kernel` (which takes 8). Not measured; compiled for 4 rows it spills for some formats
#: and leaves few warps in flight for the others, where the tensor cores take 4 rows like 16.
DECODE_ROWS = 2
#: Multiprocessors to fill where there is no GPU to ask (the interpreter, ahead-of-time compilation): an H100's.
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Plan:
    """A kernel and its tiles. kind: "decode", "tile" (tensor cores) or "dense" (dequantise, then torch.matmul).

    block_n, block_m, block_k: rows of W, rows of x or dy, inputs of a tile. splits: pieces of the reduction, summed
    by `reduce_kernel` in a fixed order.
    """

    kind: str
    block_n: int
    block_m: int
    block_k: int
    splits: int = 1
    warps: int = 4
    stages: int = 3

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        if self.kind == "dense":
            return "dequantise, then the dense product"
        counts = f"splits={self.splits} warps={self.warps} stages={self.stages}"
        return f"{self.kind} {self.block_n}x{self.block_m}x{self.block_k} {counts}"


def widens(format: Format, dtype: torch.dtype) -> bool:
    """Whether operands are widened to fp32 before they are multiplied: floating values in another dtype than the
    activations', of which neither is rounded to the other."""
    return not format.quantized and FLOAT_DTYPES[str(format.values)] != dtype


def segment_of(format: Format, k: int, block_k: int, most: int | None = None) -> int:
    """The largest power of two that divides the group, at most `block_k` (and `most`)."""
    most = min(block_k, most or block_k)
    group = format.group_size
    if not format.quantized or group is None or format.groups(k) == 1:
        return most
    return min(group & -group, most)


@lru_cache(maxsize=4096)
def plan_for(
    format: Format,
    dtype: torch.dtype,
    m: int,
    shape: tuple[int, int],
    direction: str,
    gpu: str | None = None,
    multiprocessors: int = MULTIPROCESSORS,
) -> Plan:
    """The plan for `m` rows of activations of `dtype` and a weight of `shape` (N, K); `m` a `row_class`.

    `gpu` is the device's name, or None to ask no table.
    """
    if gpu is not None:
        found = tuned.lookup(gpu, tuned.key(format, dtype, m, shape, direction))
        if found is not None:
            return Plan(**found)
    return default_plan(format, dtype, m, shape, direction, multiprocessors)


def default_plan(
    format: Format,
    dtype: torch.dtype,
    m: int,
    shape: tuple[int, int],
    direction: str,
    multiprocessors: int,
) -> Plan:
    """The rule where no table answers."""
    if direction == "forward" and m <= DECODE_ROWS:
        plan = _decode_tiles(format, m)
    elif m >= DENSE_FROM_ROWS or _dense_is_faster(format, dtype, m, direction):
        return dense_plan(format)
    else:
        plan = _forward_tiles(format, shape[1], m) if direction == "forward" else _backward_tiles(format, m)
    return with_splits(plan, m, shape, direction, multiprocessors)


def _dense_is_faster(format: Format, dtype: torch.dtype, m: int, direction: str) -> bool:
    """fp32 products, which do not run on tensor cores: on an H200 int4 took three to six times a dense product's time
    at 4 and 16 rows forward; that dequantising first costs less, and dX, are by arithmetic. And unstructured weights,
    as measured there: forward at 64 rows, dX of codes at 16, of floating values at 64."""
    if dtype == torch.float32 or widens(format, dtype):
        return True
    most = 32 if direction == "forward" else 0 if format.quantized else 16
    return format.pattern == "unstructured" and m > most


def dense_plan(format: Format) -> Plan:
    """Dequantise in tiles of this size, then torch.matmul."""
    return Plan("dense", 16, 0, TILE, stages=2)


def _forward_tiles(format: Format, k: int, m: int) -> Plan:
    """BLOCK_K divides the group where a power of two of 32 or more does, so that the scale stays out of the product."""
    narrow = format.quantized and format.bits < 8
    few = m <= 32 and not (format.pattern == "sparse24" and format.quantized and format.bits == 8)  # which spills
    plan = Plan("tile", 64, max(m, 16), 128, warps=4 if few or narrow else 8)
    if format.pattern == "unstructured":
        return replace(plan, block_k=TILE, warps=8)
    segment = segment_of(format, k, plan.block_k)
    return replace(plan, block_k=segment) if segment >= 32 else plan


def _decode_tiles(format: Format, m: int) -> Plan:
    """One warp and four rows of W: the layouts of x and W then differ only within a warp, which needs no barrier.

    64 codes a lane (32 of 8 bits, or numbers): more rows or inputs cost registers, and so warps in flight.
    """
    if format.pattern == "unstructured":
        return Plan("decode", 4, m, TILE, warps=1, stages=1)
    wide = {32: 128, 16: 256, 8: 256}.get(format.bits, 512)
    if format.pattern == "sparse24" and format.bits == 2 and m > 1:
        wide = 256  # 512 spill on sm_90
    return Plan("decode", 4, m, wide, warps=1, stages=1)


def _backward_tiles(format: Format, m: int) -> Plan:
    """Measured on an H200 at 16, 32 and 64 rows, with three and four stages: as many as fit into 99 KB, which is what a
    block may have on sm_86 and sm_89 (for 8 bits and more at 64 rows two, which were not measured)."""
    block_m = max(m, 16)
    entries = 128 * TILE // (2 if format.pattern == "sparse24" else 1)
    stage = entries * format.bits // 8 + 2 * 128 * block_m  # bytes: a tile of W, one of dy
    return Plan("tile", 128, block_m, TILE, warps=8, stages=max(2, min(4, 90 * 1024 // stage)))


def with_splits(plan: Plan, m: int, shape: tuple[int, int], direction: str, multiprocessors: int) -> Plan:
    """Cut the reduction until each multiprocessor has work for its warps (16 of `decode_kernel`, which has nothing
    else to hide the memory's latency with, 8 of the others), while the partial sums that are written and read again
    stay few (measured on an H200: four pieces at 16 and 64 rows forward; eight at 16 and 32 rows of dX, four at 64)."""
    n, k = shape
    outputs, reduced = (n, k) if direction == "forward" else (k, n)
    out_block, block = (plan.block_n, plan.block_k) if direction == "forward" else (plan.block_k, plan.block_n)
    programs = -(-outputs // out_block) * -(-m // plan.block_m)
    wanted = (16 if plan.kind == "decode" else 8) * multiprocessors
    most = 16 if plan.kind == "decode" else 4 if direction == "forward" else min(16, 256 // m)
    splits = 1
    while programs * plan.warps * splits < wanted and 2 * splits <= min(most, -(-reduced // block)):
        splits *= 2
    return replace(plan, splits=splits)
