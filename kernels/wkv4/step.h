/* wkv4 for one token of one channel; the sequence kernel and decode plans share it, so that they give the same
 * bits. Of each pair of exponentials one argument is the maximum, hence zero: one exponential per pair.
 */
#ifndef SPIKELM_WKV4_STEP_H
#define SPIKELM_WKV4_STEP_H

#include "../real.h"

/* weights of the two terms: exp(a - max(a, b)) and exp(b - max(a, b)) */
INLINE void weigh(real a, real b, real *weight_a, real *weight_b) {
    real difference = a - b;
    real small = exp_nonpositive(difference < 0 ? difference : -difference);
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

#endif
