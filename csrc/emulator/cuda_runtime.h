// Stands in for the CUDA headers so that g++ compiles csrc/cuda as it is and runs it on a CPU. For tests only.
//
// Blocks run one after another; a block's warps too. The 32 lanes of a warp are fibers: each runs until a shuffle,
// where it leaves its value and waits for the others, so a shuffle that not every lane reaches ends the process
// instead of passing unseen. Compiled with -fsanitize=undefined, misaligned vector loads trap too. What this cannot
// show: races between warps, memory order, speed.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulator {

constexpr int LANES = 32;

struct Warp {
  ucontext_t scheduler;
  ucontext_t fibers[LANES];
  bool finished[LANES];
  std::unique_ptr<char[]> stacks[LANES];
  // Two slots by turns: a lane that runs ahead to the next shuffle leaves the last one's values alone.
  uint32_t shuffled[2][LANES];
  unsigned shuffles[LANES];
  int lane;
  unsigned first_thread;
  std::function<void()> body;
};

inline thread_local Warp* warp = nullptr;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cuda emulator: %s\n", what);
  abort();
}

inline void enter_lane() {
  warp->body();
  warp->finished[warp->lane] = true;
  swapcontext(&warp->fibers[warp->lane], &warp->scheduler);
}

// Runs `body` once in every lane of one full warp.
inline void run_warp(Warp& w, unsigned first_thread, const std::function<void()>& body) {
  constexpr size_t STACK = 128 * 1024;
  warp = &w;
  w.first_thread = first_thread;
  w.body = body;
  for (int lane = 0; lane < LANES; ++lane) {
    if (!w.stacks[lane]) w.stacks[lane].reset(new char[STACK]);
    w.finished[lane] = false;
    w.shuffles[lane] = 0;
    getcontext(&w.fibers[lane]);
    w.fibers[lane].uc_stack.ss_sp = w.stacks[lane].get();
    w.fibers[lane].uc_stack.ss_size = STACK;
    w.fibers[lane].uc_link = nullptr;
    makecontext(&w.fibers[lane], enter_lane, 0);
  }
  while (true) {
    int running = 0;
    for (w.lane = 0; w.lane < LANES; ++w.lane) {
      if (w.finished[w.lane]) continue;
      threadIdx = dim3(w.first_thread + w.lane, 0, 0);
      swapcontext(&w.scheduler, &w.fibers[w.lane]);
      if (!w.finished[w.lane]) ++running;
      if (w.shuffles[w.lane] != w.shuffles[0]) fail("lanes of a warp wait at different shuffles");
    }
    if (running == 0) return;
    if (running != LANES) fail("a lane left the kernel before the others' shuffle");
  }
}

}  // namespace emulator

inline float __shfl_xor_sync(uint32_t mask, float value, int lane_mask) {
  emulator::Warp& w = *emulator::warp;
  if (mask != 0xFFFFFFFFu) emulator::fail("only full-warp shuffles are emulated");
  const int lane = w.lane;
  uint32_t* slot = w.shuffled[w.shuffles[lane] % 2];
  memcpy(&slot[lane], &value, sizeof value);
  ++w.shuffles[lane];
  swapcontext(&w.fibers[lane], &w.scheduler);
  memcpy(&value, &slot[lane ^ lane_mask], sizeof value);
  return value;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
typedef struct CUstream_st* cudaStream_t;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return "an emulated CUDA error"; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x < 1 || grid.x > 0x7FFFFFFFu || grid.y < 1 || grid.y > 65535 || grid.z != 1 || block.y != 1 ||
      block.z != 1 || block.x < 1 || block.x > 1024 || block.x % emulator::LANES != 0)
    return cudaErrorInvalidConfiguration;
  static thread_local emulator::Warp warp;
  const std::function<void()> body = [&] { kernel(arguments...); };
  gridDim = grid;
  blockDim = block;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x)
      for (unsigned thread = 0; thread < block.x; thread += emulator::LANES) {
        blockIdx = dim3(x, y, 0);
        emulator::run_warp(warp, thread, body);
      }
  return cudaSuccess;
}
