// 2:4 with fp16 or bf16 values, multiplied with activations of the same type.
#include "launch.cuh"

int ctp::run_sparse24_floats(const Problem& p) {
  return p.dtype == CTP_FP16 ? sparse24<Float<__half>>(p) : sparse24<Float<__nv_bfloat16>>(p);
}
