// Codes of W by integers, in tiles (AMX).
//
// C += A B over 64 inputs at a time, in bytes: sixteen times the products of a vector. A is rows of W, a code a byte,
// as they lie. A column of B is a row of x rounded to 8 bits (int8.h), or one digit of it: of four for fp32 and fp16
// (digits.h), of three for bf16. C is exact; a segment's sums meet its scales in fp32.
#pragma once

#include "amx.h"
#include "digits.h"
#include "int8.h"

namespace {

#if defined(CTP_AMX_BF16)

#define CTP_AMX_INT8 __attribute__((target("amx-tile,amx-int8")))

constexpr int64_t kCodeRows = 32;     // of W: two tiles
constexpr int64_t kCodeSegments = 4;  // that are decoded at a time
constexpr int64_t kCodeStride = 576;  // bytes between rows of A: theirs, and not a power of two
constexpr int64_t kCodeHeight = 256;  // rows of W that share a strip of B
constexpr int64_t kCodeStrips = 32;   // of B that share rows of W
constexpr int64_t kFewStrips = 4;     // up to which rows of A had better stay in L1, kCodeRows of them
constexpr int64_t kCodeSums = kCodeSegments * kCodeRows * W;

// Rows of x as columns, in strips of 16; a row does not cross from one to the next.
struct Columns {
  int digits;                 // columns of a row, the one that counts most first; or 1, where x is rounded
  bool evens;                 // whether the even inputs of a segment come first, as shifts of dense int4 have them
  int64_t segment, segments;  // inputs; how many cover K
  int8_t* b;                  // [strip][input / 4][column][input % 4]
  int32_t*
      offsets;    // [strip][segment][column]: less what codes for zero add up to, or codes of 1 if W is not symmetric
  float* scales;  // likewise
  int64_t inputs() const { return segments * segment; }
  int64_t rows() const { return W / digits; }  // of x in a strip
};

// ---- A and B ------------------------------------------------------------------------------------------------------

// The codes of dense int4, k0 .. k1 - 1, of every 128 the even inputs first.
inline void split_nibbles(const uint8_t* in, int64_t inputs, int64_t ahead, uint8_t* out) {
  const auto split = [](__m512i codes, uint8_t* to) {
    const __m512i mask = _mm512_set1_epi8(15);
    _mm512_storeu_si512(to, _mm512_and_si512(codes, mask));
    _mm512_storeu_si512(to + 64, _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask));
  };
#pragma GCC unroll 4
  for (; inputs >= 128; inputs -= 128, in += 64, out += 128) {
    __builtin_prefetch(in + (ahead >> 1), 0, 2);
    split(_mm512_loadu_si512(in), out);
  }
  if (inputs) split(_mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, (unsigned)(inputs + 1) / 2), in), out);
}

// Codes of inputs k0 .. k1 - 1 of `rows` rows of W from `first` on (the last of W is repeated), kCodeStride apart.
// slots, ahead: as for decode_codes(), of every row.
using TileCodes = void (*)(const Weight&, bool evens, int64_t first, int64_t rows, int64_t k0, int64_t k1,
                           int64_t* slots, int64_t ahead, uint8_t* out);

template <class Pattern, class Values>
void tile_codes(const Weight& w, bool evens, int64_t first, int64_t rows, int64_t k0, int64_t k1, int64_t* slots,
                int64_t ahead, uint8_t* out) {
  if (evens)
    for (int64_t i = 0; i < rows; ++i, out += kCodeStride) {
      split_nibbles((const uint8_t*)w.stored + (slots[i] >> 1), k1 - k0, ahead, out);
      slots[i] += k1 - k0;
    }
  else
    for (int64_t i = 0; i < rows; ++i, out += kCodeStride)
      slots[i] = decode_codes<Pattern, Values::kWidth>(w, least(first + i, w.n - 1), k0, k1, slots[i], ahead, out);
}

template <class Pattern, class Values>
constexpr TileCodes tile_codes_by() {
  if constexpr (Values::kGrouped)
    return tile_codes<Pattern, Values>;
  else
    return nullptr;
}

// The digits of some integers: out[input / 4][column][input % 4], and their sums over the segment.
template <int kDigits>
void place_digits(const float* integers, int64_t segment, int8_t* out, int32_t* sums) {
  alignas(16) static constexpr auto places = [] {  // the digits of one order of four inputs side by side
    struct {
      int8_t at[16];
    } t{};
    for (int d = 0; d < kDigits; ++d)
      for (int j = 0; j < 4; ++j) t.at[4 * d + j] = (int8_t)(4 * j + kDigits - 1 - d);
    return t;
  }();
  const __m512i shuffle = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)places.at));
  const __m512i bias = _mm512_set1_epi32(kDigits == 4 ? 0x808080 : 0x8080);
  vi total = no_sums();
  for (int64_t k = 0; k < segment; k += W) {
    const __m512i v = _mm512_xor_si512(_mm512_add_epi32(_mm512_loadu_si512(integers + k), bias), bias);
    const __m512i digits = _mm512_shuffle_epi8(v, shuffle);
    total = dot4<8>(total, no_sums() + 0x01010101, (vi)digits);
    alignas(64) int8_t bytes[4 * W];
    _mm512_store_si512(bytes, digits);
    for (int q = 0; q < 4; ++q, out += 4 * W) memcpy(out, bytes + 16 * q, 4 * kDigits);
  }
  alignas(64) int32_t lanes[W];
  _mm512_store_si512(lanes, (__m512i)total);
  for (int d = 0; d < kDigits; ++d) sums[d] = lanes[d] + lanes[4 + d] + lanes[8 + d] + lanes[12 + d];
}

// The columns of a piece of row m0 + i of x, from input k on; false where it had better stay in fp32.
bool set_columns(const Job& job, const Columns& x, int64_t m0, int64_t i, int64_t k) {
  alignas(64) float wide[kPiece + W];
  alignas(64) int32_t rounded[kPiece + W];
  const int64_t inputs = least(kPiece, x.inputs() - k), there = least(inputs, job.weight.k - k);
  if (there < inputs) memset(wide, 0, sizeof wide);
  read_row(x_at(job, m0 + i, k), job.dtype, there, wide);
  const int64_t strip = i / x.rows(), column = i % x.rows() * x.digits;
  const int32_t zero_code = job.weight.symmetric ? 1 << (bits_of(job.weight) - 1) : 1;
  int8_t* out = x.b + (strip * x.inputs() + k) * W + 4 * column;
  int64_t at = (strip * x.segments + k / x.segment) * W + column;
  for (float *p = wide, *end = wide + inputs; p < end; p += x.segment, out += x.segment * W, at += W) {
    if (x.evens) {
      float sorted[128];
      for (int j = 0; j < 64; ++j) sorted[j] = p[2 * j], sorted[64 + j] = p[2 * j + 1];
      memcpy(p, sorted, sizeof sorted);
    }
    int32_t sums[4];
    if (x.digits == 1) {
      *sums = quantize(p, x.segment, rounded, x.scales + at);
      place<1>(rounded, x.segment, 1, 4 * W, out);
    } else {
      float first;
      if (!(x.digits == 3 ? set_integers<3> : set_integers<4>)(p, x.segment, &first)) return false;
      (x.digits == 3 ? place_digits<3> : place_digits<4>)(p, x.segment, out, sums);
      for (int d = 0; d < x.digits; ++d, first *= 0x1p-8f) x.scales[at + d] = first;
    }
    for (int d = 0; d < x.digits; ++d) x.offsets[at + d] = -zero_code * sums[d];
  }
  return true;
}

// ---- C ------------------------------------------------------------------------------------------------------------

// sums[segment][row of W][column] of kCodeRows rows of A and a strip of B
CTP_AMX_INT8 void code_sums(const uint8_t* a, const int8_t* b, const int32_t* offsets, bool symmetric, int64_t segment,
                            int64_t segments, int32_t* sums) {
  asm volatile("" ::: "memory");  // what the tiles load has been written
  for (int64_t s = 0; s < segments; ++s, offsets += W, sums += kCodeRows * W) {
    if (symmetric) {
      _tile_loadd(0, offsets, 0);  // the same in every row
      _tile_loadd(1, offsets, 0);
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

// c[row * ldc + column] += the sums of kCount segments, scaled. grid, zeros: of W, `padded` to a row
template <int kCount, bool kSymmetric>
void add_sums(const int32_t* sums, const float* scales, const int32_t* offsets, const float* grid, const int32_t* zeros,
              int64_t padded, float* c, int64_t ldc) {
  vf columns[kCount];
#pragma GCC unroll 4
  for (int s = 0; s < kCount; ++s) columns[s] = held_load(scales + s * W);
  for (int64_t i = 0; i < kCodeRows; ++i, c += ldc, grid += padded, zeros += padded, sums += W) {
    vf acc = load(c);
#pragma GCC unroll 4
    for (int s = 0; s < kCount; ++s) {
      vi sum = load_bytes(sums + s * kCodeRows * W);
      if constexpr (!kSymmetric) sum = sum + load_bytes(offsets + s * W) * zeros[s];
      acc = fma(to_float(sum), mul(columns[s], set1(grid[s])), acc);
    }
    store(c, acc);
  }
}

template <bool kSymmetric>
constexpr decltype(&add_sums<1, true>) kAddSums[] = {nullptr, add_sums<1, kSymmetric>, add_sums<2, kSymmetric>,
                                                     add_sums<3, kSymmetric>, add_sums<4, kSymmetric>};

// c[i] = the sum of the digits of row i of x, in place
template <int kDigits>
void join_digits(float* c, int64_t strips) {
  constexpr int kHeld = W / kDigits;
  for (int64_t t = 0; t < strips; ++t) {
    const vf v = load(c + t * W);
    vf joined = zero();
#pragma GCC unroll 4
    for (int d = kDigits - 1; d >= 0; --d)
      joined = add(joined, _mm512_permutexvar_ps((__m512i)(iota() * kDigits + d), v));
    _mm512_mask_storeu_ps(c + t * kHeld, (1 << kHeld) - 1, joined);
  }
}

// What a thread needs, in floats.
struct CodeScratch {
  int64_t height, padded, ldc, c, grid, zeros;
  CodeScratch(const Weight& w, const Columns& x, int64_t strips)
      : height(strips > kFewStrips ? kCodeHeight : kCodeRows),
        padded(round_up(x.segments, W)),
        ldc(strips * W + W),
        c(height * ldc),
        grid(height * padded),
        zeros(w.symmetric ? 0 : grid) {}
  int64_t floats() const { return c + grid + zeros + 2 * kCodeSums + height * kCodeStride / 4; }
};

// Rows m0 .. m0 + m - 1 of x, which are all of the columns, by rows n0 .. n1 - 1 of W.
template <class Decoder>
void code_part(const Job& job, const Decoder& decoder, const Columns& x, const CodeScratch& need, int64_t m0, int64_t m,
               int64_t n0, int64_t n1, float* scratch) {
  const Weight& w = job.weight;
  const int64_t padded = need.padded, ldc = need.ldc, chunk = kCodeSegments * x.segment;
  const int64_t strips = (m + x.rows() - 1) / x.rows();
  float *c = scratch, *grid = c + need.c;
  int32_t *zeros = (int32_t*)(grid + need.grid), *sums = zeros + need.zeros;
  uint8_t* a = (uint8_t*)(sums + 2 * kCodeSums);
  for (; n0 < n1; n0 += need.height) {
    const int64_t there = least(need.height, n1 - n0), rows = round_up(there, kCodeRows), blocks = rows / kCodeRows;
    int64_t slots[kCodeHeight];
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = least(n0 + i, w.n - 1);
      slots[i] = decoder.start(w, row, 0);
      segment_scales(w, x.segment, x.segments, row, grid + i * padded);
      if (!w.symmetric)
        by_segment(w, x.segment, x.segments, zeros + i * padded,
                   [&](int64_t g) { return (int32_t)w.zeros[row * w.groups + g]; });
    }
    memset(c, 0, sizeof(float) * (size_t)(rows * ldc));
    for (int64_t k = 0; k < w.k; k += chunk) {
      const int64_t end = least(k + chunk, w.k), s0 = k / x.segment, count = (end - k + x.segment - 1) / x.segment;
      decoder.tile_codes(w, x.evens, n0, rows, k, end, slots, end < w.k ? chunk : need.height * w.k - k, a);
      for (int64_t j = 0; j <= strips * blocks; ++j) {  // sums are added while tiles multiply what comes next
        if (j < strips * blocks) {
          const int64_t t = j / blocks;
          code_sums(a + j % blocks * kCodeRows * kCodeStride, x.b + (t * x.inputs() + k) * W,
                    x.offsets + (t * x.segments + s0) * W, w.symmetric, x.segment, count, sums + j % 2 * kCodeSums);
        }
        if (j > 0) {
          const int64_t t = (j - 1) / blocks, i = (j - 1) % blocks * kCodeRows, at = (t * x.segments + s0) * W;
          const auto add = (w.symmetric ? kAddSums<true> : kAddSums<false>)[count];
          add(sums + (j - 1) % 2 * kCodeSums, x.scales + at, x.offsets + at, grid + i * padded + s0,
              zeros + i * padded + s0, padded, c + i * ldc + t * W, ldc);
        }
      }
    }
    for (int64_t i = 0; i < there && x.digits > 1; ++i)
      (x.digits == 3 ? join_digits<3> : join_digits<4>)(c + i * ldc, strips);
    write_transposed(job, m0, m, n0, there, c, ldc);
  }
}

// Whether tiles of bytes serve this product, and rows of x are as many as crossed the other kernels at 4096 x 4096 (two
// threads): no fewer, because tiles take as long for one column as for sixteen, and where a row has digits
// no more, because it has fewer parts of bf16 (amx.h).
inline bool in_code_tiles(const Job& job) {
  const Weight& w = job.weight;
  const bool unstructured = w.pattern == CTP_UNSTRUCTURED;
  if (!job.tiles || job.transposed || w.values < CTP_INT8 || segment_of(w) < 4 * W) return false;
  if (job.compute == CTP_INT8_ACTIVATIONS) return job.m > kInt8DotLimit;
  const int64_t most = job.dtype == CTP_FP32 ? 64 : job.dtype == CTP_FP16 ? 32 : unstructured ? 10 : 16;
  return job.m >= (unstructured ? 5 : 3) && job.m <= most;
}

// Whether the product was done so.
template <class Decoder>
bool run_code_tiles(const Job& job, const Decoder& decoder, int threads) {
  const Weight& w = job.weight;
  if (!in_code_tiles(job)) return false;
  Columns x{};
  x.digits = job.compute == CTP_INT8_ACTIVATIONS ? 1 : job.dtype == CTP_BF16 ? 3 : 4;
  x.segment = segment_of(w);
  x.segments = (w.k + x.segment - 1) / x.segment;
  x.evens = w.pattern == CTP_DENSE && w.values == CTP_INT4 && x.segment == 128;
  const int64_t most = least(job.m, kCodeStrips * x.rows()), strips = (most + x.rows() - 1) / x.rows();
  const int64_t bytes = strips * W * x.inputs(), grids = strips * W * x.segments;
  const CodeScratch need(w, x, strips);
  float* memory = ctp::scratch((size_t)(bytes / 4 + 2 * grids + threads * need.floats()));
  if (!memory) return false;
  x.b = (int8_t*)memory;
  x.offsets = (int32_t*)(memory + bytes / 4);
  x.scales = (float*)(x.offsets + grids);
  float* own = x.scales + grids;
  // Of columns that are nobody's: left as they are, they could overflow, or be denormal numbers, which are slow.
  memset(x.offsets, 0, 2 * sizeof(float) * (size_t)grids);
  const int64_t pieces = (w.k + kPiece - 1) / kPiece;
  const Shares shares(w.n, kCodeRows, kShare, threads);
  for (int64_t m0 = 0; m0 < job.m; m0 += most) {
    const int64_t m = least(most, job.m - m0);
    int wild = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : wild) if (threads > 1)
    for (int64_t p = 0; p < pieces; ++p)
      for (int64_t i = 0; i < m; ++i) wild |= !set_columns(job, x, m0, i, p * kPiece);
    if (wild) return false;  // as it can be in the first turn only
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < shares.count; ++p) {
      configure_tiles();
      code_part(job, decoder, x, need, m0, m, shares.begin(p), shares.begin(p + 1),
                own + omp_get_thread_num() * need.floats());
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
