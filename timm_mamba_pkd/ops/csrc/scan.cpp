// The C interface: the choice of the kernel, threads and their memory.
#include "scan.h"

#include <algorithm>
#include <cstdlib>

using namespace scan;

namespace {

enum InstructionSet : int64_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

const Kernel& kernel(bool is_double, int64_t instruction_set) {
    if (is_double) return portable_double;
#if defined(__x86_64__)
    if (instruction_set == AVX512) return avx512;
    if (instruction_set == AVX2) return avx2;
#endif
    return portable;
}

// Runs task(i, scratch) for every i below `tasks`; thread j always has the same ones. Then finish(scratch) for each
// thread's memory. Returns whether there was memory.
template <class Task, class Finish>
bool run(int64_t tasks, int64_t threads, int64_t scratch_size, Task task, Finish finish) {
    threads = std::max<int64_t>(1, std::min(threads, tasks));
    const int64_t size = (scratch_size + 127) / 64 * 64;
    char* memory = static_cast<char*>(std::calloc(threads * size + 64, 1));
    if (!memory) return false;
    char* aligned = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int64_t thread = 0; thread < threads; ++thread)
        for (int64_t i = tasks * thread / threads; i < tasks * (thread + 1) / threads; ++i)
            task(i, aligned + thread * size);
    for (int64_t thread = 0; thread < threads; ++thread) finish(aligned + thread * size);
    std::free(memory);
    return true;
}

void nothing(void*) {}

}  // namespace

extern "C" {

// The sizes of the structures: a library of another version is not used.
int64_t timm_mamba_pkd_sizes() { return sizeof(Scan) << 16 | sizeof(Convolution); }

// The best instruction set that this processor has and that the library was built for.
int64_t timm_mamba_pkd_instruction_set() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PORTABLE;
}

// These return 0, or 1 if memory ran out.
int64_t timm_mamba_pkd_scan_forward(const Scan* s, int64_t instruction_set) {
    const Kernel& k = kernel(s->is_double, instruction_set);
    auto task = [&](int64_t i, void* scratch) { k.forward(*s, i / s->groups, i % s->groups, scratch); };
    return !run(s->batch * s->groups, s->threads, k.scratch_size(*s), task, nothing);
}

int64_t timm_mamba_pkd_scan_backward(const Scan* s, int64_t instruction_set) {
    const Kernel& k = kernel(s->is_double, instruction_set);
    auto task = [&](int64_t i, void* scratch) { k.backward(*s, i / s->groups, i % s->groups, scratch); };
    auto finish = [&](void* scratch) { k.finish(*s, scratch); };
    return !run(s->batch * s->groups, s->threads, k.scratch_size(*s), task, finish);
}

int64_t timm_mamba_pkd_convolve(const Convolution* s, int64_t instruction_set) {
    const Kernel& k = kernel(s->is_double, instruction_set);
    auto task = [&](int64_t i, void* scratch) { k.convolve(*s, i, scratch); };
    return !run(s->batch, s->threads, k.convolution_scratch_size(*s), task, nothing);
}

int64_t timm_mamba_pkd_convolve_backward(const Convolution* s, int64_t instruction_set) {
    const Kernel& k = kernel(s->is_double, instruction_set);
    auto task = [&](int64_t i, void* scratch) { k.convolve_backward(*s, i, scratch); };
    auto finish = [&](void* scratch) { k.finish_convolution(*s, scratch); };
    return !run(s->batch, s->threads, k.convolution_scratch_size(*s), task, finish);
}

}  // extern "C"
