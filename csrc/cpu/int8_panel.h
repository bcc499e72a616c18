// Many rows of x rounded to 8 bits: a panel of codes, panel[step][column][4], serves a block of rows. See int8.h.
#pragma once

#include "int8_fields.h"

namespace {

constexpr int64_t kInt8Chunk = kPiece;  // inputs of a panel: kTile x kInt8Chunk bytes of it stay in L1
constexpr int64_t kInt8Width = 256;     // columns that meet a chunk of x
constexpr int64_t kInt8Block = 256;     // rows of x that share a panel
constexpr int64_t kInt8Stride = kInt8Chunk + 64;

// ---- The panel ----------------------------------------------------------------------------------------------------

// Whether a plane of codes is transposed as it is packed, so that x has to be in its order.
inline int panel_order(const Weight& w) {
  const int fields = fields_of(w);
  return w.pattern == CTP_DENSE && segment_of(w) % (4 * fields) == 0 ? fields : 1;
}

// out[kTile * step .. ) = four codes each of inputs k0 .. k1 - 1 of W rows of W from `first` on (the last is repeated);
// slots[i]: where row first + i stands, and then where it stands at k1. rows: 2 W kInt8Stride bytes.
using PanelCodes = void (*)(const Weight&, int order, int64_t first, int64_t k0, int64_t k1, int64_t* slots,
                            uint8_t* rows, uint32_t* out);

// rows[0 .. bytes) = those at p; the compiler knows the usual number
template <int64_t kUsual>
inline void copy_bytes(const uint8_t* p, int64_t bytes, uint8_t* row) {
  memcpy(row, p, bytes == kUsual ? kUsual : (size_t)bytes);
}

template <class Pattern, class Values>
void panel_codes(const Weight& w, int order, int64_t first, int64_t k0, int64_t k1, int64_t* slots, uint8_t* rows,
                 uint32_t* out) {
  constexpr int kBits = Values::kWidth;
  const int64_t ahead = W * w.k, inputs = k1 - k0;
  if (order == 1 && (Pattern::kSparse || kBits < 8)) {
    for (int64_t i = 0; i < W; ++i)
      slots[i] =
          decode_codes<Pattern, kBits>(w, least(first + i, w.n - 1), k0, k1, slots[i], ahead, rows + i * kInt8Stride);
    for (int64_t d = 0; d < inputs; d += 16, out += 4 * kTile)
      transpose4((const float*)(rows + d), kInt8Stride / 4, (float*)out, kTile);
    return;
  }
  using F = Fields<Dense, kBits>;
  constexpr int64_t kLow = kInt8Chunk * F::kWidth / 8, kHigh = kInt8Chunk / 8;
  uint8_t* high = rows + W * kInt8Stride;
  for (int64_t i = 0; i < W; ++i) {
    const int64_t slot = slots[i], eights = (inputs + 7) / 8;
    copy_bytes<kLow>((const uint8_t*)w.stored + (slot * F::kWidth >> 3), eights * F::kWidth, rows + i * kInt8Stride);
    if constexpr (kBits == 3) {
      alignas(64) uint8_t bits[kHigh];
      copy_bytes<kHigh>((const uint8_t*)w.stored_hi + (slot >> 3), eights, bits);
      for (int64_t b = 0; b < kHigh; b += 2 * W) store((float*)(high + i * kInt8Stride + 2 * b), (vf)nibbles(bits + b));
    }
    for (int64_t k = 0; k < inputs; k += 64) Values::ahead(w, slot + k, ahead);
    slots[i] += inputs;
  }
  for (int64_t b = 0; b * F::kFields < inputs; b += 16) {
    alignas(64) float low[4 * W], highs[4 * W];
    transpose4((const float*)(rows + b), kInt8Stride / 4, low, W);
    if constexpr (kBits == 3) transpose4((const float*)(high + b), kInt8Stride / 4, highs, W);
#pragma GCC unroll 4
    for (int d = 0; d < 4; ++d) {
      Planes<Dense, kBits> planes;
      planes.low = load_bytes(low + d * W);
      if constexpr (kBits == 3) planes.high = load_bytes(highs + d * W);
#pragma GCC unroll 4
      for (int j = 0; j < F::kFields; ++j, out += kTile) store((float*)out, (vf)planes.codes(j));
    }
  }
}

template <class Pattern, class Values>
constexpr PanelCodes panel_by() {
  if constexpr (Values::kGrouped)
    return panel_codes<Pattern, Values>;
  else
    return nullptr;
}

// ---- The product --------------------------------------------------------------------------------------------------

// C (kR, kTile), whose rows are kInt8Width apart, for a strip of kR rows of x: first = sums of x by offsets of W, which
// stand for codes of zero, in all segments; then += x W^T, some segments of it.
struct Int8Tile {
  void (*first)(const float* sums, int64_t segments, const float* offsets, float* c);
  void (*add)(const int8_t* q, const float* sx, int64_t segment, int64_t segments, const uint32_t* panel,
              const float* scales, float* c);
};

template <int kR>
void int8_first(const float* sums, int64_t segments, const float* offsets, float* c) {
  constexpr int kSums = kR * kVectors;  // one loop over them, not two: GCC keeps such arrays in registers
  vf acc[kSums];
#pragma GCC unroll 32
  for (int j = 0; j < kSums; ++j) acc[j] = zero();
  for (int64_t s = 0; s < segments; ++s, sums += kR, offsets += kTile)
#pragma GCC unroll 32
    for (int j = 0; j < kSums; ++j) acc[j] = fma(load(offsets + j % kVectors * W), set1(sums[j / kVectors]), acc[j]);
#pragma GCC unroll 32
  for (int j = 0; j < kSums; ++j) store(c + j / kVectors * kInt8Width + j % kVectors * W, acc[j]);
}

template <int kR, int kBits>
void int8_add(const int8_t* q, const float* sx, int64_t segment, int64_t segments, const uint32_t* panel,
              const float* scales, float* c) {
  constexpr int kSums = kR * kVectors;
  for (int64_t s = 0; s < segments; ++s, sx += kR, scales += kTile) {
    vi acc[kSums];
#pragma GCC unroll 32
    for (int j = 0; j < kSums; ++j) acc[j] = no_sums();
    asm volatile("" ::: "memory");  // or GCC keeps C in memory of its own, and stores every sum twice
    for (int64_t k = 0; k < segment; k += 4, q += 4 * kR, panel += kTile)
#pragma GCC unroll 32
      for (int j = 0; j < kSums; ++j)
        acc[j] = dot4<kBits>(acc[j], load_bytes(panel + W * (j % kVectors)), repeat4(q + 4 * (j / kVectors)));
#pragma GCC unroll 32
    for (int j = 0; j < kSums; ++j) {
      float* out = c + j / kVectors * kInt8Width + j % kVectors * W;
      const vf scale = mul(load(scales + j % kVectors * W), set1(sx[j / kVectors]));
      store(out, fma(to_float(acc[j]), scale, load(out)));
    }
  }
}

template <int kR, int kBits>
Int8Tile int8_tile_of(int64_t rows) {
  if constexpr (kR > 1)
    if (rows != kR) return int8_tile_of<kR - 1, kBits>(rows);
  return {int8_first<kR>, int8_add<kR, kBits>};
}

int64_t int8_panel_floats(const Job& job, const Quantized& x) {
  return least(job.m, kInt8Block) * kInt8Width + 2 * (kInt8Width + W) * x.padded +
         (kTile * kInt8Chunk + 2 * W * kInt8Stride) / 4;
}

template <class Decoder>
void int8_panel_part(const Job& job, const Quantized& x, const Decoder& decoder, const Part& part, float* scratch) {
  const Weight& w = job.weight;
  const auto tile_of = w.values == CTP_INT8 ? int8_tile_of<kRows, 8> : int8_tile_of<kRows, 4>;
  const int64_t block = kInt8Block / x.height * x.height;
  float *c = scratch, *scales = c + least(job.m, kInt8Block) * kInt8Width, *offsets = scales + kInt8Width * x.padded;
  float *row_scales = offsets + kInt8Width * x.padded, *row_offsets = row_scales + W * x.padded;
  uint32_t* panel = (uint32_t*)(row_offsets + W * x.padded);
  uint8_t* rows = (uint8_t*)(panel + kTile * kInt8Chunk / 4);
  memset(rows, 0, (size_t)(2 * W * kInt8Stride));
  for (int64_t m0 = part.row0; m0 < part.row1; m0 += block)
    for (int64_t c0 = part.column0; c0 < part.column1; c0 += kInt8Width) {
      const int64_t m1 = least(m0 + block, part.row1), width = least(part.column1 - c0, kInt8Width);
      int64_t slots[kInt8Width];
      for (int64_t n = 0; n < round_up(width, kTile); n += W) {  // scales[n / kTile][segment][n % kTile]
        for (int64_t i = 0; i < W; ++i) {
          const int64_t row = least(c0 + n + i, w.n - 1);
          slots[n + i] = decoder.start(w, row, 0);
          weight_grid(w, x, row, row_scales + i * x.padded, row_offsets + i * x.padded);
        }
        for (int64_t s = 0; s < x.padded; s += 4) {
          const int64_t at = n / kTile * kTile * x.padded + s * kTile + n % kTile;
          transpose4(row_scales + s, x.padded, scales + at, kTile);
          if (!w.symmetric) transpose4(row_offsets + s, x.padded, offsets + at, kTile);
        }
      }
      for (int64_t k = 0; k < w.k; k += kInt8Chunk) {
        const int64_t end = least(k + kInt8Chunk, w.k), s0 = k / x.segment, s1 = (end + x.segment - 1) / x.segment;
        for (int64_t t = 0; t < width; t += kTile) {
          for (int64_t v = 0; v < kTile; v += W)
            decoder.panel(w, x.order, c0 + t + v, k, end, slots + t + v, rows, panel + v);
          const float* tile_scales = scales + t * x.padded;
          for (int64_t i = m0; i < m1; i += x.height) {
            const int64_t height = least(x.height, x.m - i);
            const Int8Tile tile = tile_of(height);
            float* out = c + (i - m0) * kInt8Width + t;
            if (k == 0)
              tile.first(x.sums + i * x.padded, x.segments, w.symmetric ? tile_scales : offsets + t * x.padded, out);
            tile.add(x.q + i * x.ldq + k * height, x.scales + i * x.padded + s0 * height, x.segment, s1 - s0, panel,
                     tile_scales + s0 * kTile, out);
          }
        }
      }
      for (int64_t i = m0; i < m1; ++i) write_row(job, i, c0, width, c + (i - m0) * kInt8Width);
    }
}

}  // namespace
