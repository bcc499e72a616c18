// Which entries of a row are stored (ctp_kernels/patterns.py draws the bitmap): one policy for each pattern.
//
//   start(weight, row, k)        the slot of the first stored entry at or after input k (a multiple of 8)
//   stored(weight, row, k0, k1)  stored entries among inputs k0 .. k1 - 1
//   kBlockStored                 stored entries among 64 inputs, or 0 where that depends
//   entries(weight, inputs)      stored entries among so many inputs, on average
#pragma once

#include "values.h"

namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t v, int64_t unit) { return (v + unit - 1) / unit * unit; }

inline int64_t popcount(const uint8_t* bytes, int64_t count) {
  int64_t bits = 0, i = 0;
  for (; i + 8 <= count; i += 8) bits += __builtin_popcountll(peek<uint64_t>(bytes + i));
  for (; i < count; ++i) bits += __builtin_popcount(bytes[i]);
  return bits;
}

inline const uint8_t* bitmap(const Weight& w, int64_t row, int64_t k) {
  return w.mask + row * ((w.k + 7) >> 3) + (k >> 3);
}

// The 32 bits of a plane from `slot` on, a multiple of 4. No byte beyond them is read.
inline uint32_t bits32_at(const uint8_t* plane, int64_t slot) {
  const uint8_t* at = plane + (slot >> 3);
  const uint32_t bits = peek<uint32_t>(at);
  return slot & 4 ? bits >> 4 | (uint32_t)at[4] << 28 : bits;
}

struct Dense {
  static constexpr bool kSparse = false;
  static constexpr int kBlockStored = 64;
  static int64_t start(const Weight& w, int64_t row, int64_t k) { return row * ((w.k + 7) & ~7) + k; }
  static int64_t entries(const Weight&, int64_t inputs) { return inputs; }
};

struct Sparse24 {
  static constexpr bool kSparse = true;
  static constexpr int kBlockStored = 32;
  static int64_t start(const Weight& w, int64_t row, int64_t k) { return row * ((w.k / 2 + 7) & ~7) + k / 2; }
  static int64_t stored(const Weight&, int64_t, int64_t k0, int64_t k1) { return (k1 - k0) / 2; }
  static int64_t entries(const Weight&, int64_t inputs) { return inputs / 2; }
};

struct Unstructured {
  static constexpr bool kSparse = true;
  static constexpr int kBlockStored = 0;
  static int64_t start(const Weight& w, int64_t row, int64_t k) {
    const int64_t tile = k >> 7;
    return (int64_t)w.row_offsets[row] * 8 + w.tile_offsets[tile * w.n + row] +
           popcount(bitmap(w, row, tile << 7), (k & 127) >> 3);
  }
  static int64_t stored(const Weight& w, int64_t row, int64_t k0, int64_t k1) {
    return popcount(bitmap(w, row, k0), (k1 - k0 + 7) >> 3);
  }
  static int64_t entries(const Weight& w, int64_t inputs) { return inputs * w.density >> 8; }
};

constexpr int64_t kRowsAhead = 8;  // rows of W, where a panel goes down its rows
constexpr int64_t kAhead = 4096;   // entries; 2 KB of int4 (tried: 512 B to 4 KB, on Ice Lake)

// The share of entries that are stored, and what counts as few.
constexpr double kFewStored = 0.35;
inline double share_stored(const Weight& w) {
  if (w.pattern == CTP_UNSTRUCTURED) return (double)w.row_offsets[w.n] * 8 / ((double)w.n * (double)w.k);
  return w.pattern == CTP_SPARSE24 ? 0.5 : 1;
}

}  // namespace
