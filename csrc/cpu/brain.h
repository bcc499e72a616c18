// bf16 activations where the processor multiplies bf16 (AVX-512 BF16): W is decoded and rounded to bf16, as a bf16
// layer holds it, and a product of pairs, summed in fp32, takes the place of two multiply-adds.
//
// C += A P with pairs of neighbouring steps of the sum in a 32-bit lane: p[step / 2][column][step % 2]. Forward, rows
// of W are A as they are decoded, and P is x transposed, whose pairs already lie in memory; so C is y transposed. For
// dx, rows of dy are A as they lie, and two rows of W make a row of P.
#pragma once

#include "decode.h"
#include "rows.h"

namespace {

#if defined(__AVX512F__)

#define CTP_BRAIN __attribute__((target("avx512bf16")))

constexpr int64_t kBrainLimit = 8;                  // rows of x up to which fp32 sums in registers are faster
constexpr int64_t kBrainDepth = 256;                // steps of a panel
constexpr int64_t kBrainWidth = 256;                // columns of a panel: it and C stay in L2
constexpr int64_t kBrainStride = kBrainDepth + 32;  // numbers between rows of A: not a power of two

// Whether pairs of x lie on whole pairs, and there are rows enough to pay for a panel.
inline bool in_brain(const Job& job) {
  return job.dtype == CTP_BF16 && (job.transposed || job.m > kBrainLimit) && job.depth() % 2 == 0 && job.ldx % 2 == 0 &&
         __builtin_cpu_supports("avx512bf16");
}

// out[0 .. k1 - k0) = W[row, k0 .. k1) rounded to bf16, then zeros up to a multiple of W. As decode().
template <class Pattern, class Values>
CTP_BRAIN int64_t brain_row(const Weight& w, int64_t row, int64_t k0, int64_t k1, int64_t slot, int64_t ahead,
                            uint16_t* out) {
  constexpr bool kTable = Values::kGrouped && Values::kWidth <= 4;
  for (int64_t k = k0; k < k1;) {
    const int64_t end = Values::kGrouped ? least(k - (int64_t)((uint32_t)k % (uint32_t)w.group) + w.group, k1) : k1;
    const auto grid = Values::grid(w, row, Values::kGrouped ? (uint32_t)k / (uint32_t)w.group : 0);
    __m512i table;  // of a grid's values, and zeros for pruned entries, whose code has bit 4 (blocks.h)
    if constexpr (kTable) table = _mm512_zextsi256_si512((__m256i)_mm512_cvtneps_pbh(grid.table));
    using B = Blocks<Pattern, Values>;
    B blocks(w, row, k, slot);
    for (; k + 64 <= end; k += 64, out += 64) {
      const Held held = blocks.template next<false>(w, grid, grid, ahead);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        __m512i lanes;
        if constexpr (kTable) {
          const __m256i codes = i ? _mm512_extracti64x4_epi64(held.part[0], 1) : _mm512_castsi512_si256(held.part[0]);
          lanes = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), table);
        } else if constexpr (Values::kBrain) {
          lanes = held.part[i];
        } else {
          lanes = (__m512i)_mm512_cvtne2ps_pbh(B::lanes(w, held, grid, 2 * i + 1), B::lanes(w, held, grid, 2 * i));
        }
        _mm512_storeu_si512(out + 32 * i, lanes);
      }
    }
    slot = blocks.slot;
    if (k == end) continue;
    alignas(64) float wide[64];  // fewer than 64 inputs are left
    slot = decode<Pattern, Values>(w, row, k, end, slot, ahead, wide);
    for (int64_t i = 0; i < end - k; i += W)
      _mm256_storeu_si256((__m256i*)(out + i), (__m256i)_mm512_cvtneps_pbh(load(wide + i)));
    out += end - k;
    k = end;
  }
  return slot;
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

// panel[t / kTile][.][t % kTile] = the pairs of two rows, `row` of them, for `count` numbers
void brain_pairs(const uint16_t* first, const uint16_t* second, int64_t count, float* panel) {
  alignas(64) static constexpr auto table = [] {
    struct {
      uint16_t at[64];
    } t{};
    for (int i = 0; i < 64; ++i) t.at[i] = (uint16_t)(i / 2 + i % 2 * 32);
    return t;
  }();
  for (int64_t t = 0; t < count; t += kTile, panel += kTile * kBrainDepth / 2)
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
            brain_pairs(first, second, width, panel + r / 2 * kTile);
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

#else

template <class Pattern, class Values>
constexpr decltype(nullptr) kBrainRow = nullptr;
inline bool in_brain(const Job&) { return false; }
inline int64_t brain_floats() { return 0; }
template <class Decoder>
void brain_part(const Job&, const Decoder&, const Part&, float*) {}

#endif

}  // namespace
