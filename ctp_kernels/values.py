"""How codes are written: bit planes.

A code of b bits is cut into planes whose widths divide a byte, so that no code straddles two bytes:

    int8   [8]        one byte a code
    int4   [4]        byte j: code 2j in bits 0-3, code 2j+1 in bits 4-7
    int2   [2]        byte j: codes 4j .. 4j+3 from bit 0 upwards
    int3   [2] + [1]  `codes` holds bits 0-1 as int2 does, `codes_hi` bit 2, eight codes a byte: 3.0 bits a code

Slots are numbered through the whole weight; every row starts at a multiple of 8 slots, so each plane's row
starts on a byte. Unused slots hold code 0.
"""

from __future__ import annotations

import torch

from .format import Format

PLANES = {"int8": (8,), "int4": (4,), "int3": (2, 1), "int2": (2,)}


def codes_to_planes(codes: torch.Tensor, values: str) -> list[torch.Tensor]:
    """uint8 codes (slots,), slots a multiple of 8 -> one uint8 tensor (slots * width / 8,) per plane."""
    planes, shift = [], 0
    for width in PLANES[values]:
        per_byte = 8 // width
        field = (codes >> shift) & (2**width - 1)
        shifts = torch.arange(per_byte, device=codes.device, dtype=torch.uint8) * width
        planes.append((field.view(-1, per_byte) << shifts).sum(-1, dtype=torch.uint8))
        shift += width
    return planes


def planes_to_codes(planes: list[torch.Tensor], values: str) -> torch.Tensor:
    """The inverse of `codes_to_planes`: uint8 (slots,)."""
    codes, shift = None, 0
    for plane, width in zip(planes, PLANES[values], strict=True):
        shifts = torch.arange(8 // width, device=plane.device, dtype=torch.uint8) * width
        field = ((plane.unsqueeze(-1) >> shifts) & (2**width - 1)).view(-1) << shift
        codes = field if codes is None else codes | field
        shift += width
    assert codes is not None
    return codes


def dequantize(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, format: Format) -> torch.Tensor:
    """scale * (code - zero) in fp32. codes uint8 (N, K), scales (N, groups), zeros uint8 (N, groups) or None."""
    k = codes.shape[1]
    scale, zero = spread(scales.float(), k, format), float(2 ** (format.bits - 1))
    if zeros is not None:
        zero = spread(zeros.float(), k, format)
    return scale * (codes.float() - zero)


def spread(per_group: torch.Tensor, k: int, format: Format) -> torch.Tensor:
    """(N, groups) -> (N, K), or (N, 1) where one number serves the row."""
    if format.group_size is None or format.groups(k) == 1:  # also where a file names groups of 2^32 inputs
        return per_group
    return per_group.repeat_interleave(format.group_size, dim=1)[:, :k]


def scale_dtype(scales: torch.Tensor) -> torch.dtype:
    """fp16 where fp16 holds every scale to its full precision, else fp32."""
    magnitude = scales.abs()
    fits = (magnitude <= 65504) & ((magnitude >= 2**-14) | (magnitude == 0))
    return torch.float16 if bool(fits.all()) else torch.float32


def minmax_grid(weight: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales (N, groups) and zeros (uint8, or None) that span each group of an fp32 (N, K) weight.

    Asymmetric: the range includes 0, scale = range / (2^b - 1), rounded zero (GPTQ's grid), so 0 is exactly
    representable. Symmetric: the largest magnitude falls on the outermost code that both signs have,
    scale = max|w| / (2^(b-1) - 1/2), as in GPTQ. A group of zeros takes scale 1. Scales are rounded to the dtype
    they are stored in before any code is computed from them.
    """
    n, k = weight.shape
    size = min(format.group_size or k, k)
    padded = torch.nn.functional.pad(weight, (0, -k % size)).view(n, -1, size)
    low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
    if format.symmetric:
        scales = torch.maximum(-low, high) * 2 / (2**format.bits - 1)
    else:
        scales = (high - low) / (2**format.bits - 1)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    scales = scales.to(scale_dtype(scales))
    if format.symmetric:
        return scales, None
    zeros = torch.round(-low / scales.float()).clamp(0, 2**format.bits - 1).to(torch.uint8)
    return scales, zeros


def quantize(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, format: Format) -> torch.Tensor:
    """The nearest code of every entry of an fp32 (N, K) weight: uint8 (N, K)."""
    k = weight.shape[1]
    zero = 2 ** (format.bits - 1) if zeros is None else spread(zeros.float(), k, format)
    codes = torch.round(weight / spread(scales.float(), k, format)) + zero
    return codes.clamp(0, 2**format.bits - 1).to(torch.uint8)
