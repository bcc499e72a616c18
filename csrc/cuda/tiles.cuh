// What the kernels share: a tile of activations in shared memory, and the end of a sum that several blocks share.
#pragma once

#include "patterns.cuh"

namespace ctp {

constexpr int WARPS = 4, THREADS = WARPS * ALL_LANES;
constexpr int MOST_SHARED = 99 * 1024;  // bytes of shared memory that a block may have on sm_86 and sm_89
constexpr int ROW_BYTES = TILE_K * 2;   // a row of a tile in shared memory: 16 pieces of 16 bytes

// Rows of x (or dy) as a kernel reads them; every row starts on 16 bytes.
struct Activations {
  const void* data;
  int64_t stride;
  int rows, columns;
};

// Where piece `piece` (8 columns) of a row lies. Lanes read 16 bytes each, eight of them in one pass over the 32 banks:
// rows 2q and 2q + 1, either pieces 4t + i (t = 0..3) or 4i + t. With these bits exchanged all eight differ mod 8.
__device__ __forceinline__ int dense_place(int row, int piece) {
  return row * ROW_BYTES + 16 * (piece ^ (piece >> 3 & 1) ^ (row & 1) * 6);
}

// For mma.sp, B comes by ldmatrix: matrix b of step i is pieces 4i + b of eight rows, and must hold quads 2b and 2b + 1
// of the fragment: quad 2i (b < 2) or 2i + 1 of the spans of lanes 2 (b % 2) and 2 (b % 2) + 1. So x goes to shared
// memory in quads of 8 bytes. `quad` counts along the row; the row's number is exchanged into the piece against banks.
__device__ __forceinline__ int sparse_place(int row, int quad) {
  const int t = quad / 8, step = quad % 8 / 2, second = quad % 2;
  const int piece = 4 * step + 2 * second + t / 2;
  return row * ROW_BYTES + 16 * (piece ^ (row & 7)) + 8 * (t % 2);
}
__device__ __forceinline__ int sparse_row(int row, int step, int matrix) {
  return row * ROW_BYTES + 16 * ((4 * step + matrix) ^ (row & 7));
}

// Brings columns c0 .. c0 + 127 of ROWS rows from row r0 on into `tile`, by all threads of the block; what lies
// outside becomes zero. Counts for this thread's next commit_copies.
template <int ROWS>
__device__ __forceinline__ void stage(const Activations& x, int r0, int c0, unsigned char* tile) {
  constexpr int PIECES = ROW_BYTES / 16;
  const uint16_t* data = static_cast<const uint16_t*>(x.data);
  static_assert(ROWS * PIECES % THREADS == 0, "whole turns");
#pragma unroll
  for (int turn = 0; turn < ROWS * PIECES / THREADS; ++turn) {
    const int index = turn * THREADS + int(threadIdx.x), row = index / PIECES, piece = index % PIECES;
    const int column = c0 + piece * 8, left = r0 + row < x.rows ? max(0, min(8, x.columns - column)) : 0;
    ptx::copy_async<16>(tile + dense_place(row, piece), left > 0 ? data + int64_t(r0 + row) * x.stride + column : data,
                        2 * left);
  }
}

// The same for x in the forward kernels, where every tile is whole: each of COPIERS threads brings one piece of every
// ROWS_A_TURN-th row from `row0` on. BYTES = 8 lays it out for ldmatrix.
template <int ROWS, int BYTES, int COPIERS>
struct RowCopies {
  static constexpr int PIECES = ROW_BYTES / BYTES, ROWS_A_TURN = COPIERS / PIECES;
  const uint8_t* from;  // of this thread's first row, its columns of tile 0
  int row, piece, rows;
  uint32_t turn_bytes;

  __device__ __forceinline__ RowCopies(const Activations& x, int row0, int thread)
      : row(thread / PIECES), piece(thread % PIECES), rows(x.rows - row0) {
    from = static_cast<const uint8_t*>(x.data) + ((row0 + row) * x.stride * 2 + piece * BYTES);
    turn_bytes = uint32_t(ROWS_A_TURN * x.stride * 2);
    ptx::keep(from);
  }
  // ZEROS: in place of rows that are not there; otherwise nothing.
  template <bool ZEROS>
  __device__ __forceinline__ void copy(int tile, unsigned char* to) const {
    const uint8_t* const at = further(from, tile, ROW_BYTES);
#pragma unroll
    for (int turn = 0; turn < ROWS / ROWS_A_TURN; ++turn) {
      const int now = turn * ROWS_A_TURN + row;
      if (ZEROS || now < rows)
        ptx::copy_async<BYTES>(to + (BYTES == 16 ? dense_place(now, piece) : sparse_place(now, piece)),
                               further(at, turn, turn_bytes), now < rows ? BYTES : 0);
    }
  }
};

// Partial sums of blocks that share an output tile, in the caller's workspace: first a counter per output tile, zero
// before and after every call, then a slice of floats per block.
constexpr int MAX_SHARED_TILES = 2048;
struct Shared {
  uint32_t* counters;
  float* partial;
};

// Adds up `sum` over the gridDim.z blocks of an output tile; true in the one block that came last and now holds the
// total. It adds in the order of blockIdx.z, so the result does not depend on who was last, and sets the counter back
// to zero, so that a captured graph can run again. `flag`: 4 bytes of shared memory that nobody uses any more.
template <int FRAGMENTS>
__device__ __forceinline__ bool add_up(const Shared& shared, float (&sum)[FRAGMENTS][4], unsigned char* flag) {
  constexpr int COUNT = FRAGMENTS * 4;
  if (gridDim.z == 1) return true;
  const unsigned tile = blockIdx.y * gridDim.x + blockIdx.x, tiles = gridDim.x * gridDim.y;
  const auto slice = [&](unsigned z) {
    return shared.partial + (size_t(z) * tiles + tile) * (COUNT * THREADS) + threadIdx.x;
  };
  float* mine = slice(blockIdx.z);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) mine[i * THREADS] = sum[i / 4][i % 4];
  ptx::fence();
  ptx::sync_threads();
  if (threadIdx.x == 0) ptx::store_shared(flag, ptx::arrive(shared.counters + tile));
  ptx::sync_threads();
  if (ptx::load_shared<uint32_t>(flag) != gridDim.z - 1) return false;
  ptx::fence();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) sum[i / 4][i % 4] = 0;
#pragma unroll 2
  for (unsigned z = 0; z < gridDim.z; ++z) {
    const float* from = slice(z);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sum[i / 4][i % 4] += ptx::load_l2(from + i * THREADS);
  }
  if (threadIdx.x == 0) shared.counters[tile] = 0;
  return true;
}

template <typename T>
__device__ __forceinline__ void store(T* to, float value);
template <>
__device__ __forceinline__ void store<__half>(__half* to, float value) {
  *to = __float2half_rn(value);
}
template <>
__device__ __forceinline__ void store<__nv_bfloat16>(__nv_bfloat16* to, float value) {
  *to = __float2bfloat16_rn(value);
}
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

}  // namespace ctp
