// csrc/cuda/ptx.cuh for a CPU: what each instruction does to the registers of a warp, from the tables of the PTX ISA.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace emulator {

// fp16 and bf16 bits as floats; a table, for the conversion is half of the work.
template <typename T>
inline float number(uint16_t bits) {
  if constexpr (std::is_same<T, __half>::value) {
    static const std::vector<float> table = [] {
      std::vector<float> t(65536);
      for (int i = 0; i < 65536; ++i) t[i] = __half2float(__half{uint16_t(i)});
      return t;
    }();
    return table[bits];
  } else {
    return __bfloat162float(__nv_bfloat16{bits});
  }
}
template <typename T>
inline uint16_t bits_of(float value) {
  if constexpr (std::is_same<T, __half>::value) return __float2half_rn(value).bits;
  return __float2bfloat16_rn(value).bits;
}
inline uint16_t half_of(uint32_t pair, int half) { return uint16_t(pair >> 16 * half); }

struct MmaLane {
  float* c;
  uint32_t a[4], b[4], metadata;
};

// Entry (row, column) of the stored 16 x 16 matrix A: which lane, register and half holds it.
template <typename T>
inline float a_entry(MmaLane* const* all, int row, int column) {
  const int lane = row % 8 * 4 + column % 8 / 2, reg = row / 8 + column / 8 * 2;
  return number<T>(half_of(all[lane]->a[reg], column % 2));
}
// Entry (row, column) of B, 16 or 32 rows.
template <typename T>
inline float b_entry(MmaLane* const* all, int row, int column) {
  return number<T>(half_of(all[column * 4 + row % 8 / 2]->b[row / 8], row % 2));
}
// C += a . B for row-major a (16, K): products exact, summed in fp64, rounded once. A GPU rounds more often. Entries of
// a that are not stored are not multiplied: a NaN beside them is lost.
template <typename T, int K>
inline void accumulate(MmaLane* const* all, const float (&a)[16][K], const bool (*stored)[K] = nullptr) {
  float b[K][8];
  for (int k = 0; k < K; ++k)
    for (int column = 0; column < 8; ++column) b[k][column] = b_entry<T>(all, k, column);
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      float& c = all[row % 8 * 4 + column / 2]->c[row / 8 * 2 + column % 2];
      double sum = 0;
      for (int k = 0; k < K; ++k)
        if (stored == nullptr || stored[row][k]) sum += double(a[row][k]) * b[k][column];
      c = float(c + sum);
    }
}

}  // namespace emulator

namespace ctp {
namespace ptx {

inline unsigned char* shared_memory() { return emulator::block->shared; }
inline void sync_threads(int line = __builtin_LINE()) { emulator::barrier(line); }
inline void sync_warp(int line = __builtin_LINE()) {
  int none = 0;
  emulator::warp_wide("syncwarp", line, none, [](int**) {});
}

template <typename V>
V load_shared(const void* from) {
  emulator::check_shared(from, sizeof(V), false);
  V value;
  memcpy(&value, from, sizeof value);
  return value;
}
template <typename V>
void store_shared(void* to, V value) {
  emulator::check_shared(to, sizeof(V), true);
  memcpy(to, &value, sizeof value);
}

// Nothing is written before the wait: a kernel that reads early, reads too early.
template <int BYTES>
void copy_async(void* shared, const void* global, int valid) {
  if (valid < 0 || valid > BYTES) emulator::fail("cp.async of more bytes than its size");
  if (reinterpret_cast<uintptr_t>(global) % BYTES != 0) emulator::fail("cp.async from a misaligned address");
  emulator::check_shared(shared, BYTES, true, emulator::Byte::UNDER_WAY);
  emulator::block->fiber().open.push_back({static_cast<unsigned char*>(shared), global, BYTES, valid});
}
inline void commit_copies() {
  emulator::Fiber& fiber = emulator::block->fiber();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int PENDING>
void wait_copies() {
  if (emulator::bugs & emulator::NO_WAIT) return;
  emulator::Fiber& fiber = emulator::block->fiber();
  while (int(fiber.groups.size()) > PENDING) {
    for (const emulator::Copy& copy : fiber.groups.front()) {
      emulator::check_shared(copy.shared, copy.bytes, true);
      memset(copy.shared, 0, copy.bytes);
      memcpy(copy.shared, copy.global, copy.valid);
    }
    fiber.groups.pop_front();
  }
}

inline void ldmatrix_x4(const void* row, uint32_t (&out)[4], int line = __builtin_LINE()) {
  struct Lane {
    const unsigned char* row;
    uint32_t* out;
  } mine = {static_cast<const unsigned char*>(row), out};
  emulator::check_shared(row, 16, false);
  emulator::warp_wide("ldmatrix", line, mine, [](Lane** all) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        memcpy(&all[lane]->out[matrix], all[8 * matrix + lane / 4]->row + 4 * (lane % 4), 4);
  });
}

inline uint4 load_once(const void* global) { return *static_cast<const uint4*>(global); }
template <typename V>
V load_global(const void* global) {
  return *static_cast<const V*>(global);
}

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line = __builtin_LINE()) {
  emulator::MmaLane mine = {c, {a[0], a[1], a[2], a[3]}, {b0, b1, 0, 0}, 0};
  if (emulator::bugs & emulator::SWAP_FRAGMENT) std::swap(mine.a[1], mine.a[2]);
  if (emulator::bugs & emulator::NO_CONVERGENCE && threadIdx.x % 32 == 5) {
    emulator::bugs &= ~emulator::NO_CONVERGENCE;  // lane 5 leaves out one instruction
    return;
  }
  emulator::warp_wide("mma", line, mine, [](emulator::MmaLane** all) {
    float full[16][16];
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k) full[row][k] = emulator::a_entry<T>(all, row, k);
    emulator::accumulate<T>(all, full);
  });
}

template <typename T, int SELECTOR>
void mma_sparse(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata,
                int line = __builtin_LINE()) {
  emulator::MmaLane mine = {c, {a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, metadata};
  if (emulator::bugs & emulator::SWAP_FRAGMENT) std::swap(mine.a[1], mine.a[2]);
  emulator::warp_wide("mma.sp", line, mine, [](emulator::MmaLane** all) {
    const int selector = emulator::bugs & emulator::SWAP_SELECTOR ? 1 - SELECTOR : SELECTOR;
    float full[16][32] = {};
    bool stored[16][32] = {};
    for (int row = 0; row < 16; ++row)
      for (int quad = 0; quad < 8; ++quad) {
        const uint32_t word = all[row % 8 * 4 + 2 * selector + quad / 4]->metadata;
        const uint32_t two = word >> (row / 8 * 16 + quad % 4 * 4), first = two & 3, second = two >> 2 & 3;
        if (first >= second) emulator::fail("the places of mma.sp::ordered_metadata do not rise");
        full[row][4 * quad + first] = emulator::a_entry<T>(all, row, 2 * quad);
        full[row][4 * quad + second] = emulator::a_entry<T>(all, row, 2 * quad + 1);
        stored[row][4 * quad + first] = stored[row][4 * quad + second] = true;
      }
    emulator::accumulate<T>(all, full, stored);
  });
}

template <typename T>
uint32_t pack2(float low, float high) {
  return emulator::bits_of<T>(low) | uint32_t(emulator::bits_of<T>(high)) << 16;
}
// One rounding of a product and a sum that are exact in fp64 for 16-bit operands.
template <typename T>
uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (int half = 0; half < 2; ++half) {
    const double product =
        double(emulator::number<T>(emulator::half_of(a, half))) * emulator::number<T>(emulator::half_of(b, half));
    const double exact = product + emulator::number<T>(emulator::half_of(c, half));
    // To fp32 by round-to-odd, so that the second rounding sees on which side of a tie the number lay.
    float near = float(exact);
    if (near != exact && isfinite(near)) {
      uint32_t bits;
      memcpy(&bits, &near, sizeof bits);
      if (!(bits & 1)) near = nextafterf(near, exact > near ? INFINITY : -INFINITY);
    }
    out |= uint32_t(emulator::bits_of<T>(near)) << 16 * half;
  }
  return out;
}

inline uint32_t bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = selector >> 4 * i & 15;
    if (from > 7) emulator::fail("prmt's sign mode is not emulated");
    out |= uint32_t(both >> 8 * from & 0xFF) << 8 * i;
  }
  return out;
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
  return shift >= 32 ? high : uint32_t((uint64_t(high) << 32 | low) >> shift);
}
inline int ones(uint32_t word) { return __builtin_popcount(word); }

inline void wait_for_previous() {}
inline void let_next_start() {}
inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
template <typename P>
void keep(P*&) {}

inline uint32_t arrive(uint32_t* counter) { return (*counter)++; }
inline void fence() {}
inline float load_l2(const float* from) { return *from; }

}  // namespace ptx
}  // namespace ctp
