// The selective scan for one instruction set. Each source file that includes this defines
//   KERNEL  the name of its Kernel
//   REAL    float or double, the type of the arithmetic; DOUBLE, too, for double
//   LANES   how many of them a vector holds; divides PADDING
//
// A lane is a channel. Time goes in chunks of up to 8 steps that stay in registers, the states one after the other:
// for each state, the decays of a chunk are computed at once and the recurrence runs through them. Between chunks the
// states of all channels wait in the first-level cache.
#include <algorithm>
#include <cmath>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "scan.h"

namespace scan {
namespace {

typedef REAL V __attribute__((vector_size(sizeof(REAL) * LANES)));

#define UNROLL _Pragma("GCC unroll 8")

constexpr REAL LOG2E = 1.4426950408889634074;
constexpr REAL LN2 = 0.69314718055994530942;

// ---- elementary functions ----

#if defined(DOUBLE)
template <double (*F)(double)>
inline V each(V x) {
    V y;
    for (int i = 0; i < LANES; ++i) y[i] = F(x[i]);
    return y;
}
inline V exp2(V x) { return each<std::exp2>(x); }
inline V exp(V x) { return each<std::exp>(x); }
inline V log1p(V x) { return each<std::log1p>(x); }
#else
// 2^x for integral x, times p.
#if defined(__AVX512F__)
inline V nearest(V x) { return (V)_mm512_mask_roundscale_ps((__m512)x, 0xffff, (__m512)x, 8); }
inline V scale(V p, V x) { return (V)_mm512_mask_scalef_ps((__m512)p, 0xffff, (__m512)p, (__m512)x); }
#else
inline V nearest(V x) { return (x + 12582912.0f) - 12582912.0f; }
inline V scale(V p, V x) {
    typedef int32_t I __attribute__((vector_size(4 * LANES)));
    V clamped = x < -127.0f ? V{} - 127.0f : x;
    clamped = clamped > 128.0f ? V{} + 128.0f : clamped;
    return p * (V)((__builtin_convertvector(clamped, I) + 127) << 23);
}
#endif

// 2^x for |x| <= 1/2, to 1e-7: a minimax polynomial that is exactly 1 at 0.
inline V polynomial(V x) {
    V p = x * 0.001326472731307149f + 0.009671512991189957f;
    p = p * x + 0.05550733581185341f;
    p = p * x + 0.24022242426872253f;
    p = p * x + 0.6931470036506653f;
    return p * x + 1.0f;
}

inline V exp2(V x) {
    const V whole = nearest(x);
    return scale(polynomial(x - whole), whole);
}

// e^x to 1e-7, far from 0 too: ln 2 is subtracted in two parts.
inline V exp(V x) {
    x = x < -104.0f ? V{} - 104.0f : x;
    const V whole = nearest(x * LOG2E);
    const V rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    return scale(polynomial(rest * LOG2E), whole);
}

// log(1 + e) for 0 <= e <= 1: the series of 2 artanh(e / (2 + e)), to 1e-8.
inline V log1p(V e) {
    const V s = e / (e + 2.0f), s2 = s * s;
    V p = s2 * (2.0f / 13) + 2.0f / 11;
    p = p * s2 + 2.0f / 9;
    p = p * s2 + 2.0f / 7;
    p = p * s2 + 2.0f / 5;
    p = p * s2 + 2.0f / 3;
    return s * (p * s2 + 2.0f);
}
#endif

inline V absolute(V x) { return x < REAL(0) ? -x : x; }
// As torch's: the identity above 20.
inline V softplus(V x) {
    const V y = (x > REAL(0) ? x : V{}) + log1p(exp(-absolute(x)));
    return x <= REAL(20) ? y : x;
}
inline V sigmoid(V x) { return REAL(1) / (REAL(1) + exp(-x)); }

// ---- loads and stores ----

inline V load(const REAL* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(REAL* p, V v) { std::memcpy(p, &v, sizeof v); }

inline REAL from_bfloat16(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

// `count` values at `offset`, the rest of the vector zero.
inline V read(const Tensor& tensor, int64_t offset, int64_t count) {
    constexpr int64_t own = sizeof(REAL) == 4 ? FLOAT32 : FLOAT64;
    REAL row[LANES] = {};
    if (tensor.type == own) {
        const REAL* p = static_cast<const REAL*>(tensor.data) + offset;
        if (count == LANES) return load(p);
        std::memcpy(row, p, count * sizeof(REAL));
    } else if (tensor.type == BFLOAT16) {
        const uint16_t* p = static_cast<const uint16_t*>(tensor.data) + offset;
        if (count == LANES)
            for (int i = 0; i < LANES; ++i) row[i] = from_bfloat16(p[i]);
        else
            for (int i = 0; i < count; ++i) row[i] = from_bfloat16(p[i]);
    } else if (tensor.type == FLOAT32) {
        const float* p = static_cast<const float*>(tensor.data) + offset;
        for (int i = 0; i < count; ++i) row[i] = REAL(p[i]);
    } else {
        const double* p = static_cast<const double*>(tensor.data) + offset;
        for (int i = 0; i < count; ++i) row[i] = REAL(p[i]);
    }
    return load(row);
}

inline void write(const Tensor& tensor, int64_t offset, int64_t count, V v) {
    constexpr int64_t own = sizeof(REAL) == 4 ? FLOAT32 : FLOAT64;
    if (tensor.type == own) {
        REAL* p = static_cast<REAL*>(tensor.data) + offset;
        if (count == LANES)
            store(p, v);
        else
            std::memcpy(p, &v, count * sizeof(REAL));
        return;
    }
    REAL row[LANES];
    store(row, v);
    if (tensor.type == BFLOAT16) {
        uint16_t* p = static_cast<uint16_t*>(tensor.data) + offset;
        if (count == LANES)
            for (int i = 0; i < LANES; ++i) p[i] = to_bfloat16(float(row[i]));
        else
            for (int i = 0; i < count; ++i) p[i] = to_bfloat16(float(row[i]));
    } else if (tensor.type == FLOAT32) {
        float* p = static_cast<float*>(tensor.data) + offset;
        for (int i = 0; i < count; ++i) p[i] = float(row[i]);
    } else {
        double* p = static_cast<double*>(tensor.data) + offset;
        for (int i = 0; i < count; ++i) p[i] = double(row[i]);
    }
}

// Where step t (in the order of the scan) of an element of the batch lies.
template <class Call>
inline int64_t row(const Call& s, const Tensor& tensor, int64_t batch, int64_t t) {
    return batch * tensor.batch_stride + (s.reverse ? s.length - 1 - t : t) * tensor.time_stride;
}

// (length, states) of one element of the batch, in the order of the scan.
void read_rows(const Scan& s, const Tensor& tensor, int64_t batch, REAL* out) {
    for (int64_t t = 0; t < s.length; ++t, out += s.states) {
        const int64_t at = row(s, tensor, batch, t);
        for (int64_t n = 0; n < s.states; n += LANES) {
            const int64_t count = std::min<int64_t>(LANES, s.states - n);
            const V v = read(tensor, at + n, count);
            std::memcpy(out + n, &v, count * sizeof(REAL));
        }
    }
}

// ---- sums over lanes ----

inline REAL sum(V v) {
    REAL lanes[LANES], total = 0;
    store(lanes, v);
    for (int i = 0; i < LANES; ++i) total += lanes[i];
    return total;
}

// ---- a thread's memory ----

struct Scratch {
    REAL *B, *C;           // (length, states)
    REAL* A;               // (blocks, states, lanes), times log2 e
    REAL* state;           // (blocks, states, lanes): forward the states, backward their gradients
    REAL *dA;              // as A, summed over the thread's tasks
    REAL *dD, *dbias;      // (blocks, lanes), the same
    REAL *dB, *dC;         // (states, steps of the chunk, lanes)
    bool* ready;

    Scratch(const Scan& s, void* memory) {
        const int64_t channels = padded(s.channels);
        REAL* p = static_cast<REAL*>(memory);
        auto take = [&](int64_t size) { REAL* q = p; p += (size + PADDING - 1) / PADDING * PADDING; return q; };
        A = take(channels * s.states);
        state = take(channels * s.states);
        B = take(s.length * s.states);
        C = take(s.length * s.states);
        dA = take(channels * s.states);
        dD = take(channels);
        dbias = take(channels);
        dB = take(s.states * CHUNK * LANES);
        dC = take(s.states * CHUNK * LANES);
        ready = reinterpret_cast<bool*>(p);
        if (!*ready) {
            const REAL* from = static_cast<const REAL*>(s.A);
            for (int64_t d = 0; d < s.channels; ++d)
                for (int64_t n = 0; n < s.states; ++n)
                    A[(d / LANES * s.states + n) * LANES + d % LANES] = from[d * s.states + n] * LOG2E;
            *ready = true;
        }
    }

    static int64_t size(const Scan& s) {
        const int64_t channels = padded(s.channels);
        return sizeof(REAL) * (3 * channels * s.states + 2 * (s.length * s.states + PADDING) + 2 * channels +
                               2 * s.states * CHUNK * LANES + PADDING);
    }
};

// ---- a chunk of one vector of channels ----

template <int T>
struct Steps {
    V x[T], raw[T], step[T], input[T];  // u, delta with its bias, after softplus, step times u

    Steps(const Scan& s, int64_t b, int64_t t0, int64_t d, int64_t count) {
        const V bias = s.delta_bias ? part(s.delta_bias, d, count) : V{};
        for (int t = 0; t < T; ++t) {
            x[t] = read(s.u, row(s, s.u, b, t0 + t) + d, count);
            raw[t] = step[t] = read(s.delta, row(s, s.delta, b, t0 + t) + d, count) + bias;
        }
        if (s.softplus)
            for (int t = 0; t < T; ++t) step[t] = softplus(raw[t]);
        for (int t = 0; t < T; ++t) input[t] = step[t] * x[t];
    }

    static V part(const void* values, int64_t d, int64_t count) {
        V v{};
        std::memcpy(&v, static_cast<const REAL*>(values) + d, count * sizeof(REAL));
        return v;
    }
};

template <int T>
void forward_chunk(const Scan& s, const Scratch& k, int64_t b, int64_t t0, int64_t block) {
    const int64_t d = block * LANES, count = std::min<int64_t>(LANES, s.channels - d), states = s.states;
    const Steps<T> steps(s, b, t0, d, count);
    V y[T];
    for (int t = 0; t < T; ++t) y[t] = V{};
    REAL* state = k.state + block * states * LANES;
    const REAL* A = k.A + block * states * LANES;
    const REAL *B = k.B + t0 * states, *C = k.C + t0 * states;
    for (int64_t n = 0; n < states; ++n) {
        const V a = load(A + n * LANES);
        V h = load(state + n * LANES);
        UNROLL
        for (int t = 0; t < T; ++t) {
            h = exp2(steps.step[t] * a) * h + steps.input[t] * B[t * states + n];
            y[t] += h * C[t * states + n];
        }
        store(state + n * LANES, h);
    }
    if (s.D) {
        const V D = Steps<T>::part(s.D, d, count);
        for (int t = 0; t < T; ++t) y[t] += D * steps.x[t];
    }
    for (int t = 0; t < T; ++t) {
        if (s.z.data) {
            const V z = read(s.z, row(s, s.z, b, t0 + t) + d, count);
            y[t] *= z * sigmoid(z);
        }
        write(s.y, row(s, s.y, b, t0 + t) + d, count, y[t]);
    }
}

template <int T, bool GATE>
void backward_chunk(const Scan& s, const Scratch& k, int64_t b, int64_t t0, int64_t block, const REAL* checkpoint) {
    const int64_t d = block * LANES, count = std::min<int64_t>(LANES, s.channels - d), states = s.states;
    const Steps<T> steps(s, b, t0, d, count);
    V dy[T], dy_ungated[T], z[T], y[T], dinput[T], dstep[T];
    for (int t = 0; t < T; ++t) {
        dy[t] = read(s.dy, row(s, s.dy, b, t0 + t) + d, count);
        y[t] = dinput[t] = dstep[t] = V{};
        if (GATE) {
            z[t] = read(s.z, row(s, s.z, b, t0 + t) + d, count);
            dy_ungated[t] = dy[t];
            dy[t] *= z[t] * sigmoid(z[t]);
        }
    }
    REAL *carried = k.state + block * states * LANES, *sum_dA = k.dA + block * states * LANES;
    const REAL *A = k.A + block * states * LANES, *B = k.B + t0 * states, *C = k.C + t0 * states;
    for (int64_t n = 0; n < states; ++n) {
        const V a = load(A + n * LANES);
        REAL *dB = k.dB + n * T * LANES, *dC = k.dC + n * T * LANES;
        V decay[T], left[T];  // what is left of the state before, after a step's decay
        V h = load(checkpoint + n * LANES);
        UNROLL
        for (int t = 0; t < T; ++t) {
            decay[t] = exp2(steps.step[t] * a);
            left[t] = decay[t] * h;
            h = left[t] + steps.input[t] * B[t * states + n];
            store(dC + t * LANES, load(dC + t * LANES) + dy[t] * h);
            if (GATE) y[t] += h * C[t * states + n];
        }
        V g = load(carried + n * LANES), dA = load(sum_dA + n * LANES);
        UNROLL
        for (int t = T - 1; t >= 0; --t) {
            g += dy[t] * C[t * states + n];
            store(dB + t * LANES, load(dB + t * LANES) + g * steps.input[t]);
            dinput[t] += g * B[t * states + n];
            const V dlog = g * left[t];
            dstep[t] += dlog * a;
            dA += dlog * steps.step[t];
            g *= decay[t];
        }
        store(carried + n * LANES, g);
        store(sum_dA + n * LANES, dA);
    }
    const V D = s.D ? Steps<T>::part(s.D, d, count) : V{};
    V dD = load(k.dD + d), dbias = load(k.dbias + d);
    for (int t = 0; t < T; ++t) {
        V du = dinput[t] * steps.step[t];
        if (s.D) {
            du += dy[t] * D;
            dD += dy[t] * steps.x[t];
        }
        V ddelta = dstep[t] * LN2 + dinput[t] * steps.x[t];
        if (s.softplus) ddelta *= sigmoid(steps.raw[t]);
        dbias += ddelta;
        write(s.du, row(s, s.du, b, t0 + t) + d, count, du);
        write(s.ddelta, row(s, s.ddelta, b, t0 + t) + d, count, ddelta);
        if (GATE) {
            const V gate = sigmoid(z[t]), ungated = s.D ? y[t] + D * steps.x[t] : y[t];
            write(s.dz, row(s, s.dz, b, t0 + t) + d, count,
                  dy_ungated[t] * ungated * gate * (REAL(1) + z[t] * (REAL(1) - gate)));
        }
    }
    store(k.dD + d, dD);
    store(k.dbias + d, dbias);
}

// ---- a task ----

typedef void (*Forward)(const Scan&, const Scratch&, int64_t, int64_t, int64_t);
typedef void (*Backward)(const Scan&, const Scratch&, int64_t, int64_t, int64_t, const REAL*);

constexpr Forward FORWARD[CHUNK] = {forward_chunk<1>, forward_chunk<2>, forward_chunk<3>, forward_chunk<4>,
                                    forward_chunk<5>, forward_chunk<6>, forward_chunk<7>, forward_chunk<8>};
constexpr Backward BACKWARD[2][CHUNK] = {
    {backward_chunk<1, false>, backward_chunk<2, false>, backward_chunk<3, false>, backward_chunk<4, false>,
     backward_chunk<5, false>, backward_chunk<6, false>, backward_chunk<7, false>, backward_chunk<8, false>},
    {backward_chunk<1, true>, backward_chunk<2, true>, backward_chunk<3, true>, backward_chunk<4, true>,
     backward_chunk<5, true>, backward_chunk<6, true>, backward_chunk<7, true>, backward_chunk<8, true>}};

inline int64_t start(const Scan& s, int64_t chunk) { return s.length * chunk / chunks(s.length); }

inline REAL* checkpoint(const Scan& s, int64_t batch, int64_t chunk, int64_t block) {
    const int64_t channels = padded(s.channels);
    return static_cast<REAL*>(s.checkpoints) + ((batch * chunks(s.length) + chunk) * channels + block * LANES) * s.states;
}

// The vectors of channels of a group.
struct Blocks {
    int64_t first, last;

    Blocks(const Scan& s, int64_t group) {
        const int64_t blocks = (s.channels + LANES - 1) / LANES;
        first = group * blocks / s.groups;
        last = (group + 1) * blocks / s.groups;
    }
};

void forward(const Scan& s, int64_t batch, int64_t group, void* memory) {
    const Scratch k(s, memory);
    const Blocks blocks(s, group);
    read_rows(s, s.B, batch, k.B);
    read_rows(s, s.C, batch, k.C);
    const int64_t size = (blocks.last - blocks.first) * s.states * LANES;
    REAL* state = k.state + blocks.first * s.states * LANES;
    std::fill_n(state, size, REAL(0));
    for (int64_t chunk = 0; chunk < chunks(s.length); ++chunk) {
        if (s.checkpoints) std::memcpy(checkpoint(s, batch, chunk, blocks.first), state, size * sizeof(REAL));
        const int64_t t0 = start(s, chunk);
        const Forward run = FORWARD[start(s, chunk + 1) - t0 - 1];
        for (int64_t block = blocks.first; block < blocks.last; ++block) run(s, k, batch, t0, block);
    }
}

void backward(const Scan& s, int64_t batch, int64_t group, void* memory) {
    const Scratch k(s, memory);
    const Blocks blocks(s, group);
    read_rows(s, s.B, batch, k.B);
    read_rows(s, s.C, batch, k.C);
    std::fill_n(k.state + blocks.first * s.states * LANES, (blocks.last - blocks.first) * s.states * LANES, REAL(0));
    const int64_t rows = (batch * s.groups + group) * s.length;
    for (int64_t chunk = chunks(s.length) - 1; chunk >= 0; --chunk) {
        const int64_t t0 = start(s, chunk), steps = start(s, chunk + 1) - t0;
        const Backward run = BACKWARD[s.z.data != nullptr][steps - 1];
        std::fill_n(k.dB, s.states * steps * LANES, REAL(0));
        std::fill_n(k.dC, s.states * steps * LANES, REAL(0));
        for (int64_t block = blocks.first; block < blocks.last; ++block)
            run(s, k, batch, t0, block, checkpoint(s, batch, chunk, block));
        for (int64_t n = 0; n < s.states; ++n)
            for (int64_t t = 0; t < steps; ++t) {
                const int64_t at = (rows + (s.reverse ? s.length - 1 - t0 - t : t0 + t)) * s.states + n;
                static_cast<REAL*>(s.dB)[at] = sum(load(k.dB + (n * steps + t) * LANES));
                static_cast<REAL*>(s.dC)[at] = sum(load(k.dC + (n * steps + t) * LANES));
            }
    }
}

void finish(const Scan& s, void* memory) {
    const Scratch k(s, memory);
    REAL *dA = static_cast<REAL*>(s.dA), *dD = static_cast<REAL*>(s.dD), *dbias = static_cast<REAL*>(s.ddelta_bias);
    for (int64_t d = 0; d < s.channels; ++d) {
        for (int64_t n = 0; n < s.states; ++n)
            dA[d * s.states + n] += k.dA[(d / LANES * s.states + n) * LANES + d % LANES];
        if (dD) dD[d] += k.dD[d];
        if (dbias) dbias[d] += k.dbias[d];
    }
}

// ---- the convolution ----

struct ConvolutionScratch {
    REAL *weight, *dweight;  // (width, padded channels)
    REAL *bias, *dbias;      // (padded channels)
    REAL* dpre;              // (width, padded channels): of the last `width` steps, step t in row t % width
    int64_t channels;
    bool* ready;

    ConvolutionScratch(const Convolution& s, void* memory) : channels(padded(s.channels)) {
        REAL* p = static_cast<REAL*>(memory);
        auto take = [&](int64_t rows) { REAL* q = p; p += rows * channels; return q; };
        weight = take(s.width);
        dweight = take(s.width);
        bias = take(1);
        dbias = take(1);
        dpre = take(s.width);
        ready = reinterpret_cast<bool*>(p);
        if (!*ready) {
            for (int64_t d = 0; d < s.channels; ++d) {
                for (int64_t k = 0; k < s.width; ++k)
                    weight[k * channels + d] = static_cast<const REAL*>(s.weight)[d * s.width + k];
                if (s.bias) bias[d] = static_cast<const REAL*>(s.bias)[d];
            }
            *ready = true;
        }
    }

    static int64_t size(const Convolution& s) {
        return sizeof(REAL) * ((3 * s.width + 2) * padded(s.channels) + PADDING);
    }
};

// What SiLU sees of step t: bias and the products of the last `width` steps.
__attribute__((always_inline)) inline V convolved(const Convolution& s, const ConvolutionScratch& k, int64_t width, int64_t batch, int64_t t, int64_t d,
                   int64_t count) {
    V pre = load(k.bias + d);
    UNROLL
    for (int64_t i = 0; i < width; ++i)
        if (t >= width - 1 - i)
            pre += load(k.weight + i * k.channels + d) * read(s.x, row(s, s.x, batch, t - width + 1 + i) + d, count);
    return pre;
}

// WIDTH: that of the convolution where the compiler should know it, 0 for any.
template <int WIDTH>
void convolve_width(const Convolution& s, const ConvolutionScratch& k, int64_t batch) {
    const int64_t width = WIDTH ? WIDTH : s.width;
    for (int64_t t = 0; t < s.length; ++t)
        for (int64_t d = 0; d < s.channels; d += LANES) {
            const int64_t count = std::min<int64_t>(LANES, s.channels - d);
            const V pre = convolved(s, k, width, batch, t, d, count);
            write(s.y, row(s, s.y, batch, t) + d, count, pre * sigmoid(pre));
        }
}

template <int WIDTH>
void convolve_width_backward(const Convolution& s, const ConvolutionScratch& k, int64_t batch) {
    const int64_t width = WIDTH ? WIDTH : s.width;
    for (int64_t t = s.length - 1; t >= 0; --t)
        for (int64_t d = 0; d < s.channels; d += LANES) {
            const int64_t count = std::min<int64_t>(LANES, s.channels - d);
            const V pre = convolved(s, k, width, batch, t, d, count), gate = sigmoid(pre);
            const V dy = read(s.dy, row(s, s.dy, batch, t) + d, count);
            const V dpre = dy * gate * (REAL(1) + pre * (REAL(1) - gate));
            store(k.dpre + t % width * k.channels + d, dpre);
            store(k.dbias + d, load(k.dbias + d) + dpre);
            UNROLL
            for (int64_t i = 0; i < width; ++i) {
                if (t < width - 1 - i) continue;
                REAL* sum = k.dweight + i * k.channels + d;
                store(sum, load(sum) + dpre * read(s.x, row(s, s.x, batch, t - width + 1 + i) + d, count));
            }
            V dx{};
            UNROLL
            for (int64_t i = 0; i < width; ++i)
                if (t + i < s.length) dx += load(k.weight + (width - 1 - i) * k.channels + d) * load(k.dpre + (t + i) % width * k.channels + d);
            write(s.dx, row(s, s.dx, batch, t) + d, count, dx);
        }
}

void convolve(const Convolution& s, int64_t batch, void* memory) {
    (s.width == 4 ? convolve_width<4> : convolve_width<0>)(s, ConvolutionScratch(s, memory), batch);
}

void convolve_backward(const Convolution& s, int64_t batch, void* memory) {
    (s.width == 4 ? convolve_width_backward<4> : convolve_width_backward<0>)(s, ConvolutionScratch(s, memory), batch);
}

void finish_convolution(const Convolution& s, void* memory) {
    const ConvolutionScratch k(s, memory);
    REAL *dweight = static_cast<REAL*>(s.dweight), *dbias = static_cast<REAL*>(s.dbias);
    for (int64_t d = 0; d < s.channels; ++d) {
        for (int64_t i = 0; i < s.width; ++i) dweight[d * s.width + i] += k.dweight[i * k.channels + d];
        if (dbias) dbias[d] += k.dbias[d];
    }
}

}  // namespace

extern const Kernel KERNEL = {Scratch::size, forward, backward, finish,
                              ConvolutionScratch::size, convolve, convolve_backward, finish_convolution};

}  // namespace scan
