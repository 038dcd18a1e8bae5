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

#ifdef SPIKELM_DOUBLE

#define MAGNITUDE fabs

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

#define MAGNITUDE fabsf

/* A fused multiply-add where the processor has one; never the slow library function. */
INLINE float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

/* exp(x) for x <= 0 within about one unit in the last place; 0 below -87.7; NaN stays NaN.
 * x = n log 2 + r with |r| <= log(2)/2; the sum with 1.5 * 2^23 rounds to the integer n and leaves n in the
 * low bits of its own representation. At -88 n is -127, whose power of two comes out as 0. Minimax polynomial
 * of degree 6 (Cephes expf), in pairs: a chain of multiply-adds would wait for each of them.
 */
INLINE float exp_nonpositive(float x) {
    const float round_to_integer = 12582912.0f;
    const float z = -88.0f > x ? -88.0f : x;
    const float shifted = multiply_add(z, 1.44269504f, round_to_integer);
    const float n = shifted - round_to_integer;
    const float r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, z));
    const float r2 = r * r;
    const float high = multiply_add(1.9875691500e-4f, r, 1.3981999507e-3f);
    const float middle = multiply_add(8.3334519073e-3f, r, 4.1665795894e-2f);
    const float low = multiply_add(1.6666665459e-1f, r, 5.0000001201e-1f);
    const float q = multiply_add(high, r2 * r2, multiply_add(middle, r2, low));
    const float p = multiply_add(q, r2, r) + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

/* exp_nonpositive of two numbers at once, the same bits: a processor looks ahead over about sixty operations, so
 * that two chains of dependent ones run beside each other only where they are written beside each other. */
INLINE void exp_nonpositive_pair(float xa, float xb, float *ya, float *yb) {
    const float round_to_integer = 12582912.0f;
    const float za = -88.0f > xa ? -88.0f : xa;
    const float zb = -88.0f > xb ? -88.0f : xb;
    const float shifted_a = multiply_add(za, 1.44269504f, round_to_integer);
    const float shifted_b = multiply_add(zb, 1.44269504f, round_to_integer);
    const float na = shifted_a - round_to_integer;
    const float nb = shifted_b - round_to_integer;
    const float ta = multiply_add(na, -0.693359375f, za);
    const float tb = multiply_add(nb, -0.693359375f, zb);
    const float ra = multiply_add(na, 2.12194440e-4f, ta);
    const float rb = multiply_add(nb, 2.12194440e-4f, tb);
    const float r2a = ra * ra;
    const float r2b = rb * rb;
    const float high_a = multiply_add(1.9875691500e-4f, ra, 1.3981999507e-3f);
    const float high_b = multiply_add(1.9875691500e-4f, rb, 1.3981999507e-3f);
    const float middle_a = multiply_add(8.3334519073e-3f, ra, 4.1665795894e-2f);
    const float middle_b = multiply_add(8.3334519073e-3f, rb, 4.1665795894e-2f);
    const float low_a = multiply_add(1.6666665459e-1f, ra, 5.0000001201e-1f);
    const float low_b = multiply_add(1.6666665459e-1f, rb, 5.0000001201e-1f);
    const float r4a = r2a * r2a;
    const float r4b = r2b * r2b;
    const float ma = multiply_add(middle_a, r2a, low_a);
    const float mb = multiply_add(middle_b, r2b, low_b);
    const float qa = multiply_add(high_a, r4a, ma);
    const float qb = multiply_add(high_b, r4b, mb);
    const float sa = multiply_add(qa, r2a, ra);
    const float sb = multiply_add(qb, r2b, rb);
    const float pa = sa + 1.0f;
    const float pb = sb + 1.0f;
    uint32_t bits_a, bits_b;
    memcpy(&bits_a, &shifted_a, sizeof bits_a);
    memcpy(&bits_b, &shifted_b, sizeof bits_b);
    bits_a = (bits_a << 23) + 0x3f800000u;
    bits_b = (bits_b << 23) + 0x3f800000u;
    float scale_a, scale_b;
    memcpy(&scale_a, &bits_a, sizeof scale_a);
    memcpy(&scale_b, &bits_b, sizeof scale_b);
    *ya = pa * scale_a;
    *yb = pb * scale_b;
}

#endif

#endif
