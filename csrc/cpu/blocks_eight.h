// Eight lanes: AVX2, and any processor. See blocks.h.
//
// Codes lie in 32-bit words, several to a word. A code becomes a number where it stands: its bits, under the exponent
// that gives the lowest of them the value 1, are 2^e + code exactly; subtracting 2^e + zero leaves code - zero.
#pragma once

#include "patterns.h"

namespace {

inline vi repeated(uint32_t word) { return no_sums() + (int32_t)word; }

// The low byte of every word of v, four times; the others are zero.
inline vi four_times(vi v) {
  const vi twice = v | v << 8;
  return twice | twice << 16;
}

// Bytes of v of which every bit of `bits` is set become `then`, the others zero.
inline vi where_set(vi v, uint32_t bits, uint32_t then) {
  return (vi)((Bytes)(v & repeated(bits)) == (Bytes)repeated(bits)) & repeated(then);
}

// 32 codes, one a byte.
template <int kBits>
inline vi codes32(const uint8_t* low, const uint8_t* high) {
  if constexpr (kBits == 8) return load_bytes(low);
  if constexpr (kBits == 4) return nibbles(low);
  const vi fours = four_times(widen_bytes(low));  // a byte of four codes
  const vi pairs = where_set(fours, 0x40100401, 0x01010101) | where_set(fours, 0x80200802, 0x02020202);
  if constexpr (kBits == 2) return pairs;
  const vi shifts = {0, 4, 8, 12, 16, 20, 24, 28};
  const vi ones = four_times((repeat4(high) >> shifts) & 15);
  return pairs | where_set(ones, 0x08040201, 0x04040404);
}

template <bool kFirst, class A, class B>
struct Choose {
  using Type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using Type = B;
};

struct Held {
  vi part[8];
  int64_t slot;  // of the first entry
};

template <class Pattern, class Values>
struct Blocks {
  using G = decltype(Values::grid(Weight(), 0, 0));
  static constexpr bool kScaled = Values::kGrouped;
  // Dense codes of four bits or fewer stand eight to a word, the others four to a word.
  static constexpr bool kNibbles = kScaled && !Pattern::kSparse && Values::kWidth <= 4;
  static constexpr int kApart = kNibbles ? 4 : 8, kBelow = kNibbles ? 5 : 2;  // bits; codes below the exponent
  static constexpr int kSize = kScaled ? 1 : Values::kWidth / 8;              // bytes of an entry in its place
  static constexpr int kStride = kNibbles ? 8 : kScaled ? 4 : Values::kBrain ? 2 : 1;

  const uint8_t* mask;
  int64_t slot, mask_ahead, stored_ahead;

  Blocks() = default;
  Blocks(const Weight& w, int64_t row, int64_t k, int64_t slot, int64_t ahead)
      : mask(Pattern::kSparse ? bitmap(w, row, k) : nullptr),
        slot(slot),
        mask_ahead(ahead >> 3),
        stored_ahead(Pattern::entries(w, ahead)) {
    if constexpr (kUnpacks) unpack(w, slot, 64, unpacked.codes[0]);
  }

  template <bool kStrided>
  Held next(const Weight& w, const G& grid, const G& second) {
    Held held;
    held.slot = slot;
    Values::ahead(w, slot, stored_ahead);
    if constexpr (Pattern::kSparse) {
      __builtin_prefetch(mask + mask_ahead);
      place(w, grid, second, peek<uint64_t>(mask), held.part);
      mask += 8;
    } else {
      if constexpr (kStrided && kScaled) pack(w, held.part);
      slot += 64;
    }
    return held;
  }

  static vf lanes(const Weight& w, const Held& held, const G& grid, int i) {
    const void* placed = (const char*)held.part + kSize * W * i;
    if constexpr (!Pattern::kSparse) return grid(Values::template raw<W>(w, held.slot + W * i));
    if constexpr (kScaled) return grid(codes8<W>((const uint8_t*)placed));
    return placed_lanes(held, i);
  }

  // out[0 .. 64) = the codes, one a byte
  static void codes(const Weight& w, const Held& held, int, uint8_t* out) {
    for (int i = 0; i < 2; ++i) {
      const vi each = Pattern::kSparse ? held.part[i] : codes_at(w, held.slot + 32 * i);
      memcpy(out + 32 * i, &each, sizeof each);
    }
  }

  struct Steps {
    vf from[kBelow];
    Steps() = default;
    Steps(const G& grid) {
      if constexpr (kScaled)
        for (int i = 0; i < kBelow; ++i) from[i] = add(grid.zero, set1((float)(1 << (23 - kApart * i))));
    }
  };
  static vf strided(const Weight& w, const Held& held, const Steps& steps, int i) {
    if constexpr (kScaled) {
      const int n = i % kStride / kBelow, at = kApart * (i % kStride % kBelow);
      const vi code = held.part[i / kStride] >> (kApart * kBelow * n) & repeated(((1u << kApart) - 1) << at);
      return (vf)(code | repeated((uint32_t)(127 + 23 - at) << 23)) - steps.from[at / kApart];
    } else if constexpr (Values::kBrain) {
      const vi pair =
          Pattern::kSparse ? held.part[i / 2] : load_bytes((const uint16_t*)w.stored + held.slot + i / 2 * 2 * W);
      return (vf)(i % 2 ? pair & repeated(0xffff0000) : pair << 16);
    } else {
      return Pattern::kSparse ? placed_lanes(held, i) : Values::template raw<W>(w, held.slot + W * i);
    }
  }

  static void reorder(float* x) {
    float out[64];
    for (int b = 0; b < 64; b += 8 * kStride)
      for (int i = 0; i < kStride; ++i)
        for (int lane = 0; lane < 8; ++lane)
          out[b + 8 * i + lane] = x[b + kStride * lane + (kNibbles && Values::kWidth < 4 ? i % 4 * 2 + i / 4 : i)];
    memcpy(x, out, sizeof out);
  }

 private:
  static vf placed_lanes(const Held& held, int i) {
    const void* placed = (const char*)held.part + kSize * W * i;
    if constexpr (kSize == 4) return load((const float*)placed);
    return Values::kBrain ? from_bf16<W>((const uint16_t*)placed) : from_fp16<W>((const uint16_t*)placed);
  }

  static vi codes_at(const Weight& w, int64_t slot) {
    const uint8_t *low = (const uint8_t*)w.stored + (slot * kLow >> 3), *high = (const uint8_t*)w.stored_hi;
    if constexpr (Values::kWidth != 3) return codes32<Values::kWidth>(low, high);
    const uint32_t ones = bits32_at(high, slot);
    return codes32<Values::kWidth>(low, (const uint8_t*)&ones);
  }

  // 64 codes, in the words of strided(); codes of two and three bits: the even ones of eight, then the odd ones.
  void pack(const Weight& w, vi* part) const {
    const uint8_t* low = (const uint8_t*)w.stored;
    if constexpr (Values::kWidth == 8) {
      part[0] = load_bytes(low + slot);
      part[1] = load_bytes(low + slot + 32);
    } else if constexpr (Values::kWidth == 4) {
      part[0] = load_bytes(low + (slot >> 1));
    } else {
      const vi pairs = widen_words(low + (slot >> 2));
      part[0] = (pairs & repeated(0x3333)) | (pairs << 14 & repeated(0x33330000));
      if constexpr (Values::kWidth == 3) {
        const vi ones = four_times(widen_bytes((const uint8_t*)w.stored_hi + (slot >> 3)));
        part[0] = part[0] | where_set(ones, 0x20021001, 0x04040404) | where_set(ones, 0x80084004, 0x40404040);
      }
    }
  }

  // The bytes from `at` on; where fewer than `wanted` are there, a copy in `room`, then zeros.
  static const uint8_t* bytes_at(const void* stored, int64_t at, int64_t there, int64_t wanted, uint8_t* room) {
    const uint8_t* p = (const uint8_t*)stored + at;
    if (__builtin_expect(there - at >= wanted, 1)) return p;
    memset(room, 0, (size_t)wanted);
    if (there > at) memcpy(room, p, (size_t)(there - at));
    return room;
  }

  static constexpr int kLow = Values::kWidth == 3 ? 2 : Values::kWidth;  // bits of a code in the low plane
  static constexpr int kMost = 96;                                       // codes unpacked, 32 at a time
  static constexpr bool kUnpacks = kScaled && Pattern::kSparse && !Pattern::kBlockStored;

  // Codes from a multiple of 8 on, one a byte, for `next`: a block ahead, because bytes that were just stored 32 at a
  // time cannot be loaded eight at a time before they have reached L1 (Zen 4).
  struct Unpacked {
    uint8_t codes[2][kMost + 48];
  };
  struct Nothing {};
  typename Choose<kUnpacks, Unpacked, Nothing>::Type unpacked;
  int turn = 0;

  void unpack(const Weight& w, int64_t from, int count, uint8_t* out) const {
    uint8_t room[2][kMost];
    from &= ~7;
    const uint8_t* low = bytes_at(w.stored, from * kLow >> 3, w.stored_bytes, kMost * kLow / 8, room[0]);
    const uint8_t* high = low;
    if (Values::kWidth == 3) high = bytes_at(w.stored_hi, from >> 3, w.stored_bytes >> 1, kMost / 8, room[1]);
    const int likely = (int)(w.density >> 2) + 12;
#pragma GCC unroll 3
    for (int i = 0; i < kMost; i += 32)
      if (i < likely || i < count + 7) {
        const vi codes = codes32<Values::kWidth>(low + (i * kLow >> 3), high + (i >> 3));
        memcpy(out + i, &codes, sizeof codes);
      }
  }

  // The stored entries in their places, zeros (codes: the one that means zero) elsewhere.
  void place(const Weight& w, const G& grid, const G& second, uint64_t bits, vi* part) {
    const int64_t after = slot + (Pattern::kBlockStored ? Pattern::kBlockStored : __builtin_popcountll(bits));
    if constexpr (kScaled) {
      const vi pruned[2] = {repeated((uint32_t)grid.pruned * 0x01010101),
                            repeated((uint32_t)second.pruned * 0x01010101)};
      if constexpr (!kUnpacks) {
        expand64_fours(codes_at(w, slot), bits, pruned, part);
      } else {
        const bool last = mask + 16 > w.mask + w.n * ((w.k + 7) >> 3);
        unpack(w, after, last ? 64 : __builtin_popcountll(peek<uint64_t>(mask + 8)), unpacked.codes[!turn]);
        const uint8_t* next = unpacked.codes[turn] + (slot & 7);
        part[0] = expand32(next, (uint32_t)bits, pruned[0]);
        part[1] = expand32(next + __builtin_popcount((uint32_t)bits), (uint32_t)(bits >> 32), pruned[1]);
        turn = !turn;
      }
    } else {
      constexpr int kLanes = 32 / kSize;
      uint8_t room[kSize * (64 + kLanes)];
      const uint8_t* next = bytes_at(w.stored, slot * kSize, w.stored_bytes, kSize * (after - slot + kLanes), room);
#pragma GCC unroll 16
      for (int i = 0; i < 2 * kSize; ++i) {
        const unsigned here = (unsigned)(bits >> (kLanes * i)) & ((1u << kLanes) - 1);
        const int first = entries(here & 0xff);
        part[i] = kSize == 2 ? expand16(next, here, first) : (vi)expand(load((const float*)next), here);
        next += kSize * (kSize == 2 ? first + entries(here >> 8) : first);
      }
    }
    slot = after;
  }

  // Stored entries of eight inputs.
  static int entries(unsigned bits) {
    return Pattern::kBlockStored ? Pattern::kBlockStored / 8 : __builtin_popcount(bits);
  }
};

}  // namespace
