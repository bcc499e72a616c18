"""The weight of csrc/ctp.h as ctypes sees it, and activations as raw pointers: what the C backends share."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from ..errors import CTPError
from ..format import PATTERNS, Format
from ..patterns import TILE

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_VALUES = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 3, "int4": 4, "int3": 5, "int2": 6}
_FIELDS = {
    "values": "stored",
    "codes": "stored",
    "codes_hi": "stored_hi",
    "mask": "mask",
    "row_offsets": "row_offsets",
    "tile_offsets": "tile_offsets",
    "scales": "scales",
    "zeros": "zeros",
}
_PLANE_BITS = {"codes": {"int8": 8, "int4": 4, "int3": 2, "int2": 2}, "codes_hi": {"int3": 1}}


class Weight(ctypes.Structure):
    """`ctp_weight` of csrc/ctp.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "k")),
        *((name, ctypes.c_int32) for name in ("pattern", "values", "scale_dtype", "symmetric")),
        ("group", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in ("stored", "stored_hi", "mask", "row_offsets", "tile_offsets", "scales", "zeros")
        ),
    )


def bias_for(bias: torch.Tensor | None, n: int, dtype: torch.dtype) -> tuple[torch.Tensor | None, int | None]:
    """The bias (N,) in the activations' dtype, to be kept alive over the call, and its address."""
    if bias is None:
        return None, None
    if bias.shape != (n,):
        raise CTPError(f"a bias of shape {tuple(bias.shape)} does not fit {n} outputs")
    bias = bias.to(dtype).contiguous()
    return bias, bias.data_ptr()


#: Filling a ctypes structure costs as much as a small matmul, so they are kept, by the addresses they hold.
_weights: dict[tuple, tuple[Weight, object]] = {}
_WEIGHTS_KEPT = 4096


def weight_of(tensors: Sequence[torch.Tensor], format: Format, n: int, k: int, device: torch.device) -> object:
    """A reference to the `ctp_weight` of these tensors, which must lie where the activations do."""
    key = (device, format, n, k, *[(t.data_ptr(), t.dtype) for t in tensors])
    found = _weights.get(key)
    if found is None:
        weight = _describe(tensors, format, n, k, device)
        if len(_weights) >= _WEIGHTS_KEPT:
            _weights.clear()
        found = _weights[key] = (weight, ctypes.byref(weight))
    return found[1]


def _describe(tensors: Sequence[torch.Tensor], format: Format, n: int, k: int, device: torch.device) -> Weight:
    """Checks sizes and places, so that activations of another width cannot make a kernel read out of bounds."""
    buffers = dict(zip(format.kernel_names, tensors, strict=True))
    for name, tensor in buffers.items():
        if tensor.device != device:
            raise CTPError(f"activations are on {device}, but {name!r} of the {format} weight is on {tensor.device}")
        expected = _elements(name, format, n, k, buffers)
        if tensor.numel() != expected or not tensor.is_contiguous():
            raise CTPError(
                f"activations and outputs say that the {format} weight is ({n}, {k}), where {name!r} holds {expected} "
                f"contiguous elements, but it holds {tensor.numel()}"
            )
    weight = Weight(n=n, k=k, pattern=PATTERNS.index(format.pattern), values=_VALUES[str(format.values)])
    weight.group, weight.symmetric = min(format.group_size or k, k), format.symmetric  # C divides 32-bit numbers
    if "scales" in buffers:
        weight.scale_dtype = DTYPES[buffers["scales"].dtype]
    for name, tensor in buffers.items():
        setattr(weight, _FIELDS[name], tensor.data_ptr())
    return weight


def _elements(name: str, format: Format, n: int, k: int, buffers: dict[str, torch.Tensor]) -> int:
    if name == "mask":
        return n * -(-k // 8)
    if name == "row_offsets":
        return n + 1
    if name == "tile_offsets":
        return n * -(-k // TILE)
    if name in ("scales", "zeros"):
        return n * format.groups(k)
    if format.pattern == "unstructured":
        slots = 8 * int(buffers["row_offsets"][-1])
    else:
        slots = n * format.row_entries(k)
    return slots if name == "values" else slots * _PLANE_BITS[name][str(format.values)] // 8
