// The non-zeros of some steps of a sum as a list, for skip.h.
#pragma once

#include "decode.h"

namespace {

constexpr int64_t kSkipDepth = 64;                   // steps of the sum in a list, at least
constexpr int64_t kSkipFloats = kSkipDepth * 6 * W;  // of the slice of x: more steps where it is narrow
constexpr int64_t kListMost = kSkipDepth * 6;        // steps of a list, at most
constexpr int kSkipPad = 4;                          // a list ends with zeros up to a multiple of this

// values[i] times step places[i] / pitch of the slice, where pitch is the bytes from one step to the next
struct List {
  float* values;
  uint16_t* places;
  int32_t count;  // a multiple of kSkipPad
};

// Floats of memory for a list of `steps` steps, and the list in such memory.
inline int64_t list_floats(int64_t steps) { return round_up(W + steps + 2 * W + (steps + 4 * W) / 2, 16); }
inline List list_at(float* memory, int64_t steps) { return {memory + W, (uint16_t*)(memory + W + steps + 2 * W), 0}; }

inline void end_list(List& list) {
  store(list.values + list.count, zero());
  store((float*)(list.places + list.count), zero());
  list.count = (int32_t)round_up(list.count, kSkipPad);
}

// Appends the non-zeros of row[0 .. kSkipDepth), steps from `step` on.
inline void append_dense(const float* row, int64_t step, int64_t pitch, List& list) {
  for (int64_t k = 0; k < kSkipDepth; k += W)
    list.count += compress(load(row + k), step + k, pitch, list.values + list.count, list.places + list.count);
}

// The list of W[row, k0 .. k1), at most kListMost inputs; as decode() in decode.h.
template <class Pattern, class Values>
int64_t list_row(const Weight& w, int64_t row, int64_t k0, int64_t k1, int64_t slot, int64_t pitch, List& list) {
  list.count = 0;
  for (int64_t k = k0; k < k1; k += kSkipDepth) {
    const int64_t group = Values::kGrouped ? (uint32_t)k / (uint32_t)w.group : 0;
    if constexpr (Pattern::kSparse) {
      if (k + 64 <= k1 && (!Values::kGrouped || k + 64 <= (group + 1) * w.group)) {  // stored as a list is
        const int count = places64(peek<uint64_t>(bitmap(w, row, k)), k - k0, pitch, list.places + list.count);
        const auto grid = Values::grid(w, row, group);
        float* out = list.values + list.count;
#if defined(__AVX512VBMI2__)
        stored64<Pattern, Values>(w, slot, count, grid, out);
#else
        const int64_t past = slot + count;
        const int before = (int)(slot & 7);  // entries of the first eight that are not ours
        if (count) {
          const vf kept = first(load(out - before), before);
          store(out - before, add(kept, keep(grid(Values::template raw<8>(w, slot - before)), 0xffu << before)));
        }
        for (int64_t s = slot - before + 8; s < past; s += 8)
          store(out + (s - slot), grid(Values::template raw<8>(w, s)));
#endif
        list.count += count;
        slot += count;
        continue;
      }
    }
    const int64_t end = least(k + kSkipDepth, k1);
    alignas(64) float dense[kSkipDepth + W];
    slot = decode<Pattern, Values>(w, row, k, end, slot, kSkipDepth, dense);
    for (int64_t i = round_up(end - k, W); i < kSkipDepth; i += W) store(dense + i, zero());
    append_dense(dense, k - k0, pitch, list);
  }
  // The row's next list comes after those of all other rows, and so does another row's first: nobody else sees that
  // they will be wanted.
  const auto want = [&](int64_t row, int64_t k, int64_t slot) __attribute__((always_inline)) {
    for (int64_t i = 0; i < Pattern::entries(w, k1 - k0); i += 64) Values::ahead(w, slot, i);
    __builtin_prefetch(bitmap(w, row, k + 64));
  };
  want(row, k1, slot);
  if (const int64_t later = row + kRowsAhead; k0 == 0 && later < w.n) want(later, 0, Pattern::start(w, later, 0));
  end_list(list);
  return slot;
}

}  // namespace
