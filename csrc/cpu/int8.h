// compute = CTP_INT8_ACTIVATIONS: sums of integers. With x ~ sx q over a segment of inputs (see ctp.h),
//
//   y = sum over segments of sw sx (sum of codes q) - sw zero (sx sum of q)
//
// A pruned entry is decoded as the code `zero`. A few rows of x: dot products with rows of W, in registers
// (int8_fields.h) or with four rows that are decoded into L1 as bytes. Many rows: int8_panel.h.
#pragma once

#include "int8_panel.h"

namespace {

constexpr int64_t kInt8DotLimit = 4;

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
  const bool fields = x.fields;
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
          acc[r] =
              fma(load((w.symmetric ? scales : offsets) + r * x.padded + s), load(x.sums + m * x.padded + s), acc[r]);
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

int64_t int8_dot_floats(const Job& job, const Quantized& x) {
  return 8 * x.padded + round_up(4 * job.m, W) + 2 * W + kInt8Stride;
}

// ---- Both ---------------------------------------------------------------------------------------------------------

template <class Decoder>
int run_int8(const Job& job, const Decoder& decoder, int threads) {
  const Weight& w = job.weight;
  Quantized x{};
  x.m = job.m;
  x.segment = segment_of(w);
  x.segments = (w.k + x.segment - 1) / x.segment;
  x.padded = round_up(x.segments, W);
  x.ldq = x.segments * x.segment + 64;  // not a power of two
  const bool dot = x.segment >= 4 * W && job.m <= kInt8DotLimit;
  const int64_t most = dot ? 1 : kRows, strips = (job.m + most - 1) / most;
  x.height = strips ? (job.m + strips - 1) / strips : 1;
  x.order = dot ? 1 : panel_order(w);
  x.fields_order = fields_of(w);
  const Shares shares(w.n, dot ? 4 : kTile, kShare, threads);
  const int64_t across = shares.count, down = dot ? 1 : shares.down(job.m);
  // One piece of memory, of the calling thread: rounded rows of x that all read, then every thread's own.
  const int64_t shared = round_up(job.m * (2 * x.padded + x.ldq / 2), 16);
  const int64_t own = round_up(dot ? int8_dot_floats(job, x) : int8_panel_floats(job, x), 16);
  float* memory = ctp::scratch((size_t)(shared + threads * own));
  if (!memory) return CTP_OUT_OF_MEMORY;
  x.scales = memory;
  x.sums = x.scales + job.m * x.padded;
  x.q = (int8_t*)(x.sums + job.m * x.padded);
  x.fields = dot && in_fields(w, x) ? x.q + job.m * x.ldq : nullptr;
  memset(memory, 0, sizeof(float) * (size_t)(2 * job.m * x.padded));
  // Shared out by inputs, since rows of a strip lie in the same cache lines.
  const int64_t pieces = (w.k + kPiece - 1) / kPiece;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && job.m > 1)
  for (int64_t p = 0; p < pieces; ++p)
    for (int64_t i = 0; i < job.m; ++i) quantize_piece(job, x, i, p * kPiece);
  const auto run = !dot                   ? int8_panel_part<Decoder>
                   : w.values == CTP_INT8 ? int8_dot_part<8, Decoder>
                                          : int8_dot_part<4, Decoder>;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < across * down; ++p) {
    const int64_t i = p / across, j = p % across;
    const Part part = {least(strips * i / down * x.height, job.m), least(strips * (i + 1) / down * x.height, job.m),
                       shares.begin(j), shares.begin(j + 1)};
    run(job, x, decoder, part, memory + shared + omp_get_thread_num() * own);
  }
  return CTP_OK;
}

}  // namespace
