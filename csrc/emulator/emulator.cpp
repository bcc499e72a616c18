// What only the tests of the emulator call: each instruction on 32 lanes, the metadata that the kernels make, and the
// knobs of emulator::block.
#include "../cuda/tiles.cuh"

namespace {

template <typename Body>
void one_warp(size_t shared_bytes, const Body& body) {
  blockIdx = dim3(0, 0, 0);
  gridDim = dim3();
  emulator::run_block(32, shared_bytes, body);
}

template <typename T>
void mma_on(const uint32_t* a, const uint32_t* b, float* c) {
  one_warp(0, [&] {
    const int lane = threadIdx.x;
    uint32_t own[4];
    float sum[4];
    memcpy(own, a + 4 * lane, sizeof own);
    memcpy(sum, c + 4 * lane, sizeof sum);
    ctp::ptx::mma<T>(sum, own, b[2 * lane], b[2 * lane + 1]);
    memcpy(c + 4 * lane, sum, sizeof sum);
  });
}

template <typename T, int SELECTOR>
void mma_sparse_on(const uint32_t* a, const uint32_t* b, const uint32_t* metadata, float* c) {
  one_warp(0, [&] {
    const int lane = threadIdx.x;
    uint32_t own_a[4], own_b[4];
    float sum[4];
    memcpy(own_a, a + 4 * lane, sizeof own_a);
    memcpy(own_b, b + 4 * lane, sizeof own_b);
    memcpy(sum, c + 4 * lane, sizeof sum);
    ctp::ptx::mma_sparse<T, SELECTOR>(sum, own_a, own_b, metadata[lane]);
    memcpy(c + 4 * lane, sum, sizeof sum);
  });
}

}  // namespace

extern "C" {

// Bugs: enum emulator::Bug. backwards: the last warp and the last block of a sum run first.
void ctp_emulator_configure(int bugs, int backwards, int multiprocessors) {
  emulator::bugs = bugs;
  emulator::warps_backwards = backwards != 0;
  emulator::multiprocessors = multiprocessors;
}

// a (32, 4), b (32, 2 or 4), c (32, 4), metadata (32): the registers of every lane.
void ctp_emulator_mma(int bf16, const uint32_t* a, const uint32_t* b, float* c) {
  bf16 ? mma_on<__nv_bfloat16>(a, b, c) : mma_on<__half>(a, b, c);
}
void ctp_emulator_mma_sparse(int bf16, int selector, const uint32_t* a, const uint32_t* b, const uint32_t* metadata,
                             float* c) {
  if (bf16)
    selector ? mma_sparse_on<__nv_bfloat16, 1>(a, b, metadata, c) : mma_sparse_on<__nv_bfloat16, 0>(a, b, metadata, c);
  else
    selector ? mma_sparse_on<__half, 1>(a, b, metadata, c) : mma_sparse_on<__half, 0>(a, b, metadata, c);
}

// matrices: four of 8 x 8 16-bit elements, row by row; out (32, 4).
void ctp_emulator_ldmatrix(const uint16_t* matrices, uint32_t* out) {
  one_warp(512, [&] {
    const int lane = threadIdx.x;
    unsigned char* shared = ctp::ptx::shared_memory();
    uint4 row;
    memcpy(&row, matrices + 8 * lane, sizeof row);
    ctp::ptx::store_shared(shared + 16 * lane, row);
    uint32_t registers[4];
    ctp::ptx::ldmatrix_x4(shared + 16 * lane, registers);
    memcpy(out + 4 * lane, registers, sizeof registers);
  });
}

// Copies 32 x 16 bytes by cp.async, `valid` of each, in two groups of 16 lanes' worth, and reads them back.
// early: 0 waits for both groups, 1 for the first only but reads both, 2 reads a neighbour's without a barrier.
void ctp_emulator_copy(const unsigned char* from, int valid, int early, unsigned char* out) {
  blockIdx = dim3(0, 0, 0);
  gridDim = dim3();
  emulator::run_block(64, 64 * 32, [&] {
    const int thread = threadIdx.x;
    unsigned char* shared = ctp::ptx::shared_memory();
    for (int group = 0; group < 2; ++group) {
      ctp::ptx::copy_async<16>(shared + 1024 * group + 16 * thread, from + 1024 * group + 16 * thread, valid);
      ctp::ptx::commit_copies();
    }
    if (early == 1)
      ctp::ptx::wait_copies<1>();
    else
      ctp::ptx::wait_copies<0>();
    if (early != 2) ctp::ptx::sync_threads();
    const int other = 63 - thread;
    for (int group = 0; group < 2; ++group) {
      const uint4 piece = ctp::ptx::load_shared<uint4>(shared + 1024 * group + 16 * other);
      memcpy(out + 1024 * group + 16 * other, &piece, 16);
    }
  });
}

// Warp 0 reads what warp 1 then writes over, with a barrier between or without one.
void ctp_emulator_overwrite(int with_barrier) {
  blockIdx = dim3(0, 0, 0);
  gridDim = dim3();
  emulator::run_block(64, 256, [&] {
    unsigned char* own = ctp::ptx::shared_memory() + 4 * threadIdx.x;
    ctp::ptx::store_shared(own, uint32_t(1));
    ctp::ptx::sync_threads();
    if (threadIdx.x < 32) ctp::ptx::load_shared<uint32_t>(own + 128);
    if (with_barrier) ctp::ptx::sync_threads();
    if (threadIdx.x >= 32) ctp::ptx::store_shared(own, uint32_t(2));
  });
}

// Half of the threads go to another barrier, or none.
void ctp_emulator_diverge(int other_barrier) {
  blockIdx = dim3(0, 0, 0);
  gridDim = dim3();
  emulator::run_block(64, 16, [&] {
    if (threadIdx.x < 32)
      ctp::ptx::sync_threads();
    else if (other_barrier)
      ctp::ptx::sync_threads();
  });
}

// Where tiles.cuh puts what lanes read together: 16 bytes of a row, for dense weights and for a row of ldmatrix.
int ctp_emulator_dense_place(int row, int piece) { return ctp::dense_place(row, piece); }
int ctp_emulator_sparse_place(int row, int quad) { return ctp::sparse_place(row, quad); }
int ctp_emulator_sparse_row(int row, int step, int matrix) { return ctp::sparse_row(row, step, matrix); }

uint32_t ctp_emulator_prmt(uint32_t a, uint32_t b, uint32_t selector) { return ctp::ptx::bytes(a, b, selector); }
uint32_t ctp_emulator_fma2(int bf16, uint32_t a, uint32_t b, uint32_t c) {
  return bf16 ? ctp::ptx::fma2<__nv_bfloat16>(a, b, c) : ctp::ptx::fma2<__half>(a, b, c);
}

// The metadata that the kernels give mma.sp for a bitmap (16 rows, 16 bytes): out (4 steps, 32 lanes).
void ctp_emulator_metadata(const uint8_t* bitmap, uint32_t* out) {
  one_warp(0, [&] {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    ctp::Sparse24Tile<ctp::Float<__half>> tile;
    for (int r = 0; r < 2; ++r) memcpy(tile.mask[r], bitmap + 16 * (g + 8 * r), 16);
    for (int j = 0; j < 2; ++j) out[(2 * (t / 2) + j) * 32 + lane] = tile.metadata(j, t);
  });
}

}  // extern "C"
