// Rows of activations in and out, in any of their types.
#pragma once

#include <omp.h>

#include "patterns.h"

namespace {

using ctp::Job;

constexpr double kSmall = 1 << 20;       // multiplications below which waking threads costs more than it gains
constexpr int64_t kTile = kVectors * W;  // columns of the register tile

struct Part {
  int64_t row0, row1, column0, column1;  // of y
};

// Columns of y shared out among threads, in whole units: half of them in one large part each; then in small parts,
// which whoever is free takes, because processors are not equally fast, nor equally left alone. `share`: columns of a
// small part, for which it is little work to prepare x.
constexpr int64_t kShare = 256, kSharesEach = 8;
struct Shares {
  int64_t columns, unit, units, large, all, threads, count;  // large: units that lie in large parts; count: of parts
  Shares(int64_t columns, int64_t unit, int64_t share, int all)
      : columns(columns), unit(unit), units((columns + unit - 1) / unit), large(units), all(all) {
    threads = least(all, units);
    const int64_t each = threads == 1 ? 0 : least(columns / 2 / share / threads, kSharesEach);
    if (each > 0) large = units / 2;
    count = threads * (1 + each);
  }
  int64_t begin(int64_t part) const {  // its first column
    const int64_t small = part - threads;
    return least(
        (small < 0 || count == threads ? large * part / threads : large + (units - large) * small / (count - threads)) *
            unit,
        columns);
  }
  // Into how many parts to share out rows: where threads are left over, since each share of rows decodes again.
  int64_t down(int64_t rows) const { return count < all ? least(all / count, (rows + 63) / 64) : 1; }
};

inline int64_t size_of(int32_t dtype) { return dtype == CTP_FP32 ? 4 : 2; }

inline vf widen(const void* p, int32_t dtype) {
  if (dtype == CTP_FP32) return load((const float*)p);
  return dtype == CTP_FP16 ? from_fp16<W>((const uint16_t*)p) : from_bf16<W>((const uint16_t*)p);
}

inline void narrow(void* p, int32_t dtype, vf v) {
  if (dtype == CTP_FP32) return store((float*)p, v);
  dtype == CTP_FP16 ? to_fp16((uint16_t*)p, v) : to_bf16((uint16_t*)p, v);
}

// The lanes at p, of which only `count` < W are there.
inline vf widen_some(const void* p, int32_t dtype, int64_t count) {
  char lanes[4 * W] = {};
  memcpy(lanes, p, (size_t)(count * size_of(dtype)));
  return widen(lanes, dtype);
}

// out[0 .. count) = row[0 .. count) in fp32, then zeros up to a multiple of W.
void read_row(const void* row, int32_t dtype, int64_t count, float* out) {
  const char* p = (const char*)row;
  const int64_t step = W * size_of(dtype);
  int64_t i = 0;
  for (; i + W <= count; i += W, p += step) store(out + i, widen(p, dtype));
  if (i < count) store(out + i, widen_some(p, dtype, count - i));
}

// y[row, column .. column + count) = sums + bias, rounded once.
void write_row(const Job& job, int64_t row, int64_t column, int64_t count, const float* sums) {
  const int64_t size = size_of(job.dtype);
  char* y = (char*)job.y + (row * job.columns() + column) * size;
  const char* bias = job.bias ? (const char*)job.bias + column * size : nullptr;
  for (; count > 0; count -= W, sums += W, y += W * size) {
    vf v = count >= W ? load(sums) : widen_some(sums, CTP_FP32, count);
    if (bias) {
      v = add(v, count >= W ? widen(bias, job.dtype) : widen_some(bias, job.dtype, count));
      bias += W * size;
    }
    if (count >= W) {
      narrow(y, job.dtype, v);
    } else {
      char lanes[4 * W];
      narrow(lanes, job.dtype, v);
      memcpy(y, lanes, (size_t)(count * size));
    }
  }
}

inline const void* x_at(const Job& job, int64_t row, int64_t column) {
  return (const char*)job.x + (row * job.ldx + column) * size_of(job.dtype);
}

// out[k * ldo + row] = x[row0 + row, k0 + k] for k < depth and `vectors` W rows, zeros beyond `rows`.
// wide: room for W rows of x, ldw >= depth + W apart
void transpose_rows(const Job& job, int64_t row0, int64_t rows, int64_t vectors, int64_t k0, int64_t depth, float* wide,
                    int64_t ldw, float* out, int64_t ldo) {
  const int64_t there = round_up(depth, W);
  for (int64_t v = 0; v < vectors; ++v) {
    for (int64_t i = 0; i < W; ++i)
      if (v * W + i < rows)
        read_row(x_at(job, row0 + v * W + i, k0), job.dtype, depth, wide + i * ldw);
      else
        memset(wide + i * ldw, 0, sizeof(float) * (size_t)there);
    for (int64_t k = 0; k < there; k += 4) transpose4(wide + k, ldw, out + k * ldo + v * W, ldo);
  }
}

// y[row0 .. row0 + rows, column0 .. column0 + columns) from its transpose; c's columns are ldc apart
void write_transposed(const Job& job, int64_t row0, int64_t rows, int64_t column0, int64_t columns, const float* c,
                      int64_t ldc) {
  alignas(64) float out[W * W];
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t j = 0; j < columns; j += W) {
      for (int64_t r = 0; r < W; r += 4) transpose4(c + j * ldc + i + r, ldc, out + r * W, W);
      for (int64_t r = 0; r < least(W, rows - i); ++r)
        write_row(job, row0 + i + r, column0 + j, least(W, columns - j), out + r * W);
    }
}

}  // namespace
