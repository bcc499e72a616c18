"""From tensors to launches: constants, options and grids of a plan, and the products made of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
import triton

from ...errors import CTPError
from ...format import Format
from .. import row_class
from . import kernels
from .plan import MULTIPROCESSORS, Plan, plan_for, segment_of, widens

_BUFFERS = ("codes_hi", "mask", "row_offsets", "tile_offsets", "scales", "zeros")
_REDUCE_BLOCK = 1024


def interpreted() -> bool:
    """Whether triton was imported with its interpreter switched on, which runs kernels on CPU tensors."""
    return not isinstance(kernels.matmul_kernel, triton.JITFunction)


@lru_cache(maxsize=4096)
def constants_of(
    plan: Plan, format: Format, dtype: torch.dtype, k: int, direction: str, has_bias: bool, words: bool = True
) -> dict[str, Any]:
    """The constexpr arguments of the kernel that `plan` names."""
    # Products of fp16 sums over 8 to 32 inputs: so many lie next to each other in a lane.
    most = (1 if format.pattern == "unstructured" else 32 if format.quantized else 8) if plan.kind == "decode" else None
    constants: dict[str, Any] = {
        "K": k,
        "PATTERN": format.pattern,
        "BITS": format.bits if format.quantized else 0,
        "GROUP": format.group_size if format.group_size and format.groups(k) > 1 else 0,
        "SYMMETRIC": format.symmetric,
        "SEGMENT": segment_of(format, k, plan.block_k, most),
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "WORDS": words,
    }
    if plan.kind == "dense":
        return constants
    constants |= {"SPLITS": plan.splits, "BLOCK_M": plan.block_m}
    if direction == "forward":
        constants["HAS_BIAS"] = has_bias and plan.splits == 1
    if plan.kind == "tile":
        # The interpreter's bf16 conversions are right and its bf16 arithmetic is not.
        constants["WIDEN"] = interpreted() or widens(format, dtype)
    return constants


def options_of(plan: Plan) -> dict[str, Any]:
    # Triton 3.10 changes the default of enable_fp_fusion: say it, so that every version rounds alike.
    return {"num_warps": plan.warps, "num_stages": plan.stages, "enable_fp_fusion": True}


@cache
def properties_of(index: int) -> tuple[str, int]:
    """A GPU's name, and how many multiprocessors it has."""
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count


def gpu_of(tensor: torch.Tensor) -> tuple[str | None, int]:
    """As `properties_of`, of the tensor's GPU; no name where the interpreter runs."""
    return properties_of(tensor.get_device()) if tensor.is_cuda else (None, MULTIPROCESSORS)


def _plan(format: Format, x: torch.Tensor, shape: tuple[int, int], direction: str) -> Plan:
    return plan_for(format, x.dtype, row_class(x.shape[0]), shape, direction, *gpu_of(x))


def _weight_arguments(tensors: Sequence[torch.Tensor], format: Format) -> list[torch.Tensor]:
    """The buffers in the order of the kernels' arguments; the first stands in for those that the format lacks."""
    buffers = dict(zip(format.kernel_names, tensors, strict=True))
    stored = tensors[0]
    return [stored, *(buffers.get(name, stored) for name in _BUFFERS)]


def _on_words(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether every buffer begins on 4 bytes, as all but slices of larger tensors do."""
    return all(tensor.data_ptr() % 4 == 0 for tensor in tensors)


def _near(x: torch.Tensor) -> torch.Tensor:
    """x with neighbours side by side and all rows within 2^31 elements, which is how far the decode kernel counts."""
    return x if x.stride(1) == 1 and x.shape[0] * x.stride(0) < 2**31 else x.contiguous()


def matmul(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    format: Format,
    n: int,
    bias: torch.Tensor | None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """y (M, N) = x (M, K) W^T + bias, summed in fp32, rounded once to x's dtype."""
    m, k = x.shape
    if m == 0:
        return x.new_empty((m, n))
    if bias is not None:
        if bias.shape != (n,):
            raise CTPError(f"a bias of shape {tuple(bias.shape)} does not fit {n} outputs")
        bias = bias.contiguous()
    plan = plan or _plan(format, x, (n, k), "forward")
    if plan.kind == "dense":
        weight = dequantize(tensors, format, (n, k), _operand(format, x.dtype), plan)
        wide_bias = None if bias is None else bias.to(weight.dtype)
        return torch.nn.functional.linear(x.to(weight.dtype), weight, wide_bias).to(x.dtype)
    constants = constants_of(plan, format, x.dtype, k, "forward", bias is not None, _on_words(tensors))
    kernel = kernels.decode_kernel if plan.kind == "decode" else kernels.matmul_kernel
    x = _near(x)
    weight = _weight_arguments(tensors, format)
    y = _output(x, plan, m, n)
    blocks = triton.cdiv(n, plan.block_n)
    if plan.kind == "decode":
        if m > plan.block_m:
            raise CTPError(f"a decode plan of {plan.block_m} rows cannot take {m}")
        grid = (blocks, plan.splits)
    else:
        grid = (blocks, triton.cdiv(m, plan.block_m), plan.splits)
    with torch.cuda.device_of(x):
        kernel[grid](
            x, *weight, weight[0] if bias is None else bias, y, m, n, x.stride(0), **constants, **options_of(plan)
        )
        return _reduced(y, x, bias, plan)


def matmul_t(
    dy: torch.Tensor, tensors: Sequence[torch.Tensor], format: Format, k: int, plan: Plan | None = None
) -> torch.Tensor:
    """dx (M, K) = dy (M, N) W, summed as in `matmul`."""
    m, n = dy.shape
    if m == 0:
        return dy.new_empty((m, k))
    plan = plan or _plan(format, dy, (n, k), "backward")
    if plan.kind == "dense":
        weight = dequantize(tensors, format, (n, k), _operand(format, dy.dtype), plan)
        return torch.matmul(dy.to(weight.dtype), weight).to(dy.dtype)
    constants = constants_of(plan, format, dy.dtype, k, "backward", False, _on_words(tensors))
    dy = _near(dy)
    dx = _output(dy, plan, m, k)
    grid = (triton.cdiv(k, plan.block_k), triton.cdiv(m, plan.block_m), plan.splits)
    with torch.cuda.device_of(dy):
        kernels.matmul_t_kernel[grid](
            dy, *_weight_arguments(tensors, format), dx, m, n, dy.stride(0), **constants, **options_of(plan)
        )
        return _reduced(dx, dy, None, plan)


def dequantize(
    tensors: Sequence[torch.Tensor], format: Format, shape: tuple[int, int], dtype: torch.dtype, plan: Plan
) -> torch.Tensor:
    """The weight (N, K) in `dtype`, each entry computed in fp32 and rounded once."""
    n, k = shape
    weight = torch.empty((n, k), dtype=dtype, device=tensors[0].device)
    grid = (triton.cdiv(n, plan.block_n), triton.cdiv(k, plan.block_k))
    with torch.cuda.device_of(weight):
        kernels.dequantize_kernel[grid](
            *_weight_arguments(tensors, format),
            weight,
            n,
            **constants_of(plan, format, dtype, k, "forward", False, _on_words(tensors)),
            **options_of(plan),
        )
    return weight


def _operand(format: Format, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if widens(format, dtype) else dtype


def _output(x: torch.Tensor, plan: Plan, m: int, outputs: int) -> torch.Tensor:
    """(M, outputs) in x's dtype, or fp32 (SPLITS, M, outputs)."""
    if plan.splits == 1:
        return x.new_empty((m, outputs))
    return torch.empty((plan.splits, m, outputs), dtype=torch.float32, device=x.device)


def _reduced(parts: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, plan: Plan) -> torch.Tensor:
    if plan.splits == 1:
        return parts
    y = torch.empty(parts.shape[1:], dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(y.numel(), _REDUCE_BLOCK),)
    kernels.reduce_kernel[grid](
        parts, parts if bias is None else bias, y, y.numel(), y.shape[1],
        HAS_BIAS=bias is not None, SPLITS=plan.splits, BLOCK=_REDUCE_BLOCK, num_warps=4,
    )  # fmt: skip
    return y
