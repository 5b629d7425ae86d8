// What the compiled CPU kernels share: vector types, number formats, tensors, threads.
//
// Written with GCC/Clang vector extensions: one source serves AVX-512, AVX2 and NEON.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>
#define VEDA_BF16_PAIRS 1
#else
#define VEDA_BF16_PAIRS 0
#endif

namespace veda {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
constexpr int BLOCK = 8;  // BLOCK x 2 accumulators in 32 registers
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
constexpr int BLOCK = 4;  // 16 registers
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16;
constexpr int BLOCK = 8;  // 32 registers
#else
constexpr int VECTOR_BYTES = 16;
constexpr int BLOCK = 4;
#endif

constexpr int WIDTH = VECTOR_BYTES / 4;
constexpr int LANES = 2 * WIDTH;  // queries that go through the inner loops together
constexpr int CHUNK = 128;        // keys per softmax step: scores of a step stay in L1

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct Tensor {  // strides in elements
    const char* data;
    int64_t batch, head, row, column;
};

inline Floats load(const float* p) {
    Floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

inline Floats splat(float x) { return x - Floats{}; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float widen_bf16(uint16_t h) {
    uint32_t bits = uint32_t(h) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float widen_f16(uint16_t h) {
    uint32_t bits = uint32_t(h & 0x7fff) << 13;
    float x;
    std::memcpy(&x, &bits, 4);
    x *= 0x1p112f;  // moves the exponent bias from 15 to 127, subnormals included
    std::memcpy(&bits, &x, 4);
    bits |= (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    bits |= uint32_t(h & 0x8000) << 16;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint16_t narrow_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // NaN stays NaN
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// 2^x for x <= 0; 0 below 2^-127. Error 2e-7 relative. NaN stays NaN.
inline Floats exp2_nonpositive(Floats x) {
    const Floats lowest = splat(-127.0f), magic = splat(12582912.0f);  // 1.5 * 2^23 rounds
    x = x < lowest ? lowest : x;
    const Floats shifted = x + magic;
    const Floats f = x - (shifted - magic);
    Floats p = splat(1.54035304e-4f);
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    const Ints power = ((Ints)shifted - (Ints)magic + 127) << 23;
    return p * (Floats)power;
}

// Row `row` of one head of x, as float32; any strides. `base`: that head's first element.
inline void widen_row(const Tensor& x, const char* base, int64_t dtype, int64_t row,
                      int64_t head_dim, float* to) {
    const auto copy = [&](const auto* from, auto widen) {
        from += row * x.row;
        if (x.column == 1) {  // apart, so that it vectorises
            for (int64_t d = 0; d < head_dim; d++) to[d] = widen(from[d]);
        } else {
            for (int64_t d = 0; d < head_dim; d++) to[d] = widen(from[d * x.column]);
        }
    };
    if (dtype == FLOAT32) {
        copy(reinterpret_cast<const float*>(base), [](float value) { return value; });
    } else if (dtype == BFLOAT16) {
        copy(reinterpret_cast<const uint16_t*>(base), widen_bf16);
    } else {
        copy(reinterpret_cast<const uint16_t*>(base), widen_f16);
    }
}

// The first element of one head of x.
inline const char* head_of(const Tensor& x, int64_t dtype, int64_t batch, int64_t head) {
    return x.data + (batch * x.batch + head * x.head) * (dtype == FLOAT32 ? 4 : 2);
}

// Runs every task < tasks on up to `threads` threads, each with its own `Worker(arguments)`.
// OpenMP, because torch's operators use it: the same threads serve both, and none of torch's
// still spins for work while ours run (which costs milliseconds where cores are few).
template <typename Worker, typename Arguments>
void run_tasks(int64_t tasks, int64_t threads, const Arguments& arguments) {
    std::atomic<int64_t> next{0};
    const int team = int(std::max(std::min(threads, tasks), int64_t(1)));
#pragma omp parallel num_threads(team)
    {
        Worker worker(arguments);
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) worker.run(i);
    }
}

}  // namespace veda
