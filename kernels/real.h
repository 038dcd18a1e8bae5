/* What every kernel shares: the working precision, an exponential that vectorises, a sum in a fixed order.
 *
 * A kernel is compiled once per precision: plainly for float, with -DSPIKELM_DOUBLE for double. The
 * functions here use no intrinsics, so that any C compiler may vectorise the loops that call them. A lane of
 * a vector and a scalar remainder give the same bits: nothing is contracted or reassociated.
 */
#ifndef SPIKELM_REAL_H
#define SPIKELM_REAL_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef SPIKELM_DOUBLE
typedef double real;
#else
typedef float real;
#endif

/* Always copied into the caller: loops vectorise across the call, and flags given as literals leave no branch. */
#define INLINE static inline __attribute__((always_inline))

/* Empty state of a running maximum: finite, so that differences of two of them are zero and not NaN. */
#define EMPTY_MAX ((real)-1e38)

/* Channels of a task: all of them up to the widest, or fewer where rows alone do not occupy the threads. Always
 * a whole number of 64-byte lines, but for the last task. */
static inline int64_t task_width(int64_t rows, int64_t channels, int64_t widest, int threads) {
    const int64_t shares = rows > 0 && threads > rows ? (threads + rows - 1) / rows : 1;
    const int64_t lines = ((channels + shares - 1) / shares + 15) / 16;
    return lines * 16 < widest ? (lines > 0 ? lines * 16 : 16) : widest;
}

/* total[c] = sum of per_row[row][c] in row order: the same bits for any number of threads. */
static inline void sum_rows(int64_t rows, int64_t channels, const real *restrict per_row,
                            real *restrict total) {
    for (int64_t c = 0; c < channels; c++) {
        total[c] = 0;
    }
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t c = 0; c < channels; c++) {
            total[c] += per_row[row * channels + c];
        }
    }
}

/* Whether a log decay is none: NaN or above zero. Minus infinity is a full reset. */
INLINE int any_above_zero(int64_t count, const real *restrict decay) {
    int wrong = 0;
#pragma omp simd reduction(| : wrong)
    for (int64_t i = 0; i < count; i++) {
        wrong |= decay[i] <= 0 ? 0 : 1;
    }
    return wrong;
}

/* Whether a number is NaN or infinite: only then is its difference from itself not zero. */
INLINE int any_not_finite(int64_t count, const real *restrict x) {
    int wrong = 0;
#pragma omp simd reduction(| : wrong)
    for (int64_t i = 0; i < count; i++) {
        wrong |= x[i] - x[i] == 0 ? 0 : 1;
    }
    return wrong;
}

/* Have a row in the cache soon. */
INLINE void fetch_row(int64_t count, const real *row) {
    for (int64_t i = 0; i < count; i += (int64_t)(64 / sizeof(real))) {
        __builtin_prefetch(row + i);
    }
}

#ifdef SPIKELM_DOUBLE

#define REAL_ABS fabs

/* A fused multiply-add where the processor has one; never the slow library function. */
INLINE double multiply_add(double a, double b, double c) {
#ifdef __FP_FAST_FMA
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

INLINE double exp_nonpositive(double x) { return exp(x); }

INLINE void exp_nonpositive_pair(double xa, double xb, double *ya, double *yb) {
    *ya = exp(xa);
    *yb = exp(xb);
}

#else

#define REAL_ABS fabsf

/* A fused multiply-add where the processor has one; never the slow library function. */
INLINE float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

/* exp(x) for x <= 0 within about one unit in the last place; 0 below -87 (no subnormals); NaN stays NaN.
 * x = n log 2 + r with |r| <= log(2)/2; the sum with 1.5 * 2^23 rounds to the integer n and leaves n in the
 * low bits of its own representation. Minimax polynomial of degree 6 (Cephes expf). */
INLINE float exp_nonpositive(float x) {
    const float round_to_integer = 12582912.0f;
    float z = x < -87.0f ? -87.0f : x;
    float shifted = multiply_add(z, 1.44269504f, round_to_integer);
    float n = shifted - round_to_integer;
    float r = multiply_add(n, -0.693359375f, z);
    r = multiply_add(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = multiply_add(p, r, 1.3981999507e-3f);
    p = multiply_add(p, r, 8.3334519073e-3f);
    p = multiply_add(p, r, 4.1665795894e-2f);
    p = multiply_add(p, r, 1.6666665459e-1f);
    p = multiply_add(p, r, 5.0000001201e-1f);
    p = multiply_add(p, r * r, r) + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    float y = p * scale;
    return x < -87.0f ? 0.0f : y;
}

/* exp_nonpositive of two numbers at once, the same bits: a processor looks ahead over about sixty operations, so
 * that two chains of dependent ones run beside each other only where they are written beside each other. */
INLINE void exp_nonpositive_pair(float xa, float xb, float *ya, float *yb) {
    const float round_to_integer = 12582912.0f;
    const float za = -87.0f > xa ? -87.0f : xa;
    const float zb = -87.0f > xb ? -87.0f : xb;
    const float shifted_a = multiply_add(za, 1.44269504f, round_to_integer);
    const float shifted_b = multiply_add(zb, 1.44269504f, round_to_integer);
    const float na = shifted_a - round_to_integer;
    const float nb = shifted_b - round_to_integer;
    float ra = multiply_add(na, -0.693359375f, za);
    float rb = multiply_add(nb, -0.693359375f, zb);
    ra = multiply_add(na, 2.12194440e-4f, ra);
    rb = multiply_add(nb, 2.12194440e-4f, rb);
    float pa = multiply_add(1.9875691500e-4f, ra, 1.3981999507e-3f);
    float pb = multiply_add(1.9875691500e-4f, rb, 1.3981999507e-3f);
    pa = multiply_add(pa, ra, 8.3334519073e-3f);
    pb = multiply_add(pb, rb, 8.3334519073e-3f);
    pa = multiply_add(pa, ra, 4.1665795894e-2f);
    pb = multiply_add(pb, rb, 4.1665795894e-2f);
    pa = multiply_add(pa, ra, 1.6666665459e-1f);
    pb = multiply_add(pb, rb, 1.6666665459e-1f);
    pa = multiply_add(pa, ra, 5.0000001201e-1f);
    pb = multiply_add(pb, rb, 5.0000001201e-1f);
    pa = multiply_add(pa, ra * ra, ra) + 1.0f;
    pb = multiply_add(pb, rb * rb, rb) + 1.0f;
    uint32_t bits_a, bits_b;
    memcpy(&bits_a, &shifted_a, sizeof bits_a);
    memcpy(&bits_b, &shifted_b, sizeof bits_b);
    bits_a = (bits_a << 23) + 0x3f800000u;
    bits_b = (bits_b << 23) + 0x3f800000u;
    float scale_a, scale_b;
    memcpy(&scale_a, &bits_a, sizeof scale_a);
    memcpy(&scale_b, &bits_b, sizeof scale_b);
    const float full_a = pa * scale_a, full_b = pb * scale_b;
    *ya = xa < -87.0f ? 0.0f : full_a;
    *yb = xb < -87.0f ? 0.0f : full_b;
}

#endif

#endif
