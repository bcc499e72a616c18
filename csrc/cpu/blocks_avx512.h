// AVX-512 VBMI and VBMI2. The pattern is applied to codes and 16-bit values before they are widened: one expand places
// 64 codes or 32 values. See blocks.h.
#pragma once

#include "patterns.h"

namespace {

// kBytes bytes at base + at; or, where kBytes is 0, 64 bytes, zeros past base + bytes, from where on none may be read.
template <int kBytes>
inline __m512i bytes_at(const void* base, int64_t at, int64_t bytes) {
  const uint8_t* p = (const uint8_t*)base + at;
  if constexpr (kBytes == 64) return _mm512_loadu_si512(p);
  if constexpr (kBytes == 32) return _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)p));
  if constexpr (kBytes == 16) return _mm512_zextsi128_si512(_mm_loadu_si128((const __m128i*)p));
  if constexpr (kBytes == 8) return _mm512_zextsi128_si512(_mm_loadl_epi64((const __m128i*)p));
  if (__builtin_expect(at <= bytes - 64, 1)) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi8(at < bytes ? _bzhi_u64(~0ull, (unsigned)(bytes - at)) : 0, p);
}

// The 64 bits from bit `slot` on, of which whole bytes below `limit` may be read.
inline uint64_t bits_at(const uint8_t* p, int64_t slot, int64_t limit) {
  const uint8_t* at = p + (slot >> 3);
  const int64_t there = limit - (slot >> 3);
  const unsigned shift = slot & 7;
  if (__builtin_expect(there >= 9, 1)) return peek<uint64_t>(at) >> shift | (uint64_t)at[8] << 1 << (63 - shift);
  uint64_t bits = 0;
  for (int64_t i = 0; i < there && i < 8; ++i) bits |= (uint64_t)at[i] << (8 * i);
  return bits >> shift;
}

// Byte i of the result is byte `kStep * (i / 8) + i % 8` of v: eight bytes from where eight codes of kStep bits begin.
template <int kStep>
inline __m512i eights(__m512i v) {
  alignas(64) static constexpr auto table = [] {
    struct {
      uint8_t at[64];
    } t{};
    for (int i = 0; i < 64; ++i) t.at[i] = (uint8_t)(kStep * (i / 8) + i % 8);
    return t;
  }();
  return _mm512_permutexvar_epi8(_mm512_load_si512(table.at), v);
}

// 64 codes of a plane of kBits = 2 or 4 bits, one a byte. kStored: how many are stored, in whole eights; or 0 where
// any number is, from any slot.
template <int kBits, int kStored>
inline __m512i plane_codes(const uint8_t* plane, int64_t slot, int64_t bytes) {
  // Where the codes of eight bytes begin, by the bit of the first; a load broadcasts it, which no shuffle unit has to.
  constexpr uint64_t kFirst = kBits == 4 ? 0x1c1814100c080400 : 0x0e0c0a0806040200, kEach = 0x0101010101010101;
  static constexpr uint64_t kOffsets[] = {kFirst, kFirst + kBits * kEach, kFirst + 4 * kEach, kFirst + 6 * kEach};
  const int64_t at = slot * kBits >> 3;
  const uint64_t* offsets = kOffsets + (kStored ? 0 : slot & (8 / kBits - 1));
  asm("" : "+r"(offsets));
  const __m512i fields = _mm512_multishift_epi64_epi8(_mm512_set1_epi64((long long)*offsets),
                                                      eights<kBits>(bytes_at<kStored * kBits / 8>(plane, at, bytes)));
  return _mm512_and_si512(fields, _mm512_set1_epi8((1 << kBits) - 1));
}

// 64 codes, one a byte; in dense int3 the bits above it are any.
template <int kBits, int kStored>
inline __m512i codes64(const Weight& w, int64_t slot) {
  const uint8_t* low = (const uint8_t*)w.stored;
  if constexpr (kBits == 8) return bytes_at<kStored>(low, slot, w.stored_bytes);
  if constexpr (kBits == 4 && kStored == 32) {  // in half a vector, one byte into two
    const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(low + (slot >> 1))));
    const __m256i twice = _mm256_or_si256(words, _mm256_slli_epi16(words, 4));
    return _mm512_zextsi256_si512(_mm256_and_si256(twice, _mm256_set1_epi8(15)));
  }
  if constexpr (kBits == 4 || kBits == 2) return plane_codes<kBits, kStored>(low, slot, w.stored_bytes);
  const uint8_t* high = (const uint8_t*)w.stored_hi;
  if constexpr (kStored == 64) {  // without a mask register, which takes turns of the unit that multiplies (Zen 4)
    alignas(64) static constexpr auto bits = [] {
      struct {
        uint8_t low[64], high[64];  // where byte i of the result begins in its eight codes, and in the high plane
      } t{};
      for (int i = 0; i < 64; ++i) t.low[i] = (uint8_t)(2 * (i % 8)), t.high[i] = (uint8_t)((i + 62) % 64);
      return t;
    }();
    const __m512i eights = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i*)(low + (slot >> 2))));
    const __m512i twos = _mm512_multishift_epi64_epi8(_mm512_load_si512(bits.low), eights);
    const __m512i fours = _mm512_multishift_epi64_epi8(_mm512_load_si512(bits.high),
                                                       _mm512_set1_epi64(peek<int64_t>(high + (slot >> 3))));
    return _mm512_ternarylogic_epi32(twos, fours, _mm512_set1_epi8(3), 0xe4);  // the low bits of twos, others of fours
  }
  const __m512i pairs = plane_codes<2, kStored>(low, slot, w.stored_bytes);
  __mmask64 fours;
  if constexpr (kStored == 32)
    fours = bits32_at(high, slot);
  else
    fours = bits_at(high, slot, w.stored_bytes >> 1);
  return _mm512_mask_add_epi8(pairs, fours, pairs, _mm512_set1_epi8(4));
}

struct Held {
  __m512i part[4];  // 64 codes; or 2 x 32 16-bit values; or 4 x 16 fp32 values
  uint64_t mask;
};

// Byte 4 j of the result is byte 16 i + j of v, the others zero.
inline __m512i sixteen(__m512i v, int i) {
  alignas(64) static constexpr auto table = [] {
    struct {
      uint8_t at[4][64];
    } t{};
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 64; ++j) t.at[i][j] = (uint8_t)(16 * i + j / 4);
    return t;
  }();
  return _mm512_maskz_permutexvar_epi8(0x1111111111111111, _mm512_load_si512(table.at[i]), v);
}

// The high half of dword j of the result is word 16 i + j of v, the low half zero.
inline __m512i high_halves(__m512i v, int i) {
  alignas(64) static constexpr auto table = [] {
    struct {
      uint16_t at[2][32];
    } t{};
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 32; ++j) t.at[i][j] = (uint16_t)(16 * i + j / 2);
    return t;
  }();
  return _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_load_si512(table.at[i]), v);
}

template <class Pattern, class Values>
struct Blocks {
  using G = decltype(Values::grid(Weight(), 0, 0));
  static constexpr bool kScaled = false;
  const uint8_t* mask;
  int64_t slot, mask_ahead, stored_ahead;

  Blocks() = default;
  Blocks(const Weight& w, int64_t row, int64_t k, int64_t slot, int64_t ahead)
      : mask(Pattern::kSparse ? bitmap(w, row, k) : nullptr),
        slot(slot),
        mask_ahead(ahead >> 3),
        stored_ahead(Pattern::entries(w, ahead)) {}

  // kOther: the code where there is no entry; bit 4, for a look-up in a table with zeros, or one that means zero
  template <bool kStrided, int kOther = 16>
  Held next(const Weight& w, const G&, const G&) {
    Held held;
    held.mask = ~0ull;
    if constexpr (Pattern::kSparse) {
      held.mask = peek<uint64_t>(mask);
      __builtin_prefetch(mask + mask_ahead);
      mask += 8;
    }
    Values::ahead(w, slot, stored_ahead);
    if constexpr (kStrided && Pattern::kBlockStored == 64 && Values::kWidth == 4) {  // four codes a dword: one shuffle
      const uint8_t* fours = (const uint8_t*)w.stored + (slot >> 1);
      held.part[0] = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)fours));
    } else if constexpr (Values::kGrouped) {
      held.part[0] = codes64<Values::kWidth, Pattern::kBlockStored>(w, slot);
      if constexpr (Pattern::kSparse)
        held.part[0] = _mm512_mask_expand_epi8(_mm512_set1_epi8((char)kOther), held.mask, held.part[0]);
    } else {
      constexpr int kSize = Values::kWidth / 8, kEach = 64 / kSize;
      int64_t at = slot;
#pragma GCC unroll 4
      for (int i = 0; i < kSize; ++i) {
        const __m512i bytes =
            bytes_at<Pattern::kBlockStored * kSize / (64 / kEach)>(w.stored, at * kSize, w.stored_bytes);
        if constexpr (!Pattern::kSparse) {
          held.part[i] = bytes;
          at += kEach;
        } else if constexpr (kSize == 2) {
          const uint32_t bits = (uint32_t)(held.mask >> (32 * i));
          held.part[i] = _mm512_maskz_expand_epi16(bits, bytes);
          at += Pattern::kBlockStored ? Pattern::kBlockStored * kEach / 64 : __builtin_popcount(bits);
        } else {
          const uint16_t bits = (uint16_t)(held.mask >> (16 * i));
          held.part[i] = _mm512_maskz_expand_epi32(bits, bytes);
          at += Pattern::kBlockStored ? Pattern::kBlockStored * kEach / 64 : __builtin_popcount(bits);
        }
      }
    }
    slot += Pattern::kBlockStored ? Pattern::kBlockStored : __builtin_popcountll(held.mask);
    return held;
  }

  static vf lanes(const Weight&, const Held& held, const G& grid, int i) {
    if constexpr (Values::kGrouped) {
      const vf values = look_up(sixteen(held.part[0], i), grid);
      return Values::kWidth == 8 && Pattern::kSparse ? keep(values, (unsigned)(held.mask >> (16 * i)) & 0xffff)
                                                     : values;
    } else if constexpr (Values::kBrain) {
      return as_float(high_halves(held.part[i / 2], i % 2));
    } else {
      return strided(Weight(), held, grid, i);
    }
  }

  // out[0 .. 64) = the codes, one a byte; `pruned` where there is no entry
  static void codes(const Weight&, const Held& held, int pruned, uint8_t* out) {
    const __m512i none = _mm512_set1_epi8((char)pruned);
    const __m512i all =
        Values::kWidth == 3 && !Pattern::kSparse ? _mm512_and_si512(held.part[0], _mm512_set1_epi8(7)) : held.part[0];
    _mm512_storeu_si512(out, Pattern::kSparse ? _mm512_mask_mov_epi8(none, held.mask, all) : all);
  }

  // One of every kStride inputs.
  using Steps = G;
  static constexpr int kStride = Values::kGrouped ? 4 : Values::kBrain ? 2 : 1;
  static vf strided(const Weight&, const Held& held, const Steps& grid, int i) {
    if constexpr (Values::kGrouped && Values::kWidth == 8) {
      const __m512i codes = _mm512_and_si512(_mm512_srli_epi32(held.part[0], 8 * i), _mm512_set1_epi32(0xff));
      const vf values = look_up(codes, grid);
      return Pattern::kSparse ? keep(values, (unsigned)_pext_u64(held.mask, 0x1111111111111111 << i)) : values;
    } else if constexpr (Values::kGrouped) {
      return look_up(_mm512_srli_epi32(held.part[0], (Pattern::kBlockStored == 64 && Values::kWidth == 4 ? 4 : 8) * i),
                     grid);
    } else if constexpr (Values::kWidth == 32) {
      return as_float(held.part[i]);
    } else if constexpr (Values::kBrain) {
      const __m512i part = held.part[i / 2];
      return as_float(i % 2 ? _mm512_and_si512(part, _mm512_set1_epi32((int)0xffff0000)) : _mm512_slli_epi32(part, 16));
    } else {
      const __m512i part = held.part[i / 2];
      return _mm512_cvtph_ps(i % 2 ? _mm512_extracti64x4_epi64(part, 1) : _mm512_castsi512_si256(part));
    }
  }

  // Where the first half of the inputs has another grid than the second.
  static vf halves(const Weight& w, const Held& held, const G& first, const G& second, int i) {
    return _mm512_mask_mov_ps(strided(w, held, first, i), 0xff00, strided(w, held, second, i));
  }

  static void reorder(float* x) {
    if constexpr (kStride == 4) {
      alignas(64) float out[64];
      transpose4(x, 4, out, 16);
      memcpy(x, out, sizeof out);
    } else if constexpr (kStride == 2) {
      const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      for (int i = 0; i < 64; i += 32) {
        const vf a = load(x + i), b = load(x + i + 16);
        store(x + i, _mm512_permutex2var_ps(a, even, b));
        store(x + i + 16, _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b));
      }
    }
  }

 private:
  static vf look_up(__m512i codes, const G& grid) {
    if constexpr (Pattern::kSparse && Values::kWidth < 8)
      return _mm512_permutex2var_ps(grid.table, codes, zero());
    else
      return grid(as_float(codes));
  }
};

}  // namespace
