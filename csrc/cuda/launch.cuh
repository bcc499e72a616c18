// From the C interface to a grid: the kernel's view of a weight, which instance runs, how many blocks share a sum.
#pragma once

#include "../ctp.h"
#include "matmul.cuh"
#include "matmul_t.cuh"

namespace ctp {

constexpr int CUDA_STATUS = 1000;  // a cudaError_t comes back as 1000 + its number

// One call of ctp_cuda_matmul (y, bias) or ctp_cuda_matmul_t (x is dy, y is dx).
struct Problem {
  const ctp_weight* w;
  const void* x;
  int64_t ldx, m;
  const void* bias;
  void* y;
  int32_t dtype;
  uint32_t* counters;
  float* partial;
  int64_t partial_bytes;
  cudaStream_t stream;
  bool transposed;
};

// One file a family, so that they compile side by side.
int run_int8(const Problem&);
int run_int4(const Problem&);
int run_int3(const Problem&);
int run_int2(const Problem&);
int run_sparse24_floats(const Problem&);
int run_sparse24_codes(const Problem&);
int run_unstructured(const Problem&);

inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// OCTETS and MASK_OCTETS: how many a lane loads at once; the loads are vectors where every row starts on a multiple.
template <class Part>
Weight device_weight(const ctp_weight& w) {
  using V = typename Part::Values;
  Weight out = {};
  out.low = w.stored, out.high = static_cast<const uint8_t*>(w.stored_hi), out.mask = w.mask, out.zeros = w.zeros;
  out.row_offsets = w.row_offsets, out.tile_offsets = w.tile_offsets, out.scales = w.scales;
  out.n = int(w.n), out.k = int(w.k);
  out.row_octets = int(((w.pattern == CTP_SPARSE24 ? w.k / 2 : w.k) + 7) / 8), out.mask_octets = int((w.k + 7) / 8);
  out.group = int(w.group < w.k ? w.group : w.k), out.groups = int((w.k + out.group - 1) / out.group);
  out.half_scales = w.scale_dtype == CTP_FP16;
  const auto vector = [](const void* plane, int row_octets, int octets, int bytes) {
    const int load = octets * bytes < 16 ? octets * bytes : 16;
    return load > 0 && aligned(plane, load) && int64_t(row_octets) * bytes % load == 0;
  };
  out.vector_low = vector(out.low, out.row_octets, Part::OCTETS, V::LOW_BYTES);
  out.vector_high = vector(out.high, out.row_octets, Part::OCTETS, V::HIGH_BYTES);
  out.vector_mask = vector(out.mask, out.mask_octets, Part::MASK_OCTETS, 1);
  return out;
}

// How many blocks share the sum of one output tile: enough to give every multiprocessor four blocks, none with fewer
// than four steps, and what the workspace holds. Four and four are guesses: nothing was measured.
inline int blocks_per_sum(const Problem& p, int64_t output_tiles, int steps, int64_t slice_bytes) {
  constexpr int BLOCKS = 4, STEPS = 4;
  int device = 0, processors = 0;
  if (p.counters == nullptr || p.partial == nullptr || output_tiles > MAX_SHARED_TILES) return 1;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  int64_t blocks = int64_t(BLOCKS) * processors / output_tiles;
  if (blocks > steps / STEPS) blocks = steps / STEPS;
  if (blocks > p.partial_bytes / (output_tiles * slice_bytes)) blocks = p.partial_bytes / (output_tiles * slice_bytes);
  return blocks < 1 ? 1 : int(blocks);
}

template <typename Call>
int start(void (*kernel)(Call), const Call& call, dim3 grid, int shared_bytes, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, call);
  return error == cudaSuccess ? CTP_OK : CUDA_STATUS + int(error);
}

// Rows of x for one launch: gridDim.y is at most 65535.
template <int ROWS, typename Launch>
int in_chunks(const Problem& p, const Launch& launch) {
  constexpr int64_t CHUNK = int64_t(65535) * ROWS;
  const int64_t width = p.transposed ? p.w->k : p.w->n;  // of an output row; elements are 2 bytes
  for (int64_t m0 = 0; m0 < p.m; m0 += CHUNK) {
    const int64_t m = p.m - m0 < CHUNK ? p.m - m0 : CHUNK;
    const int status =
        launch(static_cast<const char*>(p.x) + m0 * p.ldx * 2, int(m), static_cast<char*>(p.y) + m0 * width * 2);
    if (status != CTP_OK) return status;
  }
  return CTP_OK;
}

template <class Tile, int NT, int PANELS>
int launch_matmul(const Problem& p) {
  using Shape = MatmulShape<Tile, NT, PANELS>;
  static_assert(Shape::SHARED_BYTES <= 99 * 1024, "what a block may have on sm_86 and sm_89");
  return in_chunks<Shape::ROWS>(p, [&](const void* x, int m, void* y) {
    constexpr int PIECE = Tile::SPARSE_MMA ? 8 : 16;
    const int steps = int((p.w->k + TILE_K - 1) / TILE_K);
    const dim3 tiles(unsigned((p.w->n + Shape::OUTPUTS - 1) / Shape::OUTPUTS),
                     unsigned((m + Shape::ROWS - 1) / Shape::ROWS));
    const int blocks = blocks_per_sum(p, int64_t(tiles.x) * tiles.y, steps, int64_t(Shape::OUTPUTS) * Shape::ROWS * 4);
    MatmulCall call = {};
    call.w = device_weight<Tile>(*p.w);
    call.x = {x, p.ldx, m, int(p.w->k), aligned(x, PIECE) && (m == 1 || p.ldx * 2 % PIECE == 0)};
    call.bias = p.bias, call.y = y, call.shared = {p.counters, p.partial};
    call.tiles_per_block = (steps + blocks - 1) / blocks;
    const unsigned used = unsigned((steps + call.tiles_per_block - 1) / call.tiles_per_block);
    return start(matmul<Tile, NT, PANELS>, call, dim3(tiles.x, tiles.y, used), Shape::SHARED_BYTES, p.stream);
  });
}

template <class Span, int NT>
int launch_matmul_t(const Problem& p) {
  using Shape = MatmulTShape<NT>;
  static_assert(Shape::SHARED_BYTES <= 99 * 1024, "what a block may have on sm_86 and sm_89");
  return in_chunks<Shape::ROWS>(p, [&](const void* dy, int m, void* dx) {
    const int steps = int((p.w->n + TILE_K - 1) / TILE_K);
    const dim3 tiles(unsigned((p.w->k + TILE_K - 1) / TILE_K), unsigned((m + Shape::ROWS - 1) / Shape::ROWS));
    const int blocks = blocks_per_sum(p, int64_t(tiles.x) * tiles.y, steps, int64_t(TILE_K) * Shape::ROWS * 4);
    MatmulTCall call = {};
    call.w = device_weight<Span>(*p.w);
    call.dy = {dy, p.ldx, m, int(p.w->n), aligned(dy, 16) && (m == 1 || p.ldx * 2 % 16 == 0)};
    call.dx = dx, call.shared = {p.counters, p.partial};
    call.tiles_per_block = (steps + blocks - 1) / blocks;
    const unsigned used = unsigned((steps + call.tiles_per_block - 1) / call.tiles_per_block);
    return start(matmul_t<Span, NT>, call, dim3(tiles.x, tiles.y, used), Shape::SHARED_BYTES, p.stream);
  });
}

// Rows of x pick the instance. Two panels of 16 rows of W a warp read x half as often, where registers allow it.
template <class Tile, class Span, int WIDE, int PANELS>
int by_rows(const Problem& p) {
  if (p.transposed) return p.m <= 16 ? launch_matmul_t<Span, 2>(p) : launch_matmul_t<Span, 4>(p);
  if (p.m <= 8) return launch_matmul<Tile, 1, 1>(p);
  if (p.m <= 16) return launch_matmul<Tile, 2, 1>(p);
  return launch_matmul<Tile, WIDE, PANELS>(p);
}

// Groups of fewer than 128 inputs take a variant that reads narrower pieces.
template <class V>
int dense_by_group(const Problem& p) {
  using Tile = DenseTile<V, 1>;
  using Span = DenseSpan<V>;
  if (p.transposed || p.w->group >= p.w->k || p.w->group % TILE_K == 0) return by_rows<Tile, Span, 8, 1>(p);
  if (p.m <= 16) return launch_matmul<DenseTile<V, 4>, 2, 1>(p);
  return launch_matmul<DenseTile<V, 4>, 8, 1>(p);
}

template <template <typename> class V>
int dense(const Problem& p) {
  return p.dtype == CTP_FP16 ? dense_by_group<V<__half>>(p) : dense_by_group<V<__nv_bfloat16>>(p);
}

template <class V>
int sparse24(const Problem& p) {
  return by_rows<Sparse24Tile<V>, Sparse24Span<V>, 8, V::CODES ? 1 : 2>(p);
}

template <class V>
int unstructured(const Problem& p) {
  return by_rows<UnstructuredTile<V>, UnstructuredSpan<V>, 4, 1>(p);
}

}  // namespace ctp
