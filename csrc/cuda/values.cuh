// Value decoders: eight stored slots of a row, an octet, to eight numbers of type T (fp16 or bf16) in four registers,
// out[i] = (slot 2i, slot 2i + 1): the order in which mma wants neighbours along K. Layouts are drawn in
// ctp_kernels/values.py.
//
// Integers become floats by the exponent: 0x6400 | c is 1024 + c in fp16 (ten mantissa bits), 0x4300 | c is 128 + c in
// bf16 (seven), so one AND-OR per two codes and one FMA that subtracts 1024 + zero: exact, no shift, no conversion.
// A field s bits up in the mantissa reads c 2^s, and the FMA multiplies by 2^-s.
#pragma once

#include "ptx.cuh"

namespace ctp {

template <typename T>
struct Number;
template <>
struct Number<__half> {
  static constexpr uint32_t MAGIC = 0x64006400, ONE = 0x3C003C00, SIXTEENTH = 0x2C002C00;
  static constexpr uint32_t MINUS_MAGIC = 0xE400E400, MINUS_MAGIC_16TH = 0xD400D400;  // -1024, -64
  static __device__ __forceinline__ float low(uint32_t pair) { return __half2float(__ushort_as_half(uint16_t(pair))); }
  static __device__ __forceinline__ float high(uint32_t pair) {
    return __half2float(__ushort_as_half(uint16_t(pair >> 16)));
  }
};
template <>
struct Number<__nv_bfloat16> {
  static constexpr uint32_t MAGIC = 0x43004300, ONE = 0x3F803F80, SIXTEENTH = 0x3D803D80;
  static constexpr uint32_t MINUS_MAGIC = 0xC300C300, MINUS_MAGIC_16TH = 0xC100C100;  // -128, -8
  static __device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
  static __device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }
};

// What takes a code's zero away, for fields at bit 0 and at bit 4 of the mantissa. The spacing of floats around the
// magic number is 1 (at bit 4: 1/16), so adding the zero to its bits subtracts it from the number.
struct Offset {
  uint32_t bit0, bit4;
};
template <typename T>
__device__ __forceinline__ Offset offset_of(uint32_t zero) {
  const uint32_t pair = zero * 0x00010001u;
  return {Number<T>::MINUS_MAGIC + pair, Number<T>::MINUS_MAGIC_16TH + (pair << 4)};
}

// BYTES of a plane, which lie on as many bytes (at most 16), into registers.
template <int BYTES, int WORDS>
__device__ __forceinline__ void load_bytes(const uint8_t* from, uint32_t (&words)[WORDS]) {
  static_assert(WORDS * 4 >= BYTES, "the words hold the bytes");
  if constexpr (BYTES % 16 == 0) {
#pragma unroll
    for (int i = 0; i < BYTES / 16; ++i) {
      const uint4 v = ptx::load_once(from + 16 * i);
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
  } else if constexpr (BYTES == 8) {
    const uint2 v = ptx::load_global<uint2>(from);
    words[0] = v.x, words[1] = v.y;
  } else if constexpr (BYTES == 4) {
    words[0] = ptx::load_global<uint32_t>(from);
  } else if constexpr (BYTES == 2) {
    words[0] = ptx::load_global<uint16_t>(from);
  } else {
    static_assert(BYTES == 1, "a power of two");
    words[0] = ptx::load_global<uint8_t>(from);
  }
}

__host__ __device__ constexpr int words_for(int bytes) { return bytes < 4 ? 1 : bytes / 4; }

// The pairs (slot 2i, slot 2i + 1) of eight 2-bit fields `low` (16 bits): field 2i lands at bit 4i of the low half,
// field 2i + 1 at bit 4i of the high half. Read them with masks 0x00030003 << 0 and << 4, then again 8 bits down.
__device__ __forceinline__ uint32_t spread2(uint32_t low) { return low | low << 14; }

template <typename T>
struct Int4 {
  using Type = T;
  static constexpr int LOW_BYTES = 4, HIGH_BYTES = 0;  // of an octet in each bit plane
  static constexpr bool CODES = true;
  static constexpr uint32_t MIDDLE = 8;  // the zero of a symmetric format
  using Zero = Offset;
  static __device__ __forceinline__ Zero zero(uint32_t code) { return offset_of<T>(code); }
  // (code i, code i + 1) lie four bits apart: byte i of the word beside byte i of the word shifted down four bits.
  static __device__ __forceinline__ void decode(const uint32_t* low, const uint32_t*, int octet, Zero zero,
                                                uint32_t (&out)[4]) {
    const uint32_t word = low[octet], down = word >> 4;
    const uint32_t selector[4] = {0x4400, 0x5511, 0x6622, 0x7733};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t code = ptx::and_or(ptx::bytes(word, down, selector[i]), 0x000F000Fu, Number<T>::MAGIC);
      out[i] = ptx::fma2<T>(code, Number<T>::ONE, zero.bit0);
    }
  }
};

template <typename T>
struct Int3 {
  using Type = T;
  static constexpr int LOW_BYTES = 2, HIGH_BYTES = 1;
  static constexpr bool CODES = true;
  static constexpr uint32_t MIDDLE = 4;
  using Zero = Offset;
  static __device__ __forceinline__ Zero zero(uint32_t code) { return offset_of<T>(code); }
  // `high * 0x8001` puts bit 2i beside bit 2i + 1, 16 bits apart, as spread2 does with the low plane.
  static __device__ __forceinline__ void decode(const uint32_t* low, const uint32_t* high, int octet, Zero zero,
                                                uint32_t (&out)[4]) {
    const uint32_t two = spread2(ptx::bytes(low[octet / 2], 0, octet % 2 ? 0x4432 : 0x4410)), two8 = two >> 8;
    const uint32_t one = ptx::bytes(high[octet / 4], 0, 0x4440 | (octet % 4)) * 0x8001u;
    const uint32_t magic = Number<T>::MAGIC;
    const uint32_t code[4] = {ptx::and_or(one << 2, 0x00040004u, ptx::and_or(two, 0x00030003u, magic)),
                              ptx::and_or(one << 4, 0x00400040u, ptx::and_or(two, 0x00300030u, magic)),
                              ptx::and_or(one >> 2, 0x00040004u, ptx::and_or(two8, 0x00030003u, magic)),
                              ptx::and_or(one, 0x00400040u, ptx::and_or(two8, 0x00300030u, magic))};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      out[i] = i % 2 ? ptx::fma2<T>(code[i], Number<T>::SIXTEENTH, zero.bit4)
                     : ptx::fma2<T>(code[i], Number<T>::ONE, zero.bit0);
  }
};

template <typename T>
struct Int2 {
  using Type = T;
  static constexpr int LOW_BYTES = 2, HIGH_BYTES = 0;
  static constexpr bool CODES = true;
  static constexpr uint32_t MIDDLE = 2;
  using Zero = Offset;
  static __device__ __forceinline__ Zero zero(uint32_t code) { return offset_of<T>(code); }
  static __device__ __forceinline__ void decode(const uint32_t* low, const uint32_t*, int octet, Zero zero,
                                                uint32_t (&out)[4]) {
    const uint32_t two = spread2(ptx::bytes(low[octet / 2], 0, octet % 2 ? 0x4432 : 0x4410)), two8 = two >> 8;
    out[0] = ptx::fma2<T>(ptx::and_or(two, 0x00030003u, Number<T>::MAGIC), Number<T>::ONE, zero.bit0);
    out[1] = ptx::fma2<T>(ptx::and_or(two, 0x00300030u, Number<T>::MAGIC), Number<T>::SIXTEENTH, zero.bit4);
    out[2] = ptx::fma2<T>(ptx::and_or(two8, 0x00030003u, Number<T>::MAGIC), Number<T>::ONE, zero.bit0);
    out[3] = ptx::fma2<T>(ptx::and_or(two8, 0x00300030u, Number<T>::MAGIC), Number<T>::SIXTEENTH, zero.bit4);
  }
};

// Eight bits do not fit bf16's mantissa beside the exponent's trick, so bf16 goes through fp32 (0x4B0000cc is 2^23 +
// cc): the difference has at most eight significant bits and is exact in bf16.
template <typename T>
struct Int8 {
  using Type = T;
  static constexpr int LOW_BYTES = 8, HIGH_BYTES = 0;
  static constexpr bool CODES = true;
  static constexpr bool BY_FP32 = sizeof(T) == 2 && Number<T>::MAGIC == 0x43004300u;
  static constexpr uint32_t MIDDLE = 128;
  struct Zero {
    uint32_t bit0;
    float fp32;
  };
  static __device__ __forceinline__ Zero zero(uint32_t code) {
    return {Number<T>::MINUS_MAGIC + code * 0x00010001u, 8388608.0f + float(code)};
  }
  static __device__ __forceinline__ void decode(const uint32_t* low, const uint32_t*, int octet, Zero zero,
                                                uint32_t (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = low[2 * octet + i / 2];
      if constexpr (BY_FP32) {
        const float a = __uint_as_float(ptx::bytes(word, 0x4B000000u, 0x7440 + i % 2 * 2));
        const float b = __uint_as_float(ptx::bytes(word, 0x4B000000u, 0x7441 + i % 2 * 2));
        out[i] = ptx::pack2<T>(a - zero.fp32, b - zero.fp32);
      } else {
        const uint32_t code = ptx::bytes(word, 0x64646464u, i % 2 ? 0x4342 : 0x4140);
        out[i] = ptx::fma2<T>(code, Number<T>::ONE, zero.bit0);
      }
    }
  }
};

// fp16 or bf16 values, multiplied with activations of the same type.
template <typename T>
struct Float {
  using Type = T;
  static constexpr int LOW_BYTES = 16, HIGH_BYTES = 0;
  static constexpr bool CODES = false;
  static constexpr uint32_t MIDDLE = 0;
  struct Zero {};
  static __device__ __forceinline__ Zero zero(uint32_t) { return {}; }
  static __device__ __forceinline__ void decode(const uint32_t* low, const uint32_t*, int octet, Zero,
                                                uint32_t (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = low[4 * octet + i];
  }
};

}  // namespace ctp
