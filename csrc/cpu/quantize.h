// Rows of x rounded to 8 bits, and the grids of W, by the same segments of inputs (see ctp.h).
#pragma once

#include "rows.h"

namespace {

inline int bits_of(const Weight& w) {
  return w.values == CTP_INT8 ? 8 : w.values == CTP_INT4 ? 4 : w.values == CTP_INT3 ? 3 : 2;
}

inline int64_t segment_of(const Weight& w) { return w.groups == 1 ? 128 : least(w.group & -w.group, 128); }

// Rows lie in strips of `height` (the last may be lower), those of a strip side by side: q[input / 4][row][input % 4],
// scales[segment][row]. An order of 2 or 4 puts inputs j, j + order, j + 2 order, j + 3 order of every 4 order inputs
// in step j of them, as a plane of codes has them when its bytes are shifted by j codes.
struct Quantized {
  int64_t m, height, segment, segments;  // segment: inputs
  int64_t padded, ldq;                   // for a row: segments, and bytes of q
  int order;
  int8_t* q;
  int8_t* fields;  // rows of q in the order of int8_fields.h, or NULL where nobody wants it
  int fields_order;
  float *scales, *sums;  // sx; -sx sum of q, times the code for zero where that is the same for all of W
};

constexpr int64_t kPiece = 512;  // inputs that are rounded at once: whole segments, units of an order, blocks of fields

// rounded[0 .. segment) = x / scale, to nearest even; beyond, up to a vector is written. Returns their sum.
int32_t quantize(const float* x, int64_t segment, int32_t* rounded, float* scale) {
  alignas(64) float few[W];
  if (segment < W) {
    store(few, first(load(x), (int)segment));
    x = few;
  }
  vi top = no_sums(), total = no_sums();
  for (int64_t i = 0; i < segment; i += W) {
    const vi magnitude = (vi)load(x + i) & 0x7fffffff;  // a NaN is larger than every number
    top = top + ((magnitude - top) & (top < magnitude));
  }
  alignas(64) int32_t lanes[W], most = 0, sum = 0;
  store((float*)lanes, (vf)top);
  for (int i = 0; i < W; ++i) most = lanes[i] > most ? lanes[i] : most;
  if (most >= 0x7f800000) {  // not finite
    *scale = __builtin_nanf("");
    memset(rounded, 0, sizeof(int32_t) * (size_t)segment);
    return 0;
  }
  const float largest = peek<float>(&most);
  const float inverse = largest < 1e-36f ? 0 : 127 / largest;  // below: 127 / largest may overflow
  *scale = largest < 1e-36f ? 0 : largest / 127;
  for (int64_t i = 0; i < segment; i += W) {
    // In 1.5 * 2^23 + integer the integer is in the low bits.
    const vf shifted = add(mul(load(x + i), set1(inverse)), set1(12582912.0f));
    const vi integers = (vi)shifted - 0x4b400000;
    total = total + integers;
    store((float*)(rounded + i), (vf)integers);
  }
  store((float*)lanes, (vf)total);
  for (int i = 0; i < W; ++i) sum += lanes[i];
  return sum;
}

// Steps of four bytes, `pitch` bytes apart, `lanes` neighbouring ones of each step of the order side by side.
template <int kOrder>
void place(const int32_t* rounded, int64_t inputs, int lanes, int64_t pitch, int8_t* out) {
  for (; inputs >= 4 * kOrder * lanes; inputs -= 4 * kOrder * lanes, rounded += 4 * kOrder * lanes)
#pragma GCC unroll 4
    for (int j = 0; j < kOrder; ++j)
      for (int i = 0; i < lanes; ++i, out += pitch) {
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) out[b] = (int8_t)rounded[kOrder * (4 * i + b) + j];
      }
}

inline void place(int order, const int32_t* rounded, int64_t inputs, int lanes, int64_t pitch, int8_t* out) {
  (order == 1 ? place<1> : order == 2 ? place<2> : place<4>)(rounded, inputs, lanes, pitch, out);
}

// A piece of a row of x, from input k on.
void quantize_piece(const Job& job, const Quantized& x, int64_t row, int64_t k) {
  alignas(64) float wide[kPiece + W];
  alignas(64) int32_t rounded[kPiece + W];
  const int64_t inputs = least(kPiece, x.segments * x.segment - k), there = least(inputs, job.weight.k - k);
  const int64_t first = row / x.height * x.height, height = least(x.height, x.m - first), s0 = k / x.segment;
  if (there < inputs) memset(wide, 0, sizeof wide);
  read_row(x_at(job, row, k), job.dtype, there, wide);
  const int64_t at = first * x.padded + s0 * height + row - first;
  const float factor = job.weight.symmetric ? -(float)(1 << (bits_of(job.weight) - 1)) : -1;
  for (int64_t s = 0; s * x.segment < inputs; ++s) {
    float* scale = x.scales + at + s * height;
    const int32_t sum = quantize(wide + s * x.segment, x.segment, rounded + s * x.segment, scale);
    x.sums[at + s * height] = *scale * (factor * (float)sum);
  }
  if (!x.fields || there < kPiece)  // else nobody reads it: fields have the whole piece
    place(x.order, rounded, inputs, 1, 4 * height, x.q + first * x.ldq + k * height + 4 * (row - first));
  if (x.fields) place(x.fields_order, rounded, inputs, W, 4, x.fields + row * x.ldq + k);
}

// out[s] = of(group) for each segment, of the group that it lies in; then zeros up to a multiple of W
template <class T, class Of>
inline void by_segment(const Weight& w, int64_t segment, int64_t segments, T* out, Of of) {
  const int64_t each = w.groups == 1 ? segments : w.group / segment;
  int64_t s = 0;
  if (each == 1) {
    for (; s < segments; ++s) out[s] = of(s);
  } else {
    for (int64_t g = 0; g < w.groups; ++g) {
      const T value = of(g);
      for (int64_t end = least(s + each, segments); s < end; ++s) out[s] = value;
    }
  }
  for (; s < round_up(segments, W); ++s) out[s] = 0;
}

// The same of the scales of a row of W.
void segment_scales(const Weight& w, int64_t segment, int64_t segments, int64_t row, float* out) {
  if (w.group != segment || w.scale_dtype != CTP_FP16)
    return by_segment(w, segment, segments, out, [&](int64_t g) { return scale_of(w, row, g); });
  const uint16_t* scales = (const uint16_t*)w.scales + row * w.groups;
  int64_t s = 0;
  for (; s + W <= segments; s += W) store(out + s, from_fp16<W>(scales + s));
  for (; s < round_up(segments, W); ++s) out[s] = s < segments ? half(scales[s]) : 0;
}

// scales[s] = sw of a row of W for each segment, and offsets[s] = sw zero if W is not symmetric; then zeros up to a
// multiple of W
void weight_grid(const Weight& w, const Quantized& x, int64_t row, float* scales, float* offsets) {
  segment_scales(w, x.segment, x.segments, row, scales);
  if (w.symmetric) return;
  const uint8_t* zeros = w.zeros + row * w.groups;
  by_segment(w, x.segment, x.segments, offsets, [&](int64_t g) { return (float)zeros[g]; });
  for (int64_t s = 0; s < x.segments; ++s) offsets[s] *= scales[s];
}

}  // namespace
