"""Value decoders: packed bytes -> codes or numbers (see ctp_kernels/values.py for the bytes).

Two ways to read: `slot_run`, a run of neighbouring slots in each of R rows, and `slot_gather`, any slots. BITS says
what a slot holds: 8, 4, 3, 2 bits of a code, 0 a number in the dtype of `stored`. A new kind of value is a branch in
each of the two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _plane_run(plane, rows, t, WIDTH: tl.constexpr, ROW_SLOTS: tl.constexpr, COUNT: tl.constexpr):
    """uint8 (R, COUNT): the WIDTH-bit fields of slots COUNT * t .. of `rows` (R,) int64; 0 beyond the row.

    The address is a sum of products by constants, without a division, so that the compiler sees how far it is
    aligned and loads 16 bytes at a time.
    """
    ROW_BYTES: tl.constexpr = ROW_SLOTS * WIDTH // 8
    TILE_BYTES: tl.constexpr = COUNT * WIDTH // 8
    byte = t * TILE_BYTES + tl.arange(0, TILE_BYTES)
    pointers = plane + rows[:, None] * ROW_BYTES + byte[None, :]
    if ROW_BYTES % TILE_BYTES != 0:
        fields = tl.load(pointers, mask=(byte < ROW_BYTES)[None, :], other=0)
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
    stored, stored_hi, rows, t, BITS: tl.constexpr, ROW_SLOTS: tl.constexpr, COUNT: tl.constexpr
):
    """(R, COUNT) uint8 codes, or numbers: slots COUNT * t .. of `rows` (R,) int64, which lie ROW_SLOTS apart."""
    if BITS == 0:
        slot = t * COUNT + tl.arange(0, COUNT)
        pointers = stored + rows[:, None] * ROW_SLOTS + slot[None, :]
        if ROW_SLOTS % COUNT != 0:
            return tl.load(pointers, mask=(slot < ROW_SLOTS)[None, :], other=0.0)
        else:
            return tl.load(pointers)
    elif BITS == 3:
        low = _plane_run(stored, rows, t, 2, ROW_SLOTS, COUNT)
        return low | (_plane_run(stored_hi, rows, t, 1, ROW_SLOTS, COUNT) << 2)
    else:
        return _plane_run(stored, rows, t, BITS, ROW_SLOTS, COUNT)


@triton.jit
def _plane_gather(plane, starts, ranks, wanted, WIDTH: tl.constexpr):
    """uint8, shaped like `ranks`: the WIDTH-bit field of each wanted slot, 0 elsewhere."""
    PER_BYTE: tl.constexpr = 8 // WIDTH
    pieces = plane + starts // PER_BYTE
    slots = (starts % PER_BYTE).to(tl.uint32)[:, :, None] + ranks
    fields = tl.load(pieces[:, :, None] + slots // PER_BYTE, mask=wanted, other=0)
    if WIDTH < 8:
        fields = (fields >> ((slots % PER_BYTE) * WIDTH).to(tl.uint8)) & (2**WIDTH - 1)
    return fields


@triton.jit
def slot_gather(stored, stored_hi, starts, ranks, wanted, BITS: tl.constexpr):
    """(R, P, C) uint8 codes, or numbers: slots `starts` int64 (R, P) + `ranks` uint32 (R, P, C); only the wanted ones
    are read, the rest are 0. The 64-bit part of an address is formed once a piece of a row, not once a slot."""
    if BITS == 0:
        pieces = stored + starts
        return tl.load(pieces[:, :, None] + ranks, mask=wanted, other=0.0)
    elif BITS == 3:
        low = _plane_gather(stored, starts, ranks, wanted, 2)
        return low | (_plane_gather(stored_hi, starts, ranks, wanted, 1) << 2)
    else:
        return _plane_gather(stored, starts, ranks, wanted, BITS)
