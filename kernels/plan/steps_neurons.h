/* Steps of neurons. Spikes are float32, or int8 (one byte each) for products with int8 weights. */
#include "../encode/step.h"
#include "../lif/step.h"
#include "machine.h"

enum neuron_flag { INT8_SPIKES = 1, SOFT_RESET = 2, DECAY_INPUT = 4 };

INLINE void put_spike(int integer, void *spikes, int64_t i, float spike) {
    if (integer) {
        ((int8_t *)spikes)[i] = (int8_t)spike;
    } else {
        ((float *)spikes)[i] = spike;
    }
}

/* x, counts, threshold, n; f: k, dead zone, cap; flags: INT8_SPIKES */
STEP(encode) {
    const int64_t n = r->a[3];
    EACH_ROW {
        const float *x = reg(m, row, r->a[0]);
        float *threshold = reg(m, row, r->a[2]), quiet;
        void *counts = reg(m, row, r->a[1]);
        thresholds_of(n, r->f[0], r->f[1], x, threshold, &quiet);
        if (r->flags & INT8_SPIKES) {
            encode_row_int8(n, *threshold, quiet, (float)r->f[2], x, counts);
        } else {
            encode_row(n, *threshold, quiet, (float)r->f[2], x, counts);
        }
    }
}

INLINE void lif_row(const int decay_input, const int soft_reset, const int integer, int64_t n,
                    const struct record *r, const float *x, float *v, void *spikes) {
    const float *rate = r->p[0], *gain = r->p[1];
    const float threshold = (float)r->f[0], v_reset = (float)r->f[1];
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const float drive = gain ? x[i] * gain[i] : x[i];
        put_spike(integer, spikes, i, lif_token(decay_input, soft_reset, drive, rate[i], threshold, v_reset, v + i));
    }
}

/* x, field, spikes, n; f: threshold, v_reset; rate [n], gain [n] or null; flags */
STEP(lif) {
    const int64_t n = r->a[3];
    EACH_ROW {
        const float *x = reg(m, row, r->a[0]);
        float *v = field(m, row, r->a[1]);
        void *spikes = reg(m, row, r->a[2]);
        switch (r->flags & (INT8_SPIKES | SOFT_RESET | DECAY_INPUT)) {
#define CASE(flags)                                                                                            \
    case flags:                                                                                                \
        lif_row(((flags) & DECAY_INPUT) != 0, ((flags) & SOFT_RESET) != 0, ((flags) & INT8_SPIKES) != 0, n, r,  \
                x, v, spikes);                                                                                 \
        break
            CASE(0);
            CASE(INT8_SPIKES);
            CASE(SOFT_RESET);
            CASE(SOFT_RESET | INT8_SPIKES);
            CASE(DECAY_INPUT);
            CASE(DECAY_INPUT | INT8_SPIKES);
            CASE(DECAY_INPUT | SOFT_RESET);
            CASE(DECAY_INPUT | SOFT_RESET | INT8_SPIKES);
#undef CASE
        }
    }
}

/* x, spikes, n; f: threshold; gain [n] or null; flags: INT8_SPIKES */
STEP(heaviside) {
    const float *gain = r->p[0];
    const float threshold = (float)r->f[0];
    const int integer = r->flags & INT8_SPIKES;
    EACH_ROW {
        const float *x = reg(m, row, r->a[0]);
        void *spikes = reg(m, row, r->a[1]);
        for (int64_t i = 0; i < r->a[2]; i++) {
            const float drive = gain ? x[i] * gain[i] : x[i];
            put_spike(integer, spikes, i, drive - threshold >= 0 ? 1.0f : 0.0f);
        }
    }
}

/* x, scale (one float), y, n: y = x * scale; y may be x */
STEP(scale_row) {
    EACH_ROW {
        const float *x = reg(m, row, r->a[0]), scale = *reg(m, row, r->a[1]);
        float *y = reg(m, row, r->a[2]);
#pragma omp simd
        for (int64_t i = 0; i < r->a[3]; i++) {
            y[i] = x[i] * scale;
        }
    }
}
