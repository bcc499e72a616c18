// compute = CTP_INT8_ACTIVATIONS: sums of integers. With x ~ sx q over a segment of inputs (see ctp.h),
//
//   y = sum over segments of sw sx (sum of codes q) - sw zero (sx sum of q)
//
// A pruned entry is decoded as the code `zero`. A few rows of x: four rows of W are decoded into L1 as bytes and
// multiplied as dot products. Many rows: a panel of codes, panel[t][k / 4][column][k % 4], serves a block of rows.
#pragma once

#include "dots.h"
#include "rows.h"

namespace {

constexpr int64_t kInt8Chunk = 512;  // inputs of a panel: kTile x kInt8Chunk bytes of it stay in L1
constexpr int64_t kInt8Width = 256;  // columns of a panel
constexpr int64_t kInt8Block = 256;  // rows of x that share a panel
constexpr int64_t kInt8Stride = kInt8Chunk + 64;
constexpr int64_t kInt8DotLimit = 4;

// ---- Codes, one a byte --------------------------------------------------------------------------------------------

// Byte i of the result is code i of eight codes of kBits bits.
template <int kBits>
inline uint64_t spread(uint64_t bits) {
  if constexpr (kBits == 8) return bits;
  constexpr int kGap = 8 - kBits;
  bits &= (1ull << 8 * kBits % 64) - 1;
  bits = (bits | bits << 4 * kGap) & ~0ull / 0xffffffff * ((1ull << 4 * kBits % 64) - 1);
  bits = (bits | bits << 2 * kGap) & ~0ull / 0xffff * ((1ull << 2 * kBits) - 1);
  return (bits | bits << kGap) & ~0ull / 0xff * ((1ull << kBits) - 1);
}

// Eight codes of a plane from `slot` on; nothing beyond its `bytes` is read.
template <int kBits>
inline uint64_t eight_codes(const uint8_t* plane, int64_t slot, int64_t bytes) {
  const int64_t bit = slot * kBits, there = bytes - (bit >> 3);
  uint64_t word = 0;
  if (__builtin_expect(there >= 8, 1))
    word = peek<uint64_t>(plane + (bit >> 3));
  else if (there > 0)
    memcpy(&word, plane + (bit >> 3), (size_t)there);
  return spread<kBits>(word >> (bit & 7));
}

template <int kBits>
inline uint64_t eight_codes(const Weight& w, int64_t slot) {
  const uint8_t* low = (const uint8_t*)w.stored;
  if constexpr (kBits == 3)
    return eight_codes<2>(low, slot, w.stored_bytes) |
           eight_codes<1>((const uint8_t*)w.stored_hi, slot, w.stored_bytes >> 1) << 2;
  else
    return eight_codes<kBits>(low, slot, w.stored_bytes);
}

// out[0 .. k1 - k0) = the codes of W[row, k0 .. k1); returns the slot after the last. As decode() in decode.h;
// ahead: how many entries further on to prefetch from.
using Codes = int64_t (*)(const Weight&, int64_t row, int64_t k0, int64_t k1, int64_t slot, int64_t ahead,
                          uint8_t* out);

using Start = int64_t (*)(const Weight&, int64_t row, int64_t k);

template <class Pattern, int kBits>
int64_t decode_codes(const Weight& w, int64_t row, int64_t k0, int64_t k1, int64_t slot, int64_t ahead, uint8_t* out) {
  int64_t group = (uint32_t)k0 / (uint32_t)w.group;
  for (int64_t k = k0; k < k1; ++group) {
    const int64_t end = least((group + 1) * w.group, k1);
    const int pruned = w.symmetric ? 1 << (kBits - 1) : w.zeros[row * w.groups + group];
#if defined(__AVX512VBMI2__)
    Blocks<Pattern, Coded<kBits>> blocks(w, row, k, slot);
    for (; k + 64 <= end; k += 64, out += 64) {
      const Held held = blocks.template next<false>(w, ahead);
      _mm512_storeu_si512(out, Pattern::kSparse
                                   ? _mm512_mask_mov_epi8(_mm512_set1_epi8((char)pruned), held.mask, held.part[0])
                                   : held.part[0]);
    }
    slot = blocks.slot;
#endif
    for (; k < end; k += 8, out += 8) {
      uint64_t codes = eight_codes<kBits>(w, slot);
      if constexpr (Pattern::kSparse) {
        const unsigned bits = *bitmap(w, row, k);
        const uint64_t kept = spread<1>(bits) * 0xff;
        codes = (expand_bytes(codes, bits) & kept) | ((uint64_t)pruned * 0x0101010101010101 & ~kept);
        slot += __builtin_popcount(bits);
      } else {
        slot += 8;
      }
      memcpy(out, &codes, 8);
    }
    k = end;
  }
  return slot;
}

template <class Pattern, class Values>
constexpr Codes codes_of() {
  if constexpr (Values::kGrouped)
    return decode_codes<Pattern, Values::kWidth>;
  else
    return nullptr;
}

// ---- Activations --------------------------------------------------------------------------------------------------

inline int64_t segment_of(const Weight& w) { return w.groups == 1 ? 128 : least(w.group & -w.group, 128); }

struct Quantized {
  int64_t segment, segments, padded;  // inputs a segment; segments a row, and the same rounded up to W
  int64_t ldq;                        // bytes from a row of q to the next
  int8_t* q;                          // (m, ldq), zeros from K on
  float *scales, *sums;               // (m, padded): sx, and sx times the sum of q; zeros from `segments` on
};

// q[0 .. segment) = x / scale, rounded to nearest even, for a segment of x
void quantize(const float* x, int64_t segment, int8_t* q, float* scale, float* scaled_sum) {
  constexpr int kLanes = 8;
  int32_t tops[kLanes] = {}, totals[kLanes] = {}, top = 0, total = 0;
  for (int64_t i = 0; i < segment; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const int32_t magnitude = peek<int32_t>(x + i + j) & 0x7fffffff;  // a NaN is larger than every number
      tops[j] = magnitude > tops[j] ? magnitude : tops[j];
    }
  for (int j = 0; j < kLanes; ++j) top = tops[j] > top ? tops[j] : top;
  const float largest = peek<float>(&top);
  const float inverse = largest < 1e-36f ? 0 : 127 / largest;  // below: 127 / largest may overflow
  *scale = top >= 0x7f800000 ? __builtin_nanf("") : largest < 1e-36f ? 0 : largest / 127;
  for (int64_t i = 0; i < segment; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const float shifted = x[i + j] * inverse + 12582912.0f;  // 1.5 * 2^23: the integer is in the low bits
      const int8_t rounded = (int8_t)(peek<int32_t>(&shifted) & 0xff);
      q[i + j] = rounded;
      totals[j] += rounded;
    }
  for (int j = 0; j < kLanes; ++j) total += totals[j];
  *scaled_sum = *scale * (float)total;
}

void quantize_row(const Job& job, const Quantized& x, int64_t row) {
  alignas(64) float wide[128 + W];
  int8_t* q = x.q + row * x.ldq;
  float *scales = x.scales + row * x.padded, *sums = x.sums + row * x.padded;
  for (int64_t s = 0; s < x.segments; ++s) {
    const int64_t k = s * x.segment, count = least(x.segment, job.weight.k - k);
    if (count < x.segment) memset(wide, 0, sizeof wide);
    read_row(x_at(job, row, k), job.dtype, count, wide);
    quantize(wide, x.segment, q + k, scales + s, sums + s);
  }
  memset(q + x.segments * x.segment, 0, (size_t)(x.ldq - x.segments * x.segment));
  for (int64_t s = x.segments; s < x.padded; ++s) scales[s] = sums[s] = 0;
}

// scales[s] = sw and offsets[s] = -sw zero of a row of W for each segment, then zeros up to a multiple of W
void weight_grid(const Weight& w, const Quantized& x, int64_t row, float* scales, float* offsets) {
  const int64_t size = w.scale_dtype == CTP_FP16 ? 2 : 4;
  const int bits = w.values == CTP_INT8 ? 8 : w.values == CTP_INT4 ? 4 : w.values == CTP_INT3 ? 3 : 2;
  const int64_t segments = w.groups == 1 ? x.segments : w.group / x.segment;  // a group
  read_row((const char*)w.scales + row * w.groups * size, w.scale_dtype, w.groups, scales);
  if (w.symmetric) {
    for (int64_t g = 0; g < round_up(w.groups, W); g += W)
      store(offsets + g, fma(load(scales + g), set1((float)-(1 << (bits - 1))), zero()));
  } else {
    for (int64_t g = 0; g < w.groups; ++g) offsets[g] = -scales[g] * (float)w.zeros[row * w.groups + g];
  }
  if (segments > 1)
    for (int64_t s = x.segments - 1; s >= 0; --s) {
      scales[s] = scales[s / segments];
      offsets[s] = offsets[s / segments];
    }
  for (int64_t s = x.segments; s < x.padded; ++s) scales[s] = offsets[s] = 0;
}

// ---- Few rows -----------------------------------------------------------------------------------------------------

constexpr int kInt8DotRows = kDotRows > 1 ? kDotRows / 2 : 1;

// sums[i * 4 + r] += x row i . w row r over segments s0 .. s1 - 1, for kM rows of x and 4 of W, whose codes of these
// segments are at w, ldw apart
template <int kM, int kBits>
void int8_dots(const Quantized& x, int64_t row, int64_t s0, int64_t s1, const uint8_t* w, int64_t ldw,
               const float* scales, float* sums) {
  constexpr int kSums = 4 * kM;  // one loop over them, not two: GCC keeps such arrays in registers
  vf acc[kSums];
#pragma GCC unroll 16
  for (int j = 0; j < kSums; ++j) acc[j] = zero();
  const int8_t* q = x.q + row * x.ldq + s0 * x.segment;
  for (int64_t s = s0; s < s1; ++s) {
    vi products[kSums];
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) products[j] = no_sums();
    for (int64_t k = 0; k < x.segment; k += 4 * W, w += 4 * W, q += 4 * W)
#pragma GCC unroll 16
      for (int j = 0; j < kSums; ++j)
        products[j] = dot4<kBits>(products[j], load_bytes(w + j % 4 * ldw), load_bytes(q + j / 4 * x.ldq));
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j)
      acc[j] = fma(to_float(products[j]), set1(scales[j % 4 * x.padded + s] * x.scales[(row + j / 4) * x.padded + s]),
                   acc[j]);
  }
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m) sum4(acc[4 * m], acc[4 * m + 1], acc[4 * m + 2], acc[4 * m + 3], sums + 4 * m);
}

template <int kBits>
void int8_dot_part(const Job& job, const Quantized& x, Codes codes, Start start, const Part& part, float* scratch) {
  const Weight& w = job.weight;
  float *scales = scratch, *offsets = scales + 4 * x.padded, *sums = offsets + 4 * x.padded;
  uint8_t* rows = (uint8_t*)(sums + round_up(4 * job.m, W) + 2 * W);
  memset(rows, 0, 4 * kInt8Stride);
  for (int64_t n = part.column0; n < part.column1; n += 4) {
    int64_t slots[4], ids[4], ahead = start(w, least(n + 4, w.n - 1), 0) - start(w, n, 0);
    for (int r = 0; r < 4; ++r) {
      ids[r] = least(n + r, w.n - 1);
      slots[r] = start(w, ids[r], 0);
      weight_grid(w, x, ids[r], scales + r * x.padded, offsets + r * x.padded);
    }
    for (int64_t m = 0; m < job.m; ++m) {
      vf acc[4] = {zero(), zero(), zero(), zero()};
      for (int64_t s = 0; s < x.padded; s += W)
        for (int r = 0; r < 4; ++r)
          acc[r] = fma(load(offsets + r * x.padded + s), load(x.sums + m * x.padded + s), acc[r]);
      memset(sums + 4 * m, 0, 16);
      sum4(acc[0], acc[1], acc[2], acc[3], sums + 4 * m);
    }
    for (int64_t k = 0; k < w.k; k += kInt8Chunk) {
      const int64_t end = least(k + kInt8Chunk, w.k);
      for (int r = 0; r < 4; ++r) slots[r] = codes(w, ids[r], k, end, slots[r], ahead, rows + r * kInt8Stride);
      const int64_t s0 = k / x.segment, s1 = (end + x.segment - 1) / x.segment;
      int64_t m = 0;
      for (; m + kInt8DotRows <= job.m; m += kInt8DotRows)
        int8_dots<kInt8DotRows, kBits>(x, m, s0, s1, rows, kInt8Stride, scales, sums + 4 * m);
      for (; m < job.m; ++m) int8_dots<1, kBits>(x, m, s0, s1, rows, kInt8Stride, scales, sums + 4 * m);
    }
    for (int64_t m = 0; m < job.m; ++m) write_row(job, m, n, least(4, part.column1 - n), sums + 4 * m);
  }
}

// ---- Many rows ----------------------------------------------------------------------------------------------------

// C (kR, kTile) += x (kR, segments s0 .. s1 - 1) W^T; rows of C are kInt8Width apart. panel, scales and offsets begin
// at s0.
template <int kR, int kBits>
void int8_tile(const Quantized& x, int64_t row, int64_t s0, int64_t s1, const uint8_t* panel, const float* scales,
               const float* offsets, float* c) {
  const int8_t* q = x.q + row * x.ldq + s0 * x.segment;
  for (int64_t s = s0; s < s1; ++s, scales += kTile, offsets += kTile) {
    constexpr int kSums = kR * kVectors;
    vi acc[kSums];
#pragma GCC unroll 32
    for (int j = 0; j < kSums; ++j) acc[j] = no_sums();
    for (int64_t k = 0; k < x.segment; k += 4, q += 4, panel += 4 * kTile)
#pragma GCC unroll 32
      for (int j = 0; j < kSums; ++j)
        acc[j] = dot4<kBits>(acc[j], load_bytes(panel + 4 * W * (j % kVectors)), repeat4(q + j / kVectors * x.ldq));
#pragma GCC unroll 32
    for (int j = 0; j < kSums; ++j) {
      const int64_t at = (row + j / kVectors) * x.padded + s;
      const int v = j % kVectors * W;
      float* out = c + j / kVectors * kInt8Width + v;
      const vf scale = fma(load(scales + v), set1(x.scales[at]), zero());
      store(out, fma(to_float(acc[j]), scale, fma(load(offsets + v), set1(x.sums[at]), load(out))));
    }
  }
}

using Int8Tile = void (*)(const Quantized&, int64_t, int64_t, int64_t, const uint8_t*, const float*, const float*,
                          float*);
template <int kR, int kBits>
Int8Tile int8_tile_of(int rows) {
  if constexpr (kR == 1)
    return int8_tile<1, kBits>;
  else
    return rows == kR ? int8_tile<kR, kBits> : int8_tile_of<kR - 1, kBits>(rows);
}

int64_t int8_panel_floats(const Job& job, const Quantized& x) {
  return least(job.m, kInt8Block) * kInt8Width + 2 * kInt8Width * x.segments + 2 * x.padded +
         (kInt8Width * kInt8Chunk + W * kInt8Stride) / 4;
}
int64_t int8_dot_floats(const Job& job, const Quantized& x) {
  return 8 * x.padded + round_up(4 * job.m, W) + 2 * W + kInt8Stride;
}

template <int kBits>
void int8_panel_part(const Job& job, const Quantized& x, Codes codes, Start start, const Part& part, float* scratch) {
  const Weight& w = job.weight;
  const int64_t block = least(job.m, kInt8Block);
  float *c = scratch, *scales = c + block * kInt8Width, *offsets = scales + kInt8Width * x.segments;
  float *row_scales = offsets + kInt8Width * x.segments, *row_offsets = row_scales + x.padded;
  uint8_t *panel = (uint8_t*)(row_offsets + x.padded), *rows = panel + kInt8Width * kInt8Chunk;
  memset(rows, 0, (size_t)(W * kInt8Stride));
  for (int64_t m0 = part.row0; m0 < part.row1; m0 += kInt8Block)
    for (int64_t c0 = part.column0; c0 < part.column1; c0 += kInt8Width) {
      const int64_t m = least(part.row1 - m0, kInt8Block), width = least(part.column1 - c0, kInt8Width);
      int64_t slots[kInt8Width];
      for (int64_t i = 0; i < round_up(width, kTile); ++i) {  // scales[t][s][column]
        const int64_t row = least(c0 + i, w.n - 1);
        slots[i] = start(w, row, 0);
        weight_grid(w, x, row, row_scales, row_offsets);
        for (int64_t s = 0, at = i / kTile * kTile * x.segments + i % kTile; s < x.segments; ++s, at += kTile) {
          scales[at] = row_scales[s];
          offsets[at] = row_offsets[s];
        }
      }
      memset(c, 0, sizeof(float) * (size_t)(m * kInt8Width));
      for (int64_t k = 0; k < w.k; k += kInt8Chunk) {
        const int64_t end = least(k + kInt8Chunk, w.k), s0 = k / x.segment, s1 = (end + x.segment - 1) / x.segment;
        for (int64_t t = 0; t < width; t += kTile) {
          uint8_t* out = panel + t * kInt8Chunk;
          for (int64_t v = 0; v < kTile; v += W) {
            const int64_t first = least(c0 + t + v, w.n - 1);
            const int64_t ahead = start(w, least(first + W, w.n - 1), 0) - start(w, first, 0);
            for (int64_t i = 0; i < W; ++i)
              slots[t + v + i] =
                  codes(w, least(first + i, w.n - 1), k, end, slots[t + v + i], ahead, rows + i * kInt8Stride);
            for (int64_t d = 0; d < (s1 - s0) * x.segment; d += 16)
              transpose4((const float*)(rows + d), kInt8Stride / 4, (float*)(out + d * kTile + 4 * v), kTile);
          }
          const float *sw = scales + (t * x.segments + s0 * kTile), *zw = offsets + (t * x.segments + s0 * kTile);
          const int64_t strips = (m + kRows - 1) / kRows;
          for (int64_t s = 0; s < strips; ++s) {
            const int64_t i = m * s / strips, height = m * (s + 1) / strips - i;
            int8_tile_of<kRows, kBits>((int)height)(x, m0 + i, s0, s1, out, sw, zw, c + i * kInt8Width + t);
          }
        }
      }
      for (int64_t i = 0; i < m; ++i) write_row(job, m0 + i, c0, width, c + i * kInt8Width);
    }
}

// ---- Both ---------------------------------------------------------------------------------------------------------

int run_int8(const Job& job, Codes codes, Start start, int threads) {
  const Weight& w = job.weight;
  Quantized x{};
  x.segment = segment_of(w);
  x.segments = (w.k + x.segment - 1) / x.segment;
  x.padded = round_up(x.segments, W);
  x.ldq = x.segments * x.segment + 64;  // not a power of two
  const bool dot = job.m <= kInt8DotLimit && x.segment >= 4 * W;
  const int64_t unit = dot ? 4 : kTile, units = (w.n + unit - 1) / unit;
  if ((double)w.n * (double)w.k * (double)(job.m + 8) < kSmall) threads = 1;
  const int64_t across = least(threads, units);
  const int64_t down = dot ? 1 : least(threads / across, (job.m + 63) / 64);
  // One piece of memory, of the calling thread: rounded rows of x that all read, then every thread's own.
  const int64_t shared = round_up(job.m * (2 * x.padded + x.ldq / 4), 16);
  const int64_t own = round_up(dot ? int8_dot_floats(job, x) : int8_panel_floats(job, x), 16);
  float* memory = ctp::scratch((size_t)(shared + across * down * own));
  if (!memory) return CTP_OUT_OF_MEMORY;
  x.scales = memory;
  x.sums = x.scales + job.m * x.padded;
  x.q = (int8_t*)(x.sums + job.m * x.padded);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && job.m > 1)
  for (int64_t i = 0; i < job.m; ++i) quantize_row(job, x, i);
  const auto run = dot ? (w.values == CTP_INT8 ? int8_dot_part<8> : int8_dot_part<4>)
                       : (w.values == CTP_INT8 ? int8_panel_part<8> : int8_panel_part<4>);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < across * down; ++p) {
    const int64_t i = p / across, j = p % across;
    const Part part = {job.m * i / down, job.m * (i + 1) / down, units * j / across * unit,
                       least(units * (j + 1) / across * unit, w.n)};
    run(job, x, codes, start, part, memory + shared + p * own);
  }
  return CTP_OK;
}

}  // namespace
