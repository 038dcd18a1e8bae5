/* What a meter wants to know of spikes (spikelm/meter.py), counted only while somebody asks. */
#include "machine.h"

/* Columns of the numbers of an observation, as in observation.py. */
enum observed { OBSERVED_TOKENS, OBSERVED_NONZERO, OBSERVED_AT_CAP, OBSERVED_CLIPPED };

#define OBSERVED_BYTES 1 /* the flag INT8_SPIKES of neurons */

static void observe_counts(int64_t n, const int8_t *spikes, int32_t cap, int64_t *numbers, double *magnitude,
                           uint8_t *restrict fired) {
    int64_t nonzero = 0, sum = 0, at_cap = 0;
#pragma omp simd reduction(+ : nonzero, sum, at_cap)
    for (int64_t i = 0; i < n; i++) {
        const int32_t size = spikes[i] < 0 ? -spikes[i] : spikes[i];
        nonzero += size != 0;
        sum += size;
        at_cap += size >= cap;
        fired[i] |= size != 0;
    }
    numbers[OBSERVED_NONZERO] += nonzero;
    numbers[OBSERVED_AT_CAP] += cap ? at_cap : 0;
    *magnitude += (double)sum;
}

static void observe_floats(int64_t n, const float *spikes, float cap, int64_t *numbers, double *magnitude,
                           uint8_t *restrict fired) {
    int64_t nonzero = 0, at_cap = 0;
    double sum = 0;
#pragma omp simd reduction(+ : nonzero, sum, at_cap)
    for (int64_t i = 0; i < n; i++) {
        const float size = fabsf(spikes[i]);
        nonzero += size != 0;
        sum += size;
        at_cap += size >= cap;
        fired[i] |= size != 0;
    }
    numbers[OBSERVED_NONZERO] += nonzero;
    numbers[OBSERVED_AT_CAP] += cap != 0 ? at_cap : 0;
    *magnitude += sum;
}

/* spikes, n, x and threshold (one float) of counts that a cap may have made smaller, or -1 twice; numbers (int64),
 * magnitude (double), fired (n bytes); f: cap, 0 for none; flags: OBSERVED_BYTES where spikes are bytes */
STEP(observe) {
    if (!m->plan->observing) {
        return;
    }
    const int64_t n = r->a[1];
    const float cap = (float)r->f[0];
    int64_t *numbers = r->p[0], clipped = 0;
    numbers[OBSERVED_TOKENS] += m->rows;
    EACH_ROW {
        const void *spikes = reg(m, row, r->a[0]);
        const int8_t *counts = spikes;
        const float *values = spikes;
        if (r->flags & OBSERVED_BYTES) {
            observe_counts(n, counts, (int32_t)cap, numbers, r->p[1], r->p[2]);
        } else {
            observe_floats(n, values, cap, numbers, r->p[1], r->p[2]);
        }
        if (r->a[2] < 0) {
            continue;
        }
        const float *x = reg(m, row, r->a[2]), threshold = *reg(m, row, r->a[3]);
        for (int64_t i = 0; i < n; i++) {
            const int some = r->flags & OBSERVED_BYTES ? counts[i] != 0 : values[i] != 0;
            clipped += some && fabsf(rintf(x[i] / threshold)) > cap;
        }
    }
    numbers[OBSERVED_CLIPPED] += clipped;
}
