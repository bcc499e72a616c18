"""Value decoders: packed bytes -> a tile of codes or numbers, for `..values` layouts (see ctp_kernels/values.py).

A decoder reads a run of COUNT consecutive slots in each of R rows. A new kind of value is one branch more here.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: The kinds of value that `slot_run` decodes.
VALUES = ("int8", "int4", "int3", "int2", "fp16", "bf16", "fp32")


@triton.jit
def _plane_run(plane, first_slot, slots_left, WIDTH: tl.constexpr, COUNT: tl.constexpr, MASKED: tl.constexpr):
    """uint8 (R, COUNT): the WIDTH-bit fields of COUNT slots from first_slot int64 (R,), a multiple of 8."""
    per_byte: tl.constexpr = 8 // WIDTH
    byte = tl.arange(0, COUNT // per_byte)
    pointers = plane + (first_slot // per_byte)[:, None] + byte[None, :]
    if MASKED:
        fields = tl.load(pointers, mask=(byte * per_byte < slots_left)[None, :], other=0)
    else:
        fields = tl.load(pointers)
    if WIDTH <= 4:
        fields = tl.interleave(fields & 15, fields >> 4)
    if WIDTH <= 2:
        fields = tl.interleave(fields & 3, fields >> 2)
    if WIDTH <= 1:
        fields = tl.interleave(fields & 1, fields >> 1)
    return fields


@triton.jit
def slot_run(
    stored,
    stored_hi,
    first_slot,
    slots_left,
    VALUES: tl.constexpr,
    COUNT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(R, COUNT) uint8 codes, or numbers in their stored dtype. Slots from `slots_left` on read as 0 (MASKED only)."""
    if VALUES == "int8":
        return _plane_run(stored, first_slot, slots_left, 8, COUNT, MASKED)
    elif VALUES == "int4":
        return _plane_run(stored, first_slot, slots_left, 4, COUNT, MASKED)
    elif VALUES == "int3":
        low = _plane_run(stored, first_slot, slots_left, 2, COUNT, MASKED)
        return low | (_plane_run(stored_hi, first_slot, slots_left, 1, COUNT, MASKED) << 2)
    elif VALUES == "int2":
        return _plane_run(stored, first_slot, slots_left, 2, COUNT, MASKED)
    else:
        slot = tl.arange(0, COUNT)
        pointers = stored + first_slot[:, None] + slot[None, :]
        if MASKED:
            return tl.load(pointers, mask=(slot < slots_left)[None, :], other=0.0)
        else:
            return tl.load(pointers)
