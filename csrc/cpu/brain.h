// bf16 activations where the processor multiplies bf16 (AVX-512 BF16): W is decoded and rounded to bf16, as a bf16
// layer holds it, and a product of pairs, summed in fp32, takes the place of two multiply-adds.
//
// C += A P with pairs of neighbouring steps of the sum in a 32-bit lane: p[step / 2][column][step % 2]. Forward, rows
// of W are A as they are decoded, and P is x transposed, whose pairs already lie in memory; so C is y transposed. For
// dx, rows of dy are A as they lie, and two rows of W make a row of P.
#pragma once

#include "dots.h"
#include "rows.h"

namespace {

#if defined(__AVX512F__)

#define CTP_BRAIN __attribute__((target("avx512bf16")))

constexpr int64_t kBrainFew = 8;                    // rows of x up to which a panel does not pay
constexpr int64_t kBrainDots = 24;                  // rows of x up to which W is better decoded in registers
constexpr int64_t kBrainDepth = 256;                // steps of a panel
constexpr int64_t kBrainWidth = 256;                // columns of a panel: it and C stay in L2
constexpr int64_t kBrainStride = kBrainDepth + 32;  // numbers between rows of A: not a power of two

// Whether pairs of x lie on whole pairs.
inline bool in_brain(const Job& job) {
  return job.dtype == CTP_BF16 && job.depth() % 2 == 0 && (job.ldx % 2 == 0 || job.m == 1) &&
         __builtin_cpu_supports("avx512bf16");
}

// The values of a run in bf16.
template <class Pattern, class Values>
struct Brain {
  using B = Blocks<Pattern, Values>;
  static constexpr bool kTable = Values::kGrouped && Values::kWidth <= 4;
  typename B::G grids[2];  // of the halves of a block
  __m512i tables[2];       // of a grid's values twice, or once and zeros for pruned entries, whose code has bit 4
  Brain() = default;
  CTP_BRAIN Brain(const Weight& w, int64_t row, const Run& run) {
    grids[0] = Values::grid(w, row, run.group);
    grids[1] = run.second == run.group ? grids[0] : Values::grid(w, row, run.second);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      if constexpr (kTable) {
        const __m256i table = (__m256i)_mm512_cvtneps_pbh(grids[i].table);
        tables[i] = Pattern::kSparse ? _mm512_zextsi256_si512(table) : _mm512_broadcast_i64x4(table);
      }
  }
  // Inputs 32 i .. 32 i + 31 of a block.
  CTP_BRAIN __m512i lanes(const Weight& w, const Held& held, int i) const {
    if constexpr (kTable) {
      const __m256i codes = i ? _mm512_extracti64x4_epi64(held.part[0], 1) : _mm512_castsi512_si256(held.part[0]);
      return _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), tables[i]);
    } else if constexpr (Values::kBrain) {
      return held.part[i];
    } else {
      return (__m512i)_mm512_cvtne2ps_pbh(B::lanes(w, held, grids[i], 2 * i + 1), B::lanes(w, held, grids[i], 2 * i));
    }
  }
};

// out[0 .. k1 - k0) = W[row, k0 .. k1) rounded to bf16, then zeros up to a multiple of W. As decode().
template <class Pattern, class Values>
CTP_BRAIN int64_t brain_row(const Weight& w, int64_t row, int64_t k0, int64_t k1, int64_t slot, int64_t ahead,
                            uint16_t* out) {
  for (int64_t k = k0; k < k1;) {
    const Run run = run_at<Values>(w, k, k1);
    const Brain<Pattern, Values> brain(w, row, run);
    Blocks<Pattern, Values> blocks(w, row, k, slot, ahead);
    for (; k + 64 <= run.end; k += 64, out += 64) {
      const Held held = blocks.template next<false>(w, brain.grids[0], brain.grids[1]);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) _mm512_storeu_si512(out + 32 * i, brain.lanes(w, held, i));
    }
    slot = blocks.slot;
    if (k == run.end) continue;
    alignas(64) float wide[64];  // fewer than 64 inputs are left
    slot = decode<Pattern, Values>(w, row, k, run.end, slot, ahead, wide);
    for (int64_t i = 0; i < run.end - k; i += W)
      _mm256_storeu_si256((__m256i*)(out + i), (__m256i)_mm512_cvtneps_pbh(load(wide + i)));
    out += run.end - k;
    k = run.end;
  }
  return slot;
}

// As dots() in dots.h, for pairs of x: span.ldx counts pairs.
template <class Pattern, class Values, int kM>
CTP_BRAIN void brain_dots(const Weight& w, const Span& span, int64_t n, int64_t m0, int64_t* slots, int64_t ahead,
                          float* sums) {
  constexpr int kR = kM == 8 ? 2 : 4;
  const float* const x = span.x + m0 * span.ldx;
  const int64_t ldx = span.ldx, k1 = span.k1;
  for (int part = 0; part < 4; part += kR) {
    int64_t rows[kR], k = span.k0;
    Blocks<Pattern, Values> blocks[kR];
    vf acc[kR * kM];
#pragma GCC unroll 16
    for (int j = 0; j < kR * kM; ++j) acc[j] = zero();
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      rows[r] = least(n + part + r, w.n - 1);
      blocks[r] = Blocks<Pattern, Values>(w, rows[r], k, slots[part + r], ahead);
    }
    while (k + 64 <= k1) {
      const Run run = run_at<Values>(w, k, k1);
      Brain<Pattern, Values> brain[kR];
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) brain[r] = Brain<Pattern, Values>(w, rows[r], run);
      for (; k + 64 <= run.end; k += 64) {
        Held held[kR];
#pragma GCC unroll 4
        for (int r = 0; r < kR; ++r) held[r] = blocks[r].template next<false>(w, brain[r].grids[0], brain[r].grids[1]);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          __m512bh values[kR];
#pragma GCC unroll 4
          for (int r = 0; r < kR; ++r) values[r] = (__m512bh)brain[r].lanes(w, held[r], i);
#pragma GCC unroll 8
          for (int m = 0; m < kM; ++m) {
            const __m512bh pairs = (__m512bh)load(x + m * ldx + (k - span.k0) / 2 + W * i);
#pragma GCC unroll 4
            for (int r = 0; r < kR; ++r) acc[r * kM + m] = _mm512_dpbf16_ps(acc[r * kM + m], values[r], pairs);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      slots[part + r] = blocks[r].slot;
      if (k == k1) continue;  // else what is left of the row
      alignas(64) uint16_t out[64 + 4 * W] = {};
      slots[part + r] = brain_row<Pattern, Values>(w, rows[r], k, k1, slots[part + r], ahead, out);
      for (int64_t at = k; at < k1; at += 2 * W)
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m)
          acc[r * kM + m] = _mm512_dpbf16_ps(acc[r * kM + m], (__m512bh)_mm512_loadu_si512(out + at - k),
                                             (__m512bh)load(x + m * ldx + (at - span.k0) / 2));
    }
#pragma GCC unroll 16
    for (int j = 0; j < kR * kM; ++j) {
      float* to = sums + (j % kM * kDotGroup + part + j / kM) * W;
      store(to, add(load(to), acc[j]));
    }
  }
}

// c (kR, kV W) += a (kR, 2 pairs) p (2 pairs, kV W); a row of p is kTile pairs
template <int kR, int kV>
CTP_BRAIN void brain_tile(const uint16_t* a, const float* p, int64_t pairs, float* c) {
  vf acc[kR][kV];
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) acc[i][v] = load(c + i * kBrainWidth + v * W);
  for (int64_t r = 0; r < pairs; ++r, p += kTile) {
    vf b[kV];
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) b[v] = load(p + v * W);
#pragma GCC unroll 16
    for (int i = 0; i < kR; ++i) {
      const vf pair = set1(peek<float>(a + i * kBrainStride + 2 * r));
#pragma GCC unroll 16
      for (int v = 0; v < kV; ++v) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], (__m512bh)pair, (__m512bh)b[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) store(c + i * kBrainWidth + v * W, acc[i][v]);
}

using BrainTile = void (*)(const uint16_t*, const float*, int64_t, float*);
template <int kR>
BrainTile brain_tile_of(int64_t rows, bool narrow) {
  if constexpr (kR == 1)
    return narrow ? brain_tile<1, 1> : brain_tile<1, kVectors>;
  else
    return rows != kR ? brain_tile_of<kR - 1>(rows, narrow) : narrow ? brain_tile<kR, 1> : brain_tile<kR, kVectors>;
}

// c (rows, columns) += a p for up to kRows rows and a panel p[column / kTile][pair][column % kTile]
void brain_strip(const uint16_t* a, int64_t rows, const float* panel, int64_t pairs, int64_t columns, float* c) {
  for (int64_t t = 0; t < columns; t += kTile)
    brain_tile_of<kRows>(rows, columns - t <= W)(a, panel + t * kBrainDepth / 2, pairs, c + t);
}

// panel[t / kTile][.][t % kTile] = the pairs of two rows, of `depth` such, for `count` numbers
void brain_pairs(const uint16_t* first, const uint16_t* second, int64_t count, int64_t depth, float* panel) {
  alignas(64) static constexpr auto table = [] {
    struct {
      uint16_t at[64];
    } t{};
    for (int i = 0; i < 64; ++i) t.at[i] = (uint16_t)(i / 2 + i % 2 * 32);
    return t;
  }();
  for (int64_t t = 0; t < count; t += kTile, panel += kTile * depth)
    for (int i = 0; i < 2; ++i)
      store(panel + i * W,
            as_float(_mm512_permutex2var_epi16(_mm512_loadu_si512(first + t), _mm512_load_si512(table.at + 32 * i),
                                               _mm512_loadu_si512(second + t))));
}

int64_t brain_floats() {
  const int64_t a = kRows * kBrainStride / 2, panel = kBrainDepth / 2 * kBrainWidth;
  return a + panel + kBrainWidth * kBrainWidth + W * (kBrainDepth + W);
}

template <class Decoder>
void brain_part(const Job& job, const Decoder& decoder, const Part& part, float* scratch) {
  const Weight& w = job.weight;
  uint16_t* a = (uint16_t*)scratch;
  float *panel = scratch + kRows * kBrainStride / 2, *c = panel + kBrainDepth / 2 * kBrainWidth;
  float* wide = c + kBrainWidth * kBrainWidth;
  uint16_t *first = (uint16_t*)wide, *second = first + kBrainDepth + kTile;
  Job pairs = job;  // of x, as one 32-bit number each
  pairs.dtype = CTP_FP32;
  pairs.ldx /= 2;
  for (int64_t m0 = part.row0; m0 < part.row1; m0 += kBrainWidth)
    for (int64_t c0 = part.column0; c0 < part.column1; c0 += kBrainWidth) {
      const int64_t m = least(part.row1 - m0, kBrainWidth), width = least(part.column1 - c0, kBrainWidth);
      int64_t slots[kBrainWidth];
      if (!job.transposed)
        for (int64_t i = 0; i < width; ++i) slots[i] = decoder.start(w, c0 + i, 0);
      memset(c, 0, sizeof(float) * (size_t)((job.transposed ? m : width) * kBrainWidth));
      for (int64_t r0 = 0; r0 < job.depth(); r0 += kBrainDepth) {
        const int64_t length = least(job.depth() - r0, kBrainDepth);
        if (job.transposed) {
          for (int64_t r = 0; r < length; r += 2) {
            for (int64_t i = 0; i < 2; ++i)
              decoder.brain(w, r0 + r + i, c0, c0 + width, decoder.start(w, r0 + r + i, c0), kRowsAhead * w.k,
                            i ? second : first);
            brain_pairs(first, second, width, kBrainDepth / 2, panel + r / 2 * kTile);
          }
        } else {
          for (int64_t t = 0; t < m; t += kTile)
            transpose_rows(pairs, m0 + t, m - t, kVectors, r0 / 2, length / 2, wide, kBrainDepth + W,
                           panel + t * kBrainDepth / 2, kTile);
        }
        const int64_t rows = job.transposed ? m : width, columns = job.transposed ? width : m;
        const int64_t strips = (rows + kRows - 1) / kRows;
        for (int64_t s = 0; s < strips; ++s) {
          const int64_t i = rows * s / strips, height = rows * (s + 1) / strips - i;
          for (int64_t j = 0; j < height; ++j) {
            uint16_t* row = a + j * kBrainStride;
            if (job.transposed)
              memcpy(row, x_at(job, m0 + i + j, r0), sizeof(uint16_t) * (size_t)length);
            else
              slots[i + j] = decoder.brain(w, c0 + i + j, r0, r0 + length, slots[i + j], kBrainDepth, row);
          }
          brain_strip(a, height, panel, length / 2, columns, c + i * kBrainWidth);
        }
      }
      if (job.transposed)
        for (int64_t i = 0; i < m; ++i) write_row(job, m0 + i, c0, width, c + i * kBrainWidth);
      else
        write_transposed(job, m0, m, c0, width, c, kBrainWidth);
    }
}

template <class Pattern, class Values>
constexpr auto kBrainRow = brain_row<Pattern, Values>;
template <class Pattern, class Values, int kM>
constexpr Dots kBrainDotsOf = brain_dots<Pattern, Values, kM>;

#else

template <class Pattern, class Values>
constexpr decltype(nullptr) kBrainRow = nullptr;
template <class Pattern, class Values, int kM>
constexpr Dots kBrainDotsOf = nullptr;
constexpr int64_t kBrainFew = 0, kBrainDots = 0;
inline bool in_brain(const Job&) { return false; }
inline int64_t brain_floats() { return 0; }
template <class Decoder>
void brain_part(const Job&, const Decoder&, const Part&, float*) {}

#endif

}  // namespace
