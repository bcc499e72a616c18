// Every instruction of the tensor cores, of shared memory and between threads that the kernels use, and nothing else:
// the one place with PTX. Compiled by g++ the same names come from csrc/emulator/instructions.h, so that the kernels'
// own code runs on a CPU. Shared memory is touched through these functions only: the emulator checks every byte.
//
// Lane l of a warp has g = l / 4 (0..7) and t = l % 4. Fragments (PTX ISA, "Matrix fragments for mma.m16n8k16"):
//
//   A (16 x 16, row major)  a[0]: row g,     columns 2t, 2t+1      a[2]: row g,     columns 2t+8, 2t+9
//                           a[1]: row g + 8, columns 2t, 2t+1      a[3]: row g + 8, columns 2t+8, 2t+9
//   B (16 x 8)              b[0]: rows 2t, 2t+1, column g          b[1]: rows 2t+8, 2t+9, column g
//   C (16 x 8, fp32)        c[0]: row g, column 2t   c[1]: row g, column 2t+1   c[2], c[3]: the same of row g + 8
//
// mma.sp.m16n8k32: A is 16 x 32 with two of every four columns stored, so 16 x 16 stored entries in the same fragment:
// a register is one quad (four columns) of one row. B gains b[2]: rows 2t+16, +17 and b[3]: rows 2t+24, +25. Metadata:
// four bits a quad, the places of the first and the second entry. Of every four lanes two give a word each (SELECTOR 0:
// t = 0, 1; 1: t = 2, 3): the first those of quads 0..3, the second of quads 4..7; row g in bits 0..15, g + 8 above.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#ifdef CTP_EMULATOR
#include "instructions.h"
#else

namespace ctp {
namespace ptx {

extern __shared__ __align__(1024) unsigned char dynamic_shared[];
__device__ __forceinline__ unsigned char* shared_memory() { return dynamic_shared; }

__device__ __forceinline__ uint32_t address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

__device__ __forceinline__ void sync_threads() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

template <typename V>
__device__ __forceinline__ V load_shared(const void* from) {
  return *static_cast<const V*>(from);
}

template <typename V>
__device__ __forceinline__ void store_shared(void* to, V value) {
  *static_cast<V*>(to) = value;
}

// Copies BYTES to shared memory without a register between: the first `valid` from global memory, then zeros. It lands
// some time before wait_copies returns. 16 bytes pass by L1: the data is used by this block once.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid) {
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(shared)), "l"(global), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address(shared)), "l"(global), "n"(BYTES),
                 "r"(valid)
                 : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane l names row l % 8 of matrix l / 8, 16 bytes in shared memory;
// out[i]: elements 2t, 2t+1 of row g of matrix i.
__device__ __forceinline__ void ldmatrix_x4(const void* row, uint32_t (&out)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address(row))
               : "memory");
}

// 16 bytes that this kernel reads once: straight through, not kept in L1.
__device__ __forceinline__ uint4 load_once(const void* global) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global));
  return v;
}

// Less than that. (A pointer out of `keep` says no more that it is one to global memory; this does.)
template <typename V>
__device__ __forceinline__ V load_global(const void* global) {
  return __ldg(static_cast<const V*>(global));
}

template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define CTP_MMA(TYPE, NAME)                                                                                    \
  template <>                                                                                                  \
  __device__ __forceinline__ void mma<TYPE>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                        \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                        \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                              \
  }
CTP_MMA(__half, "f16")
CTP_MMA(__nv_bfloat16, "bf16")
#undef CTP_MMA

// The name says that the places of a quad rise; nvcc before 12.5 knows only the one that does not say it.
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define CTP_MMA_SP "mma.sp::ordered_metadata"
#else
#define CTP_MMA_SP "mma.sp"
#endif
template <typename T, int SELECTOR>
struct SparseMma;
#define CTP_SPARSE_MMA(TYPE, NAME)                                                                            \
  template <int SELECTOR>                                                                                     \
  struct SparseMma<TYPE, SELECTOR> {                                                                          \
    static __device__ __forceinline__ void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], \
                                               uint32_t metadata) {                                           \
      asm volatile(CTP_MMA_SP                                                                                 \
                   ".sync.aligned.m16n8k32.row.col.f32." NAME "." NAME                                        \
                   ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;" \
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),  \
                     "r"(metadata), "n"(SELECTOR));                                                           \
    }                                                                                                         \
  };
CTP_SPARSE_MMA(__half, "f16")
CTP_SPARSE_MMA(__nv_bfloat16, "bf16")
#undef CTP_SPARSE_MMA
#undef CTP_MMA_SP

// c[i] += a . b for a sparse A; see above.
template <typename T, int SELECTOR>
__device__ __forceinline__ void mma_sparse(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                           uint32_t metadata) {
  SparseMma<T, SELECTOR>::run(c, a, b, metadata);
}

// Two numbers in one register: a * b + c, rounded once each.
template <typename T>
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);
template <>
__device__ __forceinline__ uint32_t fma2<__half>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <>
__device__ __forceinline__ uint32_t fma2<__nv_bfloat16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// (low, high) rounded to T in one register.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// Byte i of the result is byte (selector >> 4i & 7) of a (0..3) and b (4..7).
__device__ __forceinline__ uint32_t bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}
// The low word of (high:low) >> min(shift, 32).
__device__ __forceinline__ uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
  return __funnelshift_rc(low, high, shift);
}
__device__ __forceinline__ int ones(uint32_t word) { return __popc(word); }

// The launch of a kernel need not wait for the end of the one before it in the stream (`start` in launch.cuh): the
// kernel itself waits, here, until that one has ended and what it wrote is there.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// When all blocks have come here or ended, the next kernel's may take the places that are left, and wait there. Said
// early, they take places that this kernel's own blocks need.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// (a & mask) | bits: one instruction, which nvcc makes two of where mask and bits are both constants.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
  return d;
}
// A pointer that nvcc keeps as it is, instead of computing it again at every use.
template <typename P>
__device__ __forceinline__ void keep(P*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// Adds one and returns what was there, after everything this thread wrote; and a read that goes past L1.
__device__ __forceinline__ uint32_t arrive(uint32_t* counter) {
  __threadfence();
  return atomicAdd(counter, 1u);
}
__device__ __forceinline__ void fence() { __threadfence(); }
__device__ __forceinline__ float load_l2(const float* from) { return __ldcg(from); }

}  // namespace ptx
}  // namespace ctp
#endif
