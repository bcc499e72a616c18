// Stands in for the CUDA headers so that g++ compiles csrc/cuda as it is and runs it on a CPU. For tests only; blocks
// run one after another (block.h). What it cannot show: speed, memory order between blocks, races inside a warp.
#pragma once

#include <math.h>

#include <algorithm>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81
};
typedef struct CUstream_st* cudaStream_t;
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace emulator {
inline int most_shared_bytes = 48 * 1024;
inline int multiprocessors = 4;  // few, so that small problems come with and without shared sums
}  // namespace emulator

inline const char* cudaGetErrorString(cudaError_t) { return "an emulated CUDA error"; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount                ? emulator::multiprocessors
           : which == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? 228 * 1024
                                                                  : 9;
  return cudaSuccess;
}

// The next launch may use more shared memory than a kernel has by default.
template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*)(Parameters...), cudaFuncAttribute, int bytes) {
  emulator::most_shared_bytes = bytes;
  return bytes <= 99 * 1024 ? cudaSuccess : cudaErrorInvalidConfiguration;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, threads = config->blockDim;
  if (grid.x < 1 || grid.x > 0x7FFFFFFFu || grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535 ||
      threads.y != 1 || threads.z != 1 || threads.x < 1 || threads.x > 1024 || threads.x % emulator::LANES != 0 ||
      config->dynamicSmemBytes > size_t(emulator::most_shared_bytes))
    return cudaErrorInvalidConfiguration;
  emulator::most_shared_bytes = 48 * 1024;
  gridDim = grid;
  blockDim = threads;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, emulator::warps_backwards ? grid.z - 1 - z : z);
        emulator::run_block(threads.x, config->dynamicSmemBytes, [&] { kernel(arguments...); });
      }
  return cudaSuccess;
}
