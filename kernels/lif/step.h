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

/* One token of count channels: spikes of 0 and 1, membranes v before -> after. Flags are literals. */
INLINE void lif_row(int64_t count, int decay_input, int soft_reset, real threshold, real v_reset,
                    const real *restrict x, const real *restrict rate, real *restrict v,
                    real *restrict spikes) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        real drive;
        const real h = charge(decay_input, x[i], v[i], rate[i], v_reset, &drive);
        spikes[i] = h >= threshold ? (real)1 : (real)0;
        v[i] = after_charge(soft_reset, h, threshold, v_reset);
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
