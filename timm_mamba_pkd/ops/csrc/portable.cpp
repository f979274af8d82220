// Any processor: 4 channels a vector, which are SSE2 registers on x86-64 and NEON registers on AArch64.
#define KERNEL portable
#define REAL float
#define LANES 4
#include "kernel.h"
