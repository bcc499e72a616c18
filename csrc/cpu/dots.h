// Dot products of four rows of W with a few rows of x, decoded in registers (AVX-512 VBMI).
#pragma once

#include "decode.h"

namespace {

constexpr int64_t kDotChunk = 512;             // inputs: four decoded rows and the rows of x stay in L1
constexpr int64_t kDotStride = kDotChunk + W;  // a group's last lanes may be stored past the chunk

#if defined(__AVX512VBMI2__)

// Whether 64 inputs share a grid.
template <class Values>
inline bool in_blocks(const Weight& w) {
  return !Values::kGrouped || w.group % 64 == 0 || w.groups == 1;
}

// A row of x (k,), as dots() takes it.
template <class Pattern, class Values>
void reorder_row(const Weight& w, float* x) {
  if (in_blocks<Values>(w))
    for (int64_t k = 0; k + 64 <= w.k; k += 64) Blocks<Pattern, Values>::reorder(x + k);
}

template <class Pattern, class Values, int kM, int kR>
void dot_rows(const Weight& w, int64_t row0, const float* x, int64_t ldx, float* scratch, float* sums) {
  constexpr int kTurns = kM == 1 ? 2 : 1;  // sums enough in flight to hide the latency of an add
  vf acc[kR][kM][kTurns];
  int64_t rows[kR];
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) {
    rows[r] = least(row0 + r, w.n - 1);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 2
      for (int t = 0; t < kTurns; ++t) acc[r][m][t] = zero();
  }
  using B = Blocks<Pattern, Values>;
  B blocks[kR] = {};
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) blocks[r] = B(w, rows[r], 0, Pattern::start(w, rows[r], 0));
  // The next four rows, at the place where these four are.
  const int64_t ahead = Pattern::start(w, least(rows[0] + 4, w.n - 1), 0) - blocks[0].slot;
  int64_t k = 0;
  if (in_blocks<Values>(w))
    for (int64_t group = 0; k + 64 <= w.k; ++group) {
      const int64_t end = Values::kGrouped ? least((group + 1) * w.group, w.k) : w.k;
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
  float *out = scratch, *spare = scratch + kDotStride;
  for (; k < w.k; k = least(k + kDotChunk, w.k)) {  // short groups, and what is left of the row
    const int64_t end = least(k + kDotChunk, w.k);
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      Store sink{out - k};
      blocks[r].slot = decode<Pattern, Values>(w, rows[r], k, end, blocks[r].slot, kAhead, spare, sink);
      for (int64_t at = k; at < end; at += W)
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m)
          acc[r][m][0] = fma(first(load(out + at - k), (int)least(end - at, W)), load(x + m * ldx + at), acc[r][m][0]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) sums[m * 4 + r] = sum(kTurns == 2 ? add(acc[r][m][0], acc[r][m][1]) : acc[r][m][0]);
}

template <class Pattern, class Values, int kM>
void dots(const Weight& w, int64_t row, const float* x, int64_t ldx, float* scratch, float* sums) {
  constexpr int kR = kM < 8 ? 4 : 2;  // rows of W in the register tile
  for (int r = 0; r < 4; r += kR) dot_rows<Pattern, Values, kM, kR>(w, row + r, x, ldx, scratch, sums + r);
}

#endif

}  // namespace
