// y = x W^T + bias for dense int4 weights: a decode kernel for few rows of x, right for any number.
//
// A warp owns ROWS rows of W and runs over K, 32 lanes side by side; each lane decodes its codes once and multiplies
// them with M_TILE rows of x. Sums are fp32 in a fixed order, so equal inputs give equal bits. Beyond M_TILE rows of x
// the weight is read again for every further M_TILE: from a few dozen rows on, a tensor-core kernel is the right tool.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../ctp.h"
#include "rows.cuh"

namespace ctp {
namespace {

constexpr int LANES = 32;
constexpr int WARPS = 4;
constexpr int ROWS = 2;
constexpr int CUDA_STATUS = 1000;  // a cudaError_t comes back as 1000 + its number

__device__ __forceinline__ float scale_at(const ctp_weight& w, int64_t index) {
  return w.scale_dtype == CTP_FP16 ? __half2float(static_cast<const __half*>(w.scales)[index])
                                   : static_cast<const float*>(w.scales)[index];
}

__device__ __forceinline__ float zero_at(const ctp_weight& w, int64_t index) {
  return w.zeros == nullptr ? 8.0f : float(w.zeros[index]);
}

// Adds one lane's share of ROWS x M_TILE inner products: inputs k0 .. k0 + 8 WORDS - 1, all of one group.
// Rows beyond the last of W or x are read as the last one and never stored.
template <int WORDS, int M_TILE, typename T>
__device__ __forceinline__ void add_chunk(const ctp_weight& w, const T* x, int64_t ldx, int64_t m, int64_t row0,
                                          int64_t m0, unsigned k0, float (&sum)[ROWS][M_TILE]) {
  // 32-bit sizes (the caller saw to it), 64-bit offsets: division and registers are dear.
  const unsigned k = unsigned(w.k), group_size = unsigned(w.group);
  const unsigned row_bytes = (k + 7) / 8 * 4, groups = (k + group_size - 1) / group_size, group = k0 / group_size;

  uint32_t words[ROWS][WORDS];
  float scale[ROWS], zero[ROWS], part[ROWS][M_TILE] = {};
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int64_t row = min(row0 + r, w.n - 1);
    load_words(static_cast<const uint8_t*>(w.stored) + row * row_bytes + k0 / 2, words[r]);
    scale[r] = scale_at(w, row * groups + group);
    zero[r] = zero_at(w, row * groups + group);
  }
#pragma unroll
  for (int word = 0; word < WORDS; ++word) {
    const unsigned k_word = k0 + 8 * word;
    float code[ROWS][8];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) decode_int4(words[r][word], zero[r], code[r]);
#pragma unroll
    for (int i = 0; i < M_TILE; ++i) {
      float input[8];
      load_eight<WORDS == 4>(x + min(m0 + i, m - 1) * ldx + k_word, int(k) - int(k_word), input);
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int j = 0; j < 8; ++j) part[r][i] = fmaf(code[r][j], input[j], part[r][i]);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int i = 0; i < M_TILE; ++i) sum[r][i] = fmaf(scale[r], part[r][i], sum[r][i]);
}

// Grid: x over rows of W, y over rows of x. WORDS = 4 needs 16-byte aligned rows of codes and of x and a group that
// is a multiple of 32 inputs (or the whole row); WORDS = 1 takes everything.
template <int WORDS, int M_TILE, typename T>
__global__ void __launch_bounds__(LANES* WARPS, 4)
    int4_rows(const ctp_weight w, const T* x, int64_t ldx, int64_t m, const T* bias, T* y) {
  const unsigned lane = threadIdx.x % LANES;
  const int64_t row0 = (int64_t(blockIdx.x) * WARPS + threadIdx.x / LANES) * ROWS;
  if (row0 >= w.n) return;  // the whole warp
  for (int64_t m0 = int64_t(blockIdx.y) * M_TILE; m0 < m; m0 += int64_t(gridDim.y) * M_TILE) {
    float sum[ROWS][M_TILE] = {};
    for (unsigned k0 = lane * 8 * WORDS; k0 < unsigned(w.k); k0 += LANES * 8 * WORDS)
      add_chunk<WORDS, M_TILE>(w, x, ldx, m, row0, m0, k0, sum);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int i = 0; i < M_TILE; ++i) {
        float total = sum[r][i];
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, step);
        // One lane per result, so that no register array is indexed at run time.
        if (lane == unsigned(r * M_TILE + i) && row0 + r < w.n && m0 + i < m) {
          if (bias != nullptr) total += to_float(bias[row0 + r]);
          from_float(total, y + (m0 + i) * w.n + row0 + r);
        }
      }
  }
}

template <int WORDS, int M_TILE, typename T>
int launch(const ctp_weight& w, const void* x, int64_t ldx, int64_t m, const void* bias, void* y, void* stream) {
  constexpr int64_t rows_per_block = WARPS * ROWS;
  const int64_t row_blocks = (w.n + rows_per_block - 1) / rows_per_block;
  const int64_t m_tiles = (m + M_TILE - 1) / M_TILE;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(row_blocks), unsigned(m_tiles < 65535 ? m_tiles : 65535));
  config.blockDim = dim3(LANES * WARPS);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, int4_rows<WORDS, M_TILE, T>, w, static_cast<const T*>(x), ldx,
                                               m, static_cast<const T*>(bias), static_cast<T*>(y));
  return error == cudaSuccess ? CTP_OK : CUDA_STATUS + int(error);
}

template <int WORDS, typename T>
int by_rows(const ctp_weight& w, const void* x, int64_t ldx, int64_t m, const void* bias, void* y, void* stream) {
  if (m == 1) return launch<WORDS, 1, T>(w, x, ldx, m, bias, y, stream);
  if (m <= 4) return launch<WORDS, 4, T>(w, x, ldx, m, bias, y, stream);
  return launch<WORDS, 8, T>(w, x, ldx, m, bias, y, stream);
}

template <typename T>
int by_alignment(const ctp_weight& w, const void* x, int64_t ldx, int64_t m, const void* bias, void* y, void* stream) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const int64_t row_bytes = (w.k + 7) / 8 * 4;
  const bool vectors = row_bytes % 16 == 0 && aligned(w.stored) && aligned(x) && ldx * int64_t(sizeof(T)) % 16 == 0 &&
                       (w.group % 32 == 0 || w.group >= w.k);
  return vectors ? by_rows<4, T>(w, x, ldx, m, bias, y, stream) : by_rows<1, T>(w, x, ldx, m, bias, y, stream);
}

}  // namespace
}  // namespace ctp

extern "C" int ctp_cuda_int4_rows(const ctp_weight* weight, const void* x, int64_t ldx, int64_t m, const void* bias,
                                  void* y, int32_t dtype, void* stream) {
  using namespace ctp;
  if (weight == nullptr || m < 0) return CTP_BAD_ARGUMENT;
  ctp_weight w = *weight;
  if (w.pattern != CTP_DENSE || w.values != CTP_INT4 || w.n < 1 || w.k < 1 || w.k > INT32_MAX - LANES * 32)
    return CTP_BAD_ARGUMENT;
  if (w.group < 1 || (w.group % 8 != 0 && w.group < w.k) || w.n > int64_t(INT32_MAX) * WARPS * ROWS)
    return CTP_BAD_ARGUMENT;
  if ((w.scale_dtype != CTP_FP16 && w.scale_dtype != CTP_FP32) || (w.zeros == nullptr) != (w.symmetric != 0))
    return CTP_BAD_ARGUMENT;
  if (w.stored == nullptr || w.scales == nullptr || reinterpret_cast<uintptr_t>(w.stored) % 4 != 0)
    return CTP_BAD_ARGUMENT;
  if (w.group > w.k) w.group = w.k;
  if (m == 0) return CTP_OK;
  if (x == nullptr || y == nullptr) return CTP_BAD_ARGUMENT;
  switch (dtype) {
    case CTP_FP32:
      return by_alignment<float>(w, x, ldx, m, bias, y, stream);
    case CTP_FP16:
      return by_alignment<__half>(w, x, ldx, m, bias, y, stream);
    case CTP_BF16:
      return by_alignment<__nv_bfloat16>(w, x, ldx, m, bias, y, stream);
    default:
      return CTP_BAD_ARGUMENT;
  }
}
