// How stored entries are written (ctp_kernels/values.py draws the bits): one policy for each kind of value.
//
//   raw<S>(weight, slot)     S entries from `slot` (a multiple of 8), S = 8 or W, one a lane; nothing beyond is read
//   ahead(weight, slot, further)  prefetches 64 entries from slot + further on
//   grid(weight, row, group) a functor from raw lanes to their fp32 values in that group
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using ctp::Weight;

// GCC takes a function that only prefetches for one without effects: where it does not inline it, it drops the call.
#define CTP_ALWAYS_INLINE __attribute__((always_inline)) inline

struct Identity {
  vf operator()(vf v) const { return v; }
};

// Asks for the bytes of the 64 entries of kBits bits from slot + further on, which may lie past the end. The
// processor's own prefetch stops at every page and does not see past a loop that waits for arithmetic. Into L2: L1
// waits for no more than 24 lines at a time, which is half the speed of memory (Zen 4).
template <int kBits>
CTP_ALWAYS_INLINE void prefetch(const void* stored, int64_t slot, int64_t further) {
  const char* p = (const char*)stored + (further * kBits >> 3) + (slot * kBits >> 3);
  for (int i = 0; i < 8 * kBits; i += 64) __builtin_prefetch(p + i, 0, 2);
}

template <int kValues>
struct Floating {
  static constexpr bool kGrouped = false, kBrain = kValues == CTP_BF16;
  static constexpr int kWidth = kValues == CTP_FP32 ? 32 : 16;
  CTP_ALWAYS_INLINE static void ahead(const Weight& w, int64_t slot, int64_t further) {
    prefetch<kWidth>(w.stored, slot, further);
  }
  static Identity grid(const Weight&, int64_t, int64_t) { return {}; }
  template <int S>
  static vf raw(const Weight& w, int64_t slot) {
    if constexpr (kValues == CTP_FP32) return from_fp32<S>((const float*)w.stored + slot);
    if constexpr (kValues == CTP_FP16) return from_fp16<S>((const uint16_t*)w.stored + slot);
    if constexpr (kValues == CTP_BF16) return from_bf16<S>((const uint16_t*)w.stored + slot);
  }
};

inline float scale_of(const Weight& w, int64_t row, int64_t group) {
  const int64_t i = row * w.groups + group;
  return w.scale_dtype == CTP_FP16 ? half(((const uint16_t*)w.scales)[i]) : ((const float*)w.scales)[i];
}

template <int kBits>
struct Coded {
  static constexpr bool kGrouped = true, kBrain = false;
  static constexpr int kWidth = kBits;
  CTP_ALWAYS_INLINE static void ahead(const Weight& w, int64_t slot, int64_t further) {
    prefetch<kBits == 3 ? 2 : kBits>(w.stored, slot, further);
    if constexpr (kBits == 3) prefetch<1>(w.stored_hi, slot, further);
  }
  static Grid<kBits> grid(const Weight& w, int64_t row, int64_t group) {
    const float zero = w.symmetric ? (float)(1 << (kBits - 1)) : (float)w.zeros[row * w.groups + group];
    return {w.scales ? scale_of(w, row, group) : 1.0f, zero};  // without scales (amx.h), codes less their zeros
  }
  template <int S>
  static vf raw(const Weight& w, int64_t slot) {
    const uint8_t* low = (const uint8_t*)w.stored;
    if constexpr (kBits == 8) return codes8<S>(low + slot);
    if constexpr (kBits == 4) return codes4<S>(low + (slot >> 1));
    if constexpr (kBits == 3) return codes3<S>(low + (slot >> 2), (const uint8_t*)w.stored_hi + (slot >> 3));
    if constexpr (kBits == 2) return codes2<S>(low + (slot >> 2));
  }
};

}  // namespace
