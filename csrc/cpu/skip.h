// Many rows of x and a weight with zeros: only what is not zero is multiplied, which beats the dense arithmetic limit.
//
// Lanes are rows of x. A slice of x, some steps of the sum by up to kSkipVectors * W rows, is transposed into L1 as
// xt[step][row]. For every column of y the non-zeros of these steps are listed; each value is broadcast and multiplied
// with its step of the slice. No load serves two columns, so the slice has to lie in L1.
//
// dx sums over rows of W, so its lists are columns of W: made by transposing a decoded panel, which pays from more rows
// of x on. (Tried and lost: dx^T in L1, to which each entry of a row of W adds its product; 8 cycles an entry on
// Zen 4.)
//
// A zero that is skipped would hide a NaN or an infinity of x: run() comes here with finite x only.
#pragma once

#include "lists.h"
#include "rows.h"

namespace {

constexpr int64_t kSkipWidth = 256;  // columns of a panel
constexpr int64_t kSkipBlock = 512;  // rows of x that share a panel
constexpr int64_t kListsAhead = 16;  // from the list that is made to the one whose bytes are asked for
constexpr int64_t kSkipStride = kSkipWidth + W;
constexpr int64_t kSkipWide = kListMost + W;
constexpr int64_t kSkipColumn = 2 * kSkipDepth;  // rows of W in a list of dx, at most

// c[0 .. kV W) += the list, of bf16 as it is stored or not, times xt. kChains sums for each vector hide the latency of
// an add.
template <int kV, int kChains, bool kStored>
void skip_tile(const List& list, const float* xt, float* c) {
  vf acc[kV * kChains];
#pragma GCC unroll 16
  for (int j = 0; j < kV * kChains; ++j) acc[j] = zero();
  // One load of values and one of places for four entries: loads are what limits this loop.
  const auto four = [&](vf values, int i) __attribute__((always_inline)) {
    const uint32_t places = peek<uint32_t>(list.places + i);
    const auto entry = [&](vf value, int e) {
      const float* x = xt + (places >> 8 * e & 0xff) * (kV * W);
#if defined(__aarch64__)
      asm("" : "+r"(x));  // or GCC adds the place to the address of every vector of xt
#endif
#pragma GCC unroll 16
      for (int v = 0; v < kV; ++v) {
        vf& sum = acc[v * kChains + e % kChains];
        sum = fma(value, load(x + v * W), sum);
      }
    };
    entry(pick<0>(values), 0);
    entry(pick<1>(values), 1);
    entry(pick<2>(values), 2);
    entry(pick<3>(values), 3);
  };
  if constexpr (kStored) {
    for (int i = 0; i < list.count; i += kSkipPad) four(repeat(list.stored + i), i);
    four(repeat(list.last), list.count);
  } else {
    for (int i = 0; i < list.count; i += kSkipPad) four(repeat(list.values + i), i);
  }
#pragma GCC unroll 16
  for (int v = 0; v < kV; ++v) {
    vf sum = add(acc[v * kChains], acc[v * kChains + 1]);
    if constexpr (kChains == 4) sum = add(sum, add(acc[v * kChains + 2], acc[v * kChains + 3]));
    store(c + v * W, add(load(c + v * W), sum));
  }
}

using SkipTile = void (*)(const List&, const float*, float*);
template <int kV, bool kStored>
SkipTile skip_tile_of(int vectors, bool four) {
  constexpr int kFour = kV <= kSkipFours ? 4 : 2;
  if (kV == 1 || vectors == kV) return four ? skip_tile<kV, kFour, kStored> : skip_tile<kV, 2, kStored>;
  if constexpr (kV > 1) return skip_tile_of<kV - 1, kStored>(vectors, four);
}

// How `rows` rows of x, a block of a thread's share, are cut into slices. What decides the order of a sum (steps) comes
// from the whole job, so that the number of threads does not change its bits.
struct Slices {
  int64_t height;          // of a slice, in vectors of rows, at most
  int64_t vectors, count;  // of rows; of slices
  int64_t steps;           // of the sum that a slice holds
  Slices(const Job& job, int64_t rows) {
    const int64_t all = (least(job.m, kSkipBlock) + W - 1) / W, fewest = (all + kSkipVectors - 1) / kSkipVectors;
    height = (all + fewest - 1) / fewest;
    vectors = (rows + W - 1) / W;
    count = (vectors + height - 1) / height;
    steps = least(kSkipFloats / (height * W) / kSkipDepth * kSkipDepth, job.transposed ? kSkipColumn : kListMost);
  }
  int64_t begin(int64_t slice) const { return vectors * slice / count; }  // its first vector
};

int64_t skip_floats(int64_t rows) {
  const int64_t block = round_up(least(rows, kSkipBlock), W);
  return kSkipFloats + kSkipWidth * block + kSkipWidth * list_floats(kListMost) + kSkipColumn * kSkipStride +
         kSkipWidth * (kSkipColumn + W) + W * kSkipWide;
}

// Memory of a thread.
struct Skip {
  float *slice, *c, *lists, *rows, *columns, *wide;
  Skip(float* scratch, int64_t block)
      : slice(scratch),
        c(slice + kSkipFloats),
        lists(c + kSkipWidth * block),
        rows(lists + kSkipWidth * list_floats(kListMost)),
        columns(rows + kSkipColumn * kSkipStride),
        wide(columns + kSkipWidth * (kSkipColumn + W)) {}
};

// Lists of columns k0 .. k0 + width - 1 of W, rows n0 .. n0 + depth - 1
template <class Decoder>
void list_columns(const Weight& w, const Decoder& decoder, int64_t n0, int64_t depth, int64_t k0, int64_t width,
                  const Skip& memory, List* lists) {
  const int64_t there = round_up(depth, kSkipDepth), stride = kSkipColumn + W;
  for (int64_t r = 0; r < there; ++r)
    if (r < depth)
      decoder.decode(w, n0 + r, k0, k0 + width, decoder.start(w, n0 + r, k0), kRowsAhead * w.k,
                     memory.rows + r * kSkipStride);
    else
      memset(memory.rows + r * kSkipStride, 0, sizeof(float) * kSkipStride);
  for (int64_t r = 0; r < there; r += W)
    for (int64_t c = 0; c < width; c += 4)
      transpose4(memory.rows + r * kSkipStride + c, kSkipStride, memory.columns + c * stride + r, stride);
  for (int64_t c = 0; c < width; ++c) {
    int count = 0;
    for (int64_t r = 0; r < there; r += kSkipDepth)
      count = append_dense(memory.columns + c * stride + r, r, lists[c], count);
    end_list(lists[c], count);
  }
}

template <class Decoder>
void skip_part(const Job& job, const Decoder& decoder, const Part& part, float* scratch) {
  const Weight& w = job.weight;
  const int64_t rows = part.row1 - part.row0, blocks = (rows + kSkipBlock - 1) / kSkipBlock, depth = job.depth();
  const int64_t block = blocks ? round_up((rows + blocks - 1) / blocks, W) : W;
  const Skip memory(scratch, block);
  for (int64_t m0 = part.row0; m0 < part.row1; m0 += block)
    for (int64_t c0 = part.column0; c0 < part.column1; c0 += kSkipWidth) {
      const int64_t m = least(part.row1 - m0, block), width = least(part.column1 - c0, kSkipWidth);
      const Slices slices(job, m);
      const bool four = slices.height <= kSkipFours, stored = w.values == CTP_BF16 && !job.transposed;
      const bool kept = slices.count > 1 || job.transposed;  // lists, until the last slice has used them
      List lists[kSkipWidth];
      int64_t slots[kSkipWidth];
      for (int64_t i = 0; i < width; ++i) {
        lists[i] = list_at(memory.lists + (kept ? i : i & 1) * list_floats(slices.steps), slices.steps);
        if (!job.transposed) slots[i] = decoder.start(w, c0 + i, 0);
      }
      memset(memory.c, 0, sizeof(float) * (size_t)(width * block));
      for (int64_t r0 = 0; r0 < depth; r0 += slices.steps) {
        const int64_t length = least(depth - r0, slices.steps);
        const auto list = [&](int64_t i) {
          // Nobody else sees that these bytes will be wanted: lists of a row are far apart in time, of a step in
          // memory.
          const int64_t later = i + kListsAhead, far = later - width, k = far < 0 ? r0 : r0 + length;
          if (k < depth) {
            const int64_t j = far < 0 ? later : least(far, i);
            decoder.list_ahead(w, c0 + j, k, least(k + slices.steps, depth), slots[j]);
          }
          slots[i] = decoder.list(w, c0 + i, r0, r0 + length, slots[i], lists[i]);
        };
        if (job.transposed)
          list_columns(w, decoder, r0, length, c0, width, memory, lists);
        else
          list(0);
        for (int64_t s = 0; s < slices.count; ++s) {
          const int64_t first = slices.begin(s), next = slices.begin(s + 1);
          transpose_rows(job, m0 + first * W, m - first * W, next - first, r0, length, memory.wide, kSkipWide,
                         memory.slice, (next - first) * W);
          const auto tile_of = stored ? skip_tile_of<kSkipVectors, true> : skip_tile_of<kSkipVectors, false>;
          const SkipTile tile = tile_of((int)(next - first), four);
          float* c = memory.c + first * W * width;  // of a slice (columns, its rows): in the order of use
          for (int64_t i = 0; i < width; ++i, c += (next - first) * W) {
            // The next list is made before this one is used: a load that needs two stores waits for both to reach L1.
            if (s == 0 && !job.transposed && i + 1 < width) list(i + 1);
            tile(lists[i], memory.slice, c);
          }
        }
      }
      for (int64_t s = 0; s < slices.count; ++s) {
        const int64_t first = slices.begin(s), next = slices.begin(s + 1);
        write_transposed(job, m0 + first * W, least(m, next * W) - first * W, c0, width, memory.c + first * W * width,
                         (next - first) * W);
      }
    }
}

// Whether every element of x is a number.
bool all_finite(const Job& job, int threads) {
  int found = 0;
  const int64_t depth = job.depth();
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : found) if (threads > 1)
  for (int64_t i = 0; i < job.m; ++i) {
    vf poison = zero();  // x * 0 is NaN where x is not finite
    int64_t k = 0;
    const int64_t step = W * size_of(job.dtype);
    const char* p = (const char*)x_at(job, i, 0);
    for (; k + W <= depth; k += W, p += step) poison = fma(widen(p, job.dtype), zero(), poison);
    if (k < depth) poison = fma(widen_some(p, job.dtype, depth - k), zero(), poison);
    found |= sum(poison) != 0;
  }
  return !found;
}

// Whether few enough entries of W are stored, and rows of x enough, for zeros to be worth skipping: where this crossed
// the other kernels at 4096 x 4096 (Zen 4, AVX-512 and AVX2). brain: whether x could be multiplied in bf16 instead.
inline bool skips(const Job& job, bool brain) {
  const Weight& w = job.weight;
  if (w.pattern == CTP_DENSE) return false;
  const double share = share_stored(w);
  const bool few = share < kFewStored;
  if (share > 0.6 || (brain && !few)) return false;
  if (job.transposed) return job.m >= (brain ? 128 : few ? 32 : 80);
  // Of a vector of rows of x, most have to be there: an empty lane costs as much as a row.
  const int64_t full = 3 * W / 4 * ((job.m + W - 1) / W);
  if (few) return job.m >= (brain ? 13 : 9);
  return job.m > kDotLimit || (job.m >= 12 && job.m >= full);
}

}  // namespace
