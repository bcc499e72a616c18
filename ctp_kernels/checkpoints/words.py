"""Codes in 32-bit words, as GPTQ and compressed-tensors files hold them.

A row of codes is one string of bits, least significant first: code j is bits `b j` to `b j + b - 1`, bit i is bit
`i % 32` of word `i // 32`. So int3 codes straddle words, 32 codes in three. Two layouts of 3 bits differ, and nothing
in the tensors tells them apart: `padded` (older compressed-tensors) has ten codes a word, two bits empty; `planar`
(GPTQModel's `gptq_p`) has the low two bits of 32 codes in two words, their high bits in the third.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: Codes whose bits fill a whole number of words, whatever their width.
PERIOD = 32


def words_of(count: int, bits: int) -> int:
    """Words that a row of `count` codes takes."""
    return -(-count * bits // 32)


def codes_to_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 (R, C) -> int32 (R, ceil(C * bits / 32)); what the last word has too much is 0."""
    rows, count = codes.shape
    periods = -(-count // PERIOD)
    columns = torch.nn.functional.pad(codes, (0, periods * PERIOD - count)).view(rows, periods, PERIOD)
    words = torch.zeros(rows, periods, bits, dtype=torch.int32, device=codes.device)
    for j, word, at, straddles in _places(bits):
        field = columns[:, :, j].to(torch.int32)
        words[:, :, word] |= field << at
        if straddles:
            words[:, :, word + 1] |= field >> (32 - at)
    return words.view(rows, -1)[:, : words_of(count, bits)].contiguous()


def words_to_codes(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `codes_to_words`: int32 (R, ceil(count * bits / 32)) -> uint8 (R, count)."""
    rows, periods = words.shape[0], -(-count // PERIOD)
    packed = torch.nn.functional.pad(words, (0, periods * bits - words.shape[1])).view(rows, periods, bits)
    codes = torch.empty(rows, periods, PERIOD, dtype=torch.uint8, device=words.device)
    for j, word, at, straddles in _places(bits):
        field = packed[:, :, word] >> at  # copies of the sign come in from the left
        if straddles:
            field = (field & ((1 << (32 - at)) - 1)) | (packed[:, :, word + 1] << (32 - at))
        codes[:, :, j] = field & (2**bits - 1)
    return codes.view(rows, -1)[:, :count]


def padded_to_codes(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 (R, ceil(count / (32 // bits))), a whole number of codes a word -> uint8 (R, count)."""
    shifts = torch.arange(32 // bits, dtype=torch.int32, device=words.device) * bits
    codes = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).view(words.shape[0], -1)[:, :count]


def planar_to_codes(words: torch.Tensor, count: int) -> torch.Tensor:
    """int32 (R, 3 * ceil(count / 32)), two words of low pairs and one of high bits a period -> uint8 (R, count)."""
    packed = words.view(words.shape[0], -1, 3)
    periods = packed.shape[1] * PERIOD
    low = words_to_codes(packed[:, :, :2].reshape(len(words), -1), 2, periods)
    high = words_to_codes(packed[:, :, 2], 1, periods)
    return (low | high << 2)[:, :count]


def _places(bits: int) -> Iterator[tuple[int, int, int, bool]]:
    """For each code of a period: its number, its word, its first bit there, and whether it goes on in the next word."""
    for j in range(PERIOD):
        word, at = divmod(j * bits, 32)
        yield j, word, at, at + bits > 32
