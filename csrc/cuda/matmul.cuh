// One step of y^T = W x^T on tensor cores, and the kernel for many rows of x, or any number of unstructured weights;
// few.cuh has the one for few.
//
// W is the left operand (16 rows of W, 8 rows of x an instruction), so that few rows of x waste little. Nobody but its
// warp needs a weight. (Unstructured entries lie at no fixed place: they go to shared memory, a slot a row.)
//
// Integers code - zero are multiplied; the sum of a group is scaled in fp32. So a row of x with a single 1 gives the
// decoded weight bit for bit, and no scale is rounded.
#pragma once

#include "packed.cuh"
#include "tiles.cuh"

namespace ctp {

struct MatmulCall {
  Weight w;
  Activations x;
  const void* bias;
  void* y;
  Shared shared;
  int tiles_per_block;  // steps of 128 inputs
};

// sum += 16 rows of W times NT * 8 rows of x, over the 128 inputs of a tile. `x`: the tile of x in shared memory;
// `row(i)`: which row of it stands for row i. `sum`: fragments of 8 rows of x each.
template <class Tile, int NT, class Stands>
__device__ __forceinline__ void multiply(const Tile& now, const unsigned char* x, const unsigned char* slots,
                                         bool half_scales, int lane, const Stands& row, float (&sum)[NT][4]) {
  using T = typename Tile::Values::Type;
  constexpr int PARTS = Tile::PARTS;
  constexpr bool SCALED = Tile::Values::CODES;
  const int g = lane / 4, t = lane % 4;
  float group_sum[SCALED ? NT : 1][4] = {};  // not yet scaled
  const auto into = [&](int nt) -> float (&)[4] {
    if constexpr (SCALED)
      return group_sum[nt];
    else
      return sum[nt];
  };
  const auto scale_group = [&](int group) {
    if constexpr (SCALED) {
      const uint32_t (&bits)[2][PARTS] = now.groups.scale;
      const float scale[2] = {scale_of(half_scales, bits[0][group]), scale_of(half_scales, bits[1][group])};
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[nt][i] = fmaf(scale[i / 2], group_sum[nt][i], sum[nt][i]);
          group_sum[nt][i] = 0;
        }
    }
  };
  if constexpr (Tile::SPARSE_MMA) {
    uint32_t metadata[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) metadata[j] = now.metadata(j, t);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t a[4];
      now.fragment(step, a);
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        uint32_t b[4];
        ptx::ldmatrix_x4(x + sparse_row(row(8 * nt + lane % 8), step, lane / 8), b);
        if (step < 2)
          ptx::mma_sparse<T, 0>(into(nt), a, b, metadata[step % 2]);
        else
          ptx::mma_sparse<T, 1>(into(nt), a, b, metadata[step % 2]);
      }
    }
  } else {
#pragma unroll
    for (int octet = 0; octet < 4; ++octet) {
      uint32_t a[2][4];
      now.octet(slots, octet, g, t, a);
      // Inputs 0..7 of the octet: 0..3 are this lane's columns of one fragment, 4..7 of the next.
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const uint4 b =
            ptx::load_shared<uint4>(x + dense_place(row(8 * nt + g), PARTS == 1 ? 4 * t + octet : 4 * octet + t));
        ptx::mma<T>(into(nt), {a[0][0], a[1][0], a[0][1], a[1][1]}, b.x, b.y);
        ptx::mma<T>(into(nt), {a[0][2], a[1][2], a[0][3], a[1][3]}, b.z, b.w);
      }
      if constexpr (PARTS == 4) scale_group(octet);
    }
  }
  if constexpr (PARTS == 1) scale_group(0);
}

template <typename T>
__device__ __forceinline__ void store_with_bias(const MatmulCall& call, int m, int n, float total) {
  if (m >= call.x.rows || n >= call.w.n) return;
  if (call.bias != nullptr) total += widen(static_cast<const T*>(call.bias)[n]);
  store(static_cast<T*>(call.y) + int64_t(m) * call.w.n + n, total);
}

// A block has four warps; each owns 16 rows of W and all NT * 8 rows of x. Both come to shared memory by cp.async,
// STAGES deep, a step of 128 inputs at a time. Sums of several blocks along K (gridDim.z) meet in `add_up`.
template <class Tile, int NT>
struct MatmulShape {
  static constexpr bool PLAIN = Tile::PARTS == 1 && Tile::SLOT_BYTES == 0;
  static constexpr int BLOCKS = NT == 8 ? 2 : PLAIN ? 4 : 3;  // a multiprocessor, by their registers
  static constexpr int OUTPUTS = WARPS * 16, ROWS = NT * 8;
  static constexpr int X_BYTES = ROWS * ROW_BYTES, WARP_BYTES = Packed<Tile>::BYTES + 16 * Tile::SLOT_BYTES;
  static constexpr int STAGES = 3, STAGE_BYTES = X_BYTES + WARPS * WARP_BYTES, SHARED_BYTES = STAGES * STAGE_BYTES;
};

template <class Tile, int NT>
__global__ void __launch_bounds__(THREADS, MatmulShape<Tile, NT>::BLOCKS) matmul(const MatmulCall call) {
  using Shape = MatmulShape<Tile, NT>;
  constexpr int STAGES = Shape::STAGES;
  const Weight& w = call.w;
  unsigned char* const stages = ptx::shared_memory();
  const int lane = int(threadIdx.x) % ALL_LANES, warp = int(threadIdx.x) / ALL_LANES, g = lane / 4, t = lane % 4;
  const int n0 = int(blockIdx.x) * Shape::OUTPUTS + warp * 16, m0 = int(blockIdx.y) * Shape::ROWS;
  const int begin = int(blockIdx.z) * call.tiles_per_block, end = min(begin + call.tiles_per_block, w.k / TILE_K);

  ptx::wait_for_previous();
  Packed<Tile> packed;
  packed.begin(w, n0, g, t);
  const RowCopies<Shape::ROWS, Tile::SPARSE_MMA ? 8 : 16, THREADS> copies(call.x, m0, int(threadIdx.x));
  EntryCopies<Tile> entries;
  if constexpr (Tile::SLOT_BYTES) entries.begin(w, n0, lane, begin);
  const auto own = [&](unsigned char* stage) { return stage + Shape::X_BYTES + warp * Shape::WARP_BYTES; };
  const auto fill_stage = [&](int tile, unsigned char* to) {
    if (tile < end) {
      copies.template copy<true>(tile, to);
      packed.copy(w, tile, lane, own(to));
      if constexpr (Tile::SLOT_BYTES) entries.copy(w, tile, lane, own(to) + Packed<Tile>::BYTES);
    }
    ptx::commit_copies();
  };
#pragma unroll
  for (int ahead = 0; ahead < STAGES - 1; ++ahead) fill_stage(begin + ahead, stages + ahead * Shape::STAGE_BYTES);

  float sum[NT][4] = {};
  unsigned char *now = stages, *before = stages + (STAGES - 1) * Shape::STAGE_BYTES;
  for (int tile = begin; tile < end; ++tile) {
    ptx::wait_copies<STAGES - 2>();  // what this thread copied is there;
    ptx::sync_threads();             // so is the others', and all have left the stage that is filled next
    fill_stage(tile + STAGES - 1, before);
    const Tile weights = packed.read(w, tile, lane, own(now));
    multiply<Tile, NT>(
        weights, now, own(now) + Packed<Tile>::BYTES, w.half_scales, lane, [](int row) { return row; }, sum);
    before = now;
    now = now == stages + (STAGES - 1) * Shape::STAGE_BYTES ? stages : now + Shape::STAGE_BYTES;
  }

  ptx::let_next_start();
  ptx::wait_copies<0>();
  if (gridDim.z > 1) ptx::sync_threads();  // add_up uses the stages
  if (!add_up(call.shared, sum, stages)) return;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
      store_with_bias<typename Tile::Values::Type>(call, m0 + 8 * nt + 2 * t + i % 2, n0 + g + i / 2 * 8, sum[nt][i]);
}

}  // namespace ctp
