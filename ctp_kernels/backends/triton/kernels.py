"""The kernels, each a loop over tiles around the decoders of `patterns.py`.

    matmul_kernel      y = x W^T + bias    tensor cores; fp32 products on the other cores
    matmul_t_kernel    dx = dy W           the same, reduced over the rows of W
    decode_kernel      y = x W^T + bias    a few rows of x: no tensor cores, no exchange between lanes until the end
    reduce_kernel      sums what the splits of one of them left, in a fixed order: the same bits on every run
    dequantize_kernel  W                   for a dense product, where there are rows enough to pay for it

Both products are computed transposed, y^T = W x^T and dx^T = W^T dy^T: the decoded weight is the A operand, which
wgmma and mma take straight from registers (in the usual orientation a Hopper kernel with 16 rows of x falls back to
mma.sync).

Arguments that all share: the buffers of a weight (N, K) as in PackedWeight (a buffer that the format lacks is never
read); PATTERN; BITS of a code, 0 for floating values; GROUP inputs a scale, 0 for one scale a row; SYMMETRIC;
SEGMENT, a power of two that divides GROUP; WORDS: all buffers begin on 4 bytes. K is a constant because a model has
only a few. With SPLITS > 1 the reduction is cut into that many pieces, and the output is fp32 (SPLITS, M, outputs),
for `reduce_kernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .patterns import dense_tile, group_scales, unscaled_tile


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    x,
    stored,
    stored_hi,
    mask,
    row_offsets,
    tile_offsets,
    scales,
    zeros,
    bias,
    y,
    M,
    N,
    ldx,
    K: tl.constexpr,
    PATTERN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SEGMENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WORDS: tl.constexpr,
):
    """x (M, K) rows ldx apart, bias (N,), y (M, N) contiguous. WIDEN: multiply in fp32 (see `plan.widens`).

    Where a tile lies in one group (SEGMENT == BLOCK_K) code - zero, an integer that every activation dtype holds
    exactly, is multiplied, and the scale goes on the fp32 sum; otherwise scale * (code - zero) is rounded once to x's
    dtype, as a dense layer of that dtype holds it.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    inside = (rows < N)[:, None] & (columns < M)[None, :]
    # Rows beyond the edge repeat the last one and are not stored: no mask in the loop.
    rows = tl.minimum(rows, N - 1).to(tl.int64)
    columns = tl.minimum(columns, M - 1).to(tl.int64)
    x_rows = x + columns[None, :] * ldx
    NUMBER: tl.constexpr = tl.float32 if WIDEN else x.dtype.element_ty
    ONE_SCALE: tl.constexpr = BITS > 0 and SEGMENT == BLOCK_K
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    EACH: tl.constexpr = (TILES + SPLITS - 1) // SPLITS

    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for t in range(split * EACH, tl.minimum(split * EACH + EACH, TILES)):
        k = t * BLOCK_K + tl.arange(0, BLOCK_K)
        if K % BLOCK_K != 0:
            xt = tl.load(x_rows + k[:, None], mask=(k < K)[:, None], other=0.0)
        else:
            xt = tl.load(x_rows + k[:, None])
        if ONE_SCALE:
            tile = unscaled_tile(
                stored, stored_hi, mask, row_offsets, tile_offsets, zeros, rows, t, N,
                K, PATTERN, BITS, GROUP, SYMMETRIC, SEGMENT, BLOCK_K, WORDS, NUMBER,
            )  # fmt: skip
        else:
            tile = dense_tile(
                stored, stored_hi, mask, row_offsets, tile_offsets, scales, zeros, rows, t, N,
                K, PATTERN, BITS, GROUP, SYMMETRIC, SEGMENT, BLOCK_K, WORDS,
            )  # fmt: skip
            if BITS > 0:
                tile = tile.to(xt.dtype)
        if WIDEN:
            tile = tile.to(tl.float32)
            xt = xt.to(tl.float32)
        tile = tile.to(xt.dtype)
        if ONE_SCALE and GROUP > 0:
            part = tl.dot(tile, xt, input_precision="ieee")
            total += part * group_scales(scales, rows, t, K, GROUP, SEGMENT, BLOCK_K)
        else:
            total = tl.dot(tile, xt, total, input_precision="ieee")

    if ONE_SCALE and GROUP == 0:
        total *= tl.load(scales + rows).to(tl.float32)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + rows).to(tl.float32)[:, None]
    out = y + (split.to(tl.int64) * M + columns)[None, :] * N + rows[:, None]
    tl.store(out, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def matmul_t_kernel(
    dy,
    stored,
    stored_hi,
    mask,
    row_offsets,
    tile_offsets,
    scales,
    zeros,
    dx,
    M,
    N,
    lddy,
    K: tl.constexpr,
    PATTERN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SEGMENT: tl.constexpr,
    WIDEN: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WORDS: tl.constexpr,
):
    """dy (M, N) rows lddy apart, dx (M, K) contiguous.

    The scale belongs to the dimension that is summed over. Multiplying it into dy would save work, but rounds
    scale * dy: in fp16 small gradients times small scales underflow, and in bf16 a one-hot row no longer returns the
    decoded row. So scale * (code - zero) is rounded once to dy's dtype, as a dense layer of that dtype holds it.
    """
    t = tl.program_id(0)
    k = t * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    inside = (k < K)[:, None] & (columns < M)[None, :]
    columns = tl.minimum(columns, M - 1).to(tl.int64)
    dy_rows = dy + columns[None, :] * lddy
    each = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLITS) * BLOCK_N

    total = tl.zeros((BLOCK_K, BLOCK_M), dtype=tl.float32)
    for n0 in range(split * each, tl.minimum(split * each + each, N), BLOCK_N):
        rows = n0 + tl.arange(0, BLOCK_N)
        dyt = tl.load(dy_rows + rows[:, None], mask=(rows < N)[:, None], other=0.0)
        tile = dense_tile(
            stored, stored_hi, mask, row_offsets, tile_offsets, scales, zeros,
            tl.minimum(rows, N - 1).to(tl.int64), t, N,
            K, PATTERN, BITS, GROUP, SYMMETRIC, SEGMENT, BLOCK_K, WORDS,
        )  # fmt: skip
        if BITS > 0:
            tile = tile.to(dyt.dtype)
        if WIDEN:
            tile = tile.to(tl.float32)
            dyt = dyt.to(tl.float32)
        total = tl.dot(tl.trans(tile.to(dyt.dtype)), dyt, total, input_precision="ieee")

    out = dx + (split.to(tl.int64) * M + columns)[None, :] * K + k[:, None]
    tl.store(out, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def decode_kernel(
    x,
    stored,
    stored_hi,
    mask,
    row_offsets,
    tile_offsets,
    scales,
    zeros,
    bias,
    y,
    M,
    N,
    ldx,
    K: tl.constexpr,
    PATTERN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SEGMENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WORDS: tl.constexpr,
):
    """As `matmul_kernel` for M <= BLOCK_M <= 8, in fp32.

    Each lane multiplies the inputs that it decodes, and sums SEGMENT of them before it applies their scale; lanes are
    summed once, after the loop.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    inside = rows < N
    rows = tl.minimum(rows, N - 1).to(tl.int64)
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    EACH: tl.constexpr = (TILES + SPLITS - 1) // SPLITS
    SEGMENTS: tl.constexpr = BLOCK_K // SEGMENT

    # One accumulator a row of x, in the layout in which the bytes were loaded; Triton knows no (*a, b).
    totals = ()
    for _ in tl.static_range(BLOCK_M):
        totals = totals + (tl.zeros((BLOCK_N, SEGMENTS), dtype=tl.float32),)  # noqa: RUF005
    for t in range(split * EACH, tl.minimum(split * EACH + EACH, TILES)):
        k = t * BLOCK_K + tl.arange(0, BLOCK_K)
        tile = unscaled_tile(
            stored, stored_hi, mask, row_offsets, tile_offsets, zeros, rows, t, N,
            K, PATTERN, BITS, GROUP, SYMMETRIC, SEGMENT, BLOCK_K, WORDS, tl.float32,
        ).to(tl.float32)  # fmt: skip
        if BITS > 0:
            scale = group_scales(scales, rows, t, K, GROUP, SEGMENT, BLOCK_K)
        sums = ()
        for m in tl.static_range(BLOCK_M):
            x_row = x + tl.minimum(M - 1, m) * ldx
            if K % BLOCK_K != 0:
                xs = tl.load(x_row + k, mask=k < K, other=0.0)
            else:
                xs = tl.load(x_row + k)
            part = tile * xs.to(tl.float32)[None, :]
            if SEGMENT > 1:
                part = tl.sum(tl.reshape(part, (BLOCK_N, SEGMENTS, SEGMENT)), 2)
            if BITS > 0:
                part *= scale
            sums = sums + (totals[m] + part,)  # noqa: RUF005
        totals = sums

    for m in tl.static_range(BLOCK_M):
        sums = tl.sum(totals[m], 1)
        if HAS_BIAS:
            sums += tl.load(bias + rows).to(tl.float32)
        out = y + (split.to(tl.int64) * M + m) * N + rows
        tl.store(out, sums.to(y.dtype.element_ty), mask=inside & (rows * 0 + m < M))


@triton.jit(do_not_specialize=["size"])
def reduce_kernel(parts, bias, y, size, N, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y (size,) = the sum over the first dimension of parts fp32 (SPLITS, size), + bias (N,), N outputs a row."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(parts + at, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * size.to(tl.int64) + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_kernel(
    stored,
    stored_hi,
    mask,
    row_offsets,
    tile_offsets,
    scales,
    zeros,
    weight,
    N,
    K: tl.constexpr,
    PATTERN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WORDS: tl.constexpr,
):
    """weight (N, K) contiguous: each entry computed in fp32 and rounded once."""
    t = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = t * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows < N)[:, None] & (k < K)[None, :]
    rows = tl.minimum(rows, N - 1).to(tl.int64)
    tile = dense_tile(
        stored, stored_hi, mask, row_offsets, tile_offsets, scales, zeros, rows, t, N,
        K, PATTERN, BITS, GROUP, SYMMETRIC, SEGMENT, BLOCK_K, WORDS,
    )  # fmt: skip
    tl.store(weight + rows[:, None] * K + k[None, :], tile.to(weight.dtype.element_ty), mask=inside)
