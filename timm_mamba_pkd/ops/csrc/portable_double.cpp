// Arithmetic in float64, on any processor.
#define KERNEL portable_double
#define REAL double
#define DOUBLE
#define LANES 2
#include "kernel.h"
