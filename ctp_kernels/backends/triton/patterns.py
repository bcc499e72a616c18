"""Pattern decoders: which slots a tile of inputs takes. A new pattern is one branch more here."""

from __future__ import annotations

import triton
import triton.language as tl

from .values import slot_run

#: The patterns that `stored_tile` decodes.
PATTERNS = ("dense",)


@triton.jit
def stored_tile(
    stored,
    stored_hi,
    rows,
    k0,
    K: tl.constexpr,
    PATTERN: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(R, BLOCK_K) codes or numbers at inputs k0 .. k0+BLOCK_K-1 of `rows` (R,); 0 beyond the row's slots.

    dense: input k of row n is slot n * row_slots + k, where row_slots is K rounded up to 8: one run of slots a row.
    """
    tl.static_assert(PATTERN == "dense")
    row_slots: tl.constexpr = (K + 7) // 8 * 8
    MASKED: tl.constexpr = row_slots % BLOCK_K != 0
    first_slot = rows.to(tl.int64) * row_slots + k0
    return slot_run(stored, stored_hi, first_slot, row_slots - k0, VALUES, BLOCK_K, MASKED)
