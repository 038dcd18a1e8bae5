/* One token of the wkv recurrence (equations in reference.py); used by sequences and by decode plans, with the
 * same bits. A channel's bits depend on nothing but the channel.
 *
 * Of each pair of exponentials one argument is the maximum, hence zero: one exponential per pair.
 */
#ifndef SPIKELM_WKV4_STEP_H
#define SPIKELM_WKV4_STEP_H

#include "../real.h"

/* weights of the two terms: exp(a - max(a, b)) and exp(b - max(a, b)) */
INLINE void weigh(real a, real b, real *weight_a, real *weight_b) {
    const real difference = a - b;
    const real small = exp_nonpositive(difference < 0 ? difference : -difference);
    *weight_a = difference >= 0 ? (real)1 : small;
    *weight_b = difference >= 0 ? small : (real)1;
}

INLINE real larger(real a, real b) { return a > b ? a : b; }

/* The output of a token; (num, den, max) go on by it. */
INLINE real wkv4_token(real decay, real bonus, real k, real v, real *num, real *den, real *max) {
    real past, now;
    weigh(*max, bonus + k, &past, &now);
    const real y = (past * *num + now * v) / (past * *den + now);
    const real decayed = *max + decay;
    weigh(decayed, k, &past, &now);
    *num = past * *num + now * v;
    *den = past * *den + now;
    *max = larger(decayed, k);
    return y;
}

/* The same for count channels. */
INLINE void wkv4_channels(int64_t count, const real *restrict decay, const real *restrict bonus,
                          const real *restrict k, const real *restrict v, real *restrict num,
                          real *restrict den, real *restrict max, real *restrict y) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        y[i] = wkv4_token(decay[i], bonus[i], k[i], v[i], num + i, den + i, max + i);
    }
}

#endif
