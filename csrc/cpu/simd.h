// Vectors of W lanes of fp32 for the instruction set that this unit is compiled for. Each of the four headers
// defines, in an anonymous namespace:
//
// clang-format off
//   vf, W                                    the vector and its lanes (8 or 16)
//   kRows, kVectors                          the register tile of the panel kernel: kRows x (kVectors * W)
//   kDotRows                                 rows of x in the register tile of the dot kernel (by 4 rows of weight)
//   kDotLimit                                rows of x up to which the dot kernel beats the panel kernel (measured at
//                                            K = 2048 and 8192: int4, fp32, 50 % bf16; Ice Lake)
//   kDotSums, kDotMost                       sums of the kernel that decodes in registers: to hide the latency of an add,
//                                            and as many as stay in registers
//   kSkipVectors, kSkipFours                 vectors of rows in a slice of skip.h; up to how many of them take four sums
//   load store zero set1 add mul fma sum     as named; fma(a, b, c) = a * b + c
//   held_load(p)                             load, and not again for every use (GCC would, to save registers)
//   repeat(p) pick<i>(v)                     p[0 .. 4), fp32 or bf16, again and again; element i of that in every lane
//   sum4(a, b, c, d, out)                    out[0..3] += the four sums
//   first(v, count)                          lanes below count, zeros above
//   drop(v, count)                           lane i is lane i + count of v, any number past the last; count < 8
//   expand(v, bits)                          lane i takes the next lane of v where bit i is set, zero where it is not
//   keep(v, bits)                            lane i of v where bit i is set, zero where it is not
//   compress(v, step, values, places)        appends the lanes that are not zero, and step + lane; how many. Writes W
//                                            of each.
//   places64(mask, step, places)             step + i for each set bit i; how many. Writes 64 + W at most.
//   from_fp32<S> from_fp16<S> from_bf16<S>   widen S elements, S = 8 or W, reading no more than them
//   to_fp16 to_bf16                          round to nearest even and store W elements
//   half(bits)                               one fp16 number
//   codes8<S> codes4<S> codes2<S> codes3<S>  S codes, one a lane, as integer bits; lanes past S are undefined
//   Grid<B>(scale, zero)(codes)              scale * (code - zero), rounded once
//   vi, no_sums(), to_float(vi)              W sums of 32 bits, zeros, and as fp32
//   spread(p, index)                         lane i = p[index[i]]; reads p[0 .. W)
//   nibbles(p)                               4 W half bytes, one a byte, low ones first
//   load_bytes(p) repeat4(p)                 4 W bytes; 4 bytes, W times
//   masked_or(v, mask, other)                (v & mask) | other
//   dot4<B>(sums, codes, x)                  lane i += the products of bytes 4 i .. 4 i + 3: B-bit codes by signed x
//   expand_bytes(bytes, bits)                byte i takes the next byte where bit i is set, zero where it is not
//   widen_bytes(p) widen_words(p)            W of them, each in 32 bits                (these five in eight lanes only)
//   expand32(p, bits, other)                 byte i takes the next of p where bit i is set, that of `other` where it is
//                                            not; reads p[0 .. 48)
//   expand64_fours(bytes, bits, other, out)  the same for 64 bits, four of every eight set, from the bytes of a vector;
//                                            other[0] for the first half, other[1] for the second
//   expand16(p, bits, in_first)              the same for 16-bit entries and zeros; in_first: set among the first eight
//                                            bits; reads p[0 .. 16)
//   transpose4(src, lds, dst, ldd)           4 columns of W rows: dst[j * ldd + i] = src[i * lds + j]
// clang-format on
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

template <class T>
inline T peek(const void* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

// For every byte of a bitmap, which stored entry each lane takes: a lane's rank among the set bits; the high bit set
// where it takes none.
struct Ranks {
  uint64_t of[256];
  constexpr Ranks() : of() {
    for (unsigned bits = 0; bits < 256; ++bits) {
      uint64_t rank = 0;
      for (int lane = 0; lane < 8; ++lane) {
        of[bits] |= (bits >> lane & 1 ? rank : 0x80) << (8 * lane);
        rank += bits >> lane & 1;
      }
    }
  }
};
constexpr Ranks kRanks;

// kRanks for entries of two bytes.
struct WordRanks {
  alignas(16) uint8_t of[256][16];
  constexpr WordRanks() : of() {
    for (int bits = 0; bits < 256; ++bits)
      for (int byte = 0; byte < 16; ++byte) {
        const int rank = (int)(kRanks.of[bits] >> (byte / 2 * 8) & 0xff);
        of[bits][byte] = (uint8_t)(rank & 0x80 ? 0x80 : 2 * rank + byte % 2);
      }
  }
};
constexpr WordRanks kWordRanks;

// For every byte of a bitmap, the lanes of its set bits, in order.
struct SetLanes {
  uint64_t of[256];
  constexpr SetLanes() : of() {
    for (unsigned bits = 0; bits < 256; ++bits)
      for (int lane = 7; lane >= 0; --lane)
        if (bits >> lane & 1) of[bits] = of[bits] << 8 | (uint64_t)lane;
  }
};
constexpr SetLanes kSetLanes;

}  // namespace

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(__aarch64__)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

#if !defined(__AVX512F__)
namespace {

template <int B>
struct Grid {
  vf scale, zero;
  int pruned;
  Grid() = default;
  Grid(float scale, float zero) : scale(set1(scale)), zero(set1(zero)), pruned((int)zero) {}
  vf operator()(vf codes) const { return scale * (to_float((vi)codes) - zero); }
};

}  // namespace
#endif
