// A few rows of x rounded to 8 bits: codes of W go from the packed bytes straight into integer sums.
//
// A block of a dense weight is 4 W bytes of the (low) plane, kFields codes each: code kFields * b + j is field j of
// byte b, so a shift and a mask give a vector of codes, and x lies reordered to match: field j of a block is x.fields[4
// W j + b] = q of input kFields * b + j. A lane of the sums covers 4 kFields neighbouring inputs, and spread() gives
// each lane the scale of its segment. With AVX-512, a block of a weight with zeros is a vector of codes, each in its
// place.
#pragma once

#include "int8_codes.h"
#include "quantize.h"

namespace {

// Codes in a byte of a plane; of int3's low one.
inline int fields_of(const Weight& w) {
  return w.pattern != CTP_DENSE || w.values == CTP_INT8 ? 1 : w.values == CTP_INT4 ? 2 : 4;
}

template <class Pattern, int kBits>
struct Fields {
  static constexpr int kWidth = kBits == 3 ? 2 : kBits;  // bits of a field
  static constexpr int kFields = Pattern::kSparse ? 1 : 8 / kWidth;
  static constexpr int64_t kBlock = 4 * W * kFields;  // inputs
};

// Whether every lane of the sums lies in one segment (both are powers of two).
inline bool in_fields(const Weight& w, const Quantized& x) {
  return (w.pattern == CTP_DENSE || (W == 16 && w.symmetric)) && x.segment >= 4 * fields_of(w);
}

// A block, packed, and its fields.
template <class Pattern, int kBits>
struct Planes {
  vi low, high;
  vi codes(int field) const {
    constexpr int kWidth = Fields<Pattern, kBits>::kWidth;
    if constexpr (Pattern::kSparse || kBits == 8) return low;
    const vi mask = no_sums() + (int32_t)(((1u << kWidth) - 1) * 0x01010101u), codes = low >> (kWidth * field);
    if constexpr (kBits != 3) return codes & mask;
    const vi fours = field < 2 ? high << (2 - field) : high >> (field - 2);
    return masked_or(codes, mask, fours & (no_sums() + 0x04040404));
  }
};

// The blocks of a row from `slot` on; see blocks.h.
template <class Pattern, int kBits>
struct FieldBlocks {
  using F = Fields<Pattern, kBits>;
  using B = Blocks<Pattern, Coded<kBits>>;
  B blocks;
  FieldBlocks() = default;
  FieldBlocks(const Weight& w, int64_t row, int64_t k, int64_t slot, int64_t ahead) : blocks(w, row, k, slot, ahead) {}
  Planes<Pattern, kBits> next(const Weight& w) {
    Planes<Pattern, kBits> planes;
    if constexpr (Pattern::kSparse) {
      const typename B::G grid{};
      planes.low = (vi)blocks.template next<false, 1 << (kBits - 1)>(w, grid, grid).part[0];
    } else {
      const int64_t slot = blocks.slot;
      planes.low = load_bytes((const uint8_t*)w.stored + (slot * F::kWidth >> 3));
      if constexpr (kBits == 3) planes.high = nibbles((const uint8_t*)w.stored_hi + (slot >> 3));
      Coded<kBits>::ahead(w, slot, blocks.stored_ahead);
      blocks.slot += F::kBlock;
    }
    return planes;
  }
};

// sums[m * 4 + r] += x row m0 + m . w row rows[r] over the first `inputs` inputs, whole blocks, kBlocks of which share
// their scales; for kM rows of x and kR of W
template <class Pattern, int kM, int kR, int kBits, int kBlocks>
void field_dots(const Weight& w, const Quantized& x, int64_t m0, int64_t inputs, const int64_t* rows,
                const int64_t* slots, int64_t ahead, const float* scales, float* sums) {
  using F = Fields<Pattern, kBits>;
  vf acc[kR * kM];
#pragma GCC unroll 16
  for (int j = 0; j < kR * kM; ++j) acc[j] = zero();
  const int shift = __builtin_ctzll((uint64_t)x.segment);
  const bool several = kBlocks == 1 && F::kBlock > x.segment;  // segments in a block
  const int8_t* const fields = x.fields + m0 * x.ldq;
  const float* const grids = x.scales + m0 * x.padded;
  int32_t lane[W];
  for (int i = 0; i < W; ++i) lane[i] = (int32_t)(4 * F::kFields * i >> shift);
  const vi lanes = load_bytes(lane);
  FieldBlocks<Pattern, kBits> blocks[kR];
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) blocks[r] = FieldBlocks<Pattern, kBits>(w, rows[r], 0, slots[r], ahead);
  for (int64_t k = 0; k < inputs; k += kBlocks * F::kBlock) {
    const int64_t s = k >> shift;
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      vi codes[kBlocks * F::kFields];
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b) {
        const Planes<Pattern, kBits> planes = blocks[r].next(w);
#pragma GCC unroll 4
        for (int j = 0; j < F::kFields; ++j) codes[b * F::kFields + j] = planes.codes(j);
      }
      const vf scale = several ? spread(scales + r * x.padded + s, lanes) : set1(scales[r * x.padded + s]);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        const int8_t* q = fields + m * x.ldq + k;
        vi products = no_sums();
#pragma GCC unroll 4
        for (int j = 0; j < kBlocks * F::kFields; ++j)
          products = dot4<kBits>(products, codes[j], load_bytes(q + 4 * W * j));
        const float* sx = grids + m * x.padded + s;
        acc[r * kM + m] = fma(mul(to_float(products), scale), several ? spread(sx, lanes) : set1(*sx), acc[r * kM + m]);
      }
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kR * kM; ++j) sums[j % kM * 4 + j / kM] += sum(acc[j]);
}

// The whole blocks of four rows of W, which stand at `slots`; returns the inputs they cover.
using FieldRows = int64_t (*)(const Weight&, const Quantized&, int64_t m, const int64_t* rows, const int64_t* slots,
                              int64_t ahead, const float* scales, float* sums);

template <class Pattern, int kBits, int kBlocks>
int64_t field_rows(const Weight& w, const Quantized& x, int64_t m, const int64_t* rows, const int64_t* slots,
                   int64_t ahead, const float* scales, float* sums) {
  constexpr int64_t kBlock = Fields<Pattern, kBits>::kBlock;
  if constexpr (kBlock < 128 && kBlocks == 1)
    if (x.segment >= 2 * kBlock) return field_rows<Pattern, kBits, 2>(w, x, m, rows, slots, ahead, scales, sums);
  const int64_t whole = x.segment > kBlock ? x.segment : kBlock, inputs = w.k / whole * whole;  // and whole segments
  int64_t i = 0;
  for (; i + 4 <= m; i += 4)
    for (int r = 0; r < 4; r += 2)
      field_dots<Pattern, 4, 2, kBits, kBlocks>(w, x, i, inputs, rows + r, slots + r, ahead, scales + r * x.padded,
                                                sums + 4 * i + r);
  for (; i + 2 <= m; i += 2)
    for (int r = 0; r < 4; r += 2)
      field_dots<Pattern, 2, 2, kBits, kBlocks>(w, x, i, inputs, rows + r, slots + r, ahead, scales + r * x.padded,
                                                sums + 4 * i + r);
  if (i < m) field_dots<Pattern, 1, 4, kBits, kBlocks>(w, x, i, inputs, rows, slots, ahead, scales, sums + 4 * i);
  return inputs;
}

template <class Pattern, class Values>
constexpr FieldRows fields_by() {
  if constexpr (Values::kGrouped && (W == 16 || !Pattern::kSparse))
    return field_rows<Pattern, Values::kWidth, 1>;
  else
    return nullptr;
}

}  // namespace
