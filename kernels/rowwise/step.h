/* Elementwise functions and norms of one row; used by the rowwise op and by decode plans, with the same bits.
 *
 * An element's bits depend on nothing but the element (norms: its row).
 */
#ifndef SPIKELM_ROWWISE_STEP_H
#define SPIKELM_ROWWISE_STEP_H

#include "../vectors.h"

/* exp(x) for any x as exp_nonpositive has it: 0 below -87 (no subnormals), infinity above 88.72, NaN for NaN. */
INLINE float exponential(float x) {
    const float round_to_integer = 12582912.0f;
    float z = x < -87.0f ? -87.0f : x;
    z = z > 88.72f ? 88.72f : z;
    const float shifted = multiply_add(z, 1.44269504f, round_to_integer);
    const float n = shifted - round_to_integer;
    float r = multiply_add(n, -0.693359375f, z);
    r = multiply_add(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = multiply_add(p, r, 1.3981999507e-3f);
    p = multiply_add(p, r, 8.3334519073e-3f);
    p = multiply_add(p, r, 4.1665795894e-2f);
    p = multiply_add(p, r, 1.6666665459e-1f);
    p = multiply_add(p, r, 5.0000001201e-1f);
    p = multiply_add(p, r * r, r) + 1.0f;
    /* 2^128 is no float: powers above 1 are taken in two factors. */
    const int up = n > 0;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = ((bits - (uint32_t)up) << 23) + 0x3f800000u;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    const float y = p * scale * (up ? 2.0f : 1.0f);
    const float cut = x < -87.0f ? 0.0f : y;
    return x > 88.72f ? INFINITY : cut;
}

/* exp(-|x|) */
INLINE float exp_magnitude(float x) { return exp_nonpositive(-fabsf(x)); }

INLINE float sigmoid_of(float x) {
    const float e = exp_magnitude(x);
    return (x < 0 ? e : 1.0f) / (1.0f + e);
}

INLINE float silu_of(float x) { return x * sigmoid_of(x); }

/* log(1 + e) for 0 <= e <= 1, as 2 artanh(e / (2 + e)). */
INLINE float log1p_unit(float e) {
    const float s = e / (2.0f + e);
    const float z = s * s;
    float p = 1.0f / 15.0f;
    p = multiply_add(p, z, 1.0f / 13.0f);
    p = multiply_add(p, z, 1.0f / 11.0f);
    p = multiply_add(p, z, 1.0f / 9.0f);
    p = multiply_add(p, z, 1.0f / 7.0f);
    p = multiply_add(p, z, 1.0f / 5.0f);
    p = multiply_add(p, z, 1.0f / 3.0f);
    return 2.0f * multiply_add(p * z, s, s);
}

INLINE float logsigmoid_of(float x) { return (x < 0 ? x : 0.0f) - log1p_unit(exp_magnitude(x)); }

INLINE float softplus_of(float x) { return (x > 0 ? x : 0.0f) + log1p_unit(exp_magnitude(x)); }

/* start + weight (end - start), computed from the nearer end as torch.lerp does. */
INLINE float lerp_of(float start, float end, float weight) {
    const int near = fabsf(weight) < 0.5f;
    return multiply_add(near ? weight : weight - 1.0f, end - start, near ? start : end);
}

INLINE void lerp_row(int64_t count, const float *start, const float *end, const float *weight, float *y) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        y[i] = lerp_of(start[i], end[i], weight[i]);
    }
}

enum unary { UNARY_EXP, UNARY_SIGMOID, UNARY_SILU, UNARY_LOGSIGMOID, UNARY_SOFTPLUS };

#define UNARY_LOOP(function)                                                                                   \
    _Pragma("omp simd") for (int64_t i = 0; i < count; i++) { y[i] = function(x[i]); }                         \
    break

/* y may be x. */
static inline void unary_row(int64_t function, int64_t count, const float *x, float *y) {
    switch (function) {
    case UNARY_EXP: UNARY_LOOP(exponential);
    case UNARY_SIGMOID: UNARY_LOOP(sigmoid_of);
    case UNARY_SILU: UNARY_LOOP(silu_of);
    case UNARY_LOGSIGMOID: UNARY_LOOP(logsigmoid_of);
    default: UNARY_LOOP(softplus_of);
    }
}

/* exp(x - largest) / sum of these; y may be x. */
static inline void softmax_row(int64_t count, const float *x, float *y) {
    float largest = x[0];
    for (int64_t i = 1; i < count; i++) {
        largest = x[i] > largest ? x[i] : largest;
    }
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        y[i] = exp_nonpositive(x[i] - largest);
    }
    const float total = row_sum(count, y);
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        y[i] /= total;
    }
}

/* (x - mean) / sqrt(variance + epsilon) * weight + bias; weight and bias may be null, y may be x. */
static inline void layernorm_row(int64_t count, float epsilon, const float *x, const float *weight,
                                 const float *bias, float *y) {
    const float mean = row_sum(count, x) / (float)count;
    const float variance = row_squares(count, x, mean) / (float)count;
    const float scale = 1.0f / sqrtf(variance + epsilon);
    if (weight && bias) {
#pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
        }
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        const float scaled = (x[i] - mean) * scale;
        const float weighted = weight ? scaled * weight[i] : scaled;
        y[i] = bias ? weighted + bias[i] : weighted;
    }
}

/* x / sqrt(mean square + epsilon) * weight; weight may be null, y may be x. */
static inline void rmsnorm_row(int64_t count, float epsilon, const float *x, const float *weight, float *y) {
    const float scale = 1.0f / sqrtf(row_squares(count, x, 0.0f) / (float)count + epsilon);
    if (weight) {
#pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            y[i] = x[i] * scale * weight[i];
        }
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        y[i] = x[i] * scale;
    }
}

#endif
