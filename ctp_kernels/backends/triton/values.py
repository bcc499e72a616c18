"""Value decoders: packed bytes -> numbers (see ctp_kernels/values.py for the bytes).

Two ways to read: `slot_run`, a run of neighbouring slots in each of R rows, and `slot_gather`, any slots. BITS says
what a slot holds: 8, 4, 3, 2 bits of a code, 0 a number in the dtype of `stored`. A new kind of value is a branch in
each of the two.

A code becomes a number without a conversion (which runs at a quarter of the rate of other instructions): its bits are
put into the mantissa of a power of two, `bias_of`, which the caller subtracts together with the zero, exactly. Two
16-bit numbers are made at a time, from fields that lie 16 bits apart in a word.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bias_of(BITS: tl.constexpr, NUMBER: tl.constexpr):
    """What a lifted code has too much: 2^7 in bf16 (7 bits of mantissa), 2^10 in fp16, 2^23 in fp32."""
    if BITS == 8:
        return 8388608.0
    elif NUMBER == tl.bfloat16:
        return 128.0
    else:
        return 1024.0


@triton.jit
def lift(codes, BITS: tl.constexpr, NUMBER: tl.constexpr):
    """code + bias, shaped like uint8 `codes`: in fp32 for 8 bits, else in bf16 where NUMBER is bf16, else in fp16."""
    if BITS == 8:
        return (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)
    elif NUMBER == tl.bfloat16:
        return (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        return (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)


@triton.jit
def _lift_pairs(fields, NUMBER: tl.constexpr):
    """(R, 2 W) from uint32 (R, W): a code in each half of a word, lifted, the lower half first."""
    if NUMBER == tl.bfloat16:
        both = fields | 0x43004300
        low = both.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        high = (both >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        both = fields | 0x64006400
        low = both.to(tl.uint16).to(tl.float16, bitcast=True)
        high = (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.interleave(low, high)


@triton.jit
def interleave4(a, b, c, d):
    """(R, 4 C) from four (R, C): a0 b0 c0 d0 a1 ..."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _byte(words, P: tl.constexpr):
    """Byte P of every word, lifted into fp32."""
    return (((words >> (8 * P)) & 255) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _nibbles(words, P: tl.constexpr, NUMBER: tl.constexpr):
    """Of every word of eight 4-bit codes the codes P and P + 4."""
    return _lift_pairs((words >> (4 * P)) & 0x000F000F, NUMBER)


@triton.jit
def _crumbs(words, high, P: tl.constexpr, BITS: tl.constexpr, NUMBER: tl.constexpr):
    """Of every word of sixteen 2-bit fields the codes P and P + 8, with their third bits from `high` (BITS 3)."""
    fields = (words >> (2 * P)) & 0x00030003
    if BITS == 3:
        fields |= ((high >> P) & 0x00010001) << 2
    return _lift_pairs(fields, NUMBER)


@triton.jit
def _load_run(plane, rows, t, ROW: tl.constexpr, TILE: tl.constexpr):
    """(R, TILE): elements TILE * t .. of `rows` (R,) int64, which lie ROW apart; 0 beyond the row.

    The address is a sum of products by constants, without a division, so that the compiler sees how far it is
    aligned and loads 16 bytes at a time.
    """
    at = t * TILE + tl.arange(0, TILE)
    pointers = plane + rows[:, None] * ROW + at[None, :]
    if ROW % TILE != 0:
        return tl.load(pointers, mask=(at < ROW)[None, :], other=0)
    else:
        return tl.load(pointers)


@triton.jit
def _plane_bytes(plane, rows, t, WIDTH: tl.constexpr, ROW_SLOTS: tl.constexpr, COUNT: tl.constexpr):
    """uint8 (R, COUNT): WIDTH-bit fields, read byte by byte."""
    fields = _load_run(plane, rows, t, ROW_SLOTS * WIDTH // 8, COUNT * WIDTH // 8)
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
    rows,
    t,
    BITS: tl.constexpr,
    ROW_SLOTS: tl.constexpr,
    COUNT: tl.constexpr,
    WORDS: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """(R, COUNT) lifted codes, or numbers: slots COUNT * t .. of `rows` (R,) int64, which lie ROW_SLOTS apart.

    WORDS: the buffers begin on 4 bytes, so that rows of a multiple of 16 slots (8 of 4 bits) are read in words.
    """
    if BITS == 0:
        return _load_run(stored, rows, t, ROW_SLOTS, COUNT)
    elif BITS == 8 and WORDS:
        words = _load_run(stored.to(tl.pointer_type(tl.uint32), bitcast=True), rows, t, ROW_SLOTS // 4, COUNT // 4)
        return interleave4(_byte(words, 0), _byte(words, 1), _byte(words, 2), _byte(words, 3))
    elif BITS == 8:
        return lift(_load_run(stored, rows, t, ROW_SLOTS, COUNT), BITS, NUMBER)
    elif BITS == 4 and WORDS:
        words = stored.to(tl.pointer_type(tl.uint32), bitcast=True)
        words = _load_run(words, rows, t, ROW_SLOTS // 8, COUNT // 8)
        return interleave4(
            _nibbles(words, 0, NUMBER), _nibbles(words, 1, NUMBER), _nibbles(words, 2, NUMBER),
            _nibbles(words, 3, NUMBER),
        )  # fmt: skip
    elif BITS == 4:
        return lift(_plane_bytes(stored, rows, t, 4, ROW_SLOTS, COUNT), BITS, NUMBER)
    elif WORDS and ROW_SLOTS % 16 == 0 and COUNT >= 16:
        words = stored.to(tl.pointer_type(tl.uint32), bitcast=True)
        words = _load_run(words, rows, t, ROW_SLOTS // 16, COUNT // 16)
        high = words
        if BITS == 3:
            halves = stored_hi.to(tl.pointer_type(tl.uint16), bitcast=True)
            high = _load_run(halves, rows, t, ROW_SLOTS // 16, COUNT // 16).to(tl.uint32)
            high = (high | (high << 8)) & 0x00FF00FF
        even = interleave4(
            _crumbs(words, high, 0, BITS, NUMBER), _crumbs(words, high, 2, BITS, NUMBER),
            _crumbs(words, high, 4, BITS, NUMBER), _crumbs(words, high, 6, BITS, NUMBER),
        )  # fmt: skip
        odd = interleave4(
            _crumbs(words, high, 1, BITS, NUMBER), _crumbs(words, high, 3, BITS, NUMBER),
            _crumbs(words, high, 5, BITS, NUMBER), _crumbs(words, high, 7, BITS, NUMBER),
        )  # fmt: skip
        return tl.interleave(even, odd)
    else:
        codes = _plane_bytes(stored, rows, t, 2, ROW_SLOTS, COUNT)
        if BITS == 3:
            codes = codes | (_plane_bytes(stored_hi, rows, t, 1, ROW_SLOTS, COUNT) << 2)
        return lift(codes, BITS, NUMBER)


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
def slot_gather(stored, stored_hi, starts, ranks, wanted, BITS: tl.constexpr, NUMBER: tl.constexpr):
    """(R, P, C) lifted codes, or numbers: slots `starts` int64 (R, P) + `ranks` uint32 (R, P, C); only the wanted ones
    are read, the rest are code 0. The 64-bit part of an address is formed once a piece of a row, not once a slot."""
    if BITS == 0:
        pieces = stored + starts
        return tl.load(pieces[:, :, None] + ranks, mask=wanted, other=0.0)
    elif BITS == 3:
        low = _plane_gather(stored, starts, ranks, wanted, 2)
        return lift(low | (_plane_gather(stored_hi, starts, ranks, wanted, 1) << 2), BITS, NUMBER)
    else:
        return lift(_plane_gather(stored, starts, ranks, wanted, BITS), BITS, NUMBER)
