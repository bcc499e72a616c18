// What 64-bit Arm has instructions of its own for. See simd.h; the rest is in simd_pair.h.
#pragma once

#include <arm_neon.h>

#include "simd_pair.h"

namespace {

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
inline vf drop(vf v, int count) {
  return pick_lanes(v, vadd_u8(vcreate_u8(0x0706050403020100), vdup_n_u8((uint8_t)count)));
}
inline vf expand(vf v, unsigned bits) { return pick_lanes(v, vcreate_u8(kRanks.of[bits])); }

inline int compress(vf v, int64_t step, float* values, uint8_t* places) {
  const vi bit = {1, 2, 4, 8, 16, 32, 64, 128}, set = bit & ((vi)(v == zero()) == 0);
  const unsigned kept = (unsigned)vaddvq_s32(set.lo + set.hi);
  const uint8x8_t lanes = vcreate_u8(kSetLanes.of[kept]);
  store(values, pick_lanes(v, lanes));
  vst1_u8(places, vadd_u8(lanes, vdup_n_u8((uint8_t)step)));
  return __builtin_popcount(kept);
}

// Bits of each byte.
inline uint64_t counts(uint64_t bits) { return vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(bits))), 0); }
inline int places64(uint64_t mask, int64_t step, uint8_t* places) {
  const uint64_t up_to = counts(mask) * 0x0101010101010101;
  for (int i = 0; i < 64; i += 8)
    vst1_u8(places + (up_to << 8 >> i & 0xff),
            vadd_u8(vcreate_u8(kSetLanes.of[mask >> i & 0xff]), vdup_n_u8((uint8_t)(step + i))));
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

}  // namespace
