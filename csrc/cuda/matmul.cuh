// y = x W^T + bias on tensor cores: one kernel for every pattern, kind of value and number of rows.
//
// It computes y^T = W x^T: W is the left operand (16 rows of W, 8 rows of x an instruction), so that few rows of x
// waste little. A block has four warps; each owns 16 PANELS rows of W and all NT * 8 rows of x. In steps of 128 inputs:
//
//   x      -> shared memory by cp.async, STAGES deep, read by all four warps
//   weight -> registers, straight from global memory, DEPTH steps ahead, never in shared memory: nobody else needs it.
//             The loads of the steps to come stay under way across the barrier of this one.
//             Unstructured entries lie at no fixed place, so they do go through shared memory, a slot a row.
//
// Integers code - zero are multiplied; the sum of a group is scaled in fp32. So a row of x with a single 1 gives the
// decoded weight bit for bit, and no scale is rounded. Sums of several blocks along K (gridDim.z) meet in `add_up`.
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

template <class Tile, int NT, int PANELS>
struct MatmulShape {
  static constexpr int STAGES = NT <= 2 && Tile::SLOT_BYTES == 0 ? 4 : 3;
  static constexpr bool SMALL = NT <= 2 && sizeof(Tile) <= 80 && !Tile::ROW_OFFSETS;
  static constexpr int DEPTH = PANELS == 2 ? 1 : SMALL ? 4 : 2;  // what 255 registers hold
  static constexpr int OUTPUTS = WARPS * 16 * PANELS, ROWS = NT * 8;
  static constexpr int X_BYTES = ROWS * ROW_BYTES, SLOTS_BYTES = 16 * Tile::SLOT_BYTES;  // of one warp
  static constexpr int STAGE_BYTES = X_BYTES + WARPS * SLOTS_BYTES, SHARED_BYTES = STAGES * STAGE_BYTES;
  static_assert(PANELS == 1 || Tile::SLOT_BYTES == 0, "slots for one panel");
};

template <class Tile, int NT, int PANELS>
__global__ void __launch_bounds__(THREADS, 2) matmul(const MatmulCall call) {
  using Shape = MatmulShape<Tile, NT, PANELS>;
  using T = typename Tile::Values::Type;
  constexpr int PARTS = Tile::PARTS;
  constexpr bool SCALED = Tile::Values::CODES;
  const Weight& w = call.w;
  unsigned char* const stages = ptx::shared_memory();
  const int lane = int(threadIdx.x) % ALL_LANES, warp = int(threadIdx.x) / ALL_LANES, g = lane / 4, t = lane % 4;
  const int n0 = int(blockIdx.x) * Shape::OUTPUTS + warp * 16 * PANELS, m0 = int(blockIdx.y) * Shape::ROWS;
  const int tiles = (w.k + TILE_K - 1) / TILE_K;
  const int begin = int(blockIdx.z) * call.tiles_per_block, end = min(begin + call.tiles_per_block, tiles);

  int rows[PANELS][2];  // rows beyond the last are read as the last one and never stored
  int64_t row_octets[PANELS][2] = {};
#pragma unroll
  for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows[panel][r] = min(n0 + 16 * panel + g + 8 * r, w.n - 1);
      if constexpr (Tile::ROW_OFFSETS) row_octets[panel][r] = w.row_offsets[rows[panel][r]];
    }

  const auto stage_at = [&](int tile) { return stages + (tile - begin) % Shape::STAGES * Shape::STAGE_BYTES; };
  EntryCopies<Tile> entries;
  if constexpr (Tile::SLOT_BYTES) entries.begin(w, n0, lane, begin);
  const auto fill_stage = [&](int tile) {
    if (tile < end) {
      stage<Shape::ROWS, Tile::SPARSE_MMA ? 8 : 16>(call.x, m0, tile * TILE_K, stage_at(tile));
      if constexpr (Tile::SLOT_BYTES)
        entries.copy(w, tile, lane, stage_at(tile) + Shape::X_BYTES + warp * Shape::SLOTS_BYTES);
    }
    ptx::commit_copies();
  };
  Tile weights[Shape::DEPTH][PANELS];
#pragma unroll
  for (int ahead = 0; ahead < Shape::DEPTH; ++ahead)
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel)
      if (begin + ahead < end) weights[ahead][panel].load(w, rows[panel], (begin + ahead) * TILE_K, t);
#pragma unroll
  for (int ahead = 0; ahead < Shape::STAGES - 1; ++ahead) fill_stage(begin + ahead);

  float sum[PANELS * NT][4] = {};  // fragments: panel by panel, 8 rows of x each
  for (int first = begin; first < end; first += Shape::DEPTH) {
#pragma unroll
    for (int ahead = 0; ahead < Shape::DEPTH; ++ahead) {
      const int tile = first + ahead;
      if (tile >= end) break;
      ptx::wait_copies<Shape::STAGES - 2>();  // this thread's share of x is there;
      ptx::sync_threads();                    // so is the others', and all have left the stage that is filled next
      fill_stage(tile + Shape::STAGES - 1);
      const unsigned char *x = stage_at(tile), *slots = x + Shape::X_BYTES + warp * Shape::SLOTS_BYTES;
      Tile(&now)[PANELS] = weights[ahead];

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
          for (int f = 0; f < PANELS * NT; ++f)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sum[f][i] = fmaf(now[f / NT].groups.scale[i / 2][group], group_sum[f][i], sum[f][i]);
              group_sum[f][i] = 0;
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
            ptx::ldmatrix_x4(x + sparse_row(8 * nt + lane % 8, step, lane / 8), b);
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
          for (int panel = 0; panel < PANELS; ++panel)
            now[panel].octet(slots, row_octets[panel], octet, g, t, a[panel]);
          // Inputs 0..7 of the octet: 0..3 are this lane's columns of one fragment, 4..7 of the next.
#pragma unroll
          for (int nt = 0; nt < NT; ++nt) {
            const uint4 b =
                ptx::load_shared<uint4>(x + dense_place(8 * nt + g, PARTS == 1 ? 4 * t + octet : 4 * octet + t));
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
#pragma unroll
      for (int panel = 0; panel < PANELS; ++panel)
        if (tile + Shape::DEPTH < end) now[panel].load(w, rows[panel], (tile + Shape::DEPTH) * TILE_K, t);
    }
  }

  ptx::wait_copies<0>();
  if (gridDim.z > 1) ptx::sync_threads();  // add_up uses the stages
  if (!add_up(call.shared, sum, stages)) return;
  T* const y = static_cast<T*>(call.y);
  const T* const bias = static_cast<const T*>(call.bias);
#pragma unroll
  for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = n0 + 16 * panel + g + i / 2 * 8;
      if (n >= w.n) continue;
      const float add = bias == nullptr ? 0.0f : widen(bias[n]);
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const int m = m0 + 8 * nt + 2 * t + i % 2;
        const float total = sum[panel * NT + nt][i];
        if (m < call.x.rows) store(y + int64_t(m) * w.n + n, bias == nullptr ? total : total + add);
      }
    }
}

}  // namespace ctp
