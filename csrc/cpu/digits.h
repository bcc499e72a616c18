// One row of x by codes of W, as exact as fp32, in integers (AVX-512 VNNI).
//
// Over a segment of inputs (int8_codes.h) x becomes s times an integer of 31 bits, s a power of two, and that is four
// signed digits of eight bits. Sums of digits times codes are exact, and take fewer steps than codes turned into fp32.
// What x loses lies 2^-30 below the largest of its segment: less than a sum in fp32 rounds away, unless many inputs
// are much smaller than that one. set_integers() then says no.
#pragma once

#include "int8_fields.h"

namespace {

#if defined(__AVX512F__)

// A row of x, in blocks of `fields` vectors of codes (int8_fields.h; where W has zeros, one vector of codes in order).
struct Digits {
  int fields;
  int64_t segment, unit, units;  // inputs of a segment; of what shares sums, a block or a segment; how many in K
  int8_t* digits;                // four vectors for each vector of codes, the digit that counts most first
  int32_t* zeros;  // two vectors for each unit: less what codes for zero would add to the first and last two, or
                   // codes of 1, if W is not symmetric
  float* scales;   // s 2^16 of each segment
  float* x;        // fp32; zeros past K
  int64_t block() const { return 4 * W * fields; }
};

Digits digits_of(const Weight& w) {
  const int64_t segment = segment_of(w);
  const int fields = fields_of(w);
  const int64_t unit = 4 * W * fields > segment ? 4 * W * fields : segment;
  return {fields, segment, unit, w.k / unit, nullptr, nullptr, nullptr, nullptr};
}

inline vi iota() { return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// Whether digits serve this product: one row of x, few inputs past the last unit, and lanes of sums that each lie in
// one segment.
inline bool in_digits(const Job& job) {
  const Weight& w = job.weight;
  if (job.m != 1 || job.transposed || w.values < CTP_INT8 || (w.pattern != CTP_DENSE && !w.symmetric)) return false;
  const Digits x = digits_of(w);
  return 16 * (w.k - x.units * x.unit) <= w.k && x.segment >= W && x.segment >= 4 * x.fields;
}

// The integers of a segment, in place, and what their first digit counts; false where its inputs had better stay in
// fp32: more than a quarter would lose bits that matter, or they leave too little room for scales.
template <int kDigits>
bool set_integers(float* x, int64_t segment, float* first) {
  vf top = zero();
  for (int64_t k = 0; k < segment; k += W) top = _mm512_max_ps(_mm512_abs_ps(load(x + k)), top);
  const float largest = _mm512_reduce_max_ps(top), small = largest * (kDigits == 4 ? 0x1p-10f : 0x1p-12f);
  int other = 0, large = 0;
  for (int64_t k = 0; k < segment; k += W) {
    const vf magnitude = _mm512_abs_ps(load(x + k));
    if (_mm512_cmp_ps_mask(magnitude, set1(0x1p60f), _CMP_NLE_UQ)) return false;  // or not a number
    other += __builtin_popcount(_mm512_cmp_ps_mask(magnitude, zero(), _CMP_NEQ_UQ));
    large += __builtin_popcount(_mm512_cmp_ps_mask(magnitude, set1(small), _CMP_GE_OQ));
  }
  if (other && (3 * other > 4 * large || largest < 0x1p-40f)) return false;
  const int exponent = other ? (peek<int32_t>(&largest) >> 23) - 126 : 0;  // largest < 2^exponent
  const int32_t up = (127 + 8 * kDigits - 2 - exponent) << 23, down = (127 - 6 + exponent) << 23;
  *first = peek<float>(&down);
  for (int64_t k = 0; k < segment; k += W)
    _mm512_storeu_si512(x + k, _mm512_cvtps_epi32(mul(load(x + k), set1(peek<float>(&up)))));
  return true;
}

// The digits of the integers that set_integers() left, and less what codes of `zero_code` would add up to.
void set_digits(const Digits& x, const int32_t* integers, int zero_code) {
  const __m512i lanes = (__m512i)(iota() * x.fields), bias = _mm512_set1_epi32(0x808080);
  int8_t* out = x.digits;
  for (int64_t u = 0; u < x.units; ++u) {
    vi sums[4] = {no_sums(), no_sums(), no_sums(), no_sums()};
    for (int64_t k = u * x.unit; k < (u + 1) * x.unit; k += x.block())
      for (int field = 0; field < x.fields; ++field, out += 16 * W) {
        for (int i = 0; i < 4; ++i) {
          const __m512i v = _mm512_i32gather_epi32(lanes, integers + k + x.fields * W * i + field, 4);
          const __m512i digits = _mm512_xor_si512(_mm512_add_epi32(v, bias), bias);
          for (int d = 0; d < 4; ++d)
            _mm_storeu_si128((__m128i*)(out + 4 * W * d + W * i),
                             _mm512_cvtepi32_epi8(_mm512_srl_epi32(digits, _mm_cvtsi32_si128(24 - 8 * d))));
        }
        for (int d = 0; d < 4; ++d) sums[d] = dot4<8>(sums[d], no_sums() + 0x01010101, load_bytes(out + 4 * W * d));
      }
    for (int half = 0; half < 2; ++half)
      _mm512_storeu_si512(x.zeros + (2 * u + half) * W,
                          (__m512i)(((sums[2 * half] << 8) + sums[2 * half + 1]) * -zero_code));
  }
}

// 2^8 first + second, where first is a sum of products of two blocks' digits with codes of kBits bits
template <int kBits>
inline vi join(vi first, vi second) {
  // Int3 has shifts enough already (Zen 4: 14.8 instead of 15.4 cycles for 128 codes; int4 14.7 instead of 14.1). Its
  // sums have 16 bits: see digit_dots().
  if constexpr (kBits == 3) return (vi)_mm512_dpwssd_epi32((__m512i)second, (__m512i)first, _mm512_set1_epi32(1 << 8));
  return (first << 8) + second;
}

// sums[r] += W[n + r, whole units] . x, for four r, where a unit is kBlocks blocks. slots[r]: where row n + r stands,
// and then where it stands after them. scales[r * padded + s]: that of row r times that of x; zeros, if W is not
// symmetric, likewise.
using DigitDots = void (*)(const Weight&, const Digits&, int64_t n, int64_t* slots, const float* scales,
                           const float* zeros, int64_t padded, float* sums);

template <class Pattern, class Values, int kBlocks, bool kSymmetric>
void digit_dots(const Weight& w, const Digits& x, int64_t n, int64_t* slots, const float* scales, const float* zeros,
                int64_t padded, float* sums) {
  constexpr int kR = 4, kFields = Fields<Pattern, Values::kWidth>::kFields;
  // A lane sums four products of a code and a digit for each field.
  static_assert(Values::kWidth == 8 || 4 * kBlocks * kFields * ((1 << Values::kWidth) - 1) * 128 < 1 << 15);
  using B = FieldBlocks<Pattern, Values::kWidth>;
  B blocks[kR];
  vf acc[kR];
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) {
    blocks[r] = B(w, least(n + r, w.n - 1), 0, slots[r], 4 * w.k);
    acc[r] = zero();
  }
  const int shift = __builtin_ctzll((uint64_t)x.segment);
  const bool several = kBlocks == 1 && x.block() > x.segment;  // segments in a block
  const vi lanes = (iota() * (4 * kFields)) >> shift;
  const int8_t* digits = x.digits;
  for (int64_t u = 0; u < x.units; ++u) {
    const vi high = load_bytes(x.zeros + 2 * u * W), low = load_bytes(x.zeros + (2 * u + 1) * W);
    vi products[kR * 4];
#pragma GCC unroll 16
    for (int j = 0; j < kR * 4; ++j)
      products[j] = kSymmetric && j % 4 == 1 ? high : kSymmetric && j % 4 == 3 ? low : no_sums();
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b, digits += 16 * W * kFields) {
      Planes<Pattern, Values::kWidth> planes[kR];
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) planes[r] = blocks[r].next(w);
#pragma GCC unroll 4
      for (int field = 0; field < kFields; ++field) {
        vi codes[kR];
#pragma GCC unroll 4
        for (int r = 0; r < kR; ++r) codes[r] = planes[r].codes(field);
#pragma GCC unroll 4
        for (int d = 0; d < 4; ++d) {
          const vi digit = load_bytes(digits + 4 * W * (4 * field + d));
#pragma GCC unroll 4
          for (int r = 0; r < kR; ++r) products[4 * r + d] = dot4<Values::kWidth>(products[4 * r + d], codes[r], digit);
        }
      }
    }
    const int64_t s = u * x.unit >> shift;
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      const vi* p = products + 4 * r;
      const float *scale = scales + r * padded + s, *zero_code = zeros + r * padded + s;
      vi first = join<Values::kWidth>(p[0], p[1]), last = join<Values::kWidth>(p[2], p[3]);
      if constexpr (!kSymmetric) {
        const vi factor = (vi)(several ? spread(zero_code, lanes) : set1(*zero_code));
        first = first + high * factor;
        last = last + low * factor;
      }
      acc[r] = fma(fma(to_float(last), set1(0x1p-16f), to_float(first)), several ? spread(scale, lanes) : set1(*scale),
                   acc[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) slots[r] = blocks[r].blocks.slot;
  sum4(acc[0], acc[1], acc[2], acc[3], sums);
}

template <class Pattern, class Values>
void digit_rows(const Weight& w, const Digits& x, int64_t n, int64_t* slots, const float* scales, const float* zeros,
                int64_t padded, float* sums) {
  const bool one = x.unit == x.block();
  DigitDots dots = one ? digit_dots<Pattern, Values, 1, true> : digit_dots<Pattern, Values, 2, true>;
  if constexpr (!Pattern::kSparse)
    if (!w.symmetric) dots = one ? digit_dots<Pattern, Values, 1, false> : digit_dots<Pattern, Values, 2, false>;
  dots(w, x, n, slots, scales, zeros, padded, sums);
}

template <class Pattern, class Values>
constexpr DigitDots digits_by() {
  if constexpr (Values::kGrouped)
    return digit_rows<Pattern, Values>;
  else
    return nullptr;
}

// out[s] = the scale of a row of W times that of x for each segment; zeros[s] = its zero, an integer, if not symmetric
void segment_grids(const Weight& w, const Digits& x, int64_t row, float* out, float* zeros) {
  const int64_t segments = x.units * x.unit / x.segment, first = row * w.groups;
  if (w.group == x.segment) {
    for (int64_t s = 0; s < segments; s += W) {
      const __mmask16 there = (__mmask16)(segments - s >= W ? 0xffff : (1 << (segments - s)) - 1);
      const vf scale = w.scale_dtype == CTP_FP16
                           ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, (const uint16_t*)w.scales + first + s))
                           : _mm512_maskz_loadu_ps(there, (const float*)w.scales + first + s);
      store(out + s, mul(scale, load(x.scales + s)));
      if (!w.symmetric)
        store(zeros + s, as_float(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, w.zeros + first + s))));
    }
    return;
  }
  segment_scales(w, x.segment, segments, row, out);
  for (int64_t s = 0; s < segments; ++s) out[s] *= x.scales[s];
  if (!w.symmetric)
    by_segment(w, x.segment, segments, zeros, [&](int64_t g) {
      const int32_t zero_code = w.zeros[first + g];
      return peek<float>(&zero_code);
    });
}

template <class Decoder>
void digit_part(const Job& job, const Decoder& decoder, const Digits& x, int64_t padded, const Part& part,
                float* scratch) {
  const Weight& w = job.weight;
  const int64_t left = x.units * x.unit;
  float *scales = scratch, *zeros = scales + 4 * padded, *row = zeros + 4 * padded;
  for (int64_t n = part.column0; n < part.column1; n += 4) {
    float sums[4] = {};
    int64_t slots[4];
    for (int64_t r = 0; r < 4; ++r) {
      slots[r] = decoder.start(w, least(n + r, w.n - 1), 0);
      segment_grids(w, x, least(n + r, w.n - 1), scales + r * padded, zeros + r * padded);
    }
    decoder.digits(w, x, n, slots, scales, zeros, padded, sums);
    for (int64_t r = 0; r < 4 && left < w.k; ++r) {
      vf rest = zero();
      decoder.decode(w, least(n + r, w.n - 1), left, w.k, slots[r], 4 * w.k, row);
      for (int64_t k = left; k < w.k; k += W) rest = fma(load(row + k - left), load(x.x + k), rest);
      sums[r] += sum(rest);
    }
    write_row(job, 0, n, least(4, part.column1 - n), sums);
  }
}

// Whether the product was done in digits.
template <class Decoder>
bool run_digits(const Job& job, const Decoder& decoder, int threads) {
  const Weight& w = job.weight;
  if (!in_digits(job)) return false;
  Digits x = digits_of(w);
  const int64_t whole = x.units * x.unit, inputs = round_up(w.k, W), padded = round_up(whole / x.segment, W);
  const int64_t own = round_up(8 * padded + x.unit + 2 * W, 16);
  float* memory = ctp::scratch((size_t)(inputs + 2 * whole + 2 * x.units * W + padded + threads * own));
  if (!memory) return false;
  x.digits = (int8_t*)memory;
  x.zeros = (int32_t*)(memory + whole);
  int32_t* integers = x.zeros + 2 * x.units * W;
  x.x = (float*)(integers + whole);
  x.scales = x.x + inputs;
  float* rest = x.scales + padded;
  read_row(job.x, job.dtype, w.k, x.x);
  memcpy(integers, x.x, sizeof(float) * (size_t)whole);
  memset(x.scales, 0, sizeof(float) * (size_t)padded);
  for (int64_t s = 0; s < whole / x.segment; ++s) {
    if (!set_integers<4>((float*)integers + s * x.segment, x.segment, x.scales + s)) return false;
    x.scales[s] *= 0x1p-8f;
  }
  set_digits(x, integers, w.symmetric ? 1 << (bits_of(w) - 1) : 1);
  const Shares shares(w.n, 4, kShare, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < shares.count; ++p) {
    const Part part = {0, 1, shares.begin(p), shares.begin(p + 1)};
    digit_part(job, decoder, x, padded, part, rest + omp_get_thread_num() * own);
  }
  return true;
}

#else

using DigitDots = decltype(nullptr);
template <class Pattern, class Values>
constexpr DigitDots digits_by() {
  return nullptr;
}
template <class Decoder>
bool run_digits(const Job&, const Decoder&, int) {
  return false;
}

#endif

}  // namespace
