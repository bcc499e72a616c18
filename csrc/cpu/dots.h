// Dot products of four rows of W with a few rows of x, decoded in registers.
#pragma once

#include "decode.h"

namespace {

constexpr int64_t kDotChunk = 512;             // inputs: four decoded rows and the rows of x stay in L1
constexpr int64_t kDotStride = kDotChunk + W;  // a group's last lanes may be stored past the chunk

constexpr int kDotGroup = 16;          // rows of W that meet a chunk of x in turn
constexpr int64_t kDotInputs = 16384;  // of all rows of x in a chunk, which L2 holds

// Inputs k0 .. k1 - 1 of the rows of x, ldx apart, and zeros as far as a vector reaches.
struct Span {
  int64_t k0, k1;
  const float* x;
  int64_t ldx;
};

// sums[(m * kDotGroup + r + i) * W] += lanes whose sum is W[n + i, k0 .. k1) . x[m, k0 .. k1), for four i, and some m
// from m0 on. k0 and k1 are multiples of 64, or k1 is K. slots[i]: where row n + i stands, and then where it stands
// after k1. ahead: how many inputs further on to prefetch from. Past the last row of W, that row is repeated.
using Dots = void (*)(const Weight&, const Span&, int64_t n, int64_t m0, int64_t* slots, int64_t ahead, float* sums);

// Whether 64 inputs share a grid, or with AVX-512 two.
template <class Values>
bool in_blocks(const Weight& w) {
  return !Values::kGrouped || w.group % (W == 16 ? 32 : 64) == 0 || w.groups == 1;
}

// Some inputs of a row of x, as dots() takes them.
template <class Pattern, class Values>
void reorder_row(const Weight& w, float* x, int64_t count) {
  for (int64_t k = 0; k + 64 <= count; k += 64) Blocks<Pattern, Values>::reorder(x + k);
}

// kR rows of W by kM of x, whose sums stay in registers: all of them, or those of a group where a scale is left out.
// kHalves: whether the halves of a block may lie in two groups.
template <class Pattern, class Values, int kR, int kM, bool kHalves>
inline void dot_block(const Weight& w, const Span& span, int64_t n, int64_t m0, int64_t* slots, int64_t ahead,
                      float* sums) {
  using B = Blocks<Pattern, Values>;
  constexpr int kTurns = kR * kM < kDotSums ? kDotSums / (kR * kM) : 1;
  const float* const x = span.x + m0 * span.ldx - span.k0;
  const int64_t ldx = span.ldx, k1 = span.k1;
  vf acc[kR][kM][kTurns];
  const auto clear = [&] {
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m)
#pragma GCC unroll 2
        for (int t = 0; t < kTurns; ++t) acc[r][m][t] = zero();
  };
  const auto keep_sums = [&](const vf* scales) {
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        float* to = sums + (m * kDotGroup + r) * W;
        const vf sum = kTurns == 2 ? add(acc[r][m][0], acc[r][m][kTurns - 1]) : acc[r][m][0];
        store(to, scales ? fma(sum, scales[r], load(to)) : add(load(to), sum));
      }
  };
  int64_t rows[kR], k = span.k0;
  B blocks[kR] = {};
  typename B::Steps steps[kR];  // the same in every group if only scales differ
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) {
    rows[r] = least(n + r, w.n - 1);
    blocks[r] = B(w, rows[r], k, slots[r], ahead);
    if (B::kScaled && w.symmetric) steps[r] = typename B::Steps(Values::grid(w, rows[r], 0));
  }
  clear();
  while (k + 64 <= k1) {
    const Run run = run_at<Values>(w, k, k1);
    typename B::G grids[kR], others[kR];
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      grids[r] = Values::grid(w, rows[r], run.group);
      if (kHalves) others[r] = Values::grid(w, rows[r], run.second);
      if (!(B::kScaled && w.symmetric)) steps[r] = typename B::Steps(grids[r]);
    }
    for (; k < run.end; k += 64) {
      Held held[kR];
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) held[r] = blocks[r].template next<true>(w, grids[r], grids[r]);
#pragma GCC unroll 8
      for (int i = 0; i < 64 / W; ++i) {
        vf values[kR];
#pragma GCC unroll 4
        for (int r = 0; r < kR; ++r)
          if constexpr (kHalves)
            values[r] = B::halves(w, held[r], grids[r], others[r], i);
          else
            values[r] = B::strided(w, held[r], steps[r], i);
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          const vf inputs = held_load(x + m * ldx + k + W * i);
#pragma GCC unroll 4
          for (int r = 0; r < kR; ++r) acc[r][m][i % kTurns] = fma(values[r], inputs, acc[r][m][i % kTurns]);
        }
      }
    }
    if constexpr (B::kScaled) {
      vf scales[kR];
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) scales[r] = grids[r].scale;
      keep_sums(scales);
      clear();
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) slots[r] = blocks[r].slot;
  if (k < k1) {  // what is left of the row
    alignas(64) float out[64];
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      slots[r] = decode<Pattern, Values>(w, rows[r], k, k1, slots[r], ahead, out);
      for (int64_t at = k; at < k1; at += W)
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) acc[r][m][0] = fma(load(out + at - k), load(x + m * ldx + at), acc[r][m][0]);
    }
  }
  keep_sums(nullptr);
}

template <class Pattern, class Values, int kM>
void dots(const Weight& w, const Span& span, int64_t n, int64_t m0, int64_t* slots, int64_t ahead, float* sums) {
  constexpr int kR = W == 8 && kM > 1 ? 2 : 4 * kM <= kDotMost ? 4 : kDotMost / kM;
  auto block = dot_block<Pattern, Values, kR, kM, false>;
  if constexpr (Values::kGrouped && W == 16)
    if (w.group % 64 && w.groups > 1) block = dot_block<Pattern, Values, kR, kM, true>;
  for (int r = 0; r < 4; r += kR) block(w, span, n + r, m0, slots + r, ahead, sums + r * W);
}

}  // namespace
