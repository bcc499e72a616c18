// The C interface of libctp_cpu: checks, and the choice of instruction set at run time.

#include <stdlib.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace ctp {
namespace {

struct Arena {
  float* memory = nullptr;
  size_t floats = 0;
  ~Arena() { free(memory); }
};
thread_local Arena arena;

// Whether the processor has AMX for bf16 and bytes, and the system lets this process use it.
bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;  // AVX-512 BF16
  constexpr long kAskFor = 0x1023, kTileData = 18;                              // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
#else
  return false;
#endif
}

bool runs_here(int32_t isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Every processor with AVX2 has F16C, POPCNT and BMI too; compilers do not all know those names here.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == CTP_AVX2) return avx2;
  if (isa == CTP_AVX512 || isa == CTP_AMX)
    return (isa == CTP_AVX512 || has_tiles()) && avx2 && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
#endif
  return isa == CTP_BASELINE;
}

int32_t best_isa() {
  int32_t isa = CTP_AMX;
  while (!runs_here(isa)) --isa;
  return isa;
}

int32_t chosen_isa = best_isa();

int run(const Job& job, int threads) {
#if defined(__x86_64__)
  if (chosen_isa >= CTP_AVX512) return avx512::run(job, threads);
  if (chosen_isa == CTP_AVX2) return avx2::run(job, threads);
#endif
  return baseline::run(job, threads);
}

// With what follows from it.
Weight complete(const ctp_weight& w) {
  static const int bits[] = {32, 16, 16, 8, 4, 2, 2};
  const int64_t in_row = w.pattern == CTP_SPARSE24 ? w.k / 2 : w.k;
  const int64_t slots = w.pattern == CTP_UNSTRUCTURED ? (int64_t)w.row_offsets[w.n] * 8 : w.n * ((in_row + 7) & ~7);
  const int64_t groups = w.values < CTP_INT8 ? 0 : (w.k + w.group - 1) / w.group;
  return {w, groups, slots * bits[w.values] / 8, (int64_t)((double)slots * 256 / ((double)w.n * (double)w.k))};
}

bool sound(const ctp_weight& w) {
  if (w.n < 1 || w.k < 1 || w.pattern < CTP_DENSE || w.pattern > CTP_UNSTRUCTURED) return false;
  if (w.values < CTP_FP32 || w.values > CTP_INT2) return false;
  if (w.pattern != CTP_DENSE && !w.mask) return false;
  if (w.pattern == CTP_SPARSE24 && w.k % 4) return false;
  if (w.pattern == CTP_UNSTRUCTURED) {
    if (!w.row_offsets || !w.tile_offsets) return false;
  } else if (!w.stored || (w.values == CTP_INT3 && !w.stored_hi)) {
    return false;  // only an unstructured weight may have no entries, and then no buffer
  }
  if (w.values < CTP_INT8) return true;
  if (!w.scales || (w.scale_dtype != CTP_FP32 && w.scale_dtype != CTP_FP16)) return false;
  return w.group > 0 && (w.group % 8 == 0 || w.group >= w.k) && (w.symmetric || w.zeros);
}

int checked_run(const ctp_weight* weight, const void* x, int64_t ldx, int64_t m, const void* bias, void* y,
                int32_t dtype, int32_t compute, int32_t threads, bool transposed) {
  if (!weight || !sound(*weight) || m < 0 || dtype < CTP_FP32 || dtype > CTP_BF16 || threads < 1)
    return CTP_BAD_ARGUMENT;
  if (compute < CTP_EXACT || compute > (weight->values < CTP_INT8 ? CTP_EXACT : CTP_INT8_ACTIVATIONS))
    return CTP_BAD_ARGUMENT;
  if (m == 0) return CTP_OK;
  if (!x || !y) return CTP_BAD_ARGUMENT;
  return run({complete(*weight), x, ldx, m, bias, y, dtype, transposed, compute, chosen_isa == CTP_AMX}, threads);
}

}  // namespace

float* scratch(size_t floats) {
  if (floats > arena.floats) {
    free(arena.memory);
    arena.floats = 0;
    void* memory = nullptr;
    arena.memory = posix_memalign(&memory, 64, floats * sizeof(float)) == 0 ? (float*)memory : nullptr;
    if (arena.memory) arena.floats = floats;
  }
  return arena.memory;
}

}  // namespace ctp

int ctp_cpu_matmul(const ctp_weight* weight, const void* x, int64_t ldx, int64_t m, const void* bias, void* y,
                   int32_t dtype, int32_t compute, int32_t threads) {
  return ctp::checked_run(weight, x, ldx, m, bias, y, dtype, compute, threads, false);
}

int ctp_cpu_matmul_t(const ctp_weight* weight, const void* dy, int64_t lddy, int64_t m, void* dx, int32_t dtype,
                     int32_t threads) {
  return ctp::checked_run(weight, dy, lddy, m, nullptr, dx, dtype, CTP_EXACT, threads, true);
}

int64_t ctp_cpu_multiply_add(int64_t turns, int32_t threads) {
#if defined(__x86_64__)
  if (ctp::chosen_isa >= CTP_AVX512) return ctp::avx512::multiply_add(turns, threads);
  if (ctp::chosen_isa == CTP_AVX2) return ctp::avx2::multiply_add(turns, threads);
#endif
  return ctp::baseline::multiply_add(turns, threads);
}

uint32_t ctp_cpu_abi(void) { return CTP_ABI; }

const char* ctp_cpu_isa(void) {
  return ctp::chosen_isa == CTP_AMX      ? "amx"
         : ctp::chosen_isa == CTP_AVX512 ? "avx512"
         : ctp::chosen_isa == CTP_AVX2   ? "avx2"
                                         : "baseline";
}

int ctp_cpu_set_isa(int32_t isa) {
  if (isa < CTP_BEST || isa > CTP_AMX) return CTP_BAD_ARGUMENT;
  if (isa == CTP_BEST) isa = ctp::best_isa();
  if (!ctp::runs_here(isa)) return CTP_UNSUPPORTED_ISA;
  ctp::chosen_isa = isa;
  return CTP_OK;
}

const char* ctp_cpu_status_string(int status) {
  switch (status) {
    case CTP_OK:
      return "no error";
    case CTP_BAD_ARGUMENT:
      return "an argument is out of range";
    case CTP_UNSUPPORTED_ISA:
      return "this processor lacks the instruction set asked for";
    case CTP_OUT_OF_MEMORY:
      return "out of memory for scratch";
    default:
      return "unknown status";
  }
}
