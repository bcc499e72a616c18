// From the C interface to a grid: the kernel's view of a weight, which instance runs, how many blocks share a sum.
#pragma once

#include <algorithm>

#include "../ctp.h"
#include "few.cuh"
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

// `unit`: how many inputs a kernel takes between two looks for a scale.
inline Weight device_weight(const ctp_weight& w, int unit) {
  Weight out = {};
  out.low = w.stored, out.high = static_cast<const uint8_t*>(w.stored_hi), out.mask = w.mask, out.zeros = w.zeros;
  out.row_offsets = w.row_offsets, out.tile_offsets = w.tile_offsets, out.scales = w.scales;
  out.n = int(w.n), out.k = int(w.k);
  out.row_octets = int((w.pattern == CTP_SPARSE24 ? w.k / 2 : w.k) / 8), out.mask_octets = int(w.k / 8);
  const int64_t group = w.group < w.k ? w.group : w.k;
  out.groups = int((w.k + group - 1) / group);
  out.group_magic = group == unit ? 0 : uint32_t((int64_t(1) << 32) / (group / unit) + 1);
  out.half_scales = w.scale_dtype == CTP_FP16;
  return out;
}

// Of the current device; 0 where it does not say.
inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) return 0;
  return value;
}

// How many blocks share the sum of one output tile, each for its part of the steps. Time goes in waves, of as many
// blocks as run at once (`registers_for` a multiprocessor, if their shared memory fits), and every block more costs its
// sum a trip through memory, about as long as half a step (forward; measured, H200).
inline int blocks_per_sum(const Problem& p, int64_t output_tiles, int steps, int64_t slice_bytes, int registers_for,
                          int shared_bytes) {
  constexpr int MOST = 32, RESERVED = 1024;  // bytes that every block takes besides its own
  if (p.counters == nullptr || p.partial == nullptr || output_tiles > MAX_SHARED_TILES) return 1;
  const int fit = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / (shared_bytes + RESERVED);
  const int64_t multiprocessors = std::max(1, attribute(cudaDevAttrMultiProcessorCount));
  const int64_t at_once = multiprocessors * std::max(1, std::min(registers_for, fit));
  int best = 1;
  int64_t least = INT64_MAX;
  for (int blocks = 1; blocks <= std::min(steps, MOST); ++blocks) {
    if (blocks > 1 && blocks * output_tiles * slice_bytes > p.partial_bytes) break;
    const int64_t waves = (blocks * output_tiles + at_once - 1) / at_once, each = (steps + blocks - 1) / blocks;
    const int64_t cost = 2 * waves * each + (blocks > 1 ? blocks : 0);
    if (cost < least) least = cost, best = blocks;
  }
  return best;
}

template <typename Call>
int start(void (*kernel)(Call), const Call& call, dim3 grid, int threads, int shared_bytes, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  // The kernel's launch need not wait for the end of the one before: the kernel itself does (ptx::wait_for_previous).
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 1 : 0;
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

template <class Tile, int NT>
int launch_matmul(const Problem& p) {
  using Shape = MatmulShape<Tile, NT>;
  static_assert(Shape::SHARED_BYTES <= MOST_SHARED, "what a block may have on sm_86 and sm_89");
  return in_chunks<Shape::ROWS>(p, [&](const void* x, int m, void* y) {
    const int steps = int(p.w->k / TILE_K);
    const dim3 tiles(unsigned((p.w->n + Shape::OUTPUTS - 1) / Shape::OUTPUTS),
                     unsigned((m + Shape::ROWS - 1) / Shape::ROWS));
    const int blocks = blocks_per_sum(p, int64_t(tiles.x) * tiles.y, steps, int64_t(Shape::OUTPUTS) * Shape::ROWS * 4,
                                      Shape::BLOCKS, Shape::SHARED_BYTES);
    MatmulCall call = {};
    call.w = device_weight(*p.w, TILE_K / Tile::PARTS);
    call.x = {x, p.ldx, m, int(p.w->k)};
    call.bias = p.bias, call.y = y, call.shared = {p.counters, p.partial};
    call.tiles_per_block = (steps + blocks - 1) / blocks;
    const unsigned used = unsigned((steps + call.tiles_per_block - 1) / call.tiles_per_block);
    return start(matmul<Tile, NT>, call, dim3(tiles.x, tiles.y, used), THREADS, Shape::SHARED_BYTES, p.stream);
  });
}

template <class Tile, int NT>
int launch_few(const Problem& p) {
  using Shape = FewShape<Tile, NT>;
  static_assert(Shape::MOST_WARPS * Shape::WARP_BYTES <= MOST_SHARED, "what a block may have on sm_86 and sm_89");
  MatmulCall call = {};
  call.w = device_weight(*p.w, TILE_K / Tile::PARTS);
  call.x = {p.x, p.ldx, int(p.m), int(p.w->k)};
  call.bias = p.bias, call.y = p.y;
  const int panels = int((p.w->n + 15) / 16);
  const int warps = Shape::warps(panels, attribute(cudaDevAttrMultiProcessorCount));
  return start(matmul_few<Tile, NT>, call, dim3(unsigned(panels)), warps * ALL_LANES, warps * Shape::WARP_BYTES,
               p.stream);
}

template <class Span, int NT>
int launch_matmul_t(const Problem& p) {
  using Shape = MatmulTShape<NT>;
  static_assert(Shape::SHARED_BYTES <= MOST_SHARED, "what a block may have on sm_86 and sm_89");
  return in_chunks<Shape::ROWS>(p, [&](const void* dy, int m, void* dx) {
    const int steps = int((p.w->n + TILE_K - 1) / TILE_K);
    const dim3 tiles(unsigned(p.w->k / TILE_K), unsigned((m + Shape::ROWS - 1) / Shape::ROWS));
    const int blocks =
        blocks_per_sum(p, int64_t(tiles.x) * tiles.y, steps, int64_t(TILE_K) * Shape::ROWS * 4, 2, Shape::SHARED_BYTES);
    MatmulTCall call = {};
    call.w = device_weight(*p.w, 16);
    call.dy = {dy, p.ldx, m, int(p.w->n)};
    call.dx = dx, call.shared = {p.counters, p.partial};
    call.tiles_per_block = (steps + blocks - 1) / blocks;
    const unsigned used = unsigned((steps + call.tiles_per_block - 1) / call.tiles_per_block);
    return start(matmul_t<Span, NT>, call, dim3(tiles.x, tiles.y, used), THREADS, Shape::SHARED_BYTES, p.stream);
  });
}

// Rows of x pick the instance.
template <class Tile>
int forward(const Problem& p) {
  if constexpr (Tile::SLOT_BYTES) {
    return launch_matmul<Tile, 4>(p);  // with few rows as fast as a kernel for few (measured, H200)
  } else {
    if (p.m <= 8) return launch_few<Tile, 1>(p);
    if (p.m <= 16) return launch_few<Tile, 2>(p);
    return p.m <= 32 ? launch_matmul<Tile, 4>(p) : launch_matmul<Tile, 8>(p);
  }
}
template <class Span>
int backward(const Problem& p) {
  return p.m <= 16 ? launch_matmul_t<Span, 2>(p) : launch_matmul_t<Span, 4>(p);
}

// Groups of fewer than 128 inputs take a variant that scales four times a tile.
template <class V>
int dense_by_group(const Problem& p) {
  if (p.transposed) return backward<DenseSpan<V>>(p);
  const bool whole = p.w->group >= p.w->k || p.w->group % TILE_K == 0;
  return whole ? forward<DenseTile<V, 1>>(p) : forward<DenseTile<V, 4>>(p);
}

template <template <typename> class V>
int dense(const Problem& p) {
  return p.dtype == CTP_FP16 ? dense_by_group<V<__half>>(p) : dense_by_group<V<__nv_bfloat16>>(p);
}

template <class V>
int sparse24(const Problem& p) {
  return p.transposed ? backward<Sparse24Span<V>>(p) : forward<Sparse24Tile<V>>(p);
}

template <class V>
int unstructured(const Problem& p) {
  return p.transposed ? backward<UnstructuredSpan<V>>(p) : forward<UnstructuredTile<V>>(p);
}

}  // namespace ctp
