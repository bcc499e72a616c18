// compute = CTP_INT8_ACTIVATIONS: sums of integers. With x ~ sx q over a segment of inputs (see ctp.h),
//
//   y = sum over segments of sw sx (sum of codes q) - sw zero (sx sum of q)
//
// A pruned entry is decoded as the code `zero`. A few rows of x: four rows of W are decoded into L1 as bytes and
// multiplied as dot products. Many rows: a panel of codes, panel[t][k / 4][column][k % 4], serves a block of rows.
#pragma once

#include "int8_fields.h"

namespace {

constexpr int64_t kInt8Chunk = 512;  // inputs of a panel: kTile x kInt8Chunk bytes of it stay in L1
constexpr int64_t kInt8Width = 256;  // columns of a panel
constexpr int64_t kInt8Block = 256;  // rows of x that share a panel
constexpr int64_t kInt8Stride = kInt8Chunk + 64;
constexpr int64_t kInt8DotLimit = 4, kFieldLimit = W == 16 ? 8 : 16;

// ---- Few rows -----------------------------------------------------------------------------------------------------

constexpr int kInt8DotRows = kDotRows > 1 ? kDotRows / 2 : 1;

// sums[i * 4 + r] += x row i . w row r over segments s0 .. s1 - 1, for kM rows of x and 4 of W, whose codes of these
// segments are at w, ldw apart
template <int kM, int kBits>
void int8_dots(const Quantized& x, int64_t row, int64_t s0, int64_t s1, const uint8_t* w, int64_t ldw,
               const float* scales, float* sums) {
  constexpr int kSums = 4 * kM;  // one loop over them, not two: GCC keeps such arrays in registers
  vf acc[kSums];
#pragma GCC unroll 16
  for (int j = 0; j < kSums; ++j) acc[j] = zero();
  const int8_t* q = x.q + row * x.ldq + s0 * x.segment;
  for (int64_t s = s0; s < s1; ++s) {
    vi products[kSums];
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) products[j] = no_sums();
    for (int64_t k = 0; k < x.segment; k += 4 * W, w += 4 * W, q += 4 * W)
#pragma GCC unroll 16
      for (int j = 0; j < kSums; ++j)
        products[j] = dot4<kBits>(products[j], load_bytes(w + j % 4 * ldw), load_bytes(q + j / 4 * x.ldq));
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j)
      acc[j] = fma(to_float(products[j]), set1(scales[j % 4 * x.padded + s] * x.scales[(row + j / 4) * x.padded + s]),
                   acc[j]);
  }
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m) sum4(acc[4 * m], acc[4 * m + 1], acc[4 * m + 2], acc[4 * m + 3], sums + 4 * m);
}

template <int kBits, class Decoder>
void int8_dot_part(const Job& job, const Quantized& x, const Decoder& decoder, const Part& part, float* scratch) {
  const Weight& w = job.weight;
  float *scales = scratch, *offsets = scales + 4 * x.padded, *sums = offsets + 4 * x.padded;
  uint8_t* rows = (uint8_t*)(sums + round_up(4 * job.m, W) + 2 * W);
  memset(rows, 0, 4 * kInt8Stride);
  const bool fields = in_fields(w, x);
  for (int64_t n = part.column0; n < part.column1; n += 4) {
    int64_t slots[4], ids[4], ahead = 4 * w.k;
    for (int r = 0; r < 4; ++r) {
      ids[r] = least(n + r, w.n - 1);
      slots[r] = decoder.start(w, ids[r], 0);
      weight_grid(w, x, ids[r], scales + r * x.padded, offsets + r * x.padded);
    }
    for (int64_t m = 0; m < job.m; ++m) {
      vf acc[4] = {zero(), zero(), zero(), zero()};
      for (int64_t s = 0; s < x.padded; s += W)
        for (int r = 0; r < 4; ++r)
          acc[r] = fma(load(offsets + r * x.padded + s), load(x.sums + m * x.padded + s), acc[r]);
      memset(sums + 4 * m, 0, 16);
      sum4(acc[0], acc[1], acc[2], acc[3], sums + 4 * m);
    }
    int64_t k = 0;
    if (fields) {
      k = decoder.fields(w, x, job.m, ids, slots, ahead, scales, sums);
      for (int r = 0; r < 4 && k < w.k; ++r) slots[r] = decoder.start(w, ids[r], k);
    }
    for (; k < w.k; k += kInt8Chunk) {
      const int64_t end = least(k + kInt8Chunk, w.k);
      for (int r = 0; r < 4; ++r) slots[r] = decoder.codes(w, ids[r], k, end, slots[r], ahead, rows + r * kInt8Stride);
      const int64_t s0 = k / x.segment, s1 = (end + x.segment - 1) / x.segment;
      int64_t m = 0;
      for (; m + kInt8DotRows <= job.m; m += kInt8DotRows)
        int8_dots<kInt8DotRows, kBits>(x, m, s0, s1, rows, kInt8Stride, scales, sums + 4 * m);
      for (; m < job.m; ++m) int8_dots<1, kBits>(x, m, s0, s1, rows, kInt8Stride, scales, sums + 4 * m);
    }
    for (int64_t m = 0; m < job.m; ++m) write_row(job, m, n, least(4, part.column1 - n), sums + 4 * m);
  }
}

// ---- Many rows ----------------------------------------------------------------------------------------------------

// C (kR, kTile) += x (kR, segments s0 .. s1 - 1) W^T; rows of C are kInt8Width apart. panel, scales and offsets begin
// at s0.
template <int kR, int kBits>
void int8_tile(const Quantized& x, int64_t row, int64_t s0, int64_t s1, const uint8_t* panel, const float* scales,
               const float* offsets, float* c) {
  const int8_t* q = x.q + row * x.ldq + s0 * x.segment;
  for (int64_t s = s0; s < s1; ++s, scales += kTile, offsets += kTile) {
    constexpr int kSums = kR * kVectors;
    vi acc[kSums];
#pragma GCC unroll 32
    for (int j = 0; j < kSums; ++j) acc[j] = no_sums();
    for (int64_t k = 0; k < x.segment; k += 4, q += 4, panel += 4 * kTile)
#pragma GCC unroll 32
      for (int j = 0; j < kSums; ++j)
        acc[j] = dot4<kBits>(acc[j], load_bytes(panel + 4 * W * (j % kVectors)), repeat4(q + j / kVectors * x.ldq));
#pragma GCC unroll 32
    for (int j = 0; j < kSums; ++j) {
      const int64_t at = (row + j / kVectors) * x.padded + s;
      const int v = j % kVectors * W;
      float* out = c + j / kVectors * kInt8Width + v;
      const vf scale = fma(load(scales + v), set1(x.scales[at]), zero());
      store(out, fma(to_float(acc[j]), scale, fma(load(offsets + v), set1(x.sums[at]), load(out))));
    }
  }
}

using Int8Tile = void (*)(const Quantized&, int64_t, int64_t, int64_t, const uint8_t*, const float*, const float*,
                          float*);
template <int kR, int kBits>
Int8Tile int8_tile_of(int rows) {
  if constexpr (kR == 1)
    return int8_tile<1, kBits>;
  else
    return rows == kR ? int8_tile<kR, kBits> : int8_tile_of<kR - 1, kBits>(rows);
}

int64_t int8_panel_floats(const Job& job, const Quantized& x) {
  return least(job.m, kInt8Block) * kInt8Width + 2 * kInt8Width * x.segments + 2 * x.padded +
         (kInt8Width * kInt8Chunk + W * kInt8Stride) / 4;
}
int64_t int8_dot_floats(const Job& job, const Quantized& x) {
  return 8 * x.padded + round_up(4 * job.m, W) + 2 * W + kInt8Stride;
}

template <int kBits, class Decoder>
void int8_panel_part(const Job& job, const Quantized& x, const Decoder& decoder, const Part& part, float* scratch) {
  const Weight& w = job.weight;
  const int64_t block = least(job.m, kInt8Block);
  float *c = scratch, *scales = c + block * kInt8Width, *offsets = scales + kInt8Width * x.segments;
  float *row_scales = offsets + kInt8Width * x.segments, *row_offsets = row_scales + x.padded;
  uint8_t *panel = (uint8_t*)(row_offsets + x.padded), *rows = panel + kInt8Width * kInt8Chunk;
  memset(rows, 0, (size_t)(W * kInt8Stride));
  for (int64_t m0 = part.row0; m0 < part.row1; m0 += kInt8Block)
    for (int64_t c0 = part.column0; c0 < part.column1; c0 += kInt8Width) {
      const int64_t m = least(part.row1 - m0, kInt8Block), width = least(part.column1 - c0, kInt8Width);
      int64_t slots[kInt8Width];
      for (int64_t i = 0; i < round_up(width, kTile); ++i) {  // scales[t][s][column]
        const int64_t row = least(c0 + i, w.n - 1);
        slots[i] = decoder.start(w, row, 0);
        weight_grid(w, x, row, row_scales, row_offsets);
        for (int64_t s = 0, at = i / kTile * kTile * x.segments + i % kTile; s < x.segments; ++s, at += kTile) {
          scales[at] = row_scales[s];
          offsets[at] = row_offsets[s];
        }
      }
      memset(c, 0, sizeof(float) * (size_t)(m * kInt8Width));
      for (int64_t k = 0; k < w.k; k += kInt8Chunk) {
        const int64_t end = least(k + kInt8Chunk, w.k), s0 = k / x.segment, s1 = (end + x.segment - 1) / x.segment;
        for (int64_t t = 0; t < width; t += kTile) {
          uint8_t* out = panel + t * kInt8Chunk;
          for (int64_t v = 0; v < kTile; v += W) {
            const int64_t first = least(c0 + t + v, w.n - 1);
            for (int64_t i = 0; i < W; ++i)
              slots[t + v + i] = decoder.codes(w, least(first + i, w.n - 1), k, end, slots[t + v + i], W * w.k,
                                               rows + i * kInt8Stride);
            for (int64_t d = 0; d < (s1 - s0) * x.segment; d += 16)
              transpose4((const float*)(rows + d), kInt8Stride / 4, (float*)(out + d * kTile + 4 * v), kTile);
          }
          const float *sw = scales + (t * x.segments + s0 * kTile), *zw = offsets + (t * x.segments + s0 * kTile);
          const int64_t strips = (m + kRows - 1) / kRows;
          for (int64_t s = 0; s < strips; ++s) {
            const int64_t i = m * s / strips, height = m * (s + 1) / strips - i;
            int8_tile_of<kRows, kBits>((int)height)(x, m0 + i, s0, s1, out, sw, zw, c + i * kInt8Width + t);
          }
        }
      }
      for (int64_t i = 0; i < m; ++i) write_row(job, m0 + i, c0, width, c + i * kInt8Width);
    }
}

// ---- Both ---------------------------------------------------------------------------------------------------------

template <class Decoder>
int run_int8(const Job& job, const Decoder& decoder, int threads) {
  const Weight& w = job.weight;
  Quantized x{};
  x.segment = segment_of(w);
  x.segments = (w.k + x.segment - 1) / x.segment;
  x.padded = round_up(x.segments, W);
  x.ldq = x.segments * x.segment + 64;  // not a power of two
  const bool fields = in_fields(w, x),
             dot = x.segment >= 4 * W && job.m <= (fields && w.pattern == CTP_DENSE ? kFieldLimit : kInt8DotLimit);
  const int64_t unit = dot ? 4 : kTile, units = (w.n + unit - 1) / unit;
  if ((double)w.n * (double)w.k * (double)(job.m + 8) < kSmall) threads = 1;
  const int64_t across = least(threads, units);
  const int64_t down = dot ? 1 : least(threads / across, (job.m + 63) / 64);
  // One piece of memory, of the calling thread: rounded rows of x that all read, then every thread's own.
  const int64_t shared = round_up(job.m * (2 * x.padded + x.ldq / 2), 16);
  const int64_t own = round_up(dot ? int8_dot_floats(job, x) : int8_panel_floats(job, x), 16);
  float* memory = ctp::scratch((size_t)(shared + across * down * own));
  if (!memory) return CTP_OUT_OF_MEMORY;
  x.scales = memory;
  x.sums = x.scales + job.m * x.padded;
  x.q = (int8_t*)(x.sums + job.m * x.padded);
  x.fields = dot && fields ? x.q + job.m * x.ldq : nullptr;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && job.m > 1)
  for (int64_t i = 0; i < job.m; ++i) quantize_row(job, x, i, fields_of(w));
  const auto run = dot ? (w.values == CTP_INT8 ? int8_dot_part<8, Decoder> : int8_dot_part<4, Decoder>)
                       : (w.values == CTP_INT8 ? int8_panel_part<8, Decoder> : int8_panel_part<4, Decoder>);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < across * down; ++p) {
    const int64_t i = p / across, j = p % across;
    const Part part = {job.m * i / down, job.m * (i + 1) / down, units * j / across * unit,
                       least(units * (j + 1) / across * unit, w.n)};
    run(job, x, decoder, part, memory + shared + p * own);
  }
  return CTP_OK;
}

}  // namespace
