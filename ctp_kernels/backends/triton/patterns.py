"""Pattern decoders: which slots a tile of inputs takes, and what they are worth. A new pattern is a branch more here.

A tile is inputs BLOCK_K * t .. BLOCK_K * (t + 1) - 1 of R rows. All patterns and all kinds of value end in
`unscaled_tile` (code - zero, or the number; pruned entries exactly 0) and `group_scales`;
`dense_tile` is their product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .values import bias_of, interleave4, lift, slot_gather, slot_run

#: Inputs between two entries of `tile_offsets`: the tile of the unstructured pattern.
UNSTRUCTURED_TILE = tl.constexpr(128)


@triton.jit
def popcount(v):
    """Set bits of uint32; LLVM knows this idiom, and makes one `popc` of it."""
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return (v * 0x01010101) >> 24


@triton.jit
def _mask_words(mask, rows, t, K: tl.constexpr, WORDS: tl.constexpr):
    """uint32 (R, 4): the bitmap of tile t, 0 beyond the row."""
    ROW_BYTES: tl.constexpr = (K + 7) // 8
    word = 4 * t + tl.arange(0, 4)
    if WORDS and ROW_BYTES % 4 == 0:  # every row starts on a word
        words = mask.to(tl.pointer_type(tl.uint32), bitcast=True)
        pointers = words + rows[:, None] * (ROW_BYTES // 4) + word[None, :]
        if ROW_BYTES % 16 == 0:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(word < ROW_BYTES // 4)[None, :], other=0)
    else:
        bits = tl.zeros((rows.shape[0], 4), tl.uint32)
        for i in tl.static_range(4):
            byte = 4 * word + i
            piece = tl.load(mask + rows[:, None] * ROW_BYTES + byte[None, :], mask=(byte < ROW_BYTES)[None, :], other=0)
            bits = bits | (piece.to(tl.uint32) << (8 * i))
        return bits


@triton.jit
def _unstructured_tile(
    stored,
    stored_hi,
    mask,
    row_offsets,
    tile_offsets,
    rows,
    t,
    N,
    K: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """(R, 128) lifted codes or numbers of tile t, and bool `kept`.

    An entry lies as many slots behind the first of its word of 32 bits as there are bits before it in the word; the
    words' beginnings are summed once a word.
    """
    words = _mask_words(mask, rows, t, K, WORDS)
    counts = popcount(words).to(tl.int32)
    first = tl.load(row_offsets + rows).to(tl.int64) * 8 + tl.load(tile_offsets + t * N + rows)
    starts = first[:, None] + tl.cumsum(counts, 1) - counts
    bit = tl.arange(0, 32).to(tl.uint32)[None, None, :]
    bits = words[:, :, None]
    kept = ((bits >> bit) & 1) != 0
    ranks = popcount(bits & ((tl.full((1, 1, 32), 1, tl.uint32) << bit) - 1))
    tile = slot_gather(stored, stored_hi, starts, ranks, kept, BITS, NUMBER)
    shape: tl.constexpr = (rows.shape[0], UNSTRUCTURED_TILE)
    return tl.reshape(tile, shape), tl.reshape(kept, shape)


@triton.jit
def _quads(mask, rows, t, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """uint8 (R, BLOCK_K / 4): the four bits of every quad of tile t."""
    ROW_BYTES: tl.constexpr = (K + 7) // 8
    byte = t * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    pointers = mask + rows[:, None] * ROW_BYTES + byte[None, :]
    if ROW_BYTES % (BLOCK_K // 8) != 0:
        bits = tl.load(pointers, mask=(byte < ROW_BYTES)[None, :], other=0)
    else:
        bits = tl.load(pointers)
    return tl.interleave(bits & 15, bits >> 4)


@triton.jit
def _expand24(slots, quads, BLOCK_K: tl.constexpr):
    """(R, BLOCK_K) from the (R, BLOCK_K / 2) `slots`: a quad's two slots go to its two set bits, the others are 0.

    Bit 0 can only be a quad's first entry and bit 3 only its second; bit 1 is the second where bit 0 is set, bit 2
    where bit 0 or 1 is. (Moving two 16-bit numbers at a time by masks made more instructions, not fewer.)
    """
    first, second = tl.split(tl.reshape(slots, (slots.shape[0], BLOCK_K // 4, 2)))
    one = tl.where((quads & 1) != 0, second, first)
    two = tl.where((quads & 3) != 0, second, first)
    return interleave4(
        tl.where((quads & 1) != 0, first, 0.0), tl.where((quads & 2) != 0, one, 0.0),
        tl.where((quads & 4) != 0, two, 0.0), tl.where((quads & 8) != 0, second, 0.0),
    )  # fmt: skip


@triton.jit
def _group_of(t, GROUP: tl.constexpr, GROUPS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_K: tl.constexpr):
    """int32 (BLOCK_K / SEGMENT,): the group of every SEGMENT inputs of tile t."""
    segment = tl.arange(0, BLOCK_K // SEGMENT)
    if GROUP == 0:
        return segment * 0
    else:
        return tl.minimum((t * BLOCK_K + segment * SEGMENT) // GROUP, GROUPS - 1)


@triton.jit
def spread(per_segment, SEGMENT: tl.constexpr):
    """(R, S) -> (R, S * SEGMENT), or (R, 1) as it is where one number serves the tile."""
    R: tl.constexpr = per_segment.shape[0]
    S: tl.constexpr = per_segment.shape[1]
    if S == 1:
        return per_segment
    else:
        return tl.reshape(tl.broadcast_to(per_segment[:, :, None], (R, S, SEGMENT)), (R, S * SEGMENT))


@triton.jit
def group_scales(scales, rows, t, K: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_K: tl.constexpr):
    """fp32 (R, BLOCK_K / SEGMENT): the scale of every SEGMENT inputs; SEGMENT divides GROUP."""
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP > 0 else 1
    group = _group_of(t, GROUP, GROUPS, SEGMENT, BLOCK_K)
    return tl.load(scales + rows[:, None] * GROUPS + group[None, :]).to(tl.float32)


@triton.jit
def _less_zero(
    lifted,
    zeros,
    rows,
    t,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """code - zero in the dtype of the `lifted` codes (R, BLOCK_K, or half as many slots of as many inputs): a
    difference of integers of at most 11 bits in fp16, 8 in bf16, 24 in fp32, and so exact."""
    if SYMMETRIC:
        return lifted - tl.full((1, 1), bias_of(BITS, NUMBER) + 2 ** (BITS - 1), lifted.dtype)
    else:
        GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP > 0 else 1
        group = _group_of(t, GROUP, GROUPS, SEGMENT, BLOCK_K)
        zero = tl.load(zeros + rows[:, None] * GROUPS + group[None, :])
        if BITS == 8:
            zero = zero.to(tl.float32) + bias_of(BITS, NUMBER)
        else:  # in the mantissa too: the interpreter's bf16 addition is wrong
            zero = lift(zero, BITS, NUMBER)
        return lifted - spread(zero, SEGMENT * lifted.shape[1] // BLOCK_K)


@triton.jit
def unscaled_tile(
    stored,
    stored_hi,
    mask,
    row_offsets,
    tile_offsets,
    zeros,
    rows,
    t,
    N,
    K: tl.constexpr,
    PATTERN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WORDS: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """(R, BLOCK_K) of `rows` (R,) int64: code - zero in dtype NUMBER, which holds it exactly, or the number in its
    stored dtype; pruned entries 0.

    Inputs from K on hold anything finite: the caller multiplies them by zero, or drops them.
    """
    if PATTERN == "dense":
        ROW_SLOTS: tl.constexpr = (K + 7) // 8 * 8
        tile = slot_run(stored, stored_hi, rows, t, BITS, ROW_SLOTS, BLOCK_K, WORDS, NUMBER)
        if BITS > 0:
            tile = _less_zero(tile, zeros, rows, t, K, BITS, GROUP, SYMMETRIC, SEGMENT, BLOCK_K, NUMBER)
    elif PATTERN == "sparse24":
        HALF: tl.constexpr = (K // 2 + 7) // 8 * 8
        slots = slot_run(stored, stored_hi, rows, t, BITS, HALF, BLOCK_K // 2, WORDS, NUMBER)
        if BITS > 0:
            slots = _less_zero(slots, zeros, rows, t, K, BITS, GROUP, SYMMETRIC, SEGMENT, BLOCK_K, NUMBER)
        tile = _expand24(slots, _quads(mask, rows, t, K, BLOCK_K), BLOCK_K)
    else:
        tl.static_assert(PATTERN == "unstructured" and BLOCK_K == UNSTRUCTURED_TILE)
        tile, kept = _unstructured_tile(
            stored, stored_hi, mask, row_offsets, tile_offsets, rows, t, N, K, BITS, WORDS, NUMBER
        )
        if BITS > 0:
            # A word of the bitmap at a time: per row, every lane that gathers would load the zeros of all its rows.
            PIECE: tl.constexpr = 32 if SEGMENT > 32 else SEGMENT
            tile = _less_zero(tile, zeros, rows, t, K, BITS, GROUP, SYMMETRIC, PIECE, BLOCK_K, NUMBER)
            tile = tl.where(kept, tile, 0.0)
    if BITS > 0:
        tile = tile.to(NUMBER)
    return tile


@triton.jit
def dense_tile(
    stored,
    stored_hi,
    mask,
    row_offsets,
    tile_offsets,
    scales,
    zeros,
    rows,
    t,
    N,
    K: tl.constexpr,
    PATTERN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WORDS: tl.constexpr,
):
    """(R, BLOCK_K): the entries of the weight, scale * (code - zero) in fp32, or numbers in their stored dtype."""
    tile = unscaled_tile(
        stored, stored_hi, mask, row_offsets, tile_offsets, zeros, rows, t, N,
        K, PATTERN, BITS, GROUP, SYMMETRIC, SEGMENT, BLOCK_K, WORDS, tl.float32,
    )  # fmt: skip
    if BITS > 0:
        tile = tile * spread(group_scales(scales, rows, t, K, GROUP, SEGMENT, BLOCK_K), SEGMENT)
    return tile
