// The decoder that composes a pattern with a kind of value.
#pragma once

#include "blocks.h"

namespace {

// Inputs k .. end - 1 of a row: whole blocks, or fewer than 64 inputs, in one group; or a block whose halves lie in
// two.
struct Run {
  int64_t group, second, end;
};
template <class Values>
inline Run run_at(const Weight& w, int64_t k, int64_t k1) {
  const int64_t group = Values::kGrouped ? (uint32_t)k / (uint32_t)w.group : 0;
  const int64_t left = Values::kGrouped ? least((group + 1) * w.group, k1) - k : k1 - k;
  if (left == 32 && w.group >= 32 && k + 64 <= k1) return {group, group + 1, k + 64};
  return {group, group, k + (left < 64 ? left : left & ~63)};
}

// A run of fewer than 64 inputs, k .. end - 1: out[0 .. end - k), then zeros up to a multiple of W.

template <class Values, class G>
inline void dense_run(const Weight& w, const G& grid, int64_t slot, int64_t count, float* out) {
  for (; count >= W; count -= W, slot += W, out += W) store(out, grid(Values::template raw<W>(w, slot)));
  if (count > 0) {  // a row is stored in whole eights of slots: never read more of them than it has
    const vf raw = W > 8 && count > 8 ? Values::template raw<W>(w, slot) : Values::template raw<8>(w, slot);
    store(out, first(grid(raw), (int)count));
  }
}

template <class Values, class G>
inline void sparse_run(const G& grid, const uint8_t* bytes, const float* next, int64_t count, float* out) {
  for (; count > 0; count -= W, bytes += W / 8, out += W) {
    const unsigned bits = W > 8 && count > 8 ? peek<uint16_t>(bytes) : *bytes;  // those past K are zero
    const vf entries = grid(expand(load(next), bits));
    store(out, Values::kGrouped ? keep(entries, bits) : entries);  // a code of zero is not a value of zero
    next += __builtin_popcount(bits);
  }
}

constexpr int64_t kSpare = 64 + 4 * W;  // the entries of a run, those before them in eight, and a vector

// out[0 .. k1 - k0) = W[row, k0 .. k1), then zeros up to a multiple of W; returns the slot after the last. k0 is a
// multiple of 8; so is k1, or it is K. `slot` is start(k0). ahead: how many inputs further on to prefetch from: where
// the caller will go next, some hundred cycles later (a panel that waited for each row took a third more time at 32
// rows of x; Zen 4).
template <class Pattern, class Values>
int64_t decode(const Weight& w, int64_t row, int64_t k0, int64_t k1, int64_t slot, int64_t ahead, float* out) {
  using B = Blocks<Pattern, Values>;
  B blocks(w, row, k0, slot, ahead);
  for (int64_t k = k0; k < k1;) {
    const Run run = run_at<Values>(w, k, k1);
    const int64_t end = run.end;
    const auto grid = Values::grid(w, row, run.group);
    if (end - k >= 64) {
      const auto second = run.second == run.group ? grid : Values::grid(w, row, run.second);
      for (; k < end; k += 64, out += 64) {
        const Held held = blocks.template next<false>(w, grid, second);
#pragma GCC unroll 8
        for (int i = 0; i < 64 / W; ++i) store(out + W * i, B::lanes(w, held, W * i < 32 ? grid : second, i));
      }
      continue;
    }
    slot = blocks.slot;
    Values::ahead(w, slot, Pattern::entries(w, ahead));
    if constexpr (Pattern::kSparse) {
      alignas(64) float spare[kSpare];  // the entries, from a multiple of 8 on; then each goes to its place
      const int64_t past = slot + Pattern::stored(w, row, k, end), from = slot & ~7;
      float* entries = spare;
      for (int64_t s = from; s < past; s += 8, entries += 8) store(entries, Values::template raw<8>(w, s));
      sparse_run<Values>(grid, bitmap(w, row, k), spare + (slot - from), end - k, out);
      slot = past;
    } else {
      dense_run<Values>(w, grid, slot, end - k, out);
      slot += end - k;
    }
    out += end - k;
    k = end;
    blocks = B(w, row, k, slot, ahead);
  }
  return blocks.slot;
}

}  // namespace
