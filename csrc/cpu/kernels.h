// What dispatch.cpp and the units of matmul.cpp (one per instruction set) know of each other.
//
// A unit keeps everything in namespaces of its own and instantiates nothing from std: two units' copies of one
// template would be merged by the linker, and a machine could run the other's instructions.
#pragma once

#include <stddef.h>

#include "../ctp.h"

namespace ctp {

struct Weight : ctp_weight {
  int64_t groups;        // scales a row
  int64_t stored_bytes;  // of `stored`: nothing beyond may be read
  int64_t density;       // stored entries of 256 inputs, on average
};

// y (m, n) = x (m, k) W^T + bias, or transposed: y (m, k) = x (m, n) W
struct Job {
  Weight weight;
  const void* x;
  int64_t ldx, m;
  const void* bias;
  void* y;
  int32_t dtype;
  bool transposed;
  int32_t compute;  // enum ctp_compute
  bool tiles;       // whether to multiply tiles: amx.h
  int64_t columns() const { return transposed ? weight.k : weight.n; }
  int64_t depth() const { return transposed ? weight.n : weight.k; }
};

// The calling thread's scratch, 64-byte aligned, kept between calls; NULL when out of memory.
float* scratch(size_t floats);

namespace baseline {
int run(const Job& job, int threads);
int64_t multiply_add(int64_t turns, int threads);
}  // namespace baseline
namespace avx2 {
int run(const Job& job, int threads);
int64_t multiply_add(int64_t turns, int threads);
}  // namespace avx2
namespace avx512 {
int run(const Job& job, int threads);
int64_t multiply_add(int64_t turns, int threads);
}  // namespace avx512

}  // namespace ctp
