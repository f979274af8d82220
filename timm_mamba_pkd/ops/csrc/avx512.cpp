// AVX-512 (F, DQ, VL, BW): 16 channels a vector.
#if defined(__x86_64__)
#define KERNEL avx512
#define REAL float
#define LANES 16
#include "kernel.h"
#endif
