// Dense int2.
#include "launch.cuh"

int ctp::run_int2(const Problem& p) { return dense<Int2>(p); }
