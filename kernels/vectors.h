/* Vectors of eight floats by the compiler's own extension: AVX2 holds one in a register, other processors split
 * it. Every product and sum has one fixed order, so that a result does not depend on how many rows or outputs
 * are computed beside it.
 */
#ifndef SPIKELM_VECTORS_H
#define SPIKELM_VECTORS_H

#include "real.h"

#if defined(__FMA__) && defined(__AVX__)
#include <immintrin.h>
#endif

typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));

INLINE v8 load8(const float *from) {
    v8 v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void store8(float *to, v8 v) { memcpy(to, &v, sizeof v); }

/* The first count (below eight) floats, zeros behind them. */
INLINE v8 load_part(const float *from, int64_t count) {
    float padded[8] = {0};
    memcpy(padded, from, (size_t)count * sizeof *from);
    return load8(padded);
}

/* a * b + c, fused where the processor can. */
INLINE v8 fma8(v8 a, v8 b, v8 c) {
#if defined(__FMA__) && defined(__AVX__)
    return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE v4 halves(v8 v) {
    v4 low, high;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, (const char *)&v + sizeof low, sizeof high);
    return low + high;
}

/* ((v0 + v4) + (v2 + v6)) + ((v1 + v5) + (v3 + v7)) */
INLINE float sum8(v8 v) {
    const v4 a = halves(v);
    return (a[0] + a[2]) + (a[1] + a[3]);
}

/* Sum of count floats: 32 lanes, then the lanes. */
INLINE float row_sum(int64_t count, const float *x) {
    v8 lane[4] = {{0}};
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        for (int j = 0; j < 4; j++) {
            lane[j] += load8(x + i + 8 * j);
        }
    }
    for (int j = 0; i < count; i += 8, j++) {
        lane[j] += count - i < 8 ? load_part(x + i, count - i) : load8(x + i);
    }
    return sum8((lane[0] + lane[2]) + (lane[1] + lane[3]));
}

/* Sum of (x - shift)^2 in the same order. */
INLINE float row_squares(int64_t count, const float *x, float shift) {
    v8 lane[4] = {{0}};
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        for (int j = 0; j < 4; j++) {
            const v8 d = load8(x + i + 8 * j) - shift;
            lane[j] = fma8(d, d, lane[j]);
        }
    }
    for (int j = 0; i < count; i += 8, j++) {
        v8 d;
        if (count - i < 8) {
            float padded[8] = {0};
            for (int64_t l = 0; l < count - i; l++) {
                padded[l] = x[i + l] - shift;
            }
            d = load8(padded);
        } else {
            d = load8(x + i) - shift;
        }
        lane[j] = fma8(d, d, lane[j]);
    }
    return sum8((lane[0] + lane[2]) + (lane[1] + lane[3]));
}

#endif
