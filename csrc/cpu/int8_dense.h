// A few rows of x rounded to 8 bits, times a dense weight: codes go from the packed bytes straight into integer sums.
//
// A block is 4 W bytes of the (low) plane, kFields codes each: code kFields * b + j is field j of byte b, so a shift
// and a mask give a vector of codes, and x lies reordered to match: field j of a block is x.fields[4 W j + b] = q of
// input kFields * b + j. A lane of the sums covers 4 kFields neighbouring inputs, and spread() gives each lane the
// scale of its segment.
#pragma once

#include "int8_codes.h"

namespace {

template <int kBits>
struct Fields {
  static constexpr int kWidth = kBits == 3 ? 2 : kBits;  // bits of a field
  static constexpr int kFields = 8 / kWidth;
  static constexpr int64_t kBlock = 4 * W * kFields;  // inputs
};

// Whether every lane of the sums lies in one segment (both are powers of two).
inline bool in_fields(const Weight& w, const Quantized& x) {
  return w.pattern == CTP_DENSE && x.segment >= 4 * fields_of(w.values);
}

// A block, packed, and its fields.
template <int kBits>
struct Planes {
  using F = Fields<kBits>;
  vi low, high;
  Planes() = default;
  Planes(const Weight& w, int64_t slot) : low(load_bytes((const uint8_t*)w.stored + (slot * F::kWidth >> 3))) {
    if constexpr (kBits == 3) high = nibbles((const uint8_t*)w.stored_hi + (slot >> 3));
  }
  vi codes(int field) const {
    if constexpr (kBits == 8) return low;
    const vi mask = no_sums() + (int32_t)(((1u << F::kWidth) - 1) * 0x01010101u), codes = low >> (F::kWidth * field);
    if constexpr (kBits != 3) return codes & mask;
    return masked_or(codes, mask,
                     field == 0   ? fours<0>(high)
                     : field == 1 ? fours<1>(high)
                     : field == 2 ? fours<2>(high)
                                  : fours<3>(high));
  }
};

// sums[m * 4 + r] += x row m0 + m . w row r over the first `blocks` blocks, for kM rows of x and kR of W
template <int kM, int kR, int kBits>
void field_dots(const Weight& w, const Quantized& x, int64_t m0, int64_t blocks, const int64_t* slots, int64_t ahead,
                const float* scales, float* sums) {
  using F = Fields<kBits>;
  vf acc[kR * kM];
#pragma GCC unroll 16
  for (int j = 0; j < kR * kM; ++j) acc[j] = zero();
  const int shift = __builtin_ctzll((uint64_t)x.segment);
  const bool several = F::kBlock > x.segment;  // segments in a block
  int32_t lane[W];
  for (int i = 0; i < W; ++i) lane[i] = (int32_t)(4 * F::kFields * i >> shift);
  const vi lanes = load_bytes(lane);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t s = b * F::kBlock >> shift;
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      const int64_t slot = slots[r] + b * F::kBlock;
      const Planes<kBits> planes(w, slot);
      vi codes[F::kFields];
#pragma GCC unroll 4
      for (int j = 0; j < F::kFields; ++j) codes[j] = planes.codes(j);
      // Into L2: L1 waits for no more than 24 lines at a time, which is half the speed of memory (Zen 4).
      __builtin_prefetch((const char*)w.stored + (slot + ahead) / F::kFields, 0, 2);
      if constexpr (kBits == 3) __builtin_prefetch((const char*)w.stored_hi + ((slot + ahead) >> 3), 0, 2);
      const vf scale = several ? spread(scales + r * x.padded + s, lanes) : set1(scales[r * x.padded + s]);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        const int8_t* q = x.fields + (m0 + m) * x.ldq + b * F::kBlock;
        vi products = no_sums();
#pragma GCC unroll 4
        for (int j = 0; j < F::kFields; ++j) products = dot4<kBits>(products, codes[j], load_bytes(q + 4 * W * j));
        const float* sx = x.scales + (m0 + m) * x.padded + s;
        acc[r * kM + m] = fma(mul(to_float(products), scale), several ? spread(sx, lanes) : set1(*sx), acc[r * kM + m]);
      }
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kR * kM; ++j) sums[j % kM * 4 + j / kM] += sum(acc[j]);
}

// The whole blocks of four rows of W; returns the inputs they cover.
template <int kBits>
int64_t field_rows(const Weight& w, const Quantized& x, int64_t rows, const int64_t* slots, int64_t ahead,
                   const float* scales, float* sums) {
  const int64_t whole = x.segment > Fields<kBits>::kBlock ? x.segment : Fields<kBits>::kBlock;  // and whole segments
  const int64_t blocks = w.k / whole * whole / Fields<kBits>::kBlock;
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4)
    for (int r = 0; r < 4; r += 2)
      field_dots<4, 2, kBits>(w, x, m, blocks, slots + r, ahead, scales + r * x.padded, sums + 4 * m + r);
  for (; m < rows; ++m) field_dots<1, 4, kBits>(w, x, m, blocks, slots, ahead, scales, sums + 4 * m);
  return blocks * Fields<kBits>::kBlock;
}

}  // namespace
