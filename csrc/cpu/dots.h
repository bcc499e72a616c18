// Dot products of four rows of W with a few rows of x, decoded in registers (AVX-512 VBMI).
#pragma once

#include "decode.h"

namespace {

constexpr int64_t kDotChunk = 512;             // inputs: four decoded rows and the rows of x stay in L1
constexpr int64_t kDotStride = kDotChunk + W;  // a group's last lanes may be stored past the chunk

constexpr int kDotGroup = 16;         // rows of W that meet a chunk of x while it is in L1
constexpr int64_t kDotInputs = 4096;  // of all rows of x in a chunk

// Inputs k0 .. k1 - 1 of the rows of x, ldx apart, and zeros as far as a vector reaches; room for decoded rows of W.
struct Span {
  int64_t k0, k1;
  const float* x;
  int64_t ldx;
  float* spare;
};

// sums[(m * kDotGroup + r + i) * W] += lanes whose sum is W[n + i, k0 .. k1) . x[m, k0 .. k1), for four i, and some m
// from m0 on. k0 and k1 are multiples of 64, or k1 is K. slots[i]: where row n + i stands, and then where it stands
// after k1. ahead: how many inputs further on to prefetch from. Past the last row of W, that row is repeated.
using Dots = void (*)(const Weight&, const Span&, int64_t n, int64_t m0, int64_t* slots, int64_t ahead, float* sums);

#if defined(__AVX512VBMI2__)

// Whether 64 inputs share a grid.
template <class Values>
inline bool in_blocks(const Weight& w) {
  return !Values::kGrouped || w.group % 64 == 0 || w.groups == 1;
}

// Some inputs of a row of x, as dots() takes them.
template <class Pattern, class Values>
void reorder_row(const Weight& w, float* x, int64_t count) {
  if (in_blocks<Values>(w))
    for (int64_t k = 0; k + 64 <= count; k += 64) Blocks<Pattern, Values>::reorder(x + k);
}

template <class Pattern, class Values, int kM>
void dots(const Weight& w, const Span& span, int64_t n, int64_t m0, int64_t* slots, int64_t ahead, float* sums) {
  constexpr int kR = 4, kTurns = kM == 1 ? 2 : 1;  // sums enough in flight to hide the latency of an add
  const float* const x = span.x + m0 * span.ldx - span.k0;
  const int64_t ldx = span.ldx, k1 = span.k1;
  vf acc[kR][kM][kTurns];
  int64_t rows[kR];
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) {
    rows[r] = least(n + r, w.n - 1);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 2
      for (int t = 0; t < kTurns; ++t) acc[r][m][t] = zero();
  }
  using B = Blocks<Pattern, Values>;
  B blocks[kR] = {};
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) blocks[r] = B(w, rows[r], span.k0, slots[r]);
  int64_t k = span.k0;
  if (in_blocks<Values>(w))
    for (int64_t group = Values::kGrouped ? (uint32_t)k / (uint32_t)w.group : 0; k + 64 <= k1; ++group) {
      const int64_t end = Values::kGrouped ? least((group + 1) * w.group, k1) : k1;
      decltype(Values::grid(w, 0, 0)) grids[kR];
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) grids[r] = Values::grid(w, rows[r], group);
      for (; k + 64 <= end; k += 64) {
        Held held[kR];
#pragma GCC unroll 4
        for (int r = 0; r < kR; ++r) held[r] = blocks[r].template next<true>(w, ahead);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          vf values[kR];
#pragma GCC unroll 4
          for (int r = 0; r < kR; ++r) values[r] = B::strided(held[r], grids[r], i);
#pragma GCC unroll 8
          for (int m = 0; m < kM; ++m) {
            const vf inputs = load(x + m * ldx + k + 16 * i);
#pragma GCC unroll 4
            for (int r = 0; r < kR; ++r) acc[r][m][i % kTurns] = fma(values[r], inputs, acc[r][m][i % kTurns]);
          }
        }
      }
    }
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) slots[r] = blocks[r].slot;
  float *out = span.spare, *unpacked = out + kDotStride;
  for (; k < k1; k = least(k + kDotChunk, k1)) {  // short groups, and what is left of the row
    const int64_t end = least(k + kDotChunk, k1);
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      Store sink{out - k};
      slots[r] = decode<Pattern, Values>(w, rows[r], k, end, slots[r], kAhead, unpacked, sink);
      for (int64_t at = k; at < end; at += W)
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m)
          acc[r][m][0] = fma(first(load(out + at - k), (int)least(end - at, W)), load(x + m * ldx + at), acc[r][m][0]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      float* to = sums + (m * kDotGroup + r) * W;
      store(to, add(load(to), kTurns == 2 ? add(acc[r][m][0], acc[r][m][1]) : acc[r][m][0]));
    }
}

#endif

}  // namespace
