// 2:4 with int4 or int3 codes.
#include "launch.cuh"

int ctp::run_sparse24_codes(const Problem& p) {
  if (p.w->values == CTP_INT4)
    return p.dtype == CTP_FP16 ? sparse24<Int4<__half>>(p) : sparse24<Int4<__nv_bfloat16>>(p);
  return p.dtype == CTP_FP16 ? sparse24<Int3<__half>>(p) : sparse24<Int3<__nv_bfloat16>>(p);
}
