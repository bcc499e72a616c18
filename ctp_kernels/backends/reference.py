"""Plain PyTorch, any device, every format: decode the weight, multiply. The truth that kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..format import Format
from ..packed import PackedWeight


def unsupported(
    format: Format,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    direction: str,
    compute: str = "exact",
) -> str | None:
    return None if dtype.is_floating_point else f"activations are {dtype}, not floating point"


def matmul(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    format: Format,
    n: int,
    bias: torch.Tensor | None,
    compute: str = "exact",
) -> torch.Tensor:
    """y (M, N) = x (M, K) W^T + bias, summed in fp32 (fp64 for fp64 activations), rounded once to x's dtype."""
    weight = _decode(tensors, format, (n, x.shape[1]), x.dtype)
    wide = x.to(weight.dtype)
    if compute == "int8":
        wide = round_activations(wide, format)
    wide_bias = None if bias is None else bias.to(weight.dtype)
    return torch.nn.functional.linear(wide, weight, wide_bias).to(x.dtype)


def matmul_t(dy: torch.Tensor, tensors: Sequence[torch.Tensor], format: Format, k: int) -> torch.Tensor:
    """dx (M, K) = dy (M, N) W, summed as in `matmul`."""
    weight = _decode(tensors, format, (dy.shape[1], k), dy.dtype)
    return (dy.to(weight.dtype) @ weight).to(dy.dtype)


def round_activations(x: torch.Tensor, format: Format) -> torch.Tensor:
    """x (M, K) as `compute="int8"` sees it: scale * q with |q| <= 127, in x's dtype (fp32 or fp64).

    scale = max|x| / 127 over segments of 2^i inputs: the largest power of two that divides the group of the format,
    at most 128 (128 for one scale a row). A segment that holds a NaN or an infinity becomes NaN.
    """
    m, k = x.shape
    group = format.group_size if format.groups(k) > 1 and format.group_size else 128
    segment = min(group & -group, 128)
    parts = torch.nn.functional.pad(x, (0, -k % segment)).view(m, -1, segment)
    largest = parts.abs().amax(-1, keepdim=True)
    scale = torch.where(largest < 1e-36, 0, largest / 127)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    rounded = torch.where(largest < 1e-36, 0, torch.round(parts * (largest.new_tensor(127) / largest)))
    return (scale * rounded).view(m, -1)[:, :k]


def _decode(
    tensors: Sequence[torch.Tensor], format: Format, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return PackedWeight(format, shape, wide, dict(zip(format.buffer_names, tensors, strict=False))).unpack()
