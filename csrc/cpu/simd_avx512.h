// AVX-512 F, BW, VL, DQ: sixteen lanes. See simd.h.
#pragma once

#include <immintrin.h>

namespace {

using vf = __m512;
constexpr int W = 16;
constexpr int kRows = 12, kVectors = 2, kDotRows = 4, kDotLimit = 24, kDotSums = 8, kDotMost = 16, kSkipVectors = 3,
              kSkipFours = 3;

inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline vf held_load(const float* p) { return load(p); }
inline void store(float* p, vf v) { _mm512_storeu_ps(p, v); }
inline vf zero() { return _mm512_setzero_ps(); }
inline vf set1(float v) { return _mm512_set1_ps(v); }
inline vf repeat(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
inline vf repeat(const uint16_t* p) {
  const __m512i high = _mm512_broadcast_i32x4(_mm_setr_epi32(0x01008080, 0x03028080, 0x05048080, 0x07068080));
  return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_set1_epi64(peek<int64_t>(p)), high));
}
template <int kLane>
inline vf pick(vf fours) {
  return _mm512_permute_ps(fours, 0x55 * kLane);
}
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }

inline __m128 fold(vf v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
inline void sum4(vf a, vf b, vf c, vf d, float* out) {
  const __m128 all = _mm_hadd_ps(_mm_hadd_ps(fold(a), fold(b)), _mm_hadd_ps(fold(c), fold(d)));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), all));
}
inline float sum(vf v) {
  const __m128 pairs = _mm_hadd_ps(fold(v), fold(v));
  return _mm_cvtss_f32(_mm_hadd_ps(pairs, pairs));
}

inline vf keep(vf v, unsigned bits) { return _mm512_maskz_mov_ps((__mmask16)bits, v); }
inline vf first(vf v, int count) { return keep(v, (1u << count) - 1); }
inline vf drop(vf v, int count) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(count)), v);
}
inline vf expand(vf v, unsigned bits) { return _mm512_maskz_expand_ps((__mmask16)bits, v); }

// Lanes past the count keep what they held: a compress that zeroed them would wait for whatever its register held
// before (five cycles; Zen 4).
inline int compress(vf v, int64_t step, float* values, uint8_t* places) {
  const __mmask16 kept = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  const __m128i lanes = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m128i at = _mm_add_epi8(lanes, _mm_set1_epi8((char)step));
  _mm512_storeu_ps(values, _mm512_mask_compress_ps(v, kept, v));
  _mm_storeu_si128((__m128i*)places, _mm_mask_compress_epi8(at, kept, at));
  return __builtin_popcount(kept);
}

inline int places64(uint64_t mask, int64_t step, uint8_t* places) {
  alignas(64) static constexpr auto table = [] {
    struct {
      uint8_t at[64];
    } t{};
    for (int i = 0; i < 64; ++i) t.at[i] = (uint8_t)i;
    return t;
  }();
  const __m512i at = _mm512_add_epi8(_mm512_load_si512(table.at), _mm512_set1_epi8((char)step));
  _mm512_storeu_si512(places, _mm512_mask_compress_epi8(at, mask, at));
  return __builtin_popcountll(mask);
}

template <int S>
inline vf from_fp32(const float* p) {
  if (S == 8) return _mm512_zextps256_ps512(_mm256_loadu_ps(p));
  return _mm512_loadu_ps(p);
}
template <int S>
inline __m256i sixteen_bits(const uint16_t* p) {
  if (S == 8) return _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)p));
  return _mm256_loadu_si256((const __m256i*)p);
}
template <int S>
inline vf from_fp16(const uint16_t* p) {
  return _mm512_cvtph_ps(sixteen_bits<S>(p));
}
template <int S>
inline vf from_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(sixteen_bits<S>(p)), 16));
}
inline void to_fp16(uint16_t* p, vf v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void to_bf16(uint16_t* p, vf v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(rounded));
}
inline float half(uint16_t bits) { return _cvtsh_ss(bits); }

inline vf as_float(__m512i v) { return _mm512_castsi512_ps(v); }

template <int S>
inline vf codes8(const uint8_t* p) {
  const __m128i bytes = S == 8 ? _mm_loadl_epi64((const __m128i*)p) : _mm_loadu_si128((const __m128i*)p);
  return as_float(_mm512_cvtepu8_epi32(bytes));
}
// Bits above a code stay in its lane: Grid looks at the low four only.
template <int S>
inline vf codes4(const uint8_t* p) {
  const __m512i bytes =
      _mm512_cvtepu8_epi64(S == 8 ? _mm_cvtsi32_si128(peek<int32_t>(p)) : _mm_loadl_epi64((const __m128i*)p));
  return as_float(_mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28)));
}
template <int S>
inline __m512i pairs_of_bits(const uint8_t* p) {
  const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_srlv_epi32(_mm512_set1_epi32(S == 8 ? peek<uint16_t>(p) : peek<int32_t>(p)), shifts);
}
template <int S>
inline vf codes2(const uint8_t* p) {
  return as_float(pairs_of_bits<S>(p));
}
template <int S>
inline vf codes3(const uint8_t* low, const uint8_t* high) {
  const __mmask16 fours = S == 8 ? *high : peek<uint16_t>(high);
  const __m512i pairs = _mm512_and_si512(pairs_of_bits<S>(low), _mm512_set1_epi32(3));
  return as_float(_mm512_mask_or_epi32(pairs, fours, pairs, _mm512_set1_epi32(4)));
}

// Up to four bits: a table of the sixteen values, in which a permute looks up sixteen codes at once. Narrower codes
// repeat the table, so that the permute ignores the bits above them.
template <int B>
struct Grid {
  vf table;
  Grid() = default;
  Grid(float scale, float zero) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const vf code = _mm512_cvtepi32_ps(_mm512_and_si512(lanes, _mm512_set1_epi32((1 << B) - 1)));
    table = _mm512_mul_ps(set1(scale), _mm512_sub_ps(code, set1(zero)));
  }
  vf operator()(vf codes) const { return _mm512_permutexvar_ps(_mm512_castps_si512(codes), table); }
};
template <>
struct Grid<8> {
  vf scale, zero;
  Grid() = default;
  Grid(float scale, float zero) : scale(set1(scale)), zero(set1(zero)) {}
  vf operator()(vf codes) const {
    return _mm512_mul_ps(scale, _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(codes)), zero));
  }
};

inline void transpose4(const float* src, int64_t lds, float* dst, int64_t ldd) {
  __m512 r[4];  // 128-bit lane l of r[i] is row 4 l + i
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_castps128_ps512(_mm_loadu_ps(src + i * lds));
    r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(src + (4 + i) * lds), 1);
    r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(src + (8 + i) * lds), 2);
    r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(src + (12 + i) * lds), 3);
  }
  const __m512 a = _mm512_unpacklo_ps(r[0], r[1]), b = _mm512_unpackhi_ps(r[0], r[1]);
  const __m512 c = _mm512_unpacklo_ps(r[2], r[3]), d = _mm512_unpackhi_ps(r[2], r[3]);
  store(dst, _mm512_shuffle_ps(a, c, 0x44));
  store(dst + ldd, _mm512_shuffle_ps(a, c, 0xee));
  store(dst + 2 * ldd, _mm512_shuffle_ps(b, d, 0x44));
  store(dst + 3 * ldd, _mm512_shuffle_ps(b, d, 0xee));
}

typedef int32_t vi __attribute__((vector_size(64)));  // not __m512i: GCC keeps an array of those in memory
inline vi no_sums() { return vi{}; }
inline vi load_bytes(const void* p) { return (vi)_mm512_loadu_si512(p); }
inline vi repeat4(const void* p) { return (vi)_mm512_set1_epi32(peek<int32_t>(p)); }
inline vi masked_or(vi v, vi mask, vi other) {
  return (vi)_mm512_ternarylogic_epi32((__m512i)v, (__m512i)mask, (__m512i)other, 0xea);
}
template <int kBits>
inline vi dot4(vi sums, vi codes, vi x) {
  return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)x);
}
inline vf spread(const float* p, vi index) { return _mm512_permutexvar_ps((__m512i)index, load(p)); }
inline vi nibbles(const void* p) {
  const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
  return (vi)_mm512_and_si512(_mm512_or_si512(words, _mm512_slli_epi16(words, 4)), _mm512_set1_epi8(15));
}
inline vf to_float(vi v) { return _mm512_cvtepi32_ps((__m512i)v); }
inline uint64_t expand_bytes(uint64_t bytes, unsigned bits) {
  return _pdep_u64(bytes, _pdep_u64(bits, 0x0101010101010101) * 0xff);
}

}  // namespace
