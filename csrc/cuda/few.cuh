// y = x W^T + bias for up to 16 rows of x and dense or 2:4 weights: the kernel that is bound by the bytes of the
// weight.
//
// A block owns a panel of 16 rows of W, and its warps share the sum over K: each takes every WARPS-th tile of 128
// inputs, alone with its own part of x in shared memory, so that nobody waits for another before the end, where the
// warps' sums meet in shared memory. All of K stays in one block: no workspace, no second block to wait for. With the
// loads of DEPTH tiles under way in every warp, 16 warps a multiprocessor keep the memory busy. (Copies to shared
// memory, as in `matmul`, take more instructions, and were slower here.)
#pragma once

#include "matmul.cuh"

namespace ctp {

template <class Tile, int NT>
struct FewShape {
  static constexpr bool SMALL = sizeof(Tile) < 64;
  static constexpr int DEPTH = NT == 1 && SMALL ? 4 : 3;                    // tiles under way, of W and of x
  static constexpr int MOST_WARPS = SMALL ? 8 : 4, BLOCKS = SMALL ? 2 : 1;  // a multiprocessor, for registers to hold
  static constexpr int ROWS = NT * 8, SUMS = ROWS * 16;                     // floats that a warp adds up
  static constexpr int STAGE_BYTES = ROWS * ROW_BYTES, WARP_BYTES = DEPTH * STAGE_BYTES;
  static_assert(SUMS * 4 <= WARP_BYTES, "the sums take the place of the stages");

  // Measured on an H200: where the panels fill the multiprocessors once or twice, eight warps end sooner; where there
  // are more, smaller blocks take each other's place more smoothly, as they do where eight warps need too many
  // registers.
  static int warps(int64_t panels, int multiprocessors) { return panels <= 2 * multiprocessors ? MOST_WARPS : 4; }
};

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

// Writes what the warps of a block have added up for a panel: float `at` of each, in the order of their numbers.
template <class Tile, int NT>
__device__ __forceinline__ void store_panel(const MatmulCall& call, const unsigned char* sums, int warps, int n0) {
  constexpr int SUMS = FewShape<Tile, NT>::SUMS;
  for (int at = int(threadIdx.x); at < SUMS; at += int(blockDim.x)) {
    float total = 0;
    for (int warp = 0; warp < warps; ++warp) total += ptx::load_shared<float>(sums + 4 * (warp * SUMS + at));
    const int lane = at % ALL_LANES, i = at / ALL_LANES % 4, nt = at / ALL_LANES / 4;
    store_with_bias<typename Tile::Values::Type>(call, 8 * nt + lane % 4 * 2 + i % 2, n0 + lane / 4 + i / 2 * 8, total);
  }
}
template <int NT>
__device__ __forceinline__ void keep_sums(const float (&sum)[NT][4], unsigned char* sums, int lane) {
#pragma unroll
  for (int nt = 0; nt < NT; ++nt)
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::store_shared(sums + 4 * ((4 * nt + i) * ALL_LANES + lane), sum[nt][i]);
}

template <class Tile, int NT>
__global__ void __launch_bounds__(FewShape<Tile, NT>::MOST_WARPS* ALL_LANES, FewShape<Tile, NT>::BLOCKS)
    matmul_few(const MatmulCall call) {
  using Shape = FewShape<Tile, NT>;
  constexpr int DEPTH = Shape::DEPTH;
  const Weight& w = call.w;
  const int lane = int(threadIdx.x) % ALL_LANES, warp = int(threadIdx.x) / ALL_LANES, g = lane / 4, t = lane % 4;
  const int warps = int(blockDim.x) / ALL_LANES, tiles = w.k / TILE_K;
  const int n0 = int(blockIdx.x) * 16;
  unsigned char* const stages = ptx::shared_memory() + warp * Shape::WARP_BYTES;

  ptx::wait_for_previous();
  Row rows[2];
  rows_of<Tile>(w, n0, g, t, rows);
  Tile weights[DEPTH];
#pragma unroll
  for (int ahead = 0; ahead < DEPTH; ++ahead)
    if (warp + ahead * warps < tiles) weights[ahead].load(w, rows, warp + ahead * warps);

  const RowCopies<NT * 8, Tile::SPARSE_MMA ? 8 : 16, ALL_LANES> copies(call.x, 0, lane);
  const auto fill_stage = [&](int tile, unsigned char* to) {
    if (tile < tiles) copies.template copy<false>(tile, to);
    ptx::commit_copies();
  };
#pragma unroll
  for (int ahead = 0; ahead < DEPTH - 1; ++ahead) fill_stage(warp + ahead * warps, stages + ahead * Shape::STAGE_BYTES);

  // Rows of x that are not there stand in for no output: the last one is read in their place.
  const int last = copies.rows - 1;
  const auto row = [&](int i) { return min(i, last); };
  float sum[NT][4] = {};
  for (int first = warp; first < tiles; first += DEPTH * warps) {
#pragma unroll
    for (int ahead = 0; ahead < DEPTH; ++ahead) {
      const int tile = first + ahead * warps;
      if (tile >= tiles) break;
      ptx::wait_copies<DEPTH - 2>();  // this lane's share of x is there;
      ptx::sync_warp();               // so is the others', and all have left the stage that is filled next
      fill_stage(tile + (DEPTH - 1) * warps, stages + (ahead + DEPTH - 1) % DEPTH * Shape::STAGE_BYTES);
      multiply<Tile, NT>(weights[ahead], stages + ahead * Shape::STAGE_BYTES, nullptr, w.half_scales, lane, row, sum);
      if (tile + DEPTH * warps < tiles) weights[ahead].load(w, rows, tile + DEPTH * warps);
    }
  }

  ptx::let_next_start();
  ptx::wait_copies<0>();
  ptx::sync_threads();
  unsigned char* const sums = ptx::shared_memory();
  keep_sums(sum, sums + warp * Shape::SUMS * 4, lane);
  ptx::sync_threads();
  store_panel<Tile, NT>(call, sums, warps, n0);
}

}  // namespace ctp
