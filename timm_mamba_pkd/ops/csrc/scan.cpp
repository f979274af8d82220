// The C interface: the choice of the kernel, threads and their memory.
#include "scan.h"

#include <algorithm>
#include <cstdlib>

using namespace scan;

namespace {

enum InstructionSet : int64_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

const Kernel& kernel(const Scan& s, int64_t instruction_set) {
    if (s.is_double) return portable_double;
#if defined(__x86_64__)
    if (instruction_set == AVX512) return avx512;
    if (instruction_set == AVX2) return avx2;
#endif
    return portable;
}

// Runs `task` on every element of the batch and group of channels; thread i always has the same ones. Returns whether
// there was memory for it.
bool run(const Scan& s, const Kernel& k, void (*task)(const Scan&, int64_t, int64_t, void*), bool finish) {
    const int64_t tasks = s.batch * s.groups, threads = std::max<int64_t>(1, std::min(s.threads, tasks));
    const int64_t size = (k.scratch_size(s) + 127) / 64 * 64;
    char* memory = static_cast<char*>(std::calloc(threads * size + 64, 1));
    if (!memory) return false;
    char* aligned = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int64_t thread = 0; thread < threads; ++thread)
        for (int64_t i = tasks * thread / threads; i < tasks * (thread + 1) / threads; ++i)
            task(s, i / s.groups, i % s.groups, aligned + thread * size);
    if (finish)
        for (int64_t thread = 0; thread < threads; ++thread) k.finish(s, aligned + thread * size);
    std::free(memory);
    return true;
}

}  // namespace

extern "C" {

// The size of Scan: a library of another version is not used.
int64_t timm_mamba_pkd_scan_size() { return sizeof(Scan); }

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

// Both return 0, or 1 if memory ran out.
int64_t timm_mamba_pkd_scan_forward(const Scan* s, int64_t instruction_set) {
    const Kernel& k = kernel(*s, instruction_set);
    return !run(*s, k, k.forward, false);
}

int64_t timm_mamba_pkd_scan_backward(const Scan* s, int64_t instruction_set) {
    const Kernel& k = kernel(*s, instruction_set);
    return !run(*s, k, k.backward, true);
}

}  // extern "C"
