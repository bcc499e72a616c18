// Many rows of x where the processor multiplies tiles of bf16 (AMX): sixteen times the fp32 multiply-adds.
//
// Nothing is rounded on the way. An fp32 number is the sum of three of bf16, an fp16 number of two; a code less its
// zero, or a bf16 value, is one. So the tiles sum exact products in fp32, and the scale of a group comes after its
// sum. (bf16 activations by codes: W is rounded to bf16 with its scale in it, as in brain.h.)
//
// C += A B over 32 steps of the sum at a time, two by two tiles of 16 x 16. Forward, A is rows of W and B is x
// transposed, so C is y transposed: pairs of neighbouring steps lie in a 32-bit lane of B. For dx, A is rows of dy,
// which carry the scales of the group that the columns of B lie in, and pairs of rows of W make B.
#pragma once

#include "brain.h"

namespace {

#if defined(__AVX512F__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)

#define CTP_AMX_BF16 __attribute__((target("amx-tile,amx-bf16,avx512bf16")))

constexpr int64_t kAmxTile = 32;                      // rows and columns of C at a time, and steps of the sum
constexpr int64_t kAmxDepth = 512;                    // steps that are decoded at a time
constexpr int64_t kAmxStride = kAmxDepth + kAmxTile;  // numbers between rows of A: not a power of two
constexpr int64_t kAmxWidth = 256;                    // columns of C
constexpr int64_t kAmxBackWidth = 512;                // the same for dx, where pieces of a row of W so long come faster
constexpr int64_t kAmxPartRows = 768;                 // rows of dy that share a panel of W, by the parts of each
constexpr int64_t kAmxHeight = 256;                   // rows of C
constexpr int64_t kAmxFew = 64;                       // rows of x, by the parts of each, that stay in L2

CTP_AMX_BF16 void configure_tiles() {
  alignas(64) static constexpr auto config = [] {
    struct {
      uint8_t palette, start, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } c{1, 0, {}, {}, {}};
    for (int i = 0; i < 8; ++i) c.bytes[i] = 64, c.rows[i] = 16;
    return c;
  }();
  _tile_loadconfig(&config);
}

CTP_AMX_BF16 void release_tiles() { _tile_release(); }

// Rows of A and columns of B, each so many parts of bf16, that add up.
struct Operands {
  const uint16_t* a;
  int64_t a_part, lda;  // numbers from one part of A to the next; between its rows
  const float* b;       // pairs, in rows of kAmxTile
  int64_t b_part;
};

// The tiles of C += A B over `steps` steps. Both have several parts in no product.
template <bool kNarrow>
CTP_AMX_BF16 inline void tile_steps(const Operands& of, int a_parts, int b_parts, int64_t steps) {
  for (int64_t k = 0; k < steps; k += kAmxTile) {
    const auto load_b = [&](int part) CTP_AMX_BF16 {  // past L1, so that A stays there
      const float* b = of.b + part * of.b_part + k / 2 * kAmxTile;
      _tile_stream_loadd(6, b, kAmxTile * 4);
      if constexpr (!kNarrow) _tile_stream_loadd(7, b + 16, kAmxTile * 4);
    };
    if (b_parts == 1) load_b(0);
    for (int p = 0; p < a_parts; ++p) {
      const uint16_t* a = of.a + p * of.a_part + k;
      _tile_loadd(4, a, of.lda * 2);
      _tile_loadd(5, a + 16 * of.lda, of.lda * 2);
      for (int q = 0; q < b_parts; ++q) {
        if (b_parts > 1) load_b(q);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (!kNarrow) _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (!kNarrow) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
}

// c (32, 32 or 16), rows ldc apart, += A B; or += A B times the scale of each row.
template <bool kNarrow>
CTP_AMX_BF16 void tile_block(const Operands& of, int a_parts, int b_parts, int64_t steps, const float* scales, float* c,
                             int64_t ldc) {
  constexpr int kV = kNarrow ? 1 : 2;
  asm volatile("" ::: "memory");  // what the tiles load has been written
  alignas(64) float sums[32 * 16 * kV];
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (!kNarrow) {
    _tile_zero(1);
    _tile_zero(3);
  }
  tile_steps<kNarrow>(of, a_parts, b_parts, steps);
  _tile_stored(0, sums, 64 * kV);
  _tile_stored(2, sums + 256 * kV, 64 * kV);
  if constexpr (!kNarrow) {
    _tile_stored(1, sums + 16, 64 * kV);
    _tile_stored(3, sums + 256 * kV + 16, 64 * kV);
  }
  for (int64_t i = 0; i < kAmxTile; ++i, c += ldc) {
    const vf scale = set1(scales ? scales[i] : 1.0f);
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) store(c + v * W, fma(load(sums + (i * kV + v) * W), scale, load(c + v * W)));
  }
}

inline void one_tile_block(bool narrow, const Operands& of, int a_parts, int b_parts, int64_t steps,
                           const float* scales, float* c, int64_t ldc) {
  (narrow ? tile_block<true> : tile_block<false>)(of, a_parts, b_parts, steps, scales, c, ldc);
}

// How a job goes by tiles.
struct Tiling {
  int parts;    // of a number of x
  bool scaled;  // whether scales come after sums
  Tiling(const Job& job)
      : parts(job.dtype == CTP_FP32   ? 3
              : job.dtype == CTP_FP16 ? 2
                                      : 1),
        scaled(job.weight.values >= CTP_INT8 && parts > 1) {}
};

// Whether tiles serve this product, and rows of x are enough for them: where they crossed the other kernels at 4096 x
// 4096 (Sapphire Rapids, two threads).
inline bool in_tiles(const Job& job, const Tiling& tiling) {
  const Weight& w = job.weight;
  if (!job.tiles || job.m < (tiling.parts == 1 ? 6 : job.transposed ? 16 : 12)) return false;
  if (tiling.parts > 1 && !job.transposed && share_stored(w) < (w.values < CTP_INT8 ? kFewStored : 0.2))
    return false;  // zeros are better skipped
  if (tiling.parts > 1 && (w.values == CTP_FP32 || w.values == CTP_FP16)) return false;
  if (job.transposed && tiling.scaled && w.scale_dtype != CTP_FP16) return false;  // dy times an fp16 scale stays tame
  return !tiling.scaled || w.groups == 1 || w.group % kAmxTile == 0;
}

// out[p * stride + i] = part p of x[i], times scales[i] if there are any, i < count, the first part the largest; then
// zeros up to a multiple of kAmxTile. A bf16 number is itself.
CTP_AMX_BF16 void split_row(const void* x, int32_t dtype, int64_t count, const float* scales, int parts, int64_t stride,
                            uint16_t* out) {
  const int64_t padded = round_up(count, kAmxTile);
  for (int p = 0; p < parts; ++p) memset(out + p * stride + count / W * W, 0, 2 * (size_t)(padded - count / W * W));
  if (dtype == CTP_BF16) {
    memcpy(out, x, 2 * (size_t)count);
    return;
  }
  const __m512i high = _mm512_set1_epi32((int)0xffff0000);
  const int64_t step = W * size_of(dtype);
  const char* in = (const char*)x;
  for (int64_t i = 0; i < count; i += W, in += step) {
    vf rest = i + W <= count ? widen(in, dtype) : widen_some(in, dtype, count - i);
    if (scales) rest = mul(rest, load(scales + i));
    for (int p = 0; p < parts; ++p) {  // cut off, not rounded: eight bits at a time, and nothing becomes infinite
      const __m512i part = _mm512_and_si512(_mm512_castps_si512(rest), high);
      rest = _mm512_sub_ps(rest, as_float(part));
      _mm256_storeu_si256((__m256i*)(out + p * stride + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(part, 16)));
    }
  }
}

// Whether sums of codes times x stay far from what fp32 cannot hold, and parts of x too.
bool tame(const Job& job, int threads) {
  int wild = 0;
  const int64_t depth = job.depth();
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : wild) if (threads > 1)
  for (int64_t i = 0; i < job.m; ++i) {
    vf top = zero();
    int other = 0;
    const int64_t step = W * size_of(job.dtype);
    const char* p = (const char*)x_at(job, i, 0);
    for (int64_t k = 0; k < depth; k += W, p += step) {
      const vf v = _mm512_abs_ps(k + W <= depth ? widen(p, job.dtype) : widen_some(p, job.dtype, depth - k));
      other |= _mm512_cmp_ps_mask(v, set1(0x1p100f), _CMP_NLE_UQ);  // or not a number
      top = _mm512_max_ps(top, v);
    }
    const float largest = _mm512_reduce_max_ps(top);
    wild |= other || (largest != 0 && largest < 0x1p-80f);
  }
  return !wild;
}

// The rows of x from m0 on as B: b[column / 32][part][pair][column % 32], for K rounded up to `depth`.
template <class Decoder>
void forward_tiles(const Job& job, const Decoder& decoder, const Tiling& tiling, int64_t m0, int64_t m, const float* b,
                   int64_t depth, int64_t c0, int64_t c1, float* scratch) {
  const Weight& w = job.weight;
  // A few rows of x stay in L2: then W is decoded along its rows, which memory gives fastest.
  const bool few = m * tiling.parts <= kAmxFew;
  const int64_t most = few ? kAmxTile : kAmxHeight, deep = kAmxHeight / most * kAmxDepth, lda = deep + kAmxTile;
  uint16_t* a = (uint16_t*)scratch;
  float *c = scratch + kAmxHeight * kAmxStride / 2, *scales = c + kAmxHeight * kAmxWidth;
  Weight codes = w;
  if (tiling.scaled) codes.scales = nullptr;
  const int64_t group = tiling.scaled && w.groups > 1 ? w.group : w.k;
  for (int64_t n0 = c0; n0 < c1; n0 += most) {
    const int64_t height = least(c1 - n0, most), strips = round_up(height, kAmxTile);
    int64_t slots[kAmxHeight];
    for (int64_t i = 0; i < height; ++i) slots[i] = decoder.start(w, n0 + i, 0);
    memset(c, 0, sizeof(float) * (size_t)(strips * kAmxWidth));
    for (int64_t r0 = 0; r0 < w.k; r0 += deep) {
      const int64_t length = least(w.k - r0, deep), padded = round_up(length, kAmxTile);
      for (int64_t i = 0; i < height; ++i) {
        uint16_t* row = a + i * lda;
        slots[i] = decoder.brain(codes, n0 + i, r0, r0 + length, slots[i], few ? w.k : deep, row);
        memset(row + length, 0, 2 * (size_t)(padded - length));
      }
      for (int64_t k = r0; k < r0 + length;) {  // the steps of a group
        const int64_t end = least(least((k / group + 1) * group, k + kAmxDepth), r0 + length);
        if (tiling.scaled)
          for (int64_t i = 0; i < height; ++i) scales[i] = scale_of(w, n0 + i, k / group);
        const int64_t steps = round_up(end - k, kAmxTile), ahead = few ? 0 : steps;
        for (int64_t t = 0; t < m; t += kAmxTile) {
          const float* columns = b + t * tiling.parts * (depth / 2) + k / 2 * kAmxTile;
          // What follows lies in L3 at best, and loads of tiles do not wait side by side: 512 rows of x take half the
          // time if it is asked for meanwhile.
          const float* next = t + kAmxTile < m ? columns + kAmxTile * tiling.parts * (depth / 2)
                                               : b + end / kAmxTile * kAmxTile / 2 * kAmxTile;
          for (int64_t s = 0; s < strips; s += kAmxTile) {
            for (int64_t i = ahead * s / strips; i < ahead * (s + kAmxTile) / strips; ++i)
              for (int q = 0; q < tiling.parts; ++q)
                __builtin_prefetch(next + q * (depth / 2) * kAmxTile + i * W, 0, 2);
            one_tile_block(m - t <= W, {a + s * lda + (k - r0), 0, lda, columns, depth / 2 * kAmxTile}, 1, tiling.parts,
                           steps, tiling.scaled ? scales + s : nullptr, c + s * kAmxWidth + t, kAmxWidth);
          }
        }
        k = end;
      }
    }
    write_transposed(job, m0, m, n0, height, c, kAmxWidth);
  }
}

// Columns c0 .. c1 - 1 of dx: a panel of W by rows of dy, to which the scales of a group of columns belong.
template <class Decoder>
void backward_tiles(const Job& job, const Decoder& decoder, const Tiling& tiling, int64_t c0, int64_t c1,
                    float* scratch) {
  const Weight& w = job.weight;
  Weight codes = w;
  if (tiling.scaled) codes.scales = nullptr;
  const int64_t group = tiling.scaled && w.groups > 1 ? w.group : w.k;
  const int64_t rows = kAmxPartRows / tiling.parts, part = rows * kAmxStride;
  uint16_t *a = (uint16_t*)scratch, *pair = a + kAmxPartRows * kAmxStride;
  float *panel = (float*)(pair + 2 * (kAmxBackWidth + kAmxTile)), *c = panel + kAmxDepth / 2 * kAmxBackWidth;
  float* scales = c + kAmxPartRows * kAmxBackWidth;
  for (int64_t m0 = 0; m0 < job.m; m0 += rows)
    for (int64_t k0 = c0; k0 < c1; k0 += kAmxBackWidth) {
      const int64_t k1 = least(k0 + kAmxBackWidth, c1), m = least(job.m - m0, rows), strips = round_up(m, kAmxTile);
      memset(c, 0, sizeof(float) * (size_t)(strips * kAmxBackWidth));
      for (int64_t n = 0; n < w.n; n += kAmxDepth) {
        const int64_t length = least(w.n - n, kAmxDepth), padded = round_up(length, kAmxTile);
        for (int64_t r = 0; r < padded; ++r) {
          uint16_t* row = pair + (r & 1) * (kAmxBackWidth + kAmxTile);
          if (r < length)
            decoder.brain(codes, n + r, k0, k1, decoder.start(w, n + r, k0), kRowsAhead * w.k, row);
          else
            memset(row, 0, sizeof(uint16_t) * (kAmxBackWidth + kAmxTile));
          if (r & 1) brain_pairs(pair, row, k1 - k0, kAmxDepth / 2, panel + r / 2 * kTile);
        }
        for (int64_t k = k0, end; k < k1; k = end) {  // the columns of a group
          end = least((k / group + 1) * group, k1);
          if (tiling.scaled)
            for (int64_t r = 0; r < padded; ++r) scales[r] = r < length ? scale_of(w, n + r, k / group) : 0.0f;
          for (int64_t i = 0; i < m; ++i)
            split_row(x_at(job, m0 + i, n), job.dtype, length, tiling.scaled ? scales : nullptr, tiling.parts, part,
                      a + i * kAmxStride);
          for (int64_t s = 0; s < strips; s += kAmxTile)
            for (int64_t t = k; t < end; t += kAmxTile)
              one_tile_block(end - t <= W,
                             {a + s * kAmxStride, part, kAmxStride, panel + (t - k0) * (kAmxDepth / 2), 0},
                             tiling.parts, 1, padded, nullptr, c + s * kAmxBackWidth + t - k0, kAmxBackWidth);
        }
      }
      for (int64_t i = 0; i < m; ++i) write_row(job, m0 + i, k0, k1 - k0, c + i * kAmxBackWidth);
    }
}

// Whether the product was done in tiles.
template <class Decoder>
bool run_tiles(const Job& job, const Decoder& decoder, int threads) {
  static_assert(kTile == kAmxTile, "brain_pairs() makes the panel of dx");
  const Weight& w = job.weight;
  const Tiling tiling(job);
  if (!in_tiles(job, tiling) || !tame(job, threads)) return false;
  if (job.transposed) {
    const Shares shares(w.k, kAmxTile, kAmxBackWidth, threads);
    const int64_t own = kAmxPartRows * kAmxStride / 2 + kAmxBackWidth + kAmxTile +
                        (kAmxDepth / 2 + kAmxPartRows) * kAmxBackWidth + kAmxDepth;
    float* memory = ctp::scratch((size_t)(threads * own));
    if (!memory) return false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < shares.count; ++p) {
      configure_tiles();
      backward_tiles(job, decoder, tiling, shares.begin(p), shares.begin(p + 1), memory + omp_get_thread_num() * own);
      release_tiles();
    }
    return true;
  }
  const int64_t depth = round_up(w.k, kAmxTile), block = round_up(least(job.m, kAmxWidth), kAmxTile);
  const int64_t shared = tiling.parts * depth / 2 * block;
  const int64_t wide = W * (kAmxDepth / 2 + W), split = 3 * kAmxTile * kAmxStride / 2;
  const int64_t own = kAmxHeight * (kAmxStride / 2 + kAmxWidth + 1) > wide + split
                          ? kAmxHeight * (kAmxStride / 2 + kAmxWidth + 1)
                          : wide + split;
  float* memory = ctp::scratch((size_t)(shared + threads * own));
  if (!memory) return false;
  const int64_t pieces = (w.k + kAmxDepth - 1) / kAmxDepth;
  const Shares shares(w.n, kAmxTile, kShare, threads);
  for (int64_t m0 = 0; m0 < job.m; m0 += kAmxWidth) {
    const int64_t m = least(job.m - m0, kAmxWidth), tiles = (m + kAmxTile - 1) / kAmxTile;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < threads; ++p) {
      float* scratch = memory + shared + p * own;
      uint16_t* parts = (uint16_t*)(scratch + wide);
      Job pairs = job;  // of parts, as one 32-bit number each
      pairs.dtype = CTP_FP32;
      pairs.ldx = kAmxStride / 2;
      for (int64_t i = tiles * pieces * p / threads; i < tiles * pieces * (p + 1) / threads; ++i) {
        const int64_t t = i / pieces * kAmxTile, k = i % pieces * kAmxDepth, length = least(w.k - k, kAmxDepth);
        const int64_t rows = least(m - t, kAmxTile);
        for (int64_t r = 0; r < rows; ++r)
          split_row(x_at(job, m0 + t + r, k), job.dtype, length, nullptr, tiling.parts, kAmxTile * kAmxStride,
                    parts + r * kAmxStride);
        for (int q = 0; q < tiling.parts; ++q) {
          pairs.x = parts + q * kAmxTile * kAmxStride;
          transpose_rows(pairs, 0, rows, 2, 0, round_up(length, kAmxTile) / 2, scratch, kAmxDepth / 2 + W,
                         memory + t * tiling.parts * (depth / 2) + (q * depth / 2 + k / 2) * kAmxTile, kAmxTile);
        }
      }
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < shares.count; ++p) {
      configure_tiles();
      forward_tiles(job, decoder, tiling, m0, m, memory, depth, shares.begin(p), shares.begin(p + 1),
                    memory + shared + omp_get_thread_num() * own);
      release_tiles();
    }
  }
  return true;
}

#else

template <class Decoder>
bool run_tiles(const Job&, const Decoder&, int) {
  return false;
}

#endif

}  // namespace
