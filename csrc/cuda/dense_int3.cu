// Dense int3.
#include "launch.cuh"

int ctp::run_int3(const Problem& p) { return dense<Int3>(p); }
