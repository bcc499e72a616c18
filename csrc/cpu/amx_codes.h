// Codes of W by integers, in tiles (AMX).
//
// C += A B over 64 inputs at a time, in bytes: sixteen times the products of a vector. A is rows of W, a code a byte,
// as they lie. A column of B is a row of x rounded to 8 bits (int8.h), or one of its digits (digits.h): of four, which
// are as exact as fp32, or of two, which hold more than bf16. C is exact; a segment's sums meet its scales in fp32.
#pragma once

#include "amx.h"
#include "digits.h"
#include "int8.h"

namespace {

#if defined(CTP_AMX)

#define CTP_AMX_INT8 __attribute__((target("amx-tile,amx-int8")))

constexpr int64_t kCodeRows = 32;     // of W: two tiles
constexpr int64_t kCodeSegments = 4;  // that are decoded at a time
constexpr int64_t kCodeStride = 576;  // bytes between rows of A: theirs, and not a power of two
constexpr int64_t kCodeHeight = 256;  // rows of W that share a strip of B
constexpr int64_t kCodeStrips = 32;   // of B that share rows of W
constexpr int64_t kFewStrips = 4;     // up to which rows of A had better stay in L1, kCodeRows of them
constexpr int64_t kCodeSums = kCodeSegments * kCodeRows * W;

// Rows of x as columns, in strips of 16.
struct Columns {
  int parts;                  // columns of a row: digits, the one that counts most first
  int64_t segment, segments;  // inputs; how many cover K
  int8_t* b;                  // [strip][input / 4][column][input % 4]
  int32_t* zeros;  // [strip][segment][column]: less what codes for zero add up to, or codes of 1 if W is not symmetric
  float* scales;   // likewise
  int64_t inputs() const { return segments * segment; }
};

// ---- A and B ------------------------------------------------------------------------------------------------------

// Whether the even inputs of a segment come first, as shifts have them.
inline bool evens_first(const Weight& w) {
  return w.pattern == CTP_DENSE && w.values == CTP_INT4 && segment_of(w) == 128;
}

// Codes of inputs k0 .. k1 - 1 of `rows` rows of W from `first` on (the last of W is repeated), kCodeStride apart.
// slots, ahead: as for decode_codes(), of every row.
using TileCodes = void (*)(const Weight&, int64_t first, int64_t rows, int64_t k0, int64_t k1, int64_t* slots,
                           int64_t ahead, uint8_t* out);

template <class Pattern, class Values>
void tile_codes(const Weight& w, int64_t first, int64_t rows, int64_t k0, int64_t k1, int64_t* slots, int64_t ahead,
                uint8_t* out) {
  for (int64_t i = 0; i < rows; ++i, out += kCodeStride) {
    if constexpr (!Pattern::kSparse && Values::kWidth == 4)
      if (evens_first(w)) {
        const auto split = [](__m512i codes, uint8_t* to) {
          const __m512i mask = _mm512_set1_epi8(15);
          _mm512_storeu_si512(to, _mm512_and_si512(codes, mask));
          _mm512_storeu_si512(to + 64, _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask));
        };
        const uint8_t* in = (const uint8_t*)w.stored + (slots[i] >> 1);
        const int64_t whole = (k1 - k0) / 128, left = (k1 - k0) % 128;
#pragma GCC unroll 4
        for (int64_t j = 0; j < whole; ++j) {
          __builtin_prefetch(in + 64 * j + (ahead >> 1), 0, 2);
          split(_mm512_loadu_si512(in + 64 * j), out + 128 * j);
        }
        if (left)
          split(_mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, (unsigned)(left + 1) / 2), in + 64 * whole),
                out + 128 * whole);
        slots[i] += k1 - k0;
        continue;
      }
    slots[i] = decode_codes<Pattern, Values::kWidth>(w, least(first + i, w.n - 1), k0, k1, slots[i], ahead, out);
  }
}

template <class Pattern, class Values>
constexpr TileCodes tile_codes_by() {
  if constexpr (Values::kGrouped)
    return tile_codes<Pattern, Values>;
  else
    return nullptr;
}

// The columns of a piece of row m0 + i of x, from input k on; false where it had better stay in fp32.
bool set_columns(const Job& job, const Columns& x, int64_t m0, int64_t i, int64_t k) {
  alignas(64) float wide[kPiece + W];
  alignas(64) int32_t rounded[kPiece + W], lanes[W];
  const int64_t inputs = least(kPiece, x.inputs() - k), there = least(inputs, job.weight.k - k);
  if (there < inputs) memset(wide, 0, sizeof wide);
  read_row(x_at(job, m0 + i, k), job.dtype, there, wide);
  const int64_t column = i * x.parts % W, strip = i * x.parts / W;
  const int32_t zero_code = job.weight.symmetric ? 1 << (bits_of(job.weight) - 1) : 1;
  int8_t* out = x.b + (strip * x.inputs() + k) * W + 4 * column;
  int64_t at = (strip * x.segments + k / x.segment) * W + column;
  // The digits of four inputs change places, so that those of one order lie side by side.
  const __m512i places =
      _mm512_broadcast_i32x4(x.parts == 4 ? _mm_setr_epi8(3, 7, 11, 15, 2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12)
                                          : _mm_setr_epi8(1, 5, 9, 13, 0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0));
  const __m512i bias = _mm512_set1_epi32(x.parts == 4 ? 0x808080 : 0x80);
  for (float *p = wide, *end = wide + inputs; p < end; p += x.segment, at += W) {
    if (evens_first(job.weight)) {
      float sorted[128];
      for (int j = 0; j < 64; ++j) sorted[j] = p[2 * j], sorted[64 + j] = p[2 * j + 1];
      memcpy(p, sorted, sizeof sorted);
    }
    if (x.parts == 1) {
      x.zeros[at] = -zero_code * quantize(p, x.segment, rounded, x.scales + at);
      place<1>(rounded, x.segment, 1, 4 * W, out);
      out += x.segment * W;
      continue;
    }
    float scale;
    if (!set_integers(p, x.segment, x.parts, &scale)) return false;
    vi total = no_sums();
    for (int64_t j = 0; j < x.segment; j += W) {
      const __m512i v = _mm512_xor_si512(_mm512_add_epi32(_mm512_loadu_si512(p + j), bias), bias);
      const __m512i digits = _mm512_shuffle_epi8(v, places);
      total = dot4<8>(total, no_sums() + 0x01010101, (vi)digits);
      alignas(64) int8_t bytes[4 * W];
      _mm512_store_si512(bytes, digits);
      for (int q = 0; q < 4; ++q, out += 4 * W) memcpy(out, bytes + 16 * q, 4 * (size_t)x.parts);
    }
    _mm512_store_si512(lanes, (__m512i)total);
    for (int d = 0; d < x.parts; ++d) {
      const int32_t weight = (127 + 8 - 8 * d) << 23;  // of the digit, as fp32
      x.scales[at + d] = scale * peek<float>(&weight);
      x.zeros[at + d] = -zero_code * (lanes[d] + lanes[4 + d] + lanes[8 + d] + lanes[12 + d]);
    }
  }
  return true;
}

// ---- C ------------------------------------------------------------------------------------------------------------

// sums[segment][row of W][column] of kCodeRows rows of A and a strip of B
CTP_AMX_INT8 void code_sums(const uint8_t* a, const int8_t* b, const int32_t* zeros, bool symmetric, int64_t segment,
                            int64_t segments, int32_t* sums) {
  asm volatile("" ::: "memory");  // what the tiles load has been written
  for (int64_t s = 0; s < segments; ++s, zeros += W, sums += kCodeRows * W) {
    if (symmetric) {
      _tile_loadd(0, zeros, 0);  // the same in every row
      _tile_loadd(1, zeros, 0);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    for (int64_t k = 0; k < segment; k += 4 * W, a += 4 * W, b += 4 * W * W) {
      _tile_loadd(6, b, 4 * W);
      _tile_loadd(4, a, kCodeStride);
      _tile_dpbusd(0, 4, 6);
      _tile_loadd(5, a + 16 * kCodeStride, kCodeStride);
      _tile_dpbusd(1, 5, 6);
    }
    _tile_stored(0, sums, 4 * W);
    _tile_stored(1, sums + 16 * W, 4 * W);
  }
}

// c[row * ldc + column] += the sums of kCount segments, scaled. grid, codes: scales and zeros of W, `padded` to a row
template <int kCount, bool kSymmetric>
void add_sums(const int32_t* sums, const float* scales, const int32_t* zeros, const float* grid, const int32_t* codes,
              int64_t padded, float* c, int64_t ldc) {
  vf columns[kCount];
#pragma GCC unroll 4
  for (int s = 0; s < kCount; ++s) columns[s] = held_load(scales + s * W);
  for (int64_t i = 0; i < kCodeRows; ++i, c += ldc, grid += padded, codes += padded, sums += W) {
    vf acc = load(c);
#pragma GCC unroll 4
    for (int s = 0; s < kCount; ++s) {
      vi sum = load_bytes(sums + s * kCodeRows * W);
      if constexpr (!kSymmetric) sum = sum + load_bytes(zeros + s * W) * codes[s];
      acc = fma(to_float(sum), mul(columns[s], set1(grid[s])), acc);
    }
    store(c, acc);
  }
}

template <bool kSymmetric>
constexpr decltype(&add_sums<1, true>) kAddSums[] = {nullptr, add_sums<1, kSymmetric>, add_sums<2, kSymmetric>,
                                                     add_sums<3, kSymmetric>, add_sums<4, kSymmetric>};

// c[i] = the sum of the digits of row i of x, in place
template <int kParts>
void join_digits(float* c, int64_t strips) {
  for (int64_t t = 0; t < strips; ++t) {
    const vf v = load(c + t * W), pairs = add(v, _mm512_permute_ps(v, 0xb1));
    if constexpr (kParts == 2)
      _mm512_mask_compressstoreu_ps(c + t * W / 2, 0x5555, pairs);
    else
      _mm512_mask_compressstoreu_ps(c + t * W / 4, 0x1111, add(pairs, _mm512_permute_ps(pairs, 0x4e)));
  }
}

// Of a thread.
struct CodeScratch {
  int64_t height, strips, padded, ldc;
  bool symmetric;
  CodeScratch(const Weight& w, const Columns& x, int64_t strips)
      : height(strips > kFewStrips ? kCodeHeight : kCodeRows),
        strips(strips),
        padded(round_up(x.segments, W)),
        ldc(strips * W + W),
        symmetric(w.symmetric) {}
  int64_t floats() const {
    return height * (ldc + padded * (symmetric ? 1 : 2) + kCodeStride / 4) + padded + 2 * kCodeSums;
  }
};

// Rows m0 .. m0 + m - 1 of x, which are all of the columns, by rows n0 .. n1 - 1 of W.
template <class Decoder>
void code_part(const Job& job, const Decoder& decoder, const Columns& x, const CodeScratch& of, int64_t m0, int64_t m,
               int64_t n0, int64_t n1, float* scratch) {
  const Weight& w = job.weight;
  const int64_t padded = of.padded, ldc = of.ldc, chunk = kCodeSegments * x.segment;
  const int64_t strips = (m * x.parts + W - 1) / W;
  float *c = scratch, *grid = c + of.height * ldc, *offsets = grid + of.height * padded;
  int32_t *codes = (int32_t*)(offsets + padded), *sums = codes + (w.symmetric ? 0 : of.height * padded);
  uint8_t* a = (uint8_t*)(sums + 2 * kCodeSums);
  for (; n0 < n1; n0 += of.height) {
    const int64_t there = least(of.height, n1 - n0), rows = round_up(there, kCodeRows), blocks = rows / kCodeRows;
    int64_t slots[kCodeHeight];
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = least(n0 + i, w.n - 1);
      slots[i] = decoder.start(w, row, 0);
      weight_grid(w, x.segment, x.segments, row, grid + i * padded, offsets);
      for (int64_t s = 0; s < x.segments && !w.symmetric; ++s)
        codes[i * padded + s] = w.zeros[row * w.groups + s * x.segment / w.group];
    }
    memset(c, 0, sizeof(float) * (size_t)(rows * ldc));
    for (int64_t k = 0; k < w.k; k += chunk) {
      const int64_t end = least(k + chunk, w.k), s0 = k / x.segment, count = (end - k + x.segment - 1) / x.segment;
      decoder.tile_codes(w, n0, rows, k, end, slots, end < w.k ? chunk : of.height * w.k - k, a);
      for (int64_t j = 0; j <= strips * blocks; ++j) {  // sums are added while tiles multiply what comes next
        if (j < strips * blocks) {
          const int64_t t = j / blocks;
          code_sums(a + j % blocks * kCodeRows * kCodeStride, x.b + (t * x.inputs() + k) * W,
                    x.zeros + (t * x.segments + s0) * W, w.symmetric, x.segment, count, sums + j % 2 * kCodeSums);
        }
        if (j > 0) {
          const int64_t t = (j - 1) / blocks, i = (j - 1) % blocks * kCodeRows, at = (t * x.segments + s0) * W;
          (w.symmetric ? kAddSums<true> : kAddSums<false>)[count](
              sums + (j - 1) % 2 * kCodeSums, x.scales + at, x.zeros + at, grid + i* padded + s0,
              codes + i* padded + s0, padded, c + i* ldc + t* W, ldc);
        }
      }
    }
    for (int64_t i = 0; i < there && x.parts > 1; ++i)
      (x.parts == 2 ? join_digits<2> : join_digits<4>)(c + i * ldc, strips);
    write_transposed(job, m0, m, n0, there, c, ldc);
  }
}

// Whether tiles of bytes serve this product, and rows of x are as many as crossed the other kernels at 4096 x 4096: no
// fewer, because tiles take as long for one column as for sixteen; and where x has digits no more, because bf16 has
// fewer parts (amx.h).
inline bool in_code_tiles(const Job& job) {
  const Weight& w = job.weight;
  if (!job.tiles || job.transposed || w.values < CTP_INT8 || segment_of(w) < 4 * W) return false;
  if (job.compute == CTP_INT8_ACTIVATIONS) return job.m > kInt8DotLimit;
  return job.m >= (w.pattern == CTP_UNSTRUCTURED ? 5 : 3) &&
         job.m <= (w.pattern == CTP_UNSTRUCTURED || job.dtype == CTP_FP16 ? 32 : 64);
}

// Whether the product was done so.
template <class Decoder>
bool run_code_tiles(const Job& job, const Decoder& decoder, int threads) {
  const Weight& w = job.weight;
  if (!in_code_tiles(job)) return false;
  const int64_t segment = segment_of(w);
  Columns x = {job.compute == CTP_INT8_ACTIVATIONS ? 1
               : job.dtype == CTP_BF16             ? 2
                                                   : 4,
               segment,
               (w.k + segment - 1) / segment,
               nullptr,
               nullptr,
               nullptr};
  const int64_t most = least(job.m, kCodeStrips * W / x.parts), strips = (most * x.parts + W - 1) / W;
  const int64_t bytes = strips * W * x.inputs(), grids = strips * W * x.segments;
  const CodeScratch of(w, x, strips);
  float* memory = ctp::scratch((size_t)(bytes / 4 + 2 * grids + threads * of.floats()));
  if (!memory) return false;
  x.b = (int8_t*)memory;
  x.zeros = (int32_t*)(memory + bytes / 4);
  x.scales = (float*)(x.zeros + grids);
  float* own = x.scales + grids;
  memset(x.scales, 0, sizeof(float) * (size_t)grids);  // some columns may be nobody's
  const int64_t pieces = (w.k + kPiece - 1) / kPiece, units = (w.n + kCodeRows - 1) / kCodeRows;
  for (int64_t m0 = 0; m0 < job.m; m0 += most) {
    const int64_t m = least(most, job.m - m0);
    int wild = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : wild) if (threads > 1)
    for (int64_t p = 0; p < pieces; ++p)
      for (int64_t i = 0; i < m; ++i) wild |= !set_columns(job, x, m0, i, p * kPiece);
    if (wild) return false;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < threads; ++p) {
      configure_tiles();
      code_part(job, decoder, x, of, m0, m, units * p / threads * kCodeRows,
                least(units * (p + 1) / threads * kCodeRows, w.n), own + p * of.floats());
      release_tiles();
    }
  }
  return true;
}

#else

using TileCodes = decltype(nullptr);
template <class Pattern, class Values>
constexpr TileCodes tile_codes_by() {
  return nullptr;
}
template <class Decoder>
bool run_code_tiles(const Job&, const Decoder&, int) {
  return false;
}

#endif

}  // namespace
