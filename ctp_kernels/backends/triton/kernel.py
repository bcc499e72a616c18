"""y = x W^T + bias from packed bytes: one Triton kernel, a pattern decoder times a value decoder.

The tile is computed transposed, y^T = W x^T: the decoded weight is the A operand, which wgmma and mma take
straight from registers (in the usual orientation a Hopper kernel with 16 rows of x falls back to mma.sync).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ...format import Format
from .patterns import stored_tile


@triton.jit
def matmul_kernel(
    x,
    stored,
    stored_hi,
    scales,
    zeros,
    bias,
    y,
    M,
    N,
    ldx,
    K: tl.constexpr,
    PATTERN: tl.constexpr,
    VALUES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x (M, K) rows ldx apart, y (M, N) contiguous, bias (N,); the weight's buffers as in PackedWeight.

    BITS is 0 for floating values; GROUP is 0 for one scale a row. K is a constant because a model has only a few.
    WIDEN: multiply in fp32, for the interpreter, whose bf16 conversions are right and whose bf16 arithmetic is not.

    Where BLOCK_K divides GROUP (and for GROUP 0) code - zero, an integer that every activation dtype holds exactly,
    is multiplied, and the scale goes on the fp32 sum; otherwise scale * (code - zero) is rounded once to x's dtype,
    as a dense layer of that dtype holds it.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (rows < N)[:, None] & (columns < M)[None, :]
    # Rows beyond the edge repeat the last one and are not stored: no mask in the loop.
    rows = tl.minimum(rows, N - 1)
    columns = tl.minimum(columns, M - 1)
    groups: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP > 0 else 1
    MASKED: tl.constexpr = K % BLOCK_K != 0
    scale_rows = rows.to(tl.int64) * groups
    x_rows = x + columns.to(tl.int64)[None, :] * ldx
    PER_ELEMENT: tl.constexpr = BITS > 0 and GROUP > 0 and GROUP % BLOCK_K != 0

    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if MASKED:
            xt = tl.load(x_rows + k[:, None], mask=(k < K)[:, None], other=0.0)
        else:
            xt = tl.load(x_rows + k[:, None])
        tile = stored_tile(stored, stored_hi, rows, k0, K, PATTERN, VALUES, BLOCK_K)
        if BITS > 0:
            if PER_ELEMENT:
                at = scale_rows[:, None] + tl.minimum(k // GROUP, groups - 1)[None, :]
            elif GROUP > 0:
                at = (scale_rows + k0 // GROUP)[:, None]
            else:
                at = scale_rows[:, None]
            if SYMMETRIC:
                tile = tile.to(tl.int16) - 2 ** (BITS - 1)
            else:
                tile = tile.to(tl.int16) - tl.load(zeros + at).to(tl.int16)
            if PER_ELEMENT:
                tile = (tile.to(tl.float32) * tl.load(scales + at).to(tl.float32)).to(xt.dtype)
        if WIDEN:
            tile = tile.to(tl.float32)
            xt = xt.to(tl.float32)
        tile = tile.to(xt.dtype)
        if BITS > 0 and GROUP > 0 and not PER_ELEMENT:
            part = tl.dot(tile, xt, input_precision="ieee")
            total += part * tl.load(scales + at).to(tl.float32)
        else:
            total = tl.dot(tile, xt, total, input_precision="ieee")

    if BITS > 0 and GROUP == 0:
        total *= tl.load(scales + scale_rows).to(tl.float32)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + rows).to(tl.float32)[:, None]
    out = y + columns.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(out, total.to(y.dtype.element_ty), mask=inside)


def interpreted() -> bool:
    """Whether triton was imported with its interpreter switched on, which runs kernels on CPU tensors."""
    return not isinstance(matmul_kernel, triton.JITFunction)


def variant(
    format: Format, dtype: torch.dtype, m: int, k: int, has_bias: bool
) -> tuple[dict[str, Any], dict[str, int]]:
    """The kernel's constants and launch options for activations (m, k) of `dtype`.

    A plain rule, not yet tuned on a GPU: BLOCK_K is the largest power of two that divides the group, where that
    is 32 or more, so that the scale stays out of the inner product.
    """
    if dtype == torch.float32:
        # fp32 products do not run on tensor cores; larger tiles spill.
        block_n, block_m, most_k, warps, stages = 32, 16 if m <= 16 else 32, 32, 4, 2
    elif m <= 64:
        block_n, block_m, most_k, warps, stages = 64, max(16, triton.next_power_of_2(m)), 128, 4, 3
    else:
        block_n, block_m, most_k, warps, stages = 128, 128, 64, 8, 3
    group = format.group_size or 0
    block_k = most_k
    while group % block_k and block_k > 32:
        block_k //= 2
    if group % block_k:
        block_k = most_k
    constants = {
        "K": k,
        "PATTERN": format.pattern,
        "VALUES": format.values,
        "BITS": format.bits if format.quantized else 0,
        "GROUP": group,
        "SYMMETRIC": format.symmetric,
        "HAS_BIAS": has_bias,
        "WIDEN": interpreted(),
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "BLOCK_K": block_k,
    }
    # Triton 3.10 changes the default of enable_fp_fusion: say it, so that every version rounds alike.
    return constants, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def matmul(
    x: torch.Tensor, tensors: Sequence[torch.Tensor], format: Format, n: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """y (M, N) = x (M, K) W^T + bias, summed in fp32, rounded once to x's dtype."""
    m, k = x.shape
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    buffers = dict(zip(format.kernel_names, tensors, strict=True))
    stored = buffers["codes" if format.quantized else "values"]
    constants, options = variant(format, x.dtype, m, k, bias is not None)
    grid = (triton.cdiv(n, constants["BLOCK_N"]), triton.cdiv(m, constants["BLOCK_M"]))
    # A buffer the format does not have is never read: `stored` stands in for its pointer.
    with torch.cuda.device_of(x):
        matmul_kernel[grid](
            x,
            stored,
            buffers.get("codes_hi", stored),
            buffers.get("scales", stored),
            buffers.get("zeros", stored),
            stored if bias is None else bias,
            y,
            m,
            n,
            x.stride(0),
            **constants,
            **options,
        )
    return y
