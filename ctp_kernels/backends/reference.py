"""Plain PyTorch, any device, every format: decode the weight, multiply. The truth that kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..format import Format
from ..packed import PackedWeight


def unsupported(
    format: Format, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    return None if dtype.is_floating_point else f"activations are {dtype}, not floating point"


def matmul(
    x: torch.Tensor, tensors: Sequence[torch.Tensor], format: Format, n: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """y (M, N) = x (M, K) W^T + bias, summed in fp32 (fp64 for fp64 activations), rounded once to x's dtype."""
    weight = _decode(tensors, format, (n, x.shape[1]), x.dtype)
    wide_bias = None if bias is None else bias.to(weight.dtype)
    return torch.nn.functional.linear(x.to(weight.dtype), weight, wide_bias).to(x.dtype)


def matmul_t(dy: torch.Tensor, tensors: Sequence[torch.Tensor], format: Format, k: int) -> torch.Tensor:
    """dx (M, K) = dy (M, N) W, summed as in `matmul`."""
    weight = _decode(tensors, format, (dy.shape[1], k), dy.dtype)
    return (dy.to(weight.dtype) @ weight).to(dy.dtype)


def _decode(
    tensors: Sequence[torch.Tensor], format: Format, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return PackedWeight(format, shape, wide, dict(zip(format.buffer_names, tensors, strict=True))).unpack()
