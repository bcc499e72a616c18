// The non-zeros of some steps of a sum as a list, for skip.h.
#pragma once

#include "decode.h"

namespace {

constexpr int64_t kSkipDepth = 64;                 // steps of the sum in a list, at least
constexpr int64_t kSkipFloats = kSkipDepth * 128;  // of the slice of x, 32 KB (24 or 48: slower): more steps if narrow
constexpr int64_t kListMost = 256;                 // steps of a list, at most: a place is a byte
constexpr int kSkipPad = 4;                        // a list is read so many entries at a time

// values[i] times step places[i] of the slice. Where the weight stores bf16, its stored entries are the values:
// `stored` holds all but the last kSkipPad or fewer, which are in `last`.
struct List {
  float* values;
  uint8_t* places;
  int32_t count;  // a multiple of kSkipPad; without `last`
  const uint16_t* stored;
  uint16_t last[kSkipPad];
};

// Floats of memory for a list of `steps` steps, and the list in such memory.
inline int64_t list_floats(int64_t steps) { return round_up(W + steps + 2 * W + (steps + 64 + W) / 4, 16); }
inline List list_at(float* memory, int64_t steps) {
  return {memory + W, (uint8_t*)(memory + W + steps + 2 * W), 0, nullptr, {}};
}

// The list has `count` entries in values and places: zeros up to a multiple of kSkipPad.
inline void end_list(List& list, int count) {
  store(list.values + count, zero());
  memset(list.places + count, 0, kSkipPad);
  list.count = (int32_t)round_up(count, kSkipPad);
}

// Appends the non-zeros of row[0 .. kSkipDepth), steps from `step` on, to the `count` entries there are; how many.
inline int append_dense(const float* row, int64_t step, const List& list, int count) {
  for (int64_t k = 0; k < kSkipDepth; k += W)
    count += compress(load(row + k), step + k, list.values + count, list.places + count);
  return count;
}

// The list of W[row, k0 .. k1) where the weight stores bf16: places only.
inline int64_t list_stored(const Weight& w, int64_t row, int64_t k0, int64_t k1, int64_t slot, List& list) {
  const uint8_t* mask = bitmap(w, row, k0);
  const int64_t steps = k1 - k0;
  uint8_t* places = list.places;
  int64_t step = 0;
  for (; step + 64 <= steps; step += 64, mask += 8) places += places64(peek<uint64_t>(mask), step, places);
  for (; step < steps; step += 8, ++mask) places += places64(*mask, step, places);
  memset(places, 0, kSkipPad);
  const int count = (int)(places - list.places), rest = count % kSkipPad;
  list.stored = (const uint16_t*)w.stored + slot;
  list.count = count - rest;
  uint64_t last = 0;
  if (__builtin_expect(slot + count >= kSkipPad, 1))  // what is read before the last `rest` entries is shifted out
    last = peek<uint64_t>(list.stored + count - kSkipPad) >> 16 * (kSkipPad - 1 - rest) >> 16;
  else
    for (int i = 0; i < rest; ++i) last |= (uint64_t)list.stored[i] << 16 * i;
  memcpy(list.last, &last, sizeof last);
  return slot + count;
}

// out[0 .. count) = the stored entries from `slot` on, all of one group; about `likely` of them.
template <class Values, class G>
CTP_ALWAYS_INLINE void list_entries(const Weight& w, int64_t slot, int count, int64_t likely, const G& grid,
                                    float* out) {
  if (!count) return;
  const int before = (int)(slot & 7);  // entries of the first eight that are not ours
  slot -= before;
  const int64_t there = w.stored_bytes * 8 / (Values::kWidth == 3 ? 2 : Values::kWidth) - slot;
  const auto entries = [&](int64_t i) __attribute__((always_inline)) {
    return grid(W > 8 && there - i > 8 ? Values::template raw<W>(w, slot + i) : Values::template raw<8>(w, slot + i));
  };
  store(out, drop(entries(0), before));
  out -= before;
  // As many as there mostly are without a look at the count, which nobody could predict.
  likely = least(likely, there);
  for (int64_t i = W; i < likely || i < before + count; i += W) store(out + i, entries(i));
}

// Appends the non-zeros of W[row, k .. end), steps from `step` on, fewer than kSkipDepth or of several groups.
template <class Pattern, class Values>
__attribute__((noinline)) int64_t list_decoded(const Weight& w, int64_t row, int64_t k, int64_t end, int64_t slot,
                                               int64_t step, const List& list, int& count) {
  alignas(64) float dense[kSkipDepth + W];
  slot = decode<Pattern, Values>(w, row, k, end, slot, kSkipDepth, dense);
  for (int64_t i = round_up(end - k, W); i < kSkipDepth; i += W) store(dense + i, zero());
  count = append_dense(dense, step, list, count);
  return slot;
}

// The list of W[row, k0 .. k1) by values and places.
template <class Pattern, class Values>
inline int64_t list_values(const Weight& w, int64_t row, int64_t k0, int64_t k1, int64_t slot, List& list) {
  int count = 0;
  for (int64_t k = k0; k < k1;) {
    if constexpr (Pattern::kSparse) {  // entries are stored as a list is
      const int64_t group = Values::kGrouped ? (uint32_t)k / (uint32_t)w.group : 0;
      const int64_t end = Values::kGrouped ? least((group + 1) * w.group, k1) : k1;
      const auto grid = Values::grid(w, row, group);
      const uint8_t* mask = bitmap(w, row, k);
      const int64_t likely = Pattern::entries(w, end - k) + (Pattern::kBlockStored ? 0 : 12);
      int past = count;
      for (; k + kSkipDepth <= end; k += kSkipDepth, mask += kSkipDepth / 8)
        past += places64(peek<uint64_t>(mask), k - k0, list.places + past);
      list_entries<Values>(w, slot, past - count, likely, grid, list.values + count);
      slot += past - count;
      count = past;
      if (k == end) continue;
    }
    const int64_t end = least(k + kSkipDepth, k1);
    slot = list_decoded<Pattern, Values>(w, row, k, end, slot, k - k0, list, count);
    k = end;
  }
  end_list(list, count);
  return slot;
}

// The list of W[row, k0 .. k1), at most kListMost inputs; as decode() in decode.h, but it prefetches nothing.
template <class Pattern, class Values>
int64_t list_row(const Weight& w, int64_t row, int64_t k0, int64_t k1, int64_t slot, List& list) {
  if constexpr (Pattern::kSparse && Values::kBrain) return list_stored(w, row, k0, k1, slot, list);
  return list_values<Pattern, Values>(w, row, k0, k1, slot, list);
}

// Prefetches what list_row reads, or what its list points to.
template <class Pattern, class Values>
void list_ahead(const Weight& w, int64_t row, int64_t k0, int64_t k1, int64_t slot) {
  // And some more: entries begin anywhere in a line, and half the lists have more than on average.
  for (int64_t i = 0; i < Pattern::entries(w, k1 - k0) + 64; i += 64) Values::ahead(w, slot, i);
  __builtin_prefetch(bitmap(w, row, k0));
  asm volatile("");  // or GCC takes this for a function without effects: see prefetch() in values.h
}

}  // namespace
