// Codes of W, one a byte.
#pragma once

#include "dots.h"

namespace {

// Byte i of the result is code i of eight codes of kBits bits.
template <int kBits>
inline uint64_t spread(uint64_t bits) {
  if constexpr (kBits == 8) return bits;
  constexpr int kGap = 8 - kBits;
  bits &= (1ull << 8 * kBits % 64) - 1;
  bits = (bits | bits << 4 * kGap) & ~0ull / 0xffffffff * ((1ull << 4 * kBits % 64) - 1);
  bits = (bits | bits << 2 * kGap) & ~0ull / 0xffff * ((1ull << 2 * kBits) - 1);
  return (bits | bits << kGap) & ~0ull / 0xff * ((1ull << kBits) - 1);
}

// Eight codes of a plane from `slot` on; nothing beyond its `bytes` is read.
template <int kBits>
inline uint64_t eight_codes(const uint8_t* plane, int64_t slot, int64_t bytes) {
  const int64_t bit = slot * kBits, there = bytes - (bit >> 3);
  uint64_t word = 0;
  if (__builtin_expect(there >= 8, 1))
    word = peek<uint64_t>(plane + (bit >> 3));
  else if (there > 0)
    memcpy(&word, plane + (bit >> 3), (size_t)there);
  return spread<kBits>(word >> (bit & 7));
}

template <int kBits>
inline uint64_t eight_codes(const Weight& w, int64_t slot) {
  const uint8_t* low = (const uint8_t*)w.stored;
  if constexpr (kBits == 3)
    return eight_codes<2>(low, slot, w.stored_bytes) |
           eight_codes<1>((const uint8_t*)w.stored_hi, slot, w.stored_bytes >> 1) << 2;
  else
    return eight_codes<kBits>(low, slot, w.stored_bytes);
}

// out[0 .. k1 - k0) = the codes of W[row, k0 .. k1); returns the slot after the last. As decode() in decode.h;
// ahead: how many inputs further on to prefetch from.
using Codes = int64_t (*)(const Weight&, int64_t row, int64_t k0, int64_t k1, int64_t slot, int64_t ahead,
                          uint8_t* out);

using Start = int64_t (*)(const Weight&, int64_t row, int64_t k);

template <class Pattern, int kBits>
int64_t decode_codes(const Weight& w, int64_t row, int64_t k0, int64_t k1, int64_t slot, int64_t ahead, uint8_t* out) {
  Blocks<Pattern, Coded<kBits>> blocks(w, row, k0, slot, ahead);
  const bool one = !Pattern::kSparse || w.symmetric;  // whether what is pruned has the same code everywhere
  for (int64_t k = k0; k < k1;) {
    const int64_t group = one ? 0 : (uint32_t)k / (uint32_t)w.group, end = one ? k1 : least((group + 1) * w.group, k1);
    const int pruned = w.symmetric ? 1 << (kBits - 1) : one ? 0 : w.zeros[row * w.groups + group];
    const auto grid = Coded<kBits>::grid(w, row, group);
    for (; k + 64 <= end; k += 64, out += 64) blocks.codes(w, blocks.template next<false>(w, grid, grid), pruned, out);
    if (k == end) continue;
    slot = blocks.slot;
    for (; k < end; k += 8, out += 8) {
      uint64_t codes = eight_codes<kBits>(w, slot);
      if constexpr (Pattern::kSparse) {
        const unsigned bits = *bitmap(w, row, k);
        const uint64_t kept = spread<1>(bits) * 0xff;
        codes = (expand_bytes(codes, bits) & kept) | ((uint64_t)pruned * 0x0101010101010101 & ~kept);
        slot += __builtin_popcount(bits);
      } else {
        slot += 8;
      }
      memcpy(out, &codes, 8);
    }
    k = end;
    blocks = Blocks<Pattern, Coded<kBits>>(w, row, k, slot, ahead);
  }
  return blocks.slot;
}

template <class Pattern, class Values>
constexpr Codes codes_of() {
  if constexpr (Values::kGrouped)
    return decode_codes<Pattern, Values::kWidth>;
  else
    return nullptr;
}

}  // namespace
