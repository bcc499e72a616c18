// __half for the emulator: the bits, and conversions that round to the nearest even.
#pragma once

#include <math.h>
#include <stdint.h>

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  const float sign = value.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? ldexpf(float(1024 + mantissa), exponent - 25) : ldexpf(float(mantissa), -24));
}

inline __half __float2half_rn(float value) {
  const uint16_t sign = signbit(value) ? 0x8000 : 0;
  const float magnitude = fabsf(value);
  if (isnan(value)) return {0x7FFF};
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7C00)};
  // In units of the spacing around `magnitude`: 2^-24 below 2^-14, else 1024 to 2047 spacings of its own.
  const int exponent = magnitude < 0x1p-14f ? -14 : ilogbf(magnitude);
  const int units = int(nearbyintf(ldexpf(magnitude, 10 - exponent)));
  return {uint16_t(sign | (units + ((exponent + 14) << 10)))};
}
