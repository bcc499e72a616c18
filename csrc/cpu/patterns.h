// Which entries of a row are stored (ctp_kernels/patterns.py draws the bitmap): one policy for each pattern, and the
// decoder that composes a pattern with a kind of value.
//
//   start(weight, row, k)        the slot of the first stored entry at or after input k (a multiple of 8)
//   stored(weight, row, k0, k1)  stored entries among inputs k0 .. k1 - 1
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

struct Dense {
  static constexpr bool kSparse = false;
  static int64_t start(const Weight& w, int64_t row, int64_t k) { return row * ((w.k + 7) & ~7) + k; }
};

struct Sparse24 {
  static constexpr bool kSparse = true;
  static int64_t start(const Weight& w, int64_t row, int64_t k) { return row * ((w.k / 2 + 7) & ~7) + k / 2; }
  static int64_t stored(const Weight&, int64_t, int64_t k0, int64_t k1) { return (k1 - k0) / 2; }
};

struct Unstructured {
  static constexpr bool kSparse = true;
  static int64_t start(const Weight& w, int64_t row, int64_t k) {
    return (int64_t)w.row_offsets[row] * 8 + popcount(bitmap(w, row, 0), k >> 3);
  }
  static int64_t stored(const Weight& w, int64_t row, int64_t k0, int64_t k1) {
    return popcount(bitmap(w, row, k0), (k1 - k0 + 7) >> 3);
  }
};

// One run of inputs k .. end - 1 that share a grid; `later`: the slot of the next chunk to prefetch from meanwhile.
// Both runs call sink(k, lanes, i) for every W inputs, zeros past `end`; i counts 0..3 within a turn of the loop, so
// that a sink may keep four sums and hide the latency of an add.

constexpr int64_t kAhead = 4096;  // entries; 2 KB of int4 (tried: 512 B to 4 KB, on Ice Lake)

template <class Values, class G, class Sink>
inline void dense_run(const Weight& w, const G& grid, int64_t slot, int64_t k, int64_t end, Sink& sink) {
  for (; k + 4 * W <= end; k += 4 * W, slot += 4 * W) {
    Values::ahead(w, slot + kAhead);
    sink(k, grid(Values::template raw<W>(w, slot)), 0);
    sink(k + W, grid(Values::template raw<W>(w, slot + W)), 1);
    sink(k + 2 * W, grid(Values::template raw<W>(w, slot + 2 * W)), 2);
    sink(k + 3 * W, grid(Values::template raw<W>(w, slot + 3 * W)), 3);
  }
  for (; k + W <= end; k += W, slot += W) sink(k, grid(Values::template raw<W>(w, slot)), 0);
  if (k < end) {  // a row is stored in whole eights of slots: never read more of them than it has
    const vf raw = W > 8 && end - k > 8 ? Values::template raw<W>(w, slot) : Values::template raw<8>(w, slot);
    sink(k, first(grid(raw), (int)(end - k)), 0);
  }
}

template <class Values, class G, class Sink>
inline const float* sparse_run(const Weight& w, int64_t later, const G& grid, const uint8_t* bytes, const float* next,
                               int64_t k, int64_t end, Sink& sink) {
  const auto step = [&](int64_t at, unsigned bits, int i) {
    const vf entries = grid(expand(load(next), bits));
    sink(at, Values::kGrouped ? keep(entries, bits) : entries, i);  // a code of zero is not a value of zero
    next += __builtin_popcount(bits);
  };
  const auto whole = [&]() -> unsigned {
    const unsigned bits = W == 16 ? peek<uint16_t>(bytes) : *bytes;
    bytes += W / 8;
    return bits;
  };
  const float* const begin = next;
  for (; k + 4 * W <= end; k += 4 * W) {
    if constexpr (!Values::kGrouped) Values::ahead(w, later + (next - begin));  // codes: few bytes, nothing gained
    step(k, whole(), 0);
    step(k + W, whole(), 1);
    step(k + 2 * W, whole(), 2);
    step(k + 3 * W, whole(), 3);
  }
  for (; k + W <= end; k += W) step(k, whole(), 0);
  if (k < end) step(k, W > 8 && end - k > 8 ? whole() : *bytes, 0);  // bits past K are zero
  return next;
}

// Floats of spare room that decode needs for `inputs` inputs.
inline int64_t spare_floats(int64_t inputs) { return inputs + 4 * W; }

// Calls sink for inputs k0 .. k1 - 1 of a row (see above) and returns the slot after the last. k0 is a multiple of 8;
// so is k1, or it is K. `slot` is start(k0). A sparse pattern first unpacks the stored entries into `spare`.
template <class Pattern, class Values, class Sink>
inline int64_t decode(const Weight& w, int64_t row, int64_t k0, int64_t k1, int64_t slot, float* spare, Sink& sink) {
  const float* next = spare;
  int64_t past = slot + (k1 - k0);
  if constexpr (Pattern::kSparse) {
    past = slot + Pattern::stored(w, row, k0, k1);
    float* out = spare;
    int64_t s = slot & ~7;
    next += slot - s;
    for (; s + W <= past; s += W, out += W) store(out, Values::template raw<W>(w, s));
    for (; s < past; s += 8, out += 8) store(out, Values::template raw<8>(w, s));
  }
  int64_t group = Values::kGrouped ? (uint32_t)k0 / (uint32_t)w.group : 0;
  for (int64_t k = k0; k < k1; ++group) {
    const int64_t end = Values::kGrouped ? least((group + 1) * w.group, k1) : k1;
    const auto grid = Values::grid(w, row, group);
    if constexpr (Pattern::kSparse)
      next = sparse_run<Values>(w, past + (next - spare), grid, bitmap(w, row, k), next, k, end, sink);
    else
      dense_run<Values>(w, grid, slot + k - k0, k, end, sink);
    k = end;
  }
  return past;
}

}  // namespace
