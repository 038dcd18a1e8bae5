/* One token of the wkv recurrence (equations in reference.py); used by sequences and by decode plans, with the
 * same bits. A channel's bits depend on nothing but the channel.
 *
 * Of each pair of exponentials one argument is the maximum, hence zero: one exponential per pair.
 */
#ifndef SPIKELM_WKV4_STEP_H
#define SPIKELM_WKV4_STEP_H

#include "../real.h"

INLINE real larger(real a, real b) { return a > b ? a : b; }

/* What a token weighs beside the past, in the output and in the new state: exp(a - max(a, b)) and
 * exp(b - max(a, b)) for two pairs a, b. */
struct weights {
    real out_past, out_now, new_past, new_now;
};

INLINE struct weights weigh(real max, real decayed, real current, real k) {
    const real out = max - current, new = decayed - k;
    real out_small, new_small;
    exp_nonpositive_pair(-REAL_ABS(out), -REAL_ABS(new), &out_small, &new_small);
    const int out_falls = out < 0, new_falls = new < 0; /* whether the past weighs less */
    struct weights w;
    w.out_past = out_falls ? out_small : (real)1;
    w.out_now = out_falls ? (real)1 : out_small;
    w.new_past = new_falls ? new_small : (real)1;
    w.new_now = new_falls ? (real)1 : new_small;
    return w;
}

/* The output of a token; (num, den, max) go on by it. */
INLINE real wkv4_token(real decay, real bonus, real k, real v, real *num, real *den, real *max) {
    const real decayed = *max + decay;
    const struct weights w = weigh(*max, decayed, bonus + k, k);
    const real y = (w.out_past * *num + w.out_now * v) / (w.out_past * *den + w.out_now);
    *num = w.new_past * *num + w.new_now * v;
    *den = w.new_past * *den + w.new_now;
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
