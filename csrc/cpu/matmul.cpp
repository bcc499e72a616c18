// y = x W^T + bias and dx = dy W, compiled once for each instruction set as namespace ctp::CTP_ISA.
//
// A few rows of x: dot products with rows of W, which are decoded in registers or, four at a time, into L1. Many rows:
// one register-tiled kernel C += A P, where the panel P, in L2, is of x transposed (forward) or of W (dx). A weight
// with zeros and rows enough: skip.h. Tiles, where the processor has them: amx.h, amx_codes.h. bf16 activations
// without: brain.h. Activations rounded to integers: int8.h. Every sum runs in an order that depends on K (or N) only,
// so the bits do not depend on the number of threads.

#include "amx.h"
#include "amx_codes.h"
#include "brain.h"
#include "digits.h"
#include "int8.h"
#include "skip.h"

namespace {

constexpr int64_t kDepth = 256;           // depth of a panel: kDepth x kTile floats of it stay in L1
constexpr int64_t kWidth = 256;           // columns of a panel
constexpr int64_t kFew = 8;               // rows of dy that wait for memory
constexpr int64_t kBlock = 512;           // rows of dy that share a decoded panel: kBlock x kDepth floats stay in L2
constexpr int64_t kStride = kDepth + 16;  // floats between rows of A: not a power of two, so that no cache set fills up

// ---- The decoders, composed for every pattern and kind of value ---------------------------------------------------

struct Decoder {
  // out[0 .. k1 - k0) = W[row, k0 .. k1), then zeros up to a multiple of W
  int64_t (*decode)(const Weight&, int64_t row, int64_t k0, int64_t k1, int64_t slot, int64_t ahead, float* out);
  // the list of W[row, k0 .. k1): lists.h
  int64_t (*list)(const Weight&, int64_t row, int64_t k0, int64_t k1, int64_t slot, List& list);
  void (*list_ahead)(const Weight&, int64_t row, int64_t k0, int64_t k1, int64_t slot);
  Start start;
  // dots.h: where it can, for 1, 2 and 4 rows of x
  bool (*in_blocks)(const Weight&);
  void (*reorder)(const Weight&, float* x, int64_t count);
  Dots dots[3];
  // brain.h, where it has its instructions; dots for 1, 2, 4 and 8 rows of x
  Dots brain_dots[4];
  int64_t (*brain)(const Weight&, int64_t row, int64_t k0, int64_t k1, int64_t slot, int64_t ahead, uint16_t* out);
  // int8.h
  Codes codes;
  FieldRows fields;
  PanelCodes panel;
  // amx_codes.h, where it has its instructions
  TileCodes tile_codes;
  // digits.h, likewise
  DigitDots digits;
};

template <class Pattern, class Values>
struct Composed {
  static constexpr Decoder kDecoder = {decode<Pattern, Values>,
                                       list_row<Pattern, Values>,
                                       list_ahead<Pattern, Values>,
                                       Pattern::start,
                                       in_blocks<Values>,
                                       reorder_row<Pattern, Values>,
                                       {dots<Pattern, Values, 1>, dots<Pattern, Values, 2>, dots<Pattern, Values, 4>},
                                       {kBrainDotsOf<Pattern, Values, 1>, kBrainDotsOf<Pattern, Values, 2>,
                                        kBrainDotsOf<Pattern, Values, 4>, kBrainDotsOf<Pattern, Values, 8>},
                                       kBrainRow<Pattern, Values>,
                                       codes_of<Pattern, Values>(),
                                       fields_by<Pattern, Values>(),
                                       panel_by<Pattern, Values>(),
                                       tile_codes_by<Pattern, Values>(),
                                       digits_by<Pattern, Values>()};
};

template <class Pattern>
const Decoder& decoder_of(int32_t values) {
  switch (values) {
    case CTP_FP32:
      return Composed<Pattern, Floating<CTP_FP32>>::kDecoder;
    case CTP_FP16:
      return Composed<Pattern, Floating<CTP_FP16>>::kDecoder;
    case CTP_BF16:
      return Composed<Pattern, Floating<CTP_BF16>>::kDecoder;
    case CTP_INT8:
      return Composed<Pattern, Coded<8>>::kDecoder;
    case CTP_INT4:
      return Composed<Pattern, Coded<4>>::kDecoder;
    case CTP_INT3:
      return Composed<Pattern, Coded<3>>::kDecoder;
    default:
      return Composed<Pattern, Coded<2>>::kDecoder;
  }
}

const Decoder& decoder_of(const Weight& w) {
  switch (w.pattern) {
    case CTP_DENSE:
      return decoder_of<Dense>(w.values);
    case CTP_SPARSE24:
      return decoder_of<Sparse24>(w.values);
    default:
      return decoder_of<Unstructured>(w.values);
  }
}

// ---- Few rows: dot products ---------------------------------------------------------------------------------------

// sums[(i * kDotGroup + j) * W] += lanes whose sum is x row i . w row j, for kM rows of x and 4 of w
template <int kM>
void dot_tile(const float* x, int64_t ldx, const float* w, int64_t length, float* sums) {
  vf acc[kM][4];
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < 4; ++j) acc[i][j] = zero();
  for (int64_t k = 0; k < length; k += W) {
    vf lanes[kM];
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) lanes[i] = load(x + i * ldx + k);
#pragma GCC unroll 16
    for (int j = 0; j < 4; ++j) {
      const vf column = load(w + j * kDotStride + k);
#pragma GCC unroll 16
      for (int i = 0; i < kM; ++i) acc[i][j] = fma(lanes[i], column, acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < 4; ++j) {
      float* to = sums + (i * kDotGroup + j) * W;
      store(to, add(load(to), acc[i][j]));
    }
}

// Floats between rows of x: zeros as far as the lanes of a short last group reach.
inline int64_t padded_inputs(const Weight& w) { return round_up(w.k, W) + 2 * W; }

int64_t dot_floats(const Job& job) {
  return (job.m + 3) * (padded_inputs(job.weight) + kDotGroup * W) + 4 * kDotStride;
}

// Whether these dot products are of pairs of bf16. Four rows of x or fewer gain little, so that W is not rounded there.
inline bool in_brain_dots(const Job& job, const Decoder& decoder) {
  return job.m <= kBrainDots && (job.m > 4 || job.weight.values == CTP_BF16) && decoder.in_blocks(job.weight) &&
         in_brain(job);
}

// Rows of W, four at a time, are decoded in registers where dots.h can, as often as four rows of x want them; or once,
// into L1.
void dot_part(const Job& job, const Decoder& decoder, const Part& part, float* scratch) {
  const Weight& w = job.weight;
  // Up to three rows of x more than there are: a register tile computes them, and nobody reads the sums.
  const int64_t padded = padded_inputs(w), ms = job.m + 3;
  float *x = scratch, *sums = x + ms * padded, *rows = sums + ms * kDotGroup * W;
  const bool codes = w.values >= CTP_INT8, dense = w.pattern == CTP_DENSE;
  const bool pairs = in_brain_dots(job, decoder);
  // Rows of x up to which decoding as often as four of them want is faster than decoding into L1.
  const int64_t few = W == 16 && dense && w.values == CTP_INT4 && w.group % 64 == 0 ? 24
                      : W == 8 && codes && !dense                                   ? 4
                                                                                    : 8;
  const bool in_registers = pairs || (decoder.in_blocks(w) && job.m <= few);
  // Inputs of a chunk: what L2 holds of the rows of x that meet rows of W at once, and a whole number of blocks.
  const int64_t chunk = least(pairs          ? 2 * kDotInputs / least(job.m, 8) & ~63
                              : in_registers ? kDotInputs / least(job.m, 4) & ~63
                                             : least((kDotInputs / job.m & ~63) + 128, kDotChunk),
                              padded);
  const int64_t each = pairs ? 2 : 1;         // inputs that are one number of x
  for (int64_t k = 0; k < w.k; k += chunk) {  // a chunk of x lies in one piece
    const int64_t length = least(chunk, padded - k) / each, there = least(chunk, w.k - k) / each;
    float* row = x + k * ms;
    memset(row, 0, sizeof(float) * (size_t)(ms * length));
    for (int64_t i = 0; i < job.m; ++i, row += length) {
      read_row(x_at(job, i, k), pairs ? (int32_t)CTP_FP32 : job.dtype, there, row);
      if (in_registers && !pairs) decoder.reorder(w, row, there);
    }
  }
  for (int64_t n0 = part.column0; n0 < part.column1; n0 += kDotGroup) {
    const int64_t count = least(kDotGroup, part.column1 - n0);
    int64_t slots[kDotGroup], begin[kDotGroup];
    for (int64_t r = 0; r < round_up(count, 4); ++r) slots[r] = decoder.start(w, least(n0 + r, w.n - 1), 0);
    memset(sums, 0, sizeof(float) * (size_t)(ms * kDotGroup * W));
    for (int64_t k = 0; k < w.k; k += chunk) {
      const Span span = {k, least(k + chunk, w.k), x + k * ms, least(chunk, padded - k) / each};
      // Inputs from four rows of W to those that come next: the next rows, or the first with the next chunk.
      const auto ahead = [&](int64_t r) { return r + 4 < count || span.k1 == w.k ? 4 * w.k : chunk - r * w.k; };
      if (in_registers) {
        memcpy(begin, slots, sizeof begin);
        for (int64_t m = 0; m < job.m; m += pairs ? 8 : 4) {
          const int64_t left = job.m - m;
          const Dots dots = (pairs ? decoder.brain_dots : decoder.dots)[pairs && left > 4 ? 3
                                                                        : left > 2        ? 2
                                                                                          : left - 1];
          memcpy(slots, begin, sizeof begin);
          for (int64_t r = 0; r < count; r += 4)
            dots(w, span, n0 + r, m, slots + r, ahead(r), sums + (m * kDotGroup + r) * W);
        }
        continue;
      }
      for (int64_t r = 0; r < count; r += 4) {
        for (int64_t i = 0; i < 4; ++i) {
          float* out = rows + i * kDotStride;
          memset(out + (span.k1 - k) / W * W, 0, sizeof(float) * W);
          slots[r + i] = decoder.decode(w, least(n0 + r + i, w.n - 1), k, span.k1, slots[r + i], ahead(r), out);
        }
        const int64_t length = round_up(span.k1 - k, W);
        int64_t m = 0;
        for (; m + kDotRows <= job.m; m += kDotRows)
          dot_tile<kDotRows>(span.x + m * span.ldx, span.ldx, rows, length, sums + (m * kDotGroup + r) * W);
        for (; m < job.m; ++m)
          dot_tile<1>(span.x + m * span.ldx, span.ldx, rows, length, sums + (m * kDotGroup + r) * W);
      }
    }
    for (int64_t i = 0; i < job.m; ++i) {
      float out[kDotGroup];
      for (int r = 0; r < count; ++r) out[r] = sum(load(sums + (i * kDotGroup + r) * W));
      write_row(job, i, n0, count, out);
    }
  }
}

// ---- Many rows: panels --------------------------------------------------------------------------------------------

// C (kR, kV W) += A (kR, length) P (length, kV W); rows of A are kStride apart.
template <int kR, int kV>
void panel_tile(const float* a, const float* p, int64_t ldp, int64_t length, float* c, int64_t ldc) {
  vf acc[kR][kV];
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) acc[i][v] = zero();
  for (int64_t r = 0; r < length; ++r, p += ldp) {
    vf b[kV];
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) b[v] = load(p + v * W);
#pragma GCC unroll 16
    for (int i = 0; i < kR; ++i) {
      const vf entry = set1(a[i * kStride + r]);
#pragma GCC unroll 16
      for (int v = 0; v < kV; ++v) acc[i][v] = fma(entry, b[v], acc[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) {
      float* out = c + i * ldc + v * W;
      store(out, add(load(out), acc[i][v]));
    }
}

using PanelTile = void (*)(const float*, const float*, int64_t, int64_t, float*, int64_t);
template <int kR>
PanelTile panel_tile_of(int64_t rows) {
  if constexpr (kR == 1)
    return panel_tile<1, kVectors>;
  else
    return rows == kR ? panel_tile<kR, kVectors> : panel_tile_of<kR - 1>(rows);
}

// Forward. The panel is of x transposed, panel[t][k][row of x], and W is decoded as it lies, a few rows at a time. C is
// y transposed.
int64_t forward_floats() { return kRows * kStride + kDepth * kWidth + kWidth * kWidth + W * kStride; }

void forward_part(const Job& job, const Decoder& decoder, const Part& part, float* scratch) {
  const Weight& w = job.weight;
  float *a = scratch, *panel = a + kRows * kStride, *c = panel + kDepth * kWidth;
  float* rows = c + kWidth * kWidth;
  for (int64_t m0 = part.row0; m0 < part.row1; m0 += kWidth)
    for (int64_t c0 = part.column0; c0 < part.column1; c0 += kWidth) {
      const int64_t m = least(part.row1 - m0, kWidth), width = least(part.column1 - c0, kWidth);
      int64_t slots[kWidth];
      for (int64_t i = 0; i < width; ++i) slots[i] = decoder.start(w, c0 + i, 0);
      memset(c, 0, sizeof(float) * (size_t)(width * kWidth));
      for (int64_t r0 = 0; r0 < w.k; r0 += kDepth) {
        const int64_t length = least(w.k - r0, kDepth), strips = (width + kRows - 1) / kRows;
        for (int64_t t = 0; t < m; t += kTile)
          transpose_rows(job, m0 + t, m - t, kVectors, r0, length, rows, kStride, panel + t * kDepth, kTile);
        for (int64_t s = 0; s < strips; ++s) {  // of nearly equal height: 16 rows are 8 + 8, not 12 + 4
          const int64_t n = width * s / strips, height = width * (s + 1) / strips - n;
          for (int64_t i = 0; i < height; ++i)
            slots[n + i] = decoder.decode(w, c0 + n + i, r0, r0 + length, slots[n + i], kDepth, a + i * kStride);
          for (int64_t t = 0; t < m; t += kTile)
            panel_tile_of<kRows>(height)(a, panel + t * kDepth, kTile, length, c + n * kWidth + t, kWidth);
        }
      }
      write_transposed(job, m0, m, c0, width, c, kWidth);
    }
}

// dx. The panel is of W as it lies, panel[n][k]; rows of dy are A. Few rows of dy wait for memory, which gives long
// pieces of a row of W faster: the panel is wider, and less deep.
struct Backward {
  int64_t block, width, depth, stride;  // rows of dy; the panel; floats between rows of it
  Backward(const Job& job, int64_t rows)
      : block(least(rows, kBlock)),
        width(job.m <= kFew ? 4 * kWidth : kWidth),
        depth(kDepth * kWidth / width),
        stride(width + 16) {}
  int64_t floats() const { return block * (kStride + width) + depth * stride; }
};

void backward_part(const Job& job, const Decoder& decoder, const Part& part, float* scratch) {
  const Weight& w = job.weight;
  const Backward b(job, part.row1 - part.row0);
  float *a = scratch, *panel = a + b.block * kStride, *c = panel + b.depth * b.stride;
  for (int64_t m0 = part.row0; m0 < part.row1; m0 += kBlock)
    for (int64_t c0 = part.column0; c0 < part.column1; c0 += b.width) {
      const int64_t m = least(part.row1 - m0, kBlock), width = least(part.column1 - c0, b.width);
      const int64_t strips = (m + kRows - 1) / kRows, step = m == 1 ? 4 * kTile : m == 2 ? 2 * kTile : kTile;
      memset(c, 0, sizeof(float) * (size_t)(m * b.width));
      for (int64_t r0 = 0; r0 < w.n; r0 += b.depth) {
        const int64_t length = least(w.n - r0, b.depth);
        for (int64_t r = 0; r < length; ++r)
          decoder.decode(w, r0 + r, c0, c0 + width, decoder.start(w, r0 + r, c0), kRowsAhead * w.k,
                         panel + r * b.stride);
        for (int64_t i = 0; i < m; ++i) read_row(x_at(job, m0 + i, r0), job.dtype, length, a + i * kStride);
        for (int64_t t = 0; t < width; t += step)
          for (int64_t s = 0; s < strips; ++s) {
            const int64_t i = m * s / strips, height = m * (s + 1) / strips - i;
            const PanelTile tile = m == 1   ? panel_tile<1, 4 * kVectors>  // sums enough to hide the latency of an add
                                   : m == 2 ? panel_tile<2, 2 * kVectors>
                                            : panel_tile_of<kRows>(height);
            tile(a + i * kStride, panel + t, b.stride, length, c + i * b.width + t, b.width);
          }
      }
      for (int64_t i = 0; i < m; ++i) write_row(job, m0 + i, c0, width, c + i * b.width);
    }
}

}  // namespace

namespace ctp {
namespace CTP_ISA {

int run(const Job& job, int threads) {
  const Weight& w = job.weight;
  const Decoder& decoder = decoder_of(w);
  if ((double)w.n * (double)w.k * (double)(job.m + 8) < kSmall) threads = 1;
  if (run_code_tiles(job, decoder, threads)) return CTP_OK;
  if (job.compute == CTP_INT8_ACTIVATIONS) return run_int8(job, decoder, threads);
  if (run_digits(job, decoder, threads) || run_tiles(job, decoder, threads)) return CTP_OK;
  const bool pairs = in_brain(job), skip = skips(job, pairs) && all_finite(job, threads);
  const bool dot = !skip && !job.transposed &&
                   job.m <= (!pairs                 ? kDotLimit
                             : decoder.in_blocks(w) ? kBrainDots
                                                    : kBrainFew);
  const bool brain = !skip && !dot && pairs;
  const auto kernel = skip             ? skip_part<Decoder>
                      : brain          ? brain_part<Decoder>
                      : dot            ? dot_part
                      : job.transposed ? backward_part
                                       : forward_part;
  const int64_t share = !job.transposed ? kShare : job.m <= kFew ? 4 * kShare : 2 * kShare;
  const Shares shares(job.columns(), dot ? 4 : kTile, share, threads);
  const int64_t across = shares.count, down = dot ? 1 : shares.down(job.m);
  int status = CTP_OK;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < across * down; ++p) {
    const int64_t i = p / across, j = p % across;
    const Part part = {job.m * i / down, job.m * (i + 1) / down, shares.begin(j), shares.begin(j + 1)};
    const int64_t rows = part.row1 - part.row0;
    float* memory = scratch((size_t)(skip             ? skip_floats(rows)
                                     : brain          ? brain_floats()
                                     : dot            ? dot_floats(job)
                                     : job.transposed ? Backward(job, rows).floats()
                                                      : forward_floats()));
    if (memory) {
      kernel(job, decoder, part, memory);
    } else {
#pragma omp atomic write
      status = CTP_OUT_OF_MEMORY;
    }
  }
  return status;
}

int64_t multiply_add(int64_t turns, int threads) {
  constexpr int kChains = 10;  // in flight: latency times units, and no more than any instruction set has registers
  float kept = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads) reduction(+ : kept)
  for (int t = 0; t < threads; ++t) {
    vf chains[kChains], factor = set1(0.5f + 0.01f * (float)t), term = set1(1.0f);
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) chains[i] = set1((float)i);
    for (int64_t turn = 0; turn < turns; ++turn)
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i) chains[i] = fma(chains[i], factor, term);
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) kept += sum(chains[i]);
  }
  return kept == 0 ? 0 : turns * threads * kChains * W * 2;  // always the latter; the sum keeps the loop alive
}

}  // namespace CTP_ISA
}  // namespace ctp
