// Any processor, by the vector extension of GCC and Clang. See simd.h; the rest is in simd_pair.h.
#pragma once

#include "simd_pair.h"

namespace {

constexpr int kRows = 4, kVectors = 1, kDotRows = 1, kDotLimit = 32, kDotMost = 4, kSkipVectors = 4, kSkipFours = 1;

inline vf fma(vf a, vf b, vf c) { return a * b + c; }
template <int kLane>
inline vf pick(vf fours) {
  return set1(fours.lo[kLane]);
}
inline float sum(vf v) {
  const vf::Half four = v.lo + v.hi;
  return (four[0] + four[1]) + (four[2] + four[3]);
}
inline void sum4(vf a, vf b, vf c, vf d, float* out) {
  out[0] += sum(a);
  out[1] += sum(b);
  out[2] += sum(c);
  out[3] += sum(d);
}

inline vf drop(vf v, int count) {
  float entries[16] = {};
  store(entries, v);
  return load(entries + count);
}
inline vf expand(vf v, unsigned bits) {
  float entries[8], out[8] = {};
  store(entries, v);
  for (int lane = 0, rank = 0; lane < 8; ++lane)
    if (bits >> lane & 1) out[lane] = entries[rank++];
  return load(out);
}

inline int compress(vf v, int64_t step, float* values, uint8_t* places) {
  int count = 0;
  for (int lane = 0; lane < 8; ++lane)
    if (v[lane] != 0) {
      values[count] = v[lane];
      places[count++] = (uint8_t)(step + lane);
    }
  return count;
}

inline int places64(uint64_t mask, int64_t step, uint8_t* places) {
  int count = 0;
  for (; mask; mask &= mask - 1) places[count++] = (uint8_t)(step + __builtin_ctzll(mask));
  return count;
}

inline float as_number(uint32_t bits) { return peek<float>(&bits); }
inline float half(uint16_t bits) {
  const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude < 0x0400) return (sign ? -1.0f : 1.0f) * (float)magnitude * 0x1p-24f;
  if (magnitude >= 0x7c00) return as_number(sign | 0x7f800000 | magnitude << 13);
  return as_number(sign | ((magnitude << 13) + (112u << 23)));
}
inline uint16_t to_half(float v) {
  uint32_t bits = peek<uint32_t>(&v);
  const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (bits < 0x38800000) {                       // below 2^-14: the adder rounds to multiples of 2^-24
    const float shifted = as_number(bits) + 0.5f;
    return sign | (uint16_t)(peek<uint32_t>(&shifted) - 0x3f000000);
  }
  return sign | (uint16_t)((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13);
}

typedef uint8_t EightBytes __attribute__((vector_size(8)));
typedef uint16_t EightWords __attribute__((vector_size(16)));
typedef int32_t Eight __attribute__((vector_size(32)));
inline vi widen_words(const void* p) {
  const Eight words = __builtin_convertvector(peek<EightWords>(p), Eight);
  return peek<vi>(&words);
}
inline vi widen_bytes(const void* p) {
  const EightWords words = __builtin_convertvector(peek<EightBytes>(p), EightWords);
  return widen_words(&words);
}

template <int S>
inline vf from_fp16(const uint16_t* p) {
  float v[8];
  for (int i = 0; i < 8; ++i) v[i] = half(peek<uint16_t>(p + i));
  return load(v);
}
inline void to_fp16(uint16_t* p, vf v) {
  for (int i = 0; i < 8; ++i) p[i] = to_half(v[i]);
}

template <int S>
inline vf codes4(const uint8_t* p) {
  int32_t v[8];
  for (int i = 0; i < 8; ++i) v[i] = p[i / 2] >> 4 * (i % 2) & 15;
  return load((const float*)v);
}
template <int S>
inline vf codes2(const uint8_t* p) {
  int32_t v[8];
  for (int i = 0; i < 8; ++i) v[i] = p[i / 4] >> 2 * (i % 4) & 3;
  return load((const float*)v);
}
template <int S>
inline vf codes3(const uint8_t* low, const uint8_t* high) {
  int32_t v[8];
  for (int i = 0; i < 8; ++i) v[i] = (low[i / 4] >> 2 * (i % 4) & 3) | (*high >> i & 1) << 2;
  return load((const float*)v);
}

inline void transpose4(const float* src, int64_t lds, float* dst, int64_t ldd) {
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 8; ++i) dst[j * ldd + i] = src[i * lds + j];
}

inline vf spread(const float* p, vi index) {
  float out[8];
  for (int lane = 0; lane < 8; ++lane) out[lane] = p[index[lane]];
  return load(out);
}
inline vi nibbles(const void* p) {
  uint8_t bytes[32];
  for (int i = 0; i < 32; ++i) bytes[i] = (uint8_t)(((const uint8_t*)p)[i / 2] >> (i % 2 * 4) & 15);
  return peek<vi>(bytes);
}
template <int kBits>
inline vi dot4(vi sums, vi codes, vi x) {
  for (int byte = 0; byte < 4; ++byte) sums = sums + (codes >> (8 * byte) & 0xff) * ((x << (24 - 8 * byte)) >> 24);
  return sums;
}
inline uint64_t expand_bytes(uint64_t bytes, unsigned bits) {
  uint64_t out = 0;
  for (int at = 0; at < 64; at += 8, bits >>= 1)
    if (bits & 1) {
      out |= (bytes & 0xff) << at;
      bytes >>= 8;
    }
  return out;
}
inline vi expand32(const void* p, uint32_t bits, vi other) {
  const uint8_t* next = (const uint8_t*)p;
  uint8_t out[32];
  memcpy(out, &other, sizeof out);
  for (; bits; bits &= bits - 1) out[__builtin_ctz(bits)] = *next++;
  return peek<vi>(out);
}
inline void expand64_fours(vi bytes, uint64_t bits, const vi* other, vi* out) {
  out[0] = expand32(&bytes, (uint32_t)bits, other[0]);
  out[1] = expand32((const char*)&bytes + 16, (uint32_t)(bits >> 32), other[1]);
}
inline vi expand16(const void* p, unsigned bits, int) {
  const uint16_t* next = (const uint16_t*)p;
  uint16_t out[16] = {};
  for (; bits; bits &= bits - 1) out[__builtin_ctz(bits)] = *next++;
  return peek<vi>(out);
}

}  // namespace
