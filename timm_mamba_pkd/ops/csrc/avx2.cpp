// AVX2 with FMA: 8 channels a vector.
#if defined(__x86_64__)
#define KERNEL avx2
#define REAL float
#define LANES 8
#include "kernel.h"
#endif
