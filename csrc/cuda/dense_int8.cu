// Dense int8.
#include "launch.cuh"

int ctp::run_int8(const Problem& p) { return dense<Int8>(p); }
