/* Leaky integrate-and-fire of one channel for one token; the sequence kernel and decode plans share it, so that
 * they give the same bits. Written operation by operation as in reference.py.
 */
#ifndef SPIKELM_LIF_STEP_H
#define SPIKELM_LIF_STEP_H

#include "../real.h"

/* Charged membrane h; *drive receives d h / d rate. */
INLINE real charge(int decay_input, real x, real v, real rate, real v_reset, real *drive) {
    const real above = v - v_reset;
    if (decay_input) {
        *drive = x - above;
        return v + *drive * rate;
    }
    *drive = -above;
    return v - above * rate + x;
}

/* Charge, fire, reset: 1 or 0. */
INLINE real lif_token(int decay_input, int soft_reset, real x, real rate, real threshold, real v_reset, real *v) {
    real drive;
    const real h = charge(decay_input, x, *v, rate, v_reset, &drive);
    const real after = soft_reset ? h - threshold : v_reset;
    *v = h >= threshold ? after : h;
    return h >= threshold ? (real)1 : (real)0;
}

#endif
