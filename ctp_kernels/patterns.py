"""Which entries of a row exist: the bitmap.

Both sparse patterns are one bitmap, one bit per weight, least significant bit first along K:

    byte j of row n      bit   7 6 5 4 3 2 1 0
    covers inputs k = 8j + b   1 0 1 0 0 1 1 0   ->  8j+1, 8j+2, 8j+5, 8j+7 are stored
                               `--quad 1-' `--quad 0-'

`sparse24` has exactly two bits in every nibble, so row n starts at slot `n * K/2` (rounded up to 8) and
needs no index. `unstructured` rows start at slot `8 * row_offsets[n]`. A stored entry may be zero (a quad
with fewer than two non-zeros still stores two). A row's bytes after its last stored slot are zero.
"""

from __future__ import annotations

import torch

#: Inputs of a tile, for `tile_offsets`.
TILE = 128

_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
POPCOUNT = torch.tensor([bin(i).count("1") for i in range(256)], dtype=torch.uint8)


def mask_to_bytes(mask: torch.Tensor) -> torch.Tensor:
    """bool (N, K) -> uint8 (N, ceil(K/8))."""
    n, k = mask.shape
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -k % 8)).view(n, -1, 8)
    return (padded * _BITS.to(mask.device)).sum(-1, dtype=torch.uint8)


def bytes_to_mask(bitmap: torch.Tensor, k: int) -> torch.Tensor:
    """uint8 (N, ceil(K/8)) -> bool (N, K)."""
    bits = (bitmap.unsqueeze(-1) & _BITS.to(bitmap.device)) != 0
    return bits.view(bitmap.shape[0], -1)[:, :k]


def tile_offsets(bitmap: torch.Tensor) -> torch.Tensor:
    """uint8 (N, ceil(K/8)) -> int32 (ceil(K/128), N): stored entries of row n before input 128 t.

    So a kernel can begin anywhere in a row, and read the beginnings of neighbouring rows in one piece.
    """
    n, bytes_a_row = bitmap.shape
    padded = torch.nn.functional.pad(bitmap, (0, -bytes_a_row % (TILE // 8)))
    counts = POPCOUNT.to(bitmap.device)[padded.long()].view(n, -1, TILE // 8).sum(-1, dtype=torch.int32)
    return (counts.cumsum(1, dtype=torch.int32) - counts).T.contiguous()


def is_sparse24(weight: torch.Tensor) -> bool:
    """Whether every four consecutive inputs of the (N, K) weight hold at most two non-zeros."""
    n, k = weight.shape
    return k % 4 == 0 and bool(((weight != 0).view(n, k // 4, 4).sum(-1) <= 2).all())


def magnitude24(weight: torch.Tensor) -> torch.Tensor:
    """bool (N, K): the two largest magnitudes of every four; earlier inputs win ties, so always exactly two."""
    n, k = weight.shape
    quads = weight.abs().float().view(n, k // 4, 4)
    kept = quads.argsort(dim=-1, descending=True, stable=True)[..., :2]
    return torch.zeros(quads.shape, dtype=torch.bool, device=weight.device).scatter_(-1, kept, True).view(n, k)


def gather_rows(dense: torch.Tensor, mask: torch.Tensor, row_starts: torch.Tensor, total: int) -> torch.Tensor:
    """The stored entries of (N, K) `dense`, each row from its slot in `row_starts` (N,), in `total` slots."""
    rank = mask.long().cumsum(1) - 1
    slots = (row_starts.long().unsqueeze(1) + rank)[mask]
    out = torch.zeros(total, dtype=dense.dtype, device=dense.device)
    out[slots] = dense[mask]
    return out


def scatter_rows(stored: torch.Tensor, mask: torch.Tensor, row_starts: torch.Tensor) -> torch.Tensor:
    """The inverse of `gather_rows`: (N, K), zero where the mask is."""
    rank = mask.long().cumsum(1) - 1
    out = torch.zeros(mask.shape, dtype=stored.dtype, device=stored.device)
    out[mask] = stored[(row_starts.long().unsqueeze(1) + rank)[mask]]
    return out
