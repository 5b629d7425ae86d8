// The inner products of the attention kernel: blocks of key rows or value columns x LANES queries.

#pragma once

#include "cpu_common.h"

namespace veda {

// ---- float32 products ---------------------------------------------------------------------------

// Scores (BLOCK x LANES) of BLOCK key rows; q: (D, LANES). Raises `top` to their maximum.
inline void score_block(const float* const* rows, const float* q, int64_t head_dim, float* scores,
                        Floats top[2], int used) {
    Floats a[BLOCK][2] = {};
    const float* r[BLOCK];
    for (int i = 0; i < BLOCK; i++) r[i] = rows[i];
    for (int64_t d = 0; d < head_dim; d++) {
        const Floats q0 = load(q + d * LANES), q1 = load(q + d * LANES + WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK; i++) {
            const float k = r[i][d];
            a[i][0] += k * q0;
            a[i][1] += k * q1;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK; i++) {
        store(scores + i * LANES, a[i][0]);
        store(scores + i * LANES + WIDTH, a[i][1]);
        if (i < used) {
            top[0] = larger(a[i][0], top[0]);
            top[1] = larger(a[i][1], top[1]);
        }
    }
}

// o[d0 + i] = o[d0 + i] * fade + sum over keys of v[key][d0 + i] * p[key], i < ROWS.
template <int ROWS>
inline void value_block(const float* const* rows, int64_t keys, const float* p, int64_t d0,
                        const Floats fade[2], float* o) {
    Floats a[ROWS][2] = {};  // summed apart from o: short sums round less
    for (int64_t key = 0; key < keys; key++) {
        const float* v = rows[key] + d0;
        const Floats p0 = load(p + key * LANES), p1 = load(p + key * LANES + WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            a[i][0] += v[i] * p0;
            a[i][1] += v[i] * p1;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
        float* at = o + (d0 + i) * LANES;
        store(at, load(at) * fade[0] + a[i][0]);
        store(at + WIDTH, load(at + WIDTH) * fade[1] + a[i][1]);
    }
}

// ---- bfloat16 pair products ---------------------------------------------------------------------

#if VEDA_BF16_PAIRS
inline Floats dot_pairs(Floats sum, Words a, uint32_t b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a,
                                    (__m512bh)_mm512_set1_epi32(int32_t(b)));
}

inline Words load_words(const uint32_t* p) {
    Words x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline uint32_t pair_at(const uint16_t* p) {
    uint32_t x;
    std::memcpy(&x, p, 4);
    return x;
}

// As `score_block`; q: (D / 2, LANES) pairs along D.
inline void score_block_pairs(const uint16_t* const* rows, const uint32_t* q, int64_t pairs,
                              float factor, float* scores, Floats top[2], int used) {
    Floats a[BLOCK][2] = {};
    const uint16_t* r[BLOCK];
    for (int i = 0; i < BLOCK; i++) r[i] = rows[i];
    for (int64_t d = 0; d < pairs; d++) {
        const Words q0 = load_words(q + d * LANES), q1 = load_words(q + d * LANES + WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK; i++) {
            const uint32_t k = pair_at(r[i] + 2 * d);
            a[i][0] = dot_pairs(a[i][0], q0, k);
            a[i][1] = dot_pairs(a[i][1], q1, k);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK; i++) {
        a[i][0] *= factor;
        a[i][1] *= factor;
        store(scores + i * LANES, a[i][0]);
        store(scores + i * LANES + WIDTH, a[i][1]);
        if (i < used) {
            top[0] = larger(a[i][0], top[0]);
            top[1] = larger(a[i][1], top[1]);
        }
    }
}

// As `value_block`; v: (keys / 2, D) and p: (keys / 2, LANES), pairs along the keys.
template <int ROWS>
inline void value_block_pairs(const uint32_t* v, int64_t pairs, const uint32_t* p, int64_t d0,
                              int64_t head_dim, const Floats fade[2], float* o) {
    Floats a[ROWS][2] = {};  // summed apart from o: short sums round less
    for (int64_t pair = 0; pair < pairs; pair++) {
        const uint32_t* row = v + pair * head_dim + d0;
        const Words p0 = load_words(p + pair * LANES), p1 = load_words(p + pair * LANES + WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            a[i][0] = dot_pairs(a[i][0], p0, row[i]);
            a[i][1] = dot_pairs(a[i][1], p1, row[i]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
        float* at = o + (d0 + i) * LANES;
        store(at, load(at) * fade[0] + a[i][0]);
        store(at + WIDTH, load(at + WIDTH) * fade[1] + a[i][1]);
    }
}

inline Words high_half(Floats x) { return (Words)x + 0x8000u; }  // x >= 0: rounds to nearest
#endif

}  // namespace veda
