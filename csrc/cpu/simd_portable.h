// Any processor, by the vector extension of GCC and Clang, and 64-bit Arm by its own instructions: eight lanes. See
// simd.h.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

// Two vectors of 16 bytes, not one of 32: GCC keeps a vector that is wider than the registers in memory, and every turn
// of a loop would load and store its sums.
template <class T>
struct Pair {
  typedef T Half __attribute__((vector_size(16)));
  Half lo, hi;
  Pair() = default;
  Pair(Half lo, Half hi) : lo(lo), hi(hi) {}
  Pair(T a, T b, T c, T d, T e, T f, T g, T h) : lo{a, b, c, d}, hi{e, f, g, h} {}
  Pair(T v) : lo{v, v, v, v}, hi(lo) {}
  template <class U>
  explicit Pair(Pair<U> bits) : lo((Half)bits.lo), hi((Half)bits.hi) {}
  T operator[](int i) const { return i < 16 / (int)sizeof(T) ? lo[i] : hi[i - 16 / (int)sizeof(T)]; }
  friend Pair operator+(Pair a, Pair b) { return {a.lo + b.lo, a.hi + b.hi}; }
  friend Pair operator-(Pair a, Pair b) { return {a.lo - b.lo, a.hi - b.hi}; }
  friend Pair operator*(Pair a, Pair b) { return {a.lo * b.lo, a.hi * b.hi}; }
  friend Pair operator&(Pair a, Pair b) { return {a.lo & b.lo, a.hi & b.hi}; }
  friend Pair operator|(Pair a, Pair b) { return {a.lo | b.lo, a.hi | b.hi}; }
  friend Pair operator<<(Pair a, Pair b) { return {a.lo << b.lo, a.hi << b.hi}; }
  friend Pair operator>>(Pair a, Pair b) { return {a.lo >> b.lo, a.hi >> b.hi}; }
  friend Pair operator==(Pair a, Pair b) { return {(Half)(a.lo == b.lo), (Half)(a.hi == b.hi)}; }
  friend Pair operator<(Pair a, Pair b) { return {(Half)(a.lo < b.lo), (Half)(a.hi < b.hi)}; }
};

typedef Pair<float> vf;
typedef Pair<int32_t> vi;
typedef Pair<uint8_t> Bytes;
constexpr int W = 8, kDotSums = 4;

// Halves, not a whole Pair, which GCC would copy to the stack first.
inline vf load(const float* p) { return {peek<vf::Half>(p), peek<vf::Half>(p + 4)}; }
inline vf held_load(const float* p) { return load(p); }
inline void store(float* p, vf v) {
  memcpy(p, &v.lo, sizeof v.lo);
  memcpy(p + 4, &v.hi, sizeof v.hi);
}
inline vf zero() { return vf{}; }
inline vf set1(float v) { return v; }
inline vf repeat(const float* p) { return {peek<vf::Half>(p), peek<vf::Half>(p)}; }
inline vf add(vf a, vf b) { return a + b; }
inline vf mul(vf a, vf b) { return a * b; }

inline vf as_float(vi v) { return (vf)v; }
inline vi lanes() { return {0, 1, 2, 3, 4, 5, 6, 7}; }

inline vf first(vf v, int count) { return as_float((vi)v & (lanes() < count)); }
inline vf keep(vf v, unsigned bits) {
  const vi bit = {1, 2, 4, 8, 16, 32, 64, 128};
  return as_float((vi)v & ((bit & (int32_t)bits) == bit));
}

inline vf to_float(vi v) { return {__builtin_convertvector(v.lo, vf::Half), __builtin_convertvector(v.hi, vf::Half)}; }

template <int S>
inline vf from_fp32(const float* p) {
  return load(p);
}
inline void to_bf16(uint16_t* p, vf v) {
  for (int i = 0; i < 8; ++i) {
    const float number = v[i];
    const uint32_t bits = peek<uint32_t>(&number);
    p[i] = number != number ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

template <int B>
struct Grid {
  vf scale, zero;
  int pruned;
  Grid() = default;
  Grid(float scale, float zero) : scale(set1(scale)), zero(set1(zero)), pruned((int)zero) {}
  vf operator()(vf codes) const { return scale * (to_float((vi)codes) - zero); }
};

inline vi no_sums() { return vi{}; }
inline vi load_bytes(const void* p) { return {peek<vi::Half>(p), peek<vi::Half>((const char*)p + 16)}; }
inline vi repeat4(const void* p) { return peek<int32_t>(p); }

#if defined(__aarch64__)

// As for AVX2, but six vectors in a slice would not stay in registers. Not measured: no Arm processor was at hand.
constexpr int kRows = 6, kVectors = 2, kDotRows = 2, kDotLimit = 12, kDotMost = 8, kSkipVectors = 4, kSkipFours = 3;

inline vf fma(vf a, vf b, vf c) { return {vfmaq_f32(c.lo, a.lo, b.lo), vfmaq_f32(c.hi, a.hi, b.hi)}; }

template <int kLane>
inline vf pick(vf fours) {
  const vf::Half lane = vdupq_laneq_f32(fours.lo, kLane);
  return {lane, lane};
}
inline float sum(vf v) { return vaddvq_f32(v.lo + v.hi); }
inline void sum4(vf a, vf b, vf c, vf d, float* out) {
  const float32x4_t ab = vpaddq_f32(a.lo + a.hi, b.lo + b.hi), cd = vpaddq_f32(c.lo + c.hi, d.lo + d.hi);
  vst1q_f32(out, vld1q_f32(out) + vpaddq_f32(ab, cd));
}

// Lane i = lane lanes[i] of v; zero where the high bit of lanes[i] is set.
inline vf pick_lanes(vf v, uint8x8_t lanes) {
  const uint8x16_t from = vcombine_u8(vqshl_n_u8(lanes, 2), vdup_n_u8(0)), twice = vzip1q_u8(from, from);
  const uint8x16_t bytes = vreinterpretq_u8_u32(vdupq_n_u32(0x03020100));
  const uint8x16x2_t table = {{(uint8x16_t)v.lo, (uint8x16_t)v.hi}};
  return {(vf::Half)vqtbl2q_u8(table, vzip1q_u8(twice, twice) | bytes),
          (vf::Half)vqtbl2q_u8(table, vzip2q_u8(twice, twice) | bytes)};
}
inline vf expand(vf v, unsigned bits) { return pick_lanes(v, vcreate_u8(kRanks.of[bits])); }

inline void store_places(uint16_t* places, uint8x8_t lanes, int64_t k, int64_t pitch) {
  vst1q_u16(places, vmulq_n_u16(vaddw_u8(vdupq_n_u16((uint16_t)k), lanes), (uint16_t)pitch));
}
inline int compress(vf v, int64_t k, int64_t pitch, float* values, uint16_t* places) {
  const vi bit = {1, 2, 4, 8, 16, 32, 64, 128}, set = bit & ((vi)(v == zero()) == 0);
  const unsigned kept = (unsigned)vaddvq_s32(set.lo + set.hi);
  const uint8x8_t lanes = vcreate_u8(kSetLanes.of[kept]);
  store(values, pick_lanes(v, lanes));
  store_places(places, lanes, k, pitch);
  return __builtin_popcount(kept);
}

// Bits of each byte.
inline uint64_t counts(uint64_t bits) { return vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(bits))), 0); }
inline int places64(uint64_t mask, int64_t step, int64_t pitch, uint16_t* places) {
  const uint64_t up_to = counts(mask) * 0x0101010101010101;
  for (int i = 0; i < 64; i += 8)
    store_places(places + (up_to << 8 >> i & 0xff), vcreate_u8(kSetLanes.of[mask >> i & 0xff]), step + i, pitch);
  return (int)(up_to >> 56);
}

inline vi widen_words(const void* p) {
  const uint16x8_t words = peek<uint16x8_t>(p);
  return {(vi::Half)vmovl_u16(vget_low_u16(words)), (vi::Half)vmovl_high_u16(words)};
}
inline vi widen_bytes(const void* p) {
  const uint16x8_t words = vmovl_u8(peek<uint8x8_t>(p));
  return widen_words(&words);
}
inline float half(uint16_t bits) { return (float)peek<__fp16>(&bits); }
template <int S>
inline vf from_fp16(const uint16_t* p) {
  const float16x8_t v = peek<float16x8_t>(p);
  return {vcvt_f32_f16(vget_low_f16(v)), vcvt_high_f32_f16(v)};
}
inline void to_fp16(uint16_t* p, vf v) {
  const float16x8_t rounded = vcvt_high_f16_f32(vcvt_f16_f32(v.lo), v.hi);
  memcpy(p, &rounded, sizeof rounded);
}

template <int S>
inline vf codes4(const uint8_t* p) {
  return as_float(repeat4(p) >> vi{0, 4, 8, 12, 16, 20, 24, 28} & 15);
}
template <int S>
inline vf codes2(const uint8_t* p) {
  return as_float(vi(peek<uint16_t>(p)) >> (lanes() + lanes()) & 3);
}
template <int S>
inline vf codes3(const uint8_t* low, const uint8_t* high) {
  return as_float((vi)codes2<S>(low) | (vi(*high << 2) >> lanes() & 4));
}

inline void transpose4(const float* src, int64_t lds, float* dst, int64_t ldd) {
  for (int i = 0; i < 8; i += 4, src += 4 * lds, dst += 4) {
    const float32x4_t a = vld1q_f32(src), b = vld1q_f32(src + lds);
    const float32x4_t c = vld1q_f32(src + 2 * lds), d = vld1q_f32(src + 3 * lds);
    const float64x2_t even = (float64x2_t)vtrn1q_f32(a, b), odd = (float64x2_t)vtrn2q_f32(a, b);
    const float64x2_t even2 = (float64x2_t)vtrn1q_f32(c, d), odd2 = (float64x2_t)vtrn2q_f32(c, d);
    vst1q_f32(dst, (float32x4_t)vtrn1q_f64(even, even2));
    vst1q_f32(dst + ldd, (float32x4_t)vtrn1q_f64(odd, odd2));
    vst1q_f32(dst + 2 * ldd, (float32x4_t)vtrn2q_f64(even, even2));
    vst1q_f32(dst + 3 * ldd, (float32x4_t)vtrn2q_f64(odd, odd2));
  }
}

inline vf spread(const float* p, vi index) {
  const vi bytes = index * 0x04040404 + 0x03020100;
  const uint8x16x2_t table = {{peek<uint8x16_t>(p), peek<uint8x16_t>(p + 4)}};
  return {(vf::Half)vqtbl2q_u8(table, (uint8x16_t)bytes.lo), (vf::Half)vqtbl2q_u8(table, (uint8x16_t)bytes.hi)};
}
inline vi nibbles(const void* p) {
  const uint8x16_t pairs = peek<uint8x16_t>(p), low = pairs & 15, high = pairs >> 4;
  return {(vi::Half)vzip1q_u8(low, high), (vi::Half)vzip2q_u8(low, high)};
}
template <int kBits>
inline int32x4_t dot4_half(int32x4_t sums, int8x16_t codes, int8x16_t x) {
  if constexpr (kBits == 8) {  // code = (code - 128) + 128
    codes ^= -128;
    sums = vpadalq_s16(sums, vshlq_n_s16(vpaddlq_s8(x), 7));
  }
  return vpadalq_s16(sums, vpaddq_s16(vmull_s8(vget_low_s8(codes), vget_low_s8(x)), vmull_high_s8(codes, x)));
}
template <int kBits>
inline vi dot4(vi sums, vi codes, vi x) {
  return {dot4_half<kBits>(sums.lo, (int8x16_t)codes.lo, (int8x16_t)x.lo),
          dot4_half<kBits>(sums.hi, (int8x16_t)codes.hi, (int8x16_t)x.hi)};
}

inline uint64_t expand_bytes(uint64_t bytes, unsigned bits) {
  const uint8x16_t table = vcombine_u8(vcreate_u8(bytes), vdup_n_u8(0));
  return vget_lane_u64(vreinterpret_u64_u8(vqtbl1_u8(table, vcreate_u8(kRanks.of[bits]))), 0);
}
inline vi expand32(const void* p, uint32_t bits, vi other) {
  const uint64_t before = counts(bits) * 0x01010100;
  uint8x8_t eight[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const uint8x16_t next = peek<uint8x16_t>((const char*)p + (before >> 8 * i & 0xff));
    const int32x2_t keep =
        i % 2 ? vget_high_s32(i < 2 ? other.lo : other.hi) : vget_low_s32(i < 2 ? other.lo : other.hi);
    eight[i] = vqtbx1_u8((uint8x8_t)keep, next, vcreate_u8(kRanks.of[bits >> 8 * i & 0xff]));
  }
  return {(vi::Half)vcombine_u8(eight[0], eight[1]), (vi::Half)vcombine_u8(eight[2], eight[3])};
}
inline void expand64_fours(vi bytes, uint64_t bits, const vi* other, vi* out) {
  const auto sixteen = [&](vi::Half codes, vi::Half other, int i) {  // inputs 16 i .. 16 i + 15
    const uint64_t second = kRanks.of[bits >> (16 * i + 8) & 0xff];
    const uint8x16_t ranks = vcombine_u8(vcreate_u8(kRanks.of[bits >> 16 * i & 0xff]), vcreate_u8(second));
    const uint64_t first = i % 2 * 0x0808080808080808;
    const uint8x16_t from = vcombine_u8(vcreate_u8(first), vcreate_u8(first + 0x0404040404040404));
    return (vi::Half)vqtbx1q_u8((uint8x16_t)other, (uint8x16_t)codes, ranks + from);
  };
  out[0] = {sixteen(bytes.lo, other[0].lo, 0), sixteen(bytes.lo, other[0].hi, 1)};
  out[1] = {sixteen(bytes.hi, other[1].lo, 2), sixteen(bytes.hi, other[1].hi, 3)};
}
inline vi expand16(const void* p, unsigned bits, int in_first) {
  const uint8x16_t a = peek<uint8x16_t>(p), b = peek<uint8x16_t>((const uint16_t*)p + in_first);
  return {(vi::Half)vqtbl1q_u8(a, vld1q_u8(kWordRanks.of[bits & 0xff])),
          (vi::Half)vqtbl1q_u8(b, vld1q_u8(kWordRanks.of[bits >> 8]))};
}

#else

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

inline vf expand(vf v, unsigned bits) {
  float entries[8], out[8] = {};
  store(entries, v);
  for (int lane = 0, rank = 0; lane < 8; ++lane)
    if (bits >> lane & 1) out[lane] = entries[rank++];
  return load(out);
}

inline int compress(vf v, int64_t k, int64_t pitch, float* values, uint16_t* places) {
  int count = 0;
  for (int lane = 0; lane < 8; ++lane)
    if (v[lane] != 0) {
      values[count] = v[lane];
      places[count++] = (uint16_t)((k + lane) * pitch);
    }
  return count;
}

inline int places64(uint64_t mask, int64_t step, int64_t pitch, uint16_t* places) {
  int count = 0;
  for (; mask; mask &= mask - 1) places[count++] = (uint16_t)((step + __builtin_ctzll(mask)) * pitch);
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

#endif

template <int S>
inline vf from_bf16(const uint16_t* p) {
  return as_float(widen_words(p) << 16);
}
template <int S>
inline vf codes8(const uint8_t* p) {
  return as_float(widen_bytes(p));
}

}  // namespace
