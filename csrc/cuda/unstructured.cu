// Any mask, with fp16 or bf16 values (activations of the same type) or int4 codes.
#include "launch.cuh"

int ctp::run_unstructured(const Problem& p) {
  if (p.w->values == CTP_INT4)
    return p.dtype == CTP_FP16 ? unstructured<Int4<__half>>(p) : unstructured<Int4<__nv_bfloat16>>(p);
  return p.dtype == CTP_FP16 ? unstructured<Float<__half>>(p) : unstructured<Float<__nv_bfloat16>>(p);
}
