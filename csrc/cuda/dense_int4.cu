// Dense int4.
#include "launch.cuh"

int ctp::run_int4(const Problem& p) { return dense<Int4>(p); }
