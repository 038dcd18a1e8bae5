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

#ifdef SPIKELM_DOUBLE

/* A fused multiply-add where the processor has one; never the slow library function. */
INLINE double multiply_add(double a, double b, double c) {
#ifdef __FP_FAST_FMA
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

INLINE double exp_nonpositive(double x) { return exp(x); }

#else

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

#endif

#endif
