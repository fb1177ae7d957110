// All kernels of the engine, as one module.
#include "pointwise.cu"
#include "attend_prefill.cu"
#include "attend_decode.cu"
