// The selective scan for one instruction set. Each source file that includes this defines
//   KERNEL  the name of its Kernel
//   REAL    float or double, the type of the arithmetic; DOUBLE, too, for double
//   LANES   how many of them a vector holds; divides PADDING
//
// A lane is a channel. Time goes in chunks of up to 8 steps, the channels in tiles. What a chunk of a tile needs is first
// brought into rows in the first-level cache, converted; then the states come one after the other: for each, the decays
// of the chunk are computed at once and the recurrence runs through them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "scan.h"

namespace scan {
namespace {

typedef REAL V __attribute__((vector_size(sizeof(REAL) * LANES)));
typedef std::conditional_t<sizeof(REAL) == 4, int32_t, int64_t> Integer;
typedef Integer Index __attribute__((vector_size(sizeof(REAL) * LANES)));

#define UNROLL _Pragma("GCC unroll 8")

inline V load(const REAL* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(REAL* p, V v) { std::memcpy(p, &v, sizeof v); }

// ---- four vectors at a time ----

// Four vectors, every operation on each in turn: their chains of dependent instructions run side by side.
struct V4 {
    V a, b, c, d;
};

template <class F, class... X>
__attribute__((always_inline)) inline V4 map(F f, const X&... x) {
    return {f(x.a...), f(x.b...), f(x.c...), f(x.d...)};
}

inline V4 operator+(V4 x, V4 y) { return map([](V x, V y) { return x + y; }, x, y); }
inline V4 operator-(V4 x, V4 y) { return map([](V x, V y) { return x - y; }, x, y); }
inline V4 operator*(V4 x, V4 y) { return map([](V x, V y) { return x * y; }, x, y); }
inline V4 operator/(V4 x, V4 y) { return map([](V x, V y) { return x / y; }, x, y); }
inline V4 operator+(V4 x, REAL y) { return map([=](V x) { return x + y; }, x); }
inline V4 operator-(V4 x, REAL y) { return map([=](V x) { return x - y; }, x); }
inline V4 operator*(V4 x, REAL y) { return map([=](V x) { return x * y; }, x); }
inline V4 operator*(V4 x, V y) { return map([=](V x) { return x * y; }, x); }
inline V4 operator-(REAL x, V4 y) { return map([=](V y) { return x - y; }, y); }
inline V4 operator/(REAL x, V4 y) { return map([=](V y) { return x / y; }, y); }
// NaN stays NaN.
#if defined(__AVX2__) && LANES == 8
inline V4 max(V4 x, REAL y) { return map([=](V x) { return (V)_mm256_max_ps(_mm256_set1_ps(y), (__m256)x); }, x); }
inline V4 min(V4 x, REAL y) { return map([=](V x) { return (V)_mm256_min_ps(_mm256_set1_ps(y), (__m256)x); }, x); }
#else
inline V4 max(V4 x, REAL y) { return map([=](V x) { return x < y ? V{} + y : x; }, x); }
inline V4 min(V4 x, REAL y) { return map([=](V x) { return x > y ? V{} + y : x; }, x); }
#endif
// The values of y where x is above `bound`, elsewhere those of z.
inline V4 choose(V4 x, REAL bound, V4 y, V4 z) { return map([=](V x, V y, V z) { return x > bound ? y : z; }, x, y, z); }
inline V4 choose(V4 x, REAL bound, REAL y, V4 z) { return map([=](V x, V z) { return x > bound ? V{} + y : z; }, x, z); }
inline V4 load4(const REAL* p) { return {load(p), load(p + LANES), load(p + 2 * LANES), load(p + 3 * LANES)}; }
inline void store4(REAL* p, V4 x) {
    store(p, x.a);
    store(p + LANES, x.b);
    store(p + 2 * LANES, x.c);
    store(p + 3 * LANES, x.d);
}

// ---- elementary functions ----

constexpr REAL LOG2E = 1.4426950408889634074;
constexpr REAL LN2 = 0.69314718055994530942;

#if defined(DOUBLE)
template <double (*F)(double)>
inline V4 lanes(V4 x) {
    return map([](V v) {
        for (int i = 0; i < LANES; ++i) v[i] = F(v[i]);
        return v;
    }, x);
}
inline V4 exp2(V4 x) { return lanes<std::exp2>(x); }
inline V4 exp(V4 x) { return lanes<std::exp>(x); }
inline V4 log1p(V4 x) { return lanes<std::log1p>(x); }
#else
// What 2^x takes without overflow, x rounded, and 2^x for integral x, times p.
#if defined(__AVX512F__) && LANES == 16
inline V4 bounded(V4 x) { return x; }
inline V4 nearest(V4 x) {
    return map([](V x) { return (V)_mm512_mask_roundscale_ps((__m512)x, 0xffff, (__m512)x, 8); }, x);
}
inline V4 scale(V4 p, V4 x) {
    return map([](V p, V x) { return (V)_mm512_mask_scalef_ps((__m512)p, 0xffff, (__m512)p, (__m512)x); }, p, x);
}
#else
constexpr float WHOLE = 12582912;  // 3 * 2^22: added, it leaves an integer in the low bits
inline V4 bounded(V4 x) { return min(max(x, -127.0f), 128.0f); }
inline V4 nearest(V4 x) { return (x + WHOLE) - WHOLE; }
inline V4 scale(V4 p, V4 x) { return map([](V p, V x) { return p * (V)((Index)(x + (WHOLE + 127)) << 23); }, p, x); }
#endif

// 2^x for |x| <= 1/2, to 1e-7: a minimax polynomial that is exactly 1 at 0.
inline V4 polynomial(V4 x) {
    V4 p = x * 0.001326472731307149f + 0.009671512991189957f;
    p = p * x + 0.05550733581185341f;
    p = p * x + 0.24022242426872253f;
    p = p * x + 0.6931470036506653f;
    return p * x + 1.0f;
}

inline V4 exp2(V4 x) {
    x = bounded(x);
    const V4 whole = nearest(x);
    return scale(polynomial(x - whole), whole);
}

// e^x to 1e-7, far from 0 too: ln 2 is subtracted in two parts.
inline V4 exp(V4 x) {
    x = min(max(x, -104.0f), 104.0f);
    const V4 whole = nearest(bounded(x * LOG2E));
    const V4 rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    return scale(polynomial(rest * LOG2E), whole);
}

// log(1 + e) for 0 <= e <= 1, to 3e-8: a minimax polynomial of log(1 + e) / e.
inline V4 log1p(V4 e) {
    V4 p = e * 0.005232693105996777f - 0.029505234778886343f;
    p = p * e + 0.078225946598384f;
    p = p * e - 0.13663245475530528f;
    p = p * e + 0.1910600668996152f;
    p = p * e - 0.2484298222480989f;
    p = p * e + 0.33319096815085025f;
    p = p * e - 0.49999493141490337f;
    p = p * e + 0.9999999698798899f;
    return p * e;
}
#endif

inline V4 sigmoid(V4 x) { return REAL(1) / (exp(REAL(0) - x) + REAL(1)); }

// log(1 + e^x) and its slope; as torch's, the identity above 20.
struct Softplus {
    V4 x, e;
    explicit Softplus(V4 x) : x(x), e(exp(choose(x, 0, REAL(0) - x, x))) {}
    V4 value() const { return choose(x, 20, x, max(x, 0) + log1p(e)); }
    V4 slope() const { return choose(x, 0, REAL(1), e) / (e + REAL(1)); }
};

// ---- loads and stores ----

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

inline REAL convert(uint16_t x) { return from_bfloat16(x); }
inline REAL convert(float x) { return REAL(x); }
inline REAL convert(double x) { return REAL(x); }
inline void convert(REAL x, uint16_t& y) { y = to_bfloat16(float(x)); }
inline void convert(REAL x, float& y) { y = float(x); }
inline void convert(REAL x, double& y) { y = double(x); }

template <class T>
inline V load_as(const T* p) {
    typedef T Values __attribute__((vector_size(sizeof(T) * LANES)));
    Values values;
    std::memcpy(&values, p, sizeof values);
    return __builtin_convertvector(values, V);
}
inline V load_as(const uint16_t* p) {
    REAL row[LANES];
    for (int i = 0; i < LANES; ++i) row[i] = convert(p[i]);
    return load(row);
}

// Calls run(pointer) with the tensor's values in their type.
template <class Run>
inline void typed(const Tensor& tensor, Run run) {
    if (tensor.type == BFLOAT16)
        run(static_cast<uint16_t*>(tensor.data));
    else if (tensor.type == FLOAT32)
        run(static_cast<float*>(tensor.data));
    else
        run(static_cast<double*>(tensor.data));
}

// Where step t (in the order of the scan) of an element of the batch lies.
template <class Call>
inline int64_t row(const Call& s, const Tensor& tensor, int64_t batch, int64_t t) {
    return batch * tensor.batch_stride + (s.reverse ? s.length - 1 - t : t) * tensor.time_stride;
}

// (length, states) of one element of the batch, in the order of the scan.
inline void read_rows(const Scan& s, const Tensor& tensor, int64_t batch, REAL* out) {
    typed(tensor, [&](const auto* values) {
        for (int64_t t = 0; t < s.length; ++t, out += s.states) {
            const auto* p = values + row(s, tensor, batch, t);
            for (int64_t n = 0; n < s.states; ++n) out[n] = convert(p[n]);
        }
    });
}

// Steps of `count` channels from d, as columns (channels / LANES, `rows`, LANES) of which the first rows are written; plus
// `bias` of a channel if there is one. Zeros after the last channel. Asks for the steps that lie `ahead`, too.
template <class Call>
void read(const Call& s, const Tensor& tensor, int64_t batch, int64_t t0, int64_t steps, int64_t d, int64_t count,
          const REAL* bias, REAL* columns, int64_t rows, int64_t ahead) {
    typed(tensor, [&](const auto* values) {
        for (int64_t t = 0; t < steps; ++t) {
            const auto* p = values + row(s, tensor, batch, t0 + t) + d;
            const int64_t next = std::max<int64_t>(0, std::min(s.length - 1, t0 + t + ahead));
            const auto* soon = values + row(s, tensor, batch, next) + d;
            REAL* out = columns + t * LANES;
            int64_t i = 0;
            for (; i + LANES <= count; i += LANES, out += rows * LANES) {
                __builtin_prefetch(soon + i, 0, 3);
                const V v = load_as(p + i);
                store(out, bias ? v + load(bias + i) : v);
            }
            if (i < count) {
                V v{};
                for (int64_t j = 0; j < count - i; ++j) v[j] = convert(p[i + j]);
                store(out, bias ? v + load(bias + i) : v);
            }
        }
    });
}

// Columns (channels / LANES, steps, LANES) to the steps of `count` channels from d.
template <class Call>
void write(const Call& s, const Tensor& tensor, int64_t batch, int64_t t0, int64_t steps, int64_t d, int64_t count,
           const REAL* columns) {
    typed(tensor, [&](auto* values) {
        for (int64_t t = 0; t < steps; ++t) {
            auto* p = values + row(s, tensor, batch, t0 + t) + d;
            const REAL* in = columns + t * LANES;
            int64_t i = 0;
            for (; i + LANES <= count; i += LANES, in += steps * LANES)
                for (int64_t j = 0; j < LANES; ++j) convert(in[j], p[i + j]);
            for (int64_t j = 0; j < count - i; ++j) convert(in[j], p[i + j]);
        }
    });
}

// ---- sums over lanes ----

// For pairs of vectors whose lanes are to be folded `half` apart: the lanes of the two that stay, and those to add.
struct Folds {
    Integer stay[LANES][LANES], add[LANES][LANES];  // by `half`

    constexpr Folds() : stay(), add() {
        for (int half = 1; half < LANES; half *= 2)
            for (int i = 0; i < LANES; ++i) {
                stay[half][i] = i & half ? LANES + i - half : i;
                add[half][i] = i & half ? LANES + i : i + half;
            }
    }
};
constexpr Folds FOLDS;

// The sums over the lanes of LANES vectors, as one.
inline V sums(const REAL* p) {
    V v[LANES];
    UNROLL
    for (int i = 0; i < LANES; ++i) v[i] = load(p + i * LANES);
    for (int half = LANES / 2; half > 0; half /= 2) {
        Index stay, add;
        std::memcpy(&stay, FOLDS.stay[half], sizeof stay);
        std::memcpy(&add, FOLDS.add[half], sizeof add);
        for (int i = 0; i < half; ++i)
            v[i] = __builtin_shuffle(v[i], v[i + half], stay) + __builtin_shuffle(v[i], v[i + half], add);
    }
    return v[0];
}

// ---- a thread's memory ----

// The channels that go through a chunk together: as many as leave what they need in the first-level cache.
constexpr int64_t TILE = 64;

struct Scratch {
    REAL *D, *bias;                // (channels)
    REAL* A;                       // (channels / LANES, states, LANES), times log2 e
    REAL *B, *C;                   // (length, states)
    REAL* state;                   // as A: forward the states, backward their gradients
    REAL *dA, *dD, *dbias;         // as A; (channels): summed over the thread's tasks
    REAL *dB, *dC, *sums;          // (states, steps, LANES); (states, steps)
    REAL *u, *step, *slope, *input, *y, *z, *dy, *dz, *dinput, *dstep;  // columns: (TILE / LANES, steps, LANES)
    bool* ready;

    Scratch(const Scan& s, void* memory) {
        REAL* end = static_cast<REAL*>(memory);
        layout(s, [&](REAL*& part, int64_t size) { part = end; end += size; });
        ready = reinterpret_cast<bool*>(end);
        if (*ready) return;
        for (int64_t d = 0; d < s.channels; ++d) {
            for (int64_t n = 0; n < s.states; ++n)
                A[(d / LANES * s.states + n) * LANES + d % LANES] = static_cast<const REAL*>(s.A)[d * s.states + n] * LOG2E;
            if (s.D) D[d] = static_cast<const REAL*>(s.D)[d];
            if (s.delta_bias) bias[d] = static_cast<const REAL*>(s.delta_bias)[d];
        }
        *ready = true;
    }

    static int64_t size(const Scan& s) {
        Scratch unplaced;
        int64_t total = PADDING;  // for `ready`
        unplaced.layout(s, [&](REAL*&, int64_t size) { total += size; });
        return total * sizeof(REAL);
    }

private:
    Scratch() {}

    template <class Take>
    void layout(const Scan& s, Take take) {
        const int64_t channels = padded(s.channels);
        for (REAL** part : {&D, &bias, &dD, &dbias}) take(*part, channels);
        for (REAL** part : {&A, &state, &dA}) take(*part, channels * s.states);
        for (REAL** part : {&B, &C}) take(*part, padded(s.length * s.states));
        for (REAL** part : {&dB, &dC}) take(*part, padded(s.states * CHUNK) * LANES);
        take(sums, padded(s.states * CHUNK));
        for (REAL** part : {&u, &step, &slope, &input, &y, &z, &dy, &dz, &dinput, &dstep})
            take(*part, CHUNK * TILE + 4 * LANES);
    }
};

// ---- a chunk of one vector of channels ----

// The decays of T steps, 2^(step a); those after T are of no use.
template <int T>
struct Decays {
    V decay[(T + 3) / 4 * 4];

    Decays(const REAL* step, V a) {
        UNROLL
        for (int i = 0; i < T; i += 4) {
            const V4 x = exp2(load4(step + i * LANES) * a);
            decay[i] = x.a, decay[i + 1] = x.b, decay[i + 2] = x.c, decay[i + 3] = x.d;
        }
    }
    V operator[](int t) const { return decay[t]; }
};

// From the columns of u, step and input to that of y.
template <int T>
void forward_chunk(const Scratch& k, int64_t states, int64_t t0, int64_t d, int64_t column) {
    const REAL *A = k.A + d * states, *B = k.B + t0 * states, *C = k.C + t0 * states;
    const REAL *step = k.step + column, *input = k.input + column;
    REAL* state = k.state + d * states;
    V y[T];
    for (int t = 0; t < T; ++t) y[t] = load(k.D + d) * load(k.u + column + t * LANES);
    for (int64_t n = 0; n < states; ++n) {
        const Decays<T> decay(step, load(A + n * LANES));
        V h = load(state + n * LANES);
        UNROLL
        for (int t = 0; t < T; ++t) {
            h = decay[t] * h + load(input + t * LANES) * B[t * states + n];
            y[t] += h * C[t * states + n];
        }
        store(state + n * LANES, h);
    }
    for (int t = 0; t < T; ++t) store(k.y + column + t * LANES, y[t]);
}

// From the columns of step, input and dy to those of dinput, dstep (by 1 / ln 2) and, if GATE, y without the skip.
template <int T, bool GATE>
void backward_chunk(const Scratch& k, int64_t states, int64_t t0, int64_t d, int64_t column, const REAL* checkpoint) {
    const REAL *A = k.A + d * states, *B = k.B + t0 * states, *C = k.C + t0 * states;
    const REAL *step = k.step + column, *input = k.input + column, *dy = k.dy + column;
    REAL *carried = k.state + d * states, *sum_dA = k.dA + d * states, *dB = k.dB, *dC = k.dC;
    V y[T], dinput[T], dstep[T];
    for (int t = 0; t < T; ++t) y[t] = dinput[t] = dstep[t] = V{};
    for (int64_t n = 0; n < states; ++n, dB += T * LANES, dC += T * LANES) {
        const V a = load(A + n * LANES);
        const Decays<T> decay(step, a);
        V left[T];  // what is left of the state before, after a step's decay
        V h = load(checkpoint + n * LANES);
        UNROLL
        for (int t = 0; t < T; ++t) {
            const V added = load(input + t * LANES) * B[t * states + n];
            left[t] = decay[t] * h;
            h = decay[t] * h + added;
            store(dC + t * LANES, load(dC + t * LANES) + load(dy + t * LANES) * h);
            if (GATE) y[t] += h * C[t * states + n];
        }
        V g = load(carried + n * LANES), dA = load(sum_dA + n * LANES);
        UNROLL
        for (int t = T - 1; t >= 0; --t) {
            g += load(dy + t * LANES) * C[t * states + n];
            store(dB + t * LANES, load(dB + t * LANES) + g * load(input + t * LANES));
            dinput[t] += g * B[t * states + n];
            const V dlog = g * left[t];
            dstep[t] += dlog * a;
            dA += dlog * load(step + t * LANES);
            g *= decay[t];
        }
        store(carried + n * LANES, g);
        store(sum_dA + n * LANES, dA);
    }
    for (int t = 0; t < T; ++t) {
        store(k.dinput + column + t * LANES, dinput[t]);
        store(k.dstep + column + t * LANES, dstep[t]);
        if (GATE) store(k.y + column + t * LANES, y[t]);
    }
}

typedef void (*Forward)(const Scratch&, int64_t, int64_t, int64_t, int64_t);
typedef void (*Backward)(const Scratch&, int64_t, int64_t, int64_t, int64_t, const REAL*);

constexpr Forward FORWARD[CHUNK] = {forward_chunk<1>, forward_chunk<2>, forward_chunk<3>, forward_chunk<4>,
                                    forward_chunk<5>, forward_chunk<6>, forward_chunk<7>, forward_chunk<8>};
constexpr Backward BACKWARD[2][CHUNK] = {
    {backward_chunk<1, false>, backward_chunk<2, false>, backward_chunk<3, false>, backward_chunk<4, false>,
     backward_chunk<5, false>, backward_chunk<6, false>, backward_chunk<7, false>, backward_chunk<8, false>},
    {backward_chunk<1, true>, backward_chunk<2, true>, backward_chunk<3, true>, backward_chunk<4, true>,
     backward_chunk<5, true>, backward_chunk<6, true>, backward_chunk<7, true>, backward_chunk<8, true>}};

// ---- a chunk of a tile ----

struct Tile {
    const Scan& s;
    const Scratch& k;
    const int64_t batch, t0, steps, d, channels, ahead;

    void in(const Tensor& tensor, REAL* columns, const REAL* bias = nullptr) const {
        read(s, tensor, batch, t0, steps, d, channels, bias, columns, steps, ahead);
    }
    void out(const Tensor& tensor, const REAL* columns) const { write(s, tensor, batch, t0, steps, d, channels, columns); }
    int64_t size() const { return (channels + LANES - 1) / LANES * LANES * steps; }

    // each(column, d) for every vector of channels.
    template <class Each>
    void vectors(Each each) const {
        for (int64_t i = 0; i < channels; i += LANES) each(i * steps, d + i);
    }

    template <bool SLOPES>
    void inputs() const {
        in(s.u, k.u);
        in(s.delta, k.step, s.delta_bias ? k.bias + d : nullptr);
        for (int64_t i = 0; i < size(); i += 4 * LANES) {
            V4 step = load4(k.step + i);
            if (s.softplus) {
                const Softplus softplus(step);
                step = softplus.value();
                store4(k.step + i, step);
                if (SLOPES) store4(k.slope + i, softplus.slope());
            }
            store4(k.input + i, step * load4(k.u + i));
        }
    }

    void forward() const {
        inputs<false>();
        vectors([&](int64_t column, int64_t d) { FORWARD[steps - 1](k, s.states, t0, d, column); });
        if (s.z.data) {
            in(s.z, k.z);
            for (int64_t i = 0; i < size(); i += 4 * LANES) {
                const V4 z = load4(k.z + i);
                store4(k.y + i, load4(k.y + i) * z * sigmoid(z));
            }
        }
        out(s.y, k.y);
    }

    void backward(const REAL* checkpoint) const {
        const bool gate = s.z.data;
        inputs<true>();
        in(s.dy, k.dy);
        if (gate) {
            in(s.z, k.z);
            for (int64_t i = 0; i < size(); i += 4 * LANES) {
                const V4 z = load4(k.z + i), dy = load4(k.dy + i), open = sigmoid(z);
                store4(k.dy + i, dy * z * open);
                store4(k.dz + i, dy * open * (z * (REAL(1) - open) + REAL(1)));
            }
        }
        vectors([&](int64_t column, int64_t d) {
            BACKWARD[gate][steps - 1](k, s.states, t0, d, column, checkpoint + (d - this->d) * s.states);
            const V D = load(k.D + d);
            V dD = load(k.dD + d), dbias = load(k.dbias + d);
            for (int64_t i = column; i < column + steps * LANES; i += LANES) {
                const V u = load(k.u + i), dy = load(k.dy + i), dinput = load(k.dinput + i);
                V ddelta = load(k.dstep + i) * LN2 + dinput * u;
                if (s.softplus) ddelta *= load(k.slope + i);
                dD += dy * u;
                dbias += ddelta;
                store(k.dinput + i, dinput * load(k.step + i) + dy * D);
                store(k.dstep + i, ddelta);
                if (gate) store(k.dz + i, load(k.dz + i) * (load(k.y + i) + D * u));
            }
            store(k.dD + d, dD);
            store(k.dbias + d, dbias);
        });
        out(s.du, k.dinput);
        out(s.ddelta, k.dstep);
        if (gate) out(s.dz, k.dz);
    }
};

// ---- a task ----

inline int64_t start(const Scan& s, int64_t chunk) { return s.length * chunk / chunks(s.length); }

inline REAL* checkpoint(const Scan& s, int64_t batch, int64_t chunk, int64_t d) {
    const int64_t channels = padded(s.channels);
    return static_cast<REAL*>(s.checkpoints) + ((batch * chunks(s.length) + chunk) * channels + d) * s.states;
}

// The channels of a group.
struct Channels {
    int64_t first, last, padded;

    Channels(const Scan& s, int64_t group) {
        const int64_t vectors = (s.channels + LANES - 1) / LANES;
        first = group * vectors / s.groups * LANES;
        padded = (group + 1) * vectors / s.groups * LANES;
        last = std::min(padded, s.channels);
    }

    template <class Run>
    void tiles(Run run) const {
        for (int64_t d = first; d < last; d += TILE) run(d, std::min(TILE, last - d));
    }
};

void forward(const Scan& s, int64_t batch, int64_t group, void* memory) {
    const Scratch k(s, memory);
    const Channels channels(s, group);
    read_rows(s, s.B, batch, k.B);
    read_rows(s, s.C, batch, k.C);
    const int64_t size = (channels.padded - channels.first) * s.states;
    REAL* state = k.state + channels.first * s.states;
    std::fill_n(state, size, REAL(0));
    for (int64_t chunk = 0; chunk < chunks(s.length); ++chunk) {
        if (s.checkpoints) std::memcpy(checkpoint(s, batch, chunk, channels.first), state, size * sizeof(REAL));
        const int64_t t0 = start(s, chunk), steps = start(s, chunk + 1) - t0;
        channels.tiles([&](int64_t d, int64_t count) { Tile{s, k, batch, t0, steps, d, count, CHUNK}.forward(); });
    }
}

void backward(const Scan& s, int64_t batch, int64_t group, void* memory) {
    const Scratch k(s, memory);
    const Channels channels(s, group);
    read_rows(s, s.B, batch, k.B);
    read_rows(s, s.C, batch, k.C);
    std::fill_n(k.state + channels.first * s.states, (channels.padded - channels.first) * s.states, REAL(0));
    const int64_t rows = (batch * s.groups + group) * s.length;
    for (int64_t chunk = chunks(s.length) - 1; chunk >= 0; --chunk) {
        const int64_t t0 = start(s, chunk), steps = start(s, chunk + 1) - t0;
        for (REAL* lanes : {k.dB, k.dC}) std::fill_n(lanes, s.states * steps * LANES, REAL(0));
        channels.tiles([&](int64_t d, int64_t count) {
            Tile{s, k, batch, t0, steps, d, count, -CHUNK}.backward(checkpoint(s, batch, chunk, d));
        });
        auto reduce = [&](const REAL* lanes, void* out) {
            for (int64_t i = 0; i < s.states * steps; i += LANES) store(k.sums + i, sums(lanes + i * LANES));
            for (int64_t t = 0; t < steps; ++t) {
                REAL* p = static_cast<REAL*>(out) + (rows + (s.reverse ? s.length - 1 - t0 - t : t0 + t)) * s.states;
                for (int64_t n = 0; n < s.states; ++n) p[n] = k.sums[n * steps + t];
            }
        };
        reduce(k.dB, s.dB);
        reduce(k.dC, s.dC);
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
    REAL *weight, *bias;                // (width, channels), (channels)
    REAL *dweight, *dbias;              // the same, summed over the thread's tasks
    REAL *x, *dpre;                     // columns (TILE / LANES, width - 1 + steps, LANES)
    REAL *pre, *y;                      // columns (TILE / LANES, steps, LANES): before SiLU and after, or their gradients
    bool* ready;

    ConvolutionScratch(const Convolution& s, void* memory) {
        REAL* end = static_cast<REAL*>(memory);
        layout(s, [&](REAL*& part, int64_t size) { part = end; end += size; });
        ready = reinterpret_cast<bool*>(end);
        if (*ready) return;
        for (int64_t d = 0; d < s.channels; ++d) {
            for (int64_t i = 0; i < s.width; ++i)
                weight[i * padded(s.channels) + d] = static_cast<const REAL*>(s.weight)[d * s.width + i];
            if (s.bias) bias[d] = static_cast<const REAL*>(s.bias)[d];
        }
        *ready = true;
    }

    static int64_t size(const Convolution& s) {
        ConvolutionScratch unplaced;
        int64_t total = PADDING;  // for `ready`
        unplaced.layout(s, [&](REAL*&, int64_t size) { total += size; });
        return total * sizeof(REAL);
    }

private:
    ConvolutionScratch() {}

    template <class Take>
    void layout(const Convolution& s, Take take) {
        const int64_t channels = padded(s.channels);
        for (REAL** part : {&weight, &dweight}) take(*part, s.width * channels);
        for (REAL** part : {&bias, &dbias}) take(*part, channels);
        for (REAL** part : {&x, &dpre}) take(*part, (s.width - 1 + CHUNK) * TILE);
        for (REAL** part : {&pre, &y}) take(*part, CHUNK * TILE + 4 * LANES);
    }
};

// A tile of channels of one element of the batch. WIDTH: that of the convolution where the compiler should know it, or 0.
template <int WIDTH>
struct ConvolutionTile {
    const Convolution& s;
    const ConvolutionScratch& k;
    const int64_t batch, d, channels;
    const int64_t width = WIDTH ? WIDTH : s.width, stride = padded(s.channels);

    // The columns of x, with the steps before t0 that the convolution sees and zeros before the first, and those of pre.
    void convolve(int64_t t0, int64_t steps, int64_t ahead) const {
        const int64_t rows = width - 1 + steps, missing = std::max<int64_t>(0, width - 1 - t0);
        for (int64_t i = 0; i < channels; i += LANES) std::fill_n(k.x + i * rows, missing * LANES, REAL(0));
        const int64_t first = t0 - (width - 1) + missing;
        read(s, s.x, batch, first, t0 + steps - first, d, channels, nullptr, k.x + missing * LANES, rows, ahead);
        for (int64_t i = 0; i < channels; i += LANES) {
            const REAL *x = k.x + i * rows, *weight = k.weight + d + i;
            const V bias = load(k.bias + d + i);
            for (int64_t t = 0; t < steps; ++t, x += LANES) {
                V pre = bias;
                UNROLL
                for (int64_t j = 0; j < width; ++j) pre += load(weight + j * stride) * load(x + j * LANES);
                store(k.pre + i * steps + t * LANES, pre);
            }
        }
    }

    int64_t size(int64_t steps) const { return (channels + LANES - 1) / LANES * LANES * steps; }

    void forward() const {
        for (int64_t t0 = 0; t0 < s.length; t0 += CHUNK) {
            const int64_t steps = std::min(CHUNK, s.length - t0);
            convolve(t0, steps, CHUNK);
            for (int64_t i = 0; i < size(steps); i += 4 * LANES) {
                const V4 pre = load4(k.pre + i);
                store4(k.y + i, pre * sigmoid(pre));
            }
            write(s, s.y, batch, t0, steps, d, channels, k.y);
        }
    }

    void backward() const {
        int64_t last_rows = 0;
        for (int64_t end = s.length; end > 0; end -= CHUNK) {
            const int64_t t0 = std::max<int64_t>(0, end - CHUNK), steps = end - t0, rows = width - 1 + steps;
            convolve(t0, steps, -CHUNK);
            read(s, s.dy, batch, t0, steps, d, channels, nullptr, k.y, steps, -CHUNK);
            for (int64_t i = 0; i < size(steps); i += 4 * LANES) {
                const V4 pre = load4(k.pre + i), gate = sigmoid(pre);
                store4(k.pre + i, load4(k.y + i) * gate * (pre * (REAL(1) - gate) + REAL(1)));
            }
            for (int64_t i = 0; i < channels; i += LANES) gradients(i, steps, i * rows, i * last_rows, last_rows > 0);
            write(s, s.dx, batch, t0, steps, d, channels, k.y);
            last_rows = rows;
        }
    }

    // Of the vector of channels i: from dpre of the chunk in `pre`, and of the steps after it where they lay in `dpre` for
    // the chunk before, if there was one.
    void gradients(int64_t i, int64_t steps, int64_t at, int64_t last, bool later) const {
        REAL *x = k.x + at, *pre = k.pre + i * steps, *dx = k.y + i * steps, *dweight = k.dweight + d + i;
        const REAL* weight = k.weight + d + i;
        REAL* dpre = k.dpre + at;
        if (later)
            std::memmove(dpre + steps * LANES, k.dpre + last, (width - 1) * LANES * sizeof(REAL));
        else
            std::fill_n(dpre + steps * LANES, (width - 1) * LANES, REAL(0));
        std::memcpy(dpre, pre, steps * LANES * sizeof(REAL));
        V dbias = load(k.dbias + d + i);
        for (int64_t t = 0; t < steps; ++t) {
            dbias += load(dpre + t * LANES);
            V sum{};
            UNROLL
            for (int64_t j = 0; j < width; ++j)
                sum += load(weight + (width - 1 - j) * stride) * load(dpre + (t + j) * LANES);
            store(dx + t * LANES, sum);
        }
        store(k.dbias + d + i, dbias);
        UNROLL
        for (int64_t j = 0; j < width; ++j) {
            V sum = load(dweight + j * stride);
            for (int64_t t = 0; t < steps; ++t) sum += load(dpre + t * LANES) * load(x + (t + j) * LANES);
            store(dweight + j * stride, sum);
        }
    }
};

void convolve(const Convolution& s, int64_t batch, void* memory) {
    const ConvolutionScratch k(s, memory);
    for (int64_t d = 0; d < s.channels; d += TILE) {
        const int64_t channels = std::min(TILE, s.channels - d);
        if (s.width == 4)
            ConvolutionTile<4>{s, k, batch, d, channels}.forward();
        else
            ConvolutionTile<0>{s, k, batch, d, channels}.forward();
    }
}

void convolve_backward(const Convolution& s, int64_t batch, void* memory) {
    const ConvolutionScratch k(s, memory);
    for (int64_t d = 0; d < s.channels; d += TILE) {
        const int64_t channels = std::min(TILE, s.channels - d);
        if (s.width == 4)
            ConvolutionTile<4>{s, k, batch, d, channels}.backward();
        else
            ConvolutionTile<0>{s, k, batch, d, channels}.backward();
    }
}

void finish_convolution(const Convolution& s, void* memory) {
    const ConvolutionScratch k(s, memory);
    REAL *dweight = static_cast<REAL*>(s.dweight), *dbias = static_cast<REAL*>(s.dbias);
    for (int64_t d = 0; d < s.channels; ++d) {
        for (int64_t i = 0; i < s.width; ++i) dweight[d * s.width + i] += k.dweight[i * padded(s.channels) + d];
        if (dbias) dbias[d] += k.dbias[d];
    }
}

}  // namespace

extern const Kernel KERNEL = {Scratch::size, forward, backward, finish,
                              ConvolutionScratch::size, convolve, convolve_backward, finish_convolution};

}  // namespace scan
