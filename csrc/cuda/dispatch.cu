// The C interface of libctp_cuda: checks a call and hands it to the kernels of its format.
#include "launch.cuh"

#ifndef CTP_ABI
#define CTP_ABI 0
#endif

namespace ctp {
namespace {

using Run = int (*)(const Problem&);

constexpr int64_t MOST_INPUTS = 1 << 20, MOST_APART = 1 << 27;  // elements between rows: see RowCopies

// The kernels for this pattern, kind of value and type of activations, or NULL.
Run find(const ctp_weight& w, int32_t dtype) {
  const bool same_type = w.values == dtype;
  switch (w.pattern) {
    case CTP_DENSE:
      switch (w.values) {
        case CTP_INT8:
          return run_int8;
        case CTP_INT4:
          return run_int4;
        case CTP_INT3:
          return run_int3;
        case CTP_INT2:
          return run_int2;
        default:
          return nullptr;
      }
    case CTP_SPARSE24:
      if (w.values == CTP_INT4 || w.values == CTP_INT3) return run_sparse24_codes;
      return same_type ? run_sparse24_floats : nullptr;
    case CTP_UNSTRUCTURED:
      return w.values == CTP_INT4 || same_type ? run_unstructured : nullptr;
    default:
      return nullptr;
  }
}

// Groups that share no part of what a lane multiplies before it scales; see patterns.cuh.
bool group_fits(const ctp_weight& w, bool transposed) {
  if (w.group >= w.k) return true;
  if (transposed) return w.group % 16 == 0;
  return w.group % (w.pattern == CTP_DENSE ? 32 : TILE_K) == 0;
}

bool well_formed(const ctp_weight& w) {
  const bool codes = w.values >= CTP_INT8;
  // Whole tiles, groups few enough for group_of, and entries of an unstructured weight that an int counts.
  if (w.n < 1 || w.k < 1 || w.n > INT32_MAX - 1024 || w.k > MOST_INPUTS || w.k % TILE_K != 0) return false;
  if (w.pattern == CTP_UNSTRUCTURED && w.n * w.k > INT32_MAX) return false;
  if (!aligned(w.stored, 16) || !aligned(w.stored_hi, 16) || !aligned(w.mask, 16)) return false;
  if (w.stored == nullptr && w.pattern != CTP_UNSTRUCTURED) return false;  // an all-zero weight stores nothing
  if ((w.values == CTP_INT3) != (w.stored_hi != nullptr) || (w.pattern == CTP_DENSE) != (w.mask == nullptr))
    return false;
  if ((w.pattern == CTP_UNSTRUCTURED) != (w.row_offsets != nullptr && w.tile_offsets != nullptr)) return false;
  if (!codes) return true;
  return w.scales != nullptr && (w.zeros == nullptr) == (w.symmetric != 0) && w.group >= 1 &&
         (w.scale_dtype == CTP_FP16 || w.scale_dtype == CTP_FP32);
}

int check_and_run(const Problem& p) {
  if (p.w == nullptr || p.m < 0 || p.m > INT32_MAX) return CTP_BAD_ARGUMENT;
  if (p.dtype != CTP_FP16 && p.dtype != CTP_BF16) return CTP_BAD_ARGUMENT;
  const Run run = find(*p.w, p.dtype);
  if (run == nullptr || !well_formed(*p.w)) return CTP_BAD_ARGUMENT;
  ctp_weight w = *p.w;
  if (w.values < CTP_INT8) w.group = w.k;
  if (!group_fits(w, p.transposed)) return CTP_BAD_ARGUMENT;
  if (p.m == 0) return CTP_OK;
  if (p.x == nullptr || p.y == nullptr || !aligned(p.x, 16)) return CTP_BAD_ARGUMENT;
  if (p.m > 1 && (p.ldx % 8 != 0 || p.ldx < 0 || p.ldx >= MOST_APART)) return CTP_BAD_ARGUMENT;
  Problem checked = p;
  checked.w = &w;
  if (p.m == 1) checked.ldx = 0;  // it may be anything
  return run(checked);
}

}  // namespace
}  // namespace ctp

extern "C" int ctp_cuda_matmul(const ctp_weight* weight, const void* x, int64_t ldx, int64_t m, const void* bias,
                               void* y, int32_t dtype, void* counters, void* workspace, int64_t workspace_bytes,
                               void* stream) {
  return ctp::check_and_run({weight, x, ldx, m, bias, y, dtype, static_cast<uint32_t*>(counters),
                             static_cast<float*>(workspace), workspace_bytes, static_cast<cudaStream_t>(stream),
                             false});
}

extern "C" int ctp_cuda_matmul_t(const ctp_weight* weight, const void* dy, int64_t lddy, int64_t m, void* dx,
                                 int32_t dtype, void* counters, void* workspace, int64_t workspace_bytes,
                                 void* stream) {
  return ctp::check_and_run({weight, dy, lddy, m, nullptr, dx, dtype, static_cast<uint32_t*>(counters),
                             static_cast<float*>(workspace), workspace_bytes, static_cast<cudaStream_t>(stream), true});
}

extern "C" int32_t ctp_cuda_counters(void) { return ctp::MAX_SHARED_TILES; }

extern "C" int ctp_cuda_device_count(int32_t* count) {
  int found = 0;
  const cudaError_t error = cudaGetDeviceCount(&found);
  *count = error == cudaSuccess ? found : 0;
  return error == cudaSuccess ? CTP_OK : ctp::CUDA_STATUS + int(error);
}

extern "C" const char* ctp_cuda_status_string(int status) {
  if (status == CTP_OK) return "success";
  if (status == CTP_BAD_ARGUMENT) return "an argument is out of range, misaligned, or a needed pointer is NULL";
  if (status >= ctp::CUDA_STATUS) return cudaGetErrorString(static_cast<cudaError_t>(status - ctp::CUDA_STATUS));
  return "unknown status";
}

extern "C" uint32_t ctp_cuda_abi(void) { return CTP_ABI; }
