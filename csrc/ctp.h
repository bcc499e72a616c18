/* The whole C interface of libctp_cpu and libctp_cuda: no torch, no C++, raw pointers.
 *
 * A weight (n, k) is a pattern times a kind of value; the bytes are drawn in ctp_kernels/patterns.py (bitmaps)
 * and ctp_kernels/values.py (bit planes). Every call trusts the shapes: they are checked where a weight is made.
 * Row r starts at slot r * row_entries (dense: k, sparse24: k / 2, rounded up to 8), or 8 * row_offsets[r].
 * An entry is scale * (code - zero) in fp32, zero where the bitmap is; sums are fp32, one rounding at the end.
 * A NaN or infinity in x meets pruned entries as it would meet stored zeros: it propagates as in a dense matmul.
 */
#ifndef CTP_H
#define CTP_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

enum ctp_pattern { CTP_DENSE = 0, CTP_SPARSE24 = 1, CTP_UNSTRUCTURED = 2 };
enum ctp_values { CTP_FP32 = 0, CTP_FP16 = 1, CTP_BF16 = 2, CTP_INT8 = 3, CTP_INT4 = 4, CTP_INT3 = 5, CTP_INT2 = 6 };
enum ctp_isa { CTP_BASELINE = 0, CTP_AVX2 = 1, CTP_AVX512 = 2, CTP_AMX = 3, CTP_BEST = -1 };
enum ctp_compute {
  CTP_EXACT = 0,
  /* Codes only: x is first rounded to 8-bit integers, x ~ scale * q with |q| <= 127 and scale = max|x| / 127 for
   * every 2^i inputs, the largest power of two that divides the group, at most 128 (128 for one scale a row). So
   * |error of y| <= sum of |W| scale / 2. A NaN or infinity in a row of x makes that row of y NaN. */
  CTP_INT8_ACTIVATIONS = 1
};
enum ctp_status {
  CTP_OK = 0,
  CTP_BAD_ARGUMENT = 1,    /* an enum out of range, a negative size, a NULL that is needed */
  CTP_UNSUPPORTED_ISA = 2, /* this processor lacks the instructions asked for */
  CTP_OUT_OF_MEMORY = 3
};

typedef struct {
  int64_t n, k;                /* weight is (n, k) */
  int32_t pattern;             /* enum ctp_pattern */
  int32_t values;              /* enum ctp_values */
  int32_t scale_dtype;         /* CTP_FP32 or CTP_FP16 */
  int32_t symmetric;           /* 1: zero = 2^(bits-1) */
  int64_t group;               /* inputs per scale, a multiple of 8; k for one scale a row */
  const void* stored;          /* values or codes */
  const void* stored_hi;       /* int3's high bit plane, or NULL */
  const uint8_t* mask;         /* (n, ceil(k/8)), or NULL for dense */
  const int32_t* row_offsets;  /* (n + 1,) in units of 8 slots, or NULL unless unstructured */
  const int32_t* tile_offsets; /* (ceil(k/128), n): entries of a row before input 128 t; likewise */
  const void* scales;          /* (n, ceil(k/group)), or NULL for floating values */
  const uint8_t* zeros;        /* like scales, or NULL when symmetric */
} ctp_weight;

/* x, bias and y (dy and dx) share dtype: CTP_FP32, CTP_FP16 or CTP_BF16. ldx: elements from a row to the next;
 * outputs are contiguous. bias may be NULL. Same inputs, same bits, at any number of threads. */

/* y (m, n) = x (m, k) W^T + bias */
int ctp_cpu_matmul(const ctp_weight* weight, const void* x, int64_t ldx, int64_t m, const void* bias, void* y,
                   int32_t dtype, int32_t compute, int32_t threads);
/* dx (m, k) = dy (m, n) W */
int ctp_cpu_matmul_t(const ctp_weight* weight, const void* dy, int64_t lddy, int64_t m, void* dx, int32_t dtype,
                     int32_t threads);

/* For benchmarks: runs `turns` turns of independent multiply-adds in registers on each thread, and returns how many
 * floating-point operations that was. Timed, it gives the arithmetic limit of this instruction set. */
int64_t ctp_cpu_multiply_add(int64_t turns, int32_t threads);
/* The number that the build gave as -DCTP_ABI: the CRC-32 of the sources. A loader refuses any other. */
uint32_t ctp_cpu_abi(void);
/* "baseline", "avx2" or "avx512": what the next call runs. */
const char* ctp_cpu_isa(void);
/* For tests: run this enum ctp_isa from now on (CTP_BEST: what the processor has). */
int ctp_cpu_set_isa(int32_t isa);
/* One sentence for an enum ctp_status. */
const char* ctp_cpu_status_string(int status);

/* The same on `stream` (a cudaStream_t) for CTP_FP16 and CTP_BF16 activations on tensor cores; 0, a status above, or
 * one that ctp_cuda_status_string knows. Nothing is allocated and nothing waited for, so a graph can capture a call.
 * Dense int8, int4, int3, int2; 2:4 int4, int3 and values of the activations' type; unstructured int4 and likewise. A
 * group is the row or a multiple of 32 inputs (dense forward), 128 (sparse forward), 16 (matmul_t). K is a multiple of
 * 128, at most 2^20; the weight's planes and every row of x or dy start on 16 bytes, rows less than 2^27 elements
 * apart; scales and zeros are read in whole words of four bytes. counters: ctp_cuda_counters() 32-bit words, all zero
 * before the first call and after every call; workspace: floats, the more the more blocks can share a sum. Either may
 * be NULL, which costs the most with few rows of an unstructured weight; calls that may run at the same time need their
 * own. Unlike the other kernels, 2:4 forward does not multiply pruned entries: a NaN or infinity in x beside them is
 * lost. */
int ctp_cuda_matmul(const ctp_weight* weight, const void* x, int64_t ldx, int64_t m, const void* bias, void* y,
                    int32_t dtype, void* counters, void* workspace, int64_t workspace_bytes, void* stream);
int ctp_cuda_matmul_t(const ctp_weight* weight, const void* dy, int64_t lddy, int64_t m, void* dx, int32_t dtype,
                      void* counters, void* workspace, int64_t workspace_bytes, void* stream);
int32_t ctp_cuda_counters(void);
/* The number of GPUs; 0 and a status that says why where there is none. */
int ctp_cuda_device_count(int32_t* count);
const char* ctp_cuda_status_string(int status);
uint32_t ctp_cuda_abi(void);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif

#endif /* CTP_H */
