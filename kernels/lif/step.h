/* One token of leaky integrate-and-fire neurons (equations in reference.py); used by sequences and by decode
 * plans, with the same bits. A channel's bits depend on nothing but the channel.
 *
 * The charge is written operation by operation as in reference.py, so float spikes are bit-equal to it.
 */
#ifndef SPIKELM_LIF_STEP_H
#define SPIKELM_LIF_STEP_H

#include "../real.h"

enum surrogate { ATAN, SIGMOID, TRIANGLE, STRAIGHT_THROUGH };

struct neuron {
    double threshold, v_reset, alpha;
    int32_t soft_reset, decay_input, detach_reset, surrogate;
};

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

/* Membrane after the charge h: as it is, or reset by a spike. */
INLINE real after_charge(int soft_reset, real h, real threshold, real v_reset) {
    const real fired = soft_reset ? h - threshold : v_reset;
    return h >= threshold ? fired : h;
}

/* Charge, fire, reset: 1 or 0. */
INLINE real lif_token(int decay_input, int soft_reset, real x, real rate, real threshold, real v_reset,
                      real *v) {
    real drive;
    const real h = charge(decay_input, x, *v, rate, v_reset, &drive);
    *v = after_charge(soft_reset, h, threshold, v_reset);
    return h >= threshold ? (real)1 : (real)0;
}

/* The same for count channels; the flags are literals. */
INLINE void lif_channels(int64_t count, int decay_input, int soft_reset, real threshold, real v_reset,
                         const real *restrict x, const real *restrict rate, real *restrict v,
                         real *restrict spikes) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        spikes[i] = lif_token(decay_input, soft_reset, x[i], rate[i], threshold, v_reset, v + i);
    }
}

/* Calls f with literal flags, so that each variant is a branch-free loop. */
#define DISPATCH_VARIANT(f, count, neuron, ...)               \
    do {                                                      \
        if ((neuron)->decay_input && !(neuron)->soft_reset) { \
            f(count, 1, 0, __VA_ARGS__);                      \
        } else if ((neuron)->decay_input) {                   \
            f(count, 1, 1, __VA_ARGS__);                      \
        } else if (!(neuron)->soft_reset) {                   \
            f(count, 0, 0, __VA_ARGS__);                      \
        } else {                                              \
            f(count, 0, 1, __VA_ARGS__);                      \
        }                                                     \
    } while (0)

#endif
