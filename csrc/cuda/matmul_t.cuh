// dx = dy W on tensor cores, from the same bytes as the forward: N and K change places.
//
// It computes dx^T = W^T dy^T. The left operand is W^T (16 inputs, 16 rows of W an instruction): a register holds one
// input of two neighbouring rows of W. A lane decodes an octet of each of its rows, two inputs a register, and two
// `prmt` of the registers of rows n and n + 1 give (n, n + 1) at input k and at input k + 1. With input k as fragment
// row g and input k + 1 as row g + 8, octet o of the 16 inputs that lane group g owns fills four fragments.
//
// The scale belongs to a row of W, which is summed over here, so it cannot wait for the sum; it is multiplied into the
// decoded weight, rounded once to the activations' type: the weight that a dense layer of that type holds. (Into dy it
// would be cheaper, but fp16 gradients would fall below fp16's range.) 2:4 cannot use the sparse tensor cores: its
// pattern runs along K, and the sum runs over N. Sparse weights are spread out in registers instead.
//
// A block owns 128 inputs and NT * 8 rows of dy; its four warps share the sum over N, 32 rows of W each of every 128,
// and add up in the order of their numbers. Blocks along N (gridDim.z) meet in `add_up`.
#pragma once

#include "tiles.cuh"

namespace ctp {

struct MatmulTCall {
  Weight w;
  Activations dy;
  void* dx;
  Shared shared;
  int tiles_per_block;  // steps of 128 rows of W
};

template <int NT>
struct MatmulTShape {
  static constexpr int STAGES = 3, ROWS = NT * 8, STAGE_BYTES = ROWS * ROW_BYTES;
  static constexpr int SUM_BYTES = ROWS * TILE_K * 4;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES > SUM_BYTES ? STAGES * STAGE_BYTES : SUM_BYTES;
};

// A lane's part of a row of W: 16 inputs, with their scale and zero. Rows beyond N are read as the last one; dy is zero
// there.
template <class Span>
struct Part {
  using V = typename Span::Values;
  Span span;
  uint32_t scale, zero;
  __device__ __forceinline__ void load(const Weight& w, int n, int k0, int g, int group) {
    const Row row = row_at<V>(w, min(n, w.n - 1));
    span.load(w, row, k0, g);
    if constexpr (V::CODES) {
      scale = scale_bits(w, row, group);
      zero = zero_at<V>(w, row, group);
    }
  }
  __device__ __forceinline__ void octet(const Weight& w, int i, int g, uint32_t (&out)[4]) const {
    span.octet(w, i, g, V::zero(V::CODES ? zero : 0), out);
    if constexpr (V::CODES) scale_octet<typename V::Type>(out, scale_of(w.half_scales, scale), w.half_scales);
  }
};

template <class Span, int NT>
__global__ void __launch_bounds__(THREADS, 2) matmul_t(const MatmulTCall call) {
  using Shape = MatmulTShape<NT>;
  using V = typename Span::Values;
  using T = typename V::Type;
  const Weight& w = call.w;
  unsigned char* const stages = ptx::shared_memory();
  const int lane = int(threadIdx.x) % ALL_LANES, warp = int(threadIdx.x) / ALL_LANES, g = lane / 4, t = lane % 4;
  const int k0 = int(blockIdx.x) * TILE_K, m0 = int(blockIdx.y) * Shape::ROWS;
  const int tiles = (w.n + TILE_K - 1) / TILE_K;
  const int begin = int(blockIdx.z) * call.tiles_per_block, end = min(begin + call.tiles_per_block, tiles);

  const int group = group_of(w, k0 / 16 + g);
  ptx::wait_for_previous();
  const auto stage_dy = [&](int tile) {
    if (tile < end)
      stage<Shape::ROWS>(call.dy, m0, tile * TILE_K, stages + (tile - begin) % Shape::STAGES * Shape::STAGE_BYTES);
    ptx::commit_copies();
  };
#pragma unroll
  for (int ahead = 0; ahead < Shape::STAGES - 1; ++ahead) stage_dy(begin + ahead);

  // Lane t owns rows 32 warp + 8 t .. + 7 of the 128: columns 2t, 2t+1, 2t+8, 2t+9 of two fragments. The first four are
  // loaded again for the next step as soon as they are used, while the other four are, and so on.
  Part<Span> parts[Span::EARLY ? 8 : 1];
  const auto load_half = [&](int tile, int half) {
    if constexpr (Span::EARLY) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (tile < end) parts[4 * half + j].load(w, tile * TILE_K + 32 * warp + 8 * t + 4 * half + j, k0, g, group);
    }
  };
  load_half(begin, 0);
  load_half(begin, 1);
  float sum[8][NT][4] = {};  // fragment i: inputs k0 + 16 g + 2 i (row g) and + 2 i + 1 (row g + 8)
  for (int tile = begin; tile < end; ++tile) {
    ptx::wait_copies<Shape::STAGES - 2>();
    ptx::sync_threads();
    stage_dy(tile + Shape::STAGES - 1);
    const unsigned char* dy = stages + (tile - begin) % Shape::STAGES * Shape::STAGE_BYTES;
    uint4 b[NT];
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) b[nt] = ptx::load_shared<uint4>(dy + dense_place(8 * nt + g, 4 * warp + t));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Part<Span> late[Span::EARLY ? 1 : 4];
      if constexpr (!Span::EARLY) {
#pragma unroll
        for (int j = 0; j < 4; ++j) late[j].load(w, tile * TILE_K + 32 * warp + 8 * t + 4 * half + j, k0, g, group);
      }
#pragma unroll
      for (int octet = 0; octet < 2; ++octet) {
        uint32_t row[4][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (Span::EARLY)
            parts[4 * half + j].octet(w, octet, g, row[j]);
          else
            late[j].octet(w, octet, g, row[j]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t a[4] = {ptx::bytes(row[0][i], row[1][i], 0x5410), ptx::bytes(row[0][i], row[1][i], 0x7632),
                                 ptx::bytes(row[2][i], row[3][i], 0x5410), ptx::bytes(row[2][i], row[3][i], 0x7632)};
#pragma unroll
          for (int nt = 0; nt < NT; ++nt)
            ptx::mma<T>(sum[4 * octet + i][nt], a, half ? b[nt].z : b[nt].x, half ? b[nt].w : b[nt].y);
        }
      }
      load_half(tile + 1, half);
    }
  }

  // The four warps add up in shared memory, in order; then thread i owns columns i of the block's tile.
  ptx::let_next_start();
  ptx::wait_copies<0>();
  for (int turn = 0; turn < WARPS; ++turn) {
    ptx::sync_threads();
    if (warp != turn) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          unsigned char* at = stages + ((8 * nt + 2 * t + m) * TILE_K + 16 * g + 2 * i) * 4;
          float2 two = {sum[i][nt][m], sum[i][nt][m + 2]};
          if (turn > 0) {
            const float2 before = ptx::load_shared<float2>(at);
            two = {before.x + two.x, before.y + two.y};
          }
          ptx::store_shared(at, two);
        }
  }
  ptx::sync_threads();
  static_assert(THREADS == TILE_K, "a thread a column");
  float total[Shape::ROWS / 4][4];
#pragma unroll
  for (int m = 0; m < Shape::ROWS; ++m)
    total[m / 4][m % 4] = ptx::load_shared<float>(stages + (m * TILE_K + threadIdx.x) * 4);
  if (gridDim.z > 1) ptx::sync_threads();
  if (!add_up(call.shared, total, stages)) return;
  const int k = k0 + int(threadIdx.x);
#pragma unroll
  for (int m = 0; m < Shape::ROWS; ++m)
    if (m0 + m < call.dy.rows) store(static_cast<T*>(call.dx) + int64_t(m0 + m) * w.k + k, total[m / 4][m % 4]);
}

}  // namespace ctp
