// The plain C interface of the selective scan on CPUs, and of the convolution before it. No torch headers: one binary serves every version of torch.
#pragma once
#include <cstdint>

namespace scan {

enum Type : int64_t { FLOAT32 = 0, FLOAT64 = 1, BFLOAT16 = 2 };

// A tensor (batch, length, features) of contiguous features; strides in elements. No data: absent.
struct Tensor {
    void* data;
    int64_t batch_stride;
    int64_t time_stride;
    int64_t type;
};

// Everything a call needs; native.py mirrors it field by field. The matrices are contiguous, in the type of the
// arithmetic: float32, or float64 if `is_double`.
struct Scan {
    int64_t batch, channels, length, states;
    int64_t is_double, softplus, reverse;
    int64_t threads, groups;  // a task is one element of the batch and one of as many groups of channels
    Tensor u, delta, B, C, z;
    const void *A, *D, *delta_bias;  // (channels, states), (channels), (channels)
    Tensor y;                        // written by the forward
    void* checkpoints;  // (batch, chunks, padded channels, states) in an order of its own: from forward to backward
    Tensor dy, du, ddelta, dz;
    void *dB, *dC;                // (batch, groups, length, states), contiguous, in the type of the arithmetic
    void *dA, *dD, *ddelta_bias;  // like A, D and delta_bias, zero at first
};

// The causal depthwise convolution with SiLU; native.py mirrors it. The matrices are contiguous, in the arithmetic's type.
struct Convolution {
    int64_t batch, channels, length, width;
    int64_t is_double, reverse, threads;
    Tensor x;
    const void *weight, *bias;  // (channels, width), (channels)
    Tensor y;                   // written by the forward
    Tensor dy, dx;
    void *dweight, *dbias;  // like weight and bias, zero at first
};

// Time is cut into chunks of at most this many steps, as even as possible; the states before each are checkpointed.
constexpr int64_t CHUNK = 8;
// The channels are padded to a multiple of this in the checkpoints.
constexpr int64_t PADDING = 16;

inline int64_t chunks(int64_t length) { return (length + CHUNK - 1) / CHUNK; }
inline int64_t padded(int64_t channels) { return (channels + PADDING - 1) / PADDING * PADDING; }

// One instruction set. A thread has `scratch_size` bytes of its own, aligned to cache lines and zero at first.
struct Kernel {
    int64_t (*scratch_size)(const Scan&);
    void (*forward)(const Scan&, int64_t batch, int64_t group, void* scratch);
    void (*backward)(const Scan&, int64_t batch, int64_t group, void* scratch);
    void (*finish)(const Scan&, void* scratch);  // adds a thread's sums to dA, dD and ddelta_bias

    int64_t (*convolution_scratch_size)(const Convolution&);
    void (*convolve)(const Convolution&, int64_t batch, void* scratch);
    void (*convolve_backward)(const Convolution&, int64_t batch, void* scratch);
    void (*finish_convolution)(const Convolution&, void* scratch);  // adds a thread's sums to dweight and dbias
};

extern const Kernel portable, portable_double;
#if defined(__x86_64__)
extern const Kernel avx2, avx512;
#endif

}  // namespace scan
