// The decoder that composes a pattern with a kind of value.
#pragma once

#include "patterns.h"
#if defined(__AVX512VBMI2__)
#include "blocks.h"
#endif

namespace {

// One run of inputs k .. end - 1 that share a grid; `later`: the slot of the next chunk to prefetch from meanwhile.
// Both runs call sink(k, lanes, i) for every W inputs, zeros past `end`; i counts 0..3 within a turn of the loop, so
// that a sink may keep four sums and hide the latency of an add.

template <class Values, class G, class Sink>
inline void dense_run(const Weight& w, const G& grid, int64_t slot, int64_t k, int64_t end, int64_t ahead, Sink& sink) {
  for (; k + 4 * W <= end; k += 4 * W, slot += 4 * W) {
    Values::ahead(w, slot + ahead);
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
inline void sparse_run(const Weight& w, int64_t later, const G& grid, const uint8_t* bytes, const float* next,
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
}

// The sink that keeps what is decoded: input k at out[k].
struct Store {
  float* out;
  void operator()(int64_t k, vf v, int) const { store(out + k, v); }
};

// Floats of spare room that decode needs for `inputs` inputs.
inline int64_t spare_floats(int64_t inputs) { return inputs + 4 * W; }

// Calls sink for inputs k0 .. k1 - 1 of a row (see above) and returns the slot after the last. k0 is a multiple of 8;
// so is k1, or it is K. `slot` is start(k0). ahead: how many inputs further on to prefetch from: where the caller will
// go next, some hundred cycles later (a panel that waited for each row took a third more time at 32 rows of x; Zen 4).
// A sparse pattern unpacks the stored entries of a run into `spare`; where blocks.h has its instructions, only those of
// the last, partial block.
template <class Pattern, class Values, class Sink>
inline int64_t decode(const Weight& w, int64_t row, int64_t k0, int64_t k1, int64_t slot, int64_t ahead, float* spare,
                      Sink& sink) {
  int64_t group = Values::kGrouped ? (uint32_t)k0 / (uint32_t)w.group : 0;
  for (int64_t k = k0; k < k1; ++group) {
    const int64_t end = Values::kGrouped ? least((group + 1) * w.group, k1) : k1;
    const auto grid = Values::grid(w, row, group);
#if defined(__AVX512VBMI2__)
    Blocks<Pattern, Values> blocks(w, row, k, slot);
    for (; k + 64 <= end; k += 64) {
      const Held held = blocks.template next<false>(w, ahead);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sink(k + 16 * i, blocks.lanes(held, grid, i), i);
    }
    slot = blocks.slot;
    if (k == end) continue;
#endif
    if constexpr (Pattern::kSparse) {
      const int64_t past = slot + Pattern::stored(w, row, k, end), from = slot & ~7;
      int64_t s = from;
      float* out = spare;
      for (; s + W <= past; s += W, out += W) store(out, Values::template raw<W>(w, s));
      for (; s < past; s += 8, out += 8) store(out, Values::template raw<8>(w, s));
      sparse_run<Values>(w, past, grid, bitmap(w, row, k), spare + (slot - from), k, end, sink);
      slot = past;
    } else {
      dense_run<Values>(w, grid, slot, k, end, ahead, sink);
      slot += end - k;
    }
    k = end;
  }
  return slot;
}

}  // namespace
