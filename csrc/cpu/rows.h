// Rows of activations in and out, in any of their types.
#pragma once

#include "patterns.h"

namespace {

using ctp::Job;

constexpr double kSmall = 1 << 20;       // multiplications below which waking threads costs more than it gains
constexpr int64_t kTile = kVectors * W;  // columns of the register tile

struct Part {
  int64_t row0, row1, column0, column1;  // of y
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

}  // namespace
