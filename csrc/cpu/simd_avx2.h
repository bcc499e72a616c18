// AVX2, FMA, F16C: eight lanes. See simd.h.
#pragma once

#include <immintrin.h>

namespace {

using vf = __m256;
constexpr int W = 8;
constexpr int kRows = 6, kVectors = 2, kDotRows = 2, kDotLimit = 12, kDotSums = 4, kDotMost = 8, kSkipVectors = 6,
              kSkipFours = 3;

inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline vf held_load(const float* p) {
  vf v = load(p);
  asm("" : "+x"(v));
  return v;
}
inline void store(float* p, vf v) { _mm256_storeu_ps(p, v); }
inline vf zero() { return _mm256_setzero_ps(); }
inline vf set1(float v) { return _mm256_set1_ps(v); }
inline vf repeat(const float* p) { return _mm256_broadcast_ps((const __m128*)p); }
inline vf repeat(const uint16_t* p) {
  const __m256i high = _mm256_broadcastsi128_si256(_mm_setr_epi32(0x01008080, 0x03028080, 0x05048080, 0x07068080));
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_set1_epi64x(peek<int64_t>(p)), high));
}
template <int kLane>
inline vf pick(vf fours) {
  return _mm256_permute_ps(fours, 0x55 * kLane);
}
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }

inline __m128 fold(vf v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
inline void sum4(vf a, vf b, vf c, vf d, float* out) {
  const __m128 all = _mm_hadd_ps(_mm_hadd_ps(fold(a), fold(b)), _mm_hadd_ps(fold(c), fold(d)));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), all));
}
inline float sum(vf v) {
  const __m128 pairs = _mm_hadd_ps(fold(v), fold(v));
  return _mm_cvtss_f32(_mm_hadd_ps(pairs, pairs));
}

inline vf as_float(__m256i v) { return _mm256_castsi256_ps(v); }
inline __m256i lanes() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }

inline vf first(vf v, int count) {
  return _mm256_and_ps(v, as_float(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes())));
}
inline vf keep(vf v, unsigned bits) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32((int)bits), bit);
  return _mm256_and_ps(v, as_float(_mm256_cmpeq_epi32(set, bit)));
}

inline vf drop(vf v, int count) {
  return _mm256_permutevar8x32_ps(v, _mm256_add_epi32(lanes(), _mm256_set1_epi32(count)));
}
inline vf expand(vf v, unsigned bits) {
  const __m128i ranks = _mm_loadl_epi64((const __m128i*)(kRanks.of + bits));
  return keep(_mm256_permutevar8x32_ps(v, _mm256_cvtepu8_epi32(ranks)), bits);
}

inline int compress(vf v, int64_t step, float* values, uint8_t* places) {
  const unsigned kept = (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(v, zero(), _CMP_NEQ_UQ));
  const uint64_t lanes = kSetLanes.of[kept], at = lanes + 0x0101010101010101 * (uint64_t)step;
  store(values, _mm256_permutevar8x32_ps(v, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)lanes))));
  memcpy(places, &at, sizeof at);
  return __builtin_popcount(kept);
}

inline int places64(uint64_t mask, int64_t step, uint8_t* places) {
  int count = 0;
  uint64_t from = 0x0101010101010101 * (uint64_t)step;
  for (int i = 0; i < 8; ++i, mask >>= 8, from += 0x0808080808080808) {
    const unsigned bits = mask & 0xff;
    const uint64_t at = kSetLanes.of[bits] + from;
    memcpy(places + count, &at, sizeof at);
    count += __builtin_popcount(bits);
  }
  return count;
}

template <int S>
inline vf from_fp32(const float* p) {
  return _mm256_loadu_ps(p);
}
template <int S>
inline vf from_fp16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
template <int S>
inline vf from_bf16(const uint16_t* p) {
  return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline void to_fp16(uint16_t* p, vf v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void to_bf16(uint16_t* p, vf v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), nan);
  _mm_storeu_si128((__m128i*)p,
                   _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}
inline float half(uint16_t bits) { return _cvtsh_ss(bits); }

template <int S>
inline vf codes8(const uint8_t* p) {
  return as_float(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
template <int S>
inline vf codes4(const uint8_t* p) {
  const __m256i words = _mm256_set1_epi32(peek<int32_t>(p));
  const __m256i codes = _mm256_srlv_epi32(words, _mm256_slli_epi32(lanes(), 2));
  return as_float(_mm256_and_si256(codes, _mm256_set1_epi32(15)));
}
template <int S>
inline vf codes2(const uint8_t* p) {
  const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(peek<uint16_t>(p)), _mm256_add_epi32(lanes(), lanes()));
  return as_float(_mm256_and_si256(codes, _mm256_set1_epi32(3)));
}
template <int S>
inline vf codes3(const uint8_t* low, const uint8_t* high) {
  const __m256i fours = _mm256_srlv_epi32(_mm256_set1_epi32(*high << 2), lanes());
  return _mm256_or_ps(codes2<S>(low), as_float(_mm256_and_si256(fours, _mm256_set1_epi32(4))));
}

inline void transpose4(const float* src, int64_t lds, float* dst, int64_t ldd) {
  __m256 r[4];  // 128-bit lane l of r[i] is row 4 l + i
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_castps128_ps256(_mm_loadu_ps(src + i * lds));
    r[i] = _mm256_insertf128_ps(r[i], _mm_loadu_ps(src + (4 + i) * lds), 1);
  }
  const __m256 a = _mm256_unpacklo_ps(r[0], r[1]), b = _mm256_unpackhi_ps(r[0], r[1]);
  const __m256 c = _mm256_unpacklo_ps(r[2], r[3]), d = _mm256_unpackhi_ps(r[2], r[3]);
  store(dst, _mm256_shuffle_ps(a, c, 0x44));
  store(dst + ldd, _mm256_shuffle_ps(a, c, 0xee));
  store(dst + 2 * ldd, _mm256_shuffle_ps(b, d, 0x44));
  store(dst + 3 * ldd, _mm256_shuffle_ps(b, d, 0xee));
}

typedef uint8_t Bytes __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));  // not __m256i: GCC keeps an array of those in memory
inline vi no_sums() { return vi{}; }
inline vi widen_bytes(const void* p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline vi widen_words(const void* p) { return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline vi load_bytes(const void* p) { return (vi)_mm256_loadu_si256((const __m256i*)p); }
inline vi repeat4(const void* p) { return (vi)_mm256_set1_epi32(peek<int32_t>(p)); }
inline vi masked_or(vi v, vi mask, vi other) { return (v & mask) | other; }
template <int kBits>
inline vi dot4(vi sums, vi codes, vi x) {
  const __m256i u = (__m256i)codes, s = (__m256i)x;
  if constexpr (kBits < 8) return sums + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1));
  // Two products of eight-bit codes may exceed 16 bits.
  const __m256i even = _mm256_and_si256(u, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(u, 8);
  const __m256i s_even = _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8), s_odd = _mm256_srai_epi16(s, 8);
  return sums + (vi)_mm256_madd_epi16(even, s_even) + (vi)_mm256_madd_epi16(odd, s_odd);
}
inline vf spread(const float* p, vi index) { return _mm256_permutevar8x32_ps(load(p), (__m256i)index); }
inline vi nibbles(const void* p) {
  const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
  return (vi)_mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi16(words, 4)), _mm256_set1_epi8(15));
}
inline vf to_float(vi v) { return _mm256_cvtepi32_ps((__m256i)v); }
inline uint64_t expand_bytes(uint64_t bytes, unsigned bits) {
  const __m128i ranks = _mm_loadl_epi64((const __m128i*)(kRanks.of + bits));
  return (uint64_t)_mm_cvtsi128_si64(_mm_shuffle_epi8(_mm_cvtsi64_si128((int64_t)bytes), ranks));
}

inline __m128i ranks8(unsigned bits) { return _mm_loadl_epi64((const __m128i*)(kRanks.of + bits)); }

inline vi expand32(const void* p, uint32_t bits, vi other) {  // pshufb leaves a zero: x ^ other is that of `other`
  const char* next = (const char*)p;
  __m128i eight[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const unsigned here = bits >> 8 * i & 0xff;
    const __m128i bytes = _mm_xor_si128(_mm_loadu_si128((const __m128i*)next), _mm256_castsi256_si128((__m256i)other));
    eight[i] = _mm_shuffle_epi8(bytes, ranks8(here));
    next += __builtin_popcount(here);
  }
  return other ^ (vi)_mm256_set_m128i(_mm_unpacklo_epi64(eight[2], eight[3]), _mm_unpacklo_epi64(eight[0], eight[1]));
}

inline void expand64_fours(vi bytes, uint64_t bits, const vi* other, vi* out) {
  const __m256i flip = _mm256_permute2x128_si256((__m256i)other[0], (__m256i)other[1], 0x20);
  const __m256i codes = _mm256_xor_si256((__m256i)bytes, flip);
  __m256i half[2];  // inputs 16 i + 0 .. 15 and 32 + 16 i + 0 .. 15: from eight bytes of the low and the high 128 bits
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const uint64_t here = bits >> 16 * i;
    const __m128i low = _mm_unpacklo_epi64(ranks8(here & 0xff), ranks8(here >> 8 & 0xff));
    const __m128i high = _mm_unpacklo_epi64(ranks8(here >> 32 & 0xff), ranks8(here >> 40 & 0xff));
    const int64_t first = i * 0x0808080808080808, second = first + 0x0404040404040404;
    const __m256i ranks =
        _mm256_add_epi8(_mm256_set_m128i(high, low), _mm256_setr_epi64x(first, second, first, second));
    half[i] = _mm256_shuffle_epi8(codes, ranks);
  }
  out[0] = other[0] ^ (vi)_mm256_permute2x128_si256(half[0], half[1], 0x20);
  out[1] = other[1] ^ (vi)_mm256_permute2x128_si256(half[0], half[1], 0x31);
}

inline vi expand16(const void* p, unsigned bits, int in_first) {
  const __m128i a = _mm_loadu_si128((const __m128i*)p);
  const __m128i b = _mm_loadu_si128((const __m128i*)((const uint16_t*)p + in_first));
  return (vi)_mm256_set_m128i(_mm_shuffle_epi8(b, _mm_load_si128((const __m128i*)kWordRanks.of[bits >> 8])),
                              _mm_shuffle_epi8(a, _mm_load_si128((const __m128i*)kWordRanks.of[bits & 0xff])));
}

}  // namespace
