// One step of y^T = W x^T on tensor cores, and the kernel for many rows of x; few.cuh has the one for few.
//
// W is the left operand (16 rows of W, 8 rows of x an instruction), so that few rows of x waste little. Weights go
// straight from global memory to the registers of the one warp that needs them, never through shared memory: nobody
// else needs them. (Unstructured entries lie at no fixed place, so they do, a slot a row.)
//
// Integers code - zero are multiplied; the sum of a group is scaled in fp32. So a row of x with a single 1 gives the
// decoded weight bit for bit, and no scale is rounded.
#pragma once

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

// sum += 16 PANELS rows of W, times NT * 8 rows of x, over the 128 inputs of a tile. `x`: the tile of x in shared
// memory; `row(i)`: which row of it stands for row i. `sum`: fragments, panel by panel, 8 rows of x each.
template <class Tile, int NT, int PANELS, class Stands>
__device__ __forceinline__ void multiply(const Tile (&now)[PANELS], const unsigned char* x, const unsigned char* slots,
                                         bool half_scales, int lane, const Stands& row, float (&sum)[PANELS * NT][4]) {
  using T = typename Tile::Values::Type;
  constexpr int PARTS = Tile::PARTS;
  constexpr bool SCALED = Tile::Values::CODES;
  const int g = lane / 4, t = lane % 4;
  float group_sum[SCALED ? PANELS * NT : 1][4] = {};  // not yet scaled
  const auto into = [&](int panel, int nt) -> float (&)[4] {
    if constexpr (SCALED)
      return group_sum[panel * NT + nt];
    else
      return sum[panel * NT + nt];
  };
  const auto scale_group = [&](int group) {
    if constexpr (SCALED) {
#pragma unroll
      for (int panel = 0; panel < PANELS; ++panel) {
        const uint32_t (&bits)[2][PARTS] = now[panel].groups.scale;
        const float scale[2] = {scale_of(half_scales, bits[0][group]), scale_of(half_scales, bits[1][group])};
#pragma unroll
        for (int f = panel * NT; f < (panel + 1) * NT; ++f)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sum[f][i] = fmaf(scale[i / 2], group_sum[f][i], sum[f][i]);
            group_sum[f][i] = 0;
          }
      }
    }
  };
  if constexpr (Tile::SPARSE_MMA) {
    uint32_t metadata[PANELS][2];
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
      for (int j = 0; j < 2; ++j) metadata[panel][j] = now[panel].metadata(j, t);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t a[PANELS][4];
#pragma unroll
      for (int panel = 0; panel < PANELS; ++panel) now[panel].fragment(step, a[panel]);
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        uint32_t b[4];
        ptx::ldmatrix_x4(x + sparse_row(row(8 * nt + lane % 8), step, lane / 8), b);
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel) {
          if (step < 2)
            ptx::mma_sparse<T, 0>(into(panel, nt), a[panel], b, metadata[panel][step % 2]);
          else
            ptx::mma_sparse<T, 1>(into(panel, nt), a[panel], b, metadata[panel][step % 2]);
        }
      }
    }
  } else {
#pragma unroll
    for (int octet = 0; octet < 4; ++octet) {
      uint32_t a[PANELS][2][4];
#pragma unroll
      for (int panel = 0; panel < PANELS; ++panel) now[panel].octet(slots, octet, g, t, a[panel]);
      // Inputs 0..7 of the octet: 0..3 are this lane's columns of one fragment, 4..7 of the next.
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const uint4 b =
            ptx::load_shared<uint4>(x + dense_place(row(8 * nt + g), PARTS == 1 ? 4 * t + octet : 4 * octet + t));
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel) {
          const uint32_t (&p)[2][4] = a[panel];
          ptx::mma<T>(into(panel, nt), {p[0][0], p[1][0], p[0][1], p[1][1]}, b.x, b.y);
          ptx::mma<T>(into(panel, nt), {p[0][2], p[1][2], p[0][3], p[1][3]}, b.z, b.w);
        }
      }
      if constexpr (PARTS == 4) scale_group(octet);
    }
  }
  if constexpr (PARTS == 1) scale_group(0);
}

// The two rows of W of lane (g, t) in the panel that begins with row `first`: beyond the last row they are the last
// one, and never stored.
template <class Tile>
__device__ __forceinline__ void rows_of(const Weight& w, int first, int g, int t, Row (&rows)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows[r] = row_at<typename Tile::Values>(w, min(first + g + 8 * r, w.n - 1));
    Tile::begin(rows[r], t);
  }
}

template <typename T>
__device__ __forceinline__ void store_with_bias(const MatmulCall& call, int m, int n, float total) {
  if (m >= call.x.rows || n >= call.w.n) return;
  if (call.bias != nullptr) total += widen(static_cast<const T*>(call.bias)[n]);
  store(static_cast<T*>(call.y) + int64_t(m) * call.w.n + n, total);
}

// A block has four warps; each owns 16 PANELS rows of W and all NT * 8 rows of x, which come to shared memory by
// cp.async, STAGES deep, a step of 128 inputs at a time. The weights of the steps to come stay under way across the
// barrier of this one, DEPTH steps ahead. Sums of several blocks along K (gridDim.z) meet in `add_up`.
template <class Tile, int NT, int PANELS>
struct MatmulShape {
  static constexpr bool SMALL = sizeof(Tile) < 64 && Tile::SLOT_BYTES == 0;
  static constexpr int STAGES = 3, DEPTH = SMALL ? 4 : PANELS == 2 || NT == 8 ? 1 : 2;  // what 255 registers hold
  static constexpr int OUTPUTS = WARPS * 16 * PANELS, ROWS = NT * 8;
  static constexpr int X_BYTES = ROWS * ROW_BYTES, SLOTS_BYTES = 16 * Tile::SLOT_BYTES;  // of one warp
  static constexpr int STAGE_BYTES = X_BYTES + WARPS * SLOTS_BYTES, SHARED_BYTES = STAGES * STAGE_BYTES;
  static_assert(PANELS == 1 || Tile::SLOT_BYTES == 0, "slots for one panel");
};

template <class Tile, int NT, int PANELS>
__global__ void __launch_bounds__(THREADS, 2) matmul(const MatmulCall call) {
  using Shape = MatmulShape<Tile, NT, PANELS>;
  const Weight& w = call.w;
  unsigned char* const stages = ptx::shared_memory();
  const int lane = int(threadIdx.x) % ALL_LANES, warp = int(threadIdx.x) / ALL_LANES, g = lane / 4, t = lane % 4;
  const int n0 = int(blockIdx.x) * Shape::OUTPUTS + warp * 16 * PANELS, m0 = int(blockIdx.y) * Shape::ROWS;
  const int begin = int(blockIdx.z) * call.tiles_per_block, end = min(begin + call.tiles_per_block, w.k / TILE_K);

  ptx::wait_for_previous();
  Row rows[PANELS][2];
#pragma unroll
  for (int panel = 0; panel < PANELS; ++panel) rows_of<Tile>(w, n0 + 16 * panel, g, t, rows[panel]);

  const auto stage_at = [&](int tile) { return stages + (tile - begin) % Shape::STAGES * Shape::STAGE_BYTES; };
  EntryCopies<Tile> entries;
  if constexpr (Tile::SLOT_BYTES) entries.begin(w, n0, lane, begin);
  const auto fill_stage = [&](int tile) {
    if (tile < end) {
      stage<Shape::ROWS, Tile::SPARSE_MMA ? 8 : 16>(call.x, m0, tile * TILE_K, stage_at(tile));
      if constexpr (Tile::SLOT_BYTES)
        entries.copy(w, tile, 1, lane, stage_at(tile) + Shape::X_BYTES + warp * Shape::SLOTS_BYTES);
    }
    ptx::commit_copies();
  };
  Tile weights[Shape::DEPTH][PANELS];
#pragma unroll
  for (int ahead = 0; ahead < Shape::DEPTH; ++ahead)
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel)
      if (begin + ahead < end) weights[ahead][panel].load(w, rows[panel], begin + ahead);
#pragma unroll
  for (int ahead = 0; ahead < Shape::STAGES - 1; ++ahead) fill_stage(begin + ahead);

  float sum[PANELS * NT][4] = {};
  for (int first = begin; first < end; first += Shape::DEPTH) {
#pragma unroll
    for (int ahead = 0; ahead < Shape::DEPTH; ++ahead) {
      const int tile = first + ahead;
      if (tile >= end) break;
      ptx::wait_copies<Shape::STAGES - 2>();  // this thread's share of x is there;
      ptx::sync_threads();                    // so is the others', and all have left the stage that is filled next
      fill_stage(tile + Shape::STAGES - 1);
      const unsigned char *x = stage_at(tile), *slots = x + Shape::X_BYTES + warp * Shape::SLOTS_BYTES;
      multiply<Tile, NT, PANELS>(weights[ahead], x, slots, w.half_scales, lane, [](int row) { return row; }, sum);
#pragma unroll
      for (int panel = 0; panel < PANELS; ++panel)
        if (tile + Shape::DEPTH < end) weights[ahead][panel].load(w, rows[panel], tile + Shape::DEPTH);
    }
  }

  ptx::let_next_start();
  ptx::wait_copies<0>();
  if (gridDim.z > 1) ptx::sync_threads();  // add_up uses the stages
  if (!add_up(call.shared, sum, stages)) return;
#pragma unroll
  for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
        store_with_bias<typename Tile::Values::Type>(call, m0 + 8 * nt + 2 * t + i % 2, n0 + 16 * panel + g + i / 2 * 8,
                                                     sum[panel * NT + nt][i]);
}

}  // namespace ctp
