// Value decoders: packed bytes -> fp32. Layouts are drawn in ctp_kernels/values.py.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace ctp {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void from_float(float value, float* out) { *out = value; }
__device__ __forceinline__ void from_float(float value, __half* out) { *out = __float2half_rn(value); }
__device__ __forceinline__ void from_float(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }

// Code I (0..3) of 16 bits, minus the zero, exact. A float with the exponent of 2^23 holds an integer in its mantissa:
// 0x4B000000 | code << 4I reads 2^23 + 16^I code, and one FMA takes the offset away. No shift, no int-to-float.
template <int I>
__device__ __forceinline__ float int4_minus_zero(uint32_t sixteen, float zero) {
  constexpr float step = 1.0f / float(1 << 4 * I);
  const uint32_t bits = 0x4B000000u | (sixteen & (0xFu << 4 * I));
  return fmaf(__uint_as_float(bits), step, -(8388608.0f * step + zero));
}

// Eight int4 codes of one word, lowest bits first.
__device__ __forceinline__ void decode_int4(uint32_t word, float zero, float (&out)[8]) {
  const uint32_t high = word >> 16;
  out[0] = int4_minus_zero<0>(word, zero);
  out[1] = int4_minus_zero<1>(word, zero);
  out[2] = int4_minus_zero<2>(word, zero);
  out[3] = int4_minus_zero<3>(word, zero);
  out[4] = int4_minus_zero<0>(high, zero);
  out[5] = int4_minus_zero<1>(high, zero);
  out[6] = int4_minus_zero<2>(high, zero);
  out[7] = int4_minus_zero<3>(high, zero);
}

// WORDS consecutive 32-bit words; four are one 16-byte load and must be aligned to it.
template <int WORDS>
__device__ __forceinline__ void load_words(const uint8_t* from, uint32_t (&words)[WORDS]) {
  static_assert(WORDS == 1 || WORDS == 4, "one word or one vector of four");
  if constexpr (WORDS == 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(from);
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  } else {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  }
}

// Eight activations as fp32; those from `left` on are not read and count as zero. VECTOR: `from` is 16-byte aligned.
template <bool VECTOR, typename T>
__device__ __forceinline__ void load_eight(const T* from, int left, float (&out)[8]) {
  if (VECTOR && left >= 8) {
    constexpr int PER_LOAD = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < 8; i += PER_LOAD) {
      union {
        uint4 raw;
        T value[PER_LOAD];
      } piece;
      piece.raw = *reinterpret_cast<const uint4*>(from + i);
#pragma unroll
      for (int j = 0; j < PER_LOAD; ++j) out[i + j] = to_float(piece.value[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = i < left ? to_float(from[i]) : 0.0f;
  }
}

}  // namespace ctp
