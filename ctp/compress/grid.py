"""Scales and zeros for the codes of one group of inputs, and of a whole weight."""

from __future__ import annotations

from dataclasses import replace

import torch

from ctp_kernels.format import Format
from ctp_kernels.values import dequantize, minmax_grid, quantize

#: GPTQ's search: ranges shrunk by 0, 1, ... 79 %, the error of a weight to the power 2.4.
SHRINKS, POWER = [1 - i / 100 for i in range(80)], 2.4


def fit_grid(weight: torch.Tensor, format: Format, mse: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales (N, groups) and zeros (uint8, or None) for an fp32 (N, K) weight.

    The range of each group, zero included; with `mse` the shrunk range with the least sum |w - q(w)|^2.4 (GPTQ's
    quantizer). Scales come in the dtype that stores them, so codes computed from them are the codes that are stored.
    """
    scales, zeros = minmax_grid(weight, format)
    if not mse:
        return scales, zeros
    least = _error(weight, scales, zeros, format)
    for shrink in SHRINKS[1:]:
        narrow, narrow_zeros = minmax_grid(weight * shrink, format)
        error = _error(weight, narrow, narrow_zeros, format)
        better = error < least
        least, scales = torch.where(better, error, least), torch.where(better, narrow, scales)
        if zeros is not None and narrow_zeros is not None:
            zeros = torch.where(better, narrow_zeros, zeros)
    return scales, zeros


def row_grid(format: Format) -> Format:
    """The format of one group cut out of a weight: the same codes, one scale a row."""
    return replace(format, group_size=None)


def _error(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, format: Format) -> torch.Tensor:
    """(N, groups): the error of each group."""
    n, k = weight.shape
    off = (weight - dequantize(quantize(weight, scales, zeros, format), scales, zeros, format)).abs().pow(POWER)
    return torch.nn.functional.pad(off, (0, -k % (format.group_size or k))).view(n, format.groups(k), -1).sum(-1)
