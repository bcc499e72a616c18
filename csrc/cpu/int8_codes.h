// Both sides of a product of integers: codes of W, one a byte, and rows of x rounded to 8 bits (see ctp.h).
#pragma once

#include "dots.h"
#include "rows.h"

namespace {

// ---- Codes, one a byte --------------------------------------------------------------------------------------------

// Byte i of the result is code i of eight codes of kBits bits.
template <int kBits>
inline uint64_t spread(uint64_t bits) {
  if constexpr (kBits == 8) return bits;
  constexpr int kGap = 8 - kBits;
  bits &= (1ull << 8 * kBits % 64) - 1;
  bits = (bits | bits << 4 * kGap) & ~0ull / 0xffffffff * ((1ull << 4 * kBits % 64) - 1);
  bits = (bits | bits << 2 * kGap) & ~0ull / 0xffff * ((1ull << 2 * kBits) - 1);
  return (bits | bits << kGap) & ~0ull / 0xff * ((1ull << kBits) - 1);
}

// Eight codes of a plane from `slot` on; nothing beyond its `bytes` is read.
template <int kBits>
inline uint64_t eight_codes(const uint8_t* plane, int64_t slot, int64_t bytes) {
  const int64_t bit = slot * kBits, there = bytes - (bit >> 3);
  uint64_t word = 0;
  if (__builtin_expect(there >= 8, 1))
    word = peek<uint64_t>(plane + (bit >> 3));
  else if (there > 0)
    memcpy(&word, plane + (bit >> 3), (size_t)there);
  return spread<kBits>(word >> (bit & 7));
}

template <int kBits>
inline uint64_t eight_codes(const Weight& w, int64_t slot) {
  const uint8_t* low = (const uint8_t*)w.stored;
  if constexpr (kBits == 3)
    return eight_codes<2>(low, slot, w.stored_bytes) |
           eight_codes<1>((const uint8_t*)w.stored_hi, slot, w.stored_bytes >> 1) << 2;
  else
    return eight_codes<kBits>(low, slot, w.stored_bytes);
}

// out[0 .. k1 - k0) = the codes of W[row, k0 .. k1); returns the slot after the last. As decode() in decode.h;
// ahead: how many inputs further on to prefetch from.
using Codes = int64_t (*)(const Weight&, int64_t row, int64_t k0, int64_t k1, int64_t slot, int64_t ahead,
                          uint8_t* out);

using Start = int64_t (*)(const Weight&, int64_t row, int64_t k);

template <class Pattern, int kBits>
int64_t decode_codes(const Weight& w, int64_t row, int64_t k0, int64_t k1, int64_t slot, int64_t ahead, uint8_t* out) {
  int64_t group = (uint32_t)k0 / (uint32_t)w.group;
  Blocks<Pattern, Coded<kBits>> blocks(w, row, k0, slot);
  for (int64_t k = k0; k < k1; ++group) {
    const int64_t end = least((group + 1) * w.group, k1);
    const int pruned = w.symmetric ? 1 << (kBits - 1) : w.zeros[row * w.groups + group];
    const auto grid = Coded<kBits>::grid(w, row, group);
    for (; k + 64 <= end; k += 64, out += 64)
      blocks.codes(w, blocks.template next<false>(w, grid, grid, ahead), pruned, out);
    if (k == end) continue;
    slot = blocks.slot;
    for (; k < end; k += 8, out += 8) {
      uint64_t codes = eight_codes<kBits>(w, slot);
      if constexpr (Pattern::kSparse) {
        const unsigned bits = *bitmap(w, row, k);
        const uint64_t kept = spread<1>(bits) * 0xff;
        codes = (expand_bytes(codes, bits) & kept) | ((uint64_t)pruned * 0x0101010101010101 & ~kept);
        slot += __builtin_popcount(bits);
      } else {
        slot += 8;
      }
      memcpy(out, &codes, 8);
    }
    k = end;
    blocks = Blocks<Pattern, Coded<kBits>>(w, row, k, slot);
  }
  return blocks.slot;
}

template <class Pattern, class Values>
constexpr Codes codes_of() {
  if constexpr (Values::kGrouped)
    return decode_codes<Pattern, Values::kWidth>;
  else
    return nullptr;
}

// ---- Activations --------------------------------------------------------------------------------------------------

inline int bits_of(const Weight& w) {
  return w.values == CTP_INT8 ? 8 : w.values == CTP_INT4 ? 4 : w.values == CTP_INT3 ? 3 : 2;
}

inline int64_t segment_of(const Weight& w) { return w.groups == 1 ? 128 : least(w.group & -w.group, 128); }

// out[4 W j + b] = q[fields * b + j] in each block of 4 W fields inputs
void reorder_fields(const int8_t* q, int64_t count, int fields, int8_t* out) {
  for (int64_t k = 0; k + 4 * W * fields <= count; k += 4 * W * fields)
    for (int j = 0; j < fields; ++j)
      for (int b = 0; b < 4 * W; ++b) out[k + 4 * W * j + b] = q[k + fields * b + j];
}

struct Quantized {
  int64_t segment, segments, padded;  // inputs a segment; segments a row, and the same rounded up to W
  int64_t ldq;                        // bytes from a row of q to the next
  int8_t* q;                          // (m, ldq), zeros from K on
  int8_t* fields;                     // the same in the order of int8_fields.h, or NULL where nobody wants it
  float *scales, *sums;               // (m, padded): sx, and sx times the sum of q; zeros from `segments` on
};

// q[0 .. segment) = x / scale, rounded to nearest even, for a segment of x
void quantize(const float* x, int64_t segment, int8_t* q, float* scale, float* scaled_sum) {
  constexpr int kLanes = 8;
  int32_t tops[kLanes] = {}, totals[kLanes] = {}, top = 0, total = 0;
  for (int64_t i = 0; i < segment; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const int32_t magnitude = peek<int32_t>(x + i + j) & 0x7fffffff;  // a NaN is larger than every number
      tops[j] = magnitude > tops[j] ? magnitude : tops[j];
    }
  for (int j = 0; j < kLanes; ++j) top = tops[j] > top ? tops[j] : top;
  const float largest = peek<float>(&top);
  const float inverse = largest < 1e-36f ? 0 : 127 / largest;  // below: 127 / largest may overflow
  *scale = top >= 0x7f800000 ? __builtin_nanf("") : largest < 1e-36f ? 0 : largest / 127;
  for (int64_t i = 0; i < segment; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const float shifted = x[i + j] * inverse + 12582912.0f;  // 1.5 * 2^23: the integer is in the low bits
      const int8_t rounded = (int8_t)(peek<int32_t>(&shifted) & 0xff);
      q[i + j] = rounded;
      totals[j] += rounded;
    }
  for (int j = 0; j < kLanes; ++j) total += totals[j];
  *scaled_sum = *scale * (float)total;
}

void quantize_row(const Job& job, const Quantized& x, int64_t row, int fields) {
  alignas(64) float wide[128 + W];
  int8_t* q = x.q + row * x.ldq;
  float *scales = x.scales + row * x.padded, *sums = x.sums + row * x.padded;
  for (int64_t s = 0; s < x.segments; ++s) {
    const int64_t k = s * x.segment, count = least(x.segment, job.weight.k - k);
    if (count < x.segment) memset(wide, 0, sizeof wide);
    read_row(x_at(job, row, k), job.dtype, count, wide);
    quantize(wide, x.segment, q + k, scales + s, sums + s);
  }
  memset(q + x.segments * x.segment, 0, (size_t)(x.ldq - x.segments * x.segment));
  for (int64_t s = x.segments; s < x.padded; ++s) scales[s] = sums[s] = 0;
  if (x.fields) reorder_fields(q, job.weight.k, fields, x.fields + row * x.ldq);
}

// scales[s] = sw and offsets[s] = -sw zero of a row of W for each segment, then zeros up to a multiple of W
void weight_grid(const Weight& w, const Quantized& x, int64_t row, float* scales, float* offsets) {
  const int64_t size = w.scale_dtype == CTP_FP16 ? 2 : 4;
  const int64_t segments = w.groups == 1 ? x.segments : w.group / x.segment;  // a group
  read_row((const char*)w.scales + row * w.groups * size, w.scale_dtype, w.groups, scales);
  if (w.symmetric) {
    for (int64_t g = 0; g < round_up(w.groups, W); g += W)
      store(offsets + g, fma(load(scales + g), set1((float)-(1 << (bits_of(w) - 1))), zero()));
  } else {
    for (int64_t g = 0; g < w.groups; ++g) offsets[g] = -scales[g] * (float)w.zeros[row * w.groups + g];
  }
  if (segments > 1)
    for (int64_t s = x.segments - 1; s >= 0; --s) {
      scales[s] = scales[s / segments];
      offsets[s] = offsets[s / segments];
    }
  for (int64_t s = x.segments; s < x.padded; ++s) scales[s] = offsets[s] = 0;
}

}  // namespace
