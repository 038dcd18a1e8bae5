/* Adaptive spike encoding of one row; the op and decode plans share it, so that they give the same bits. */
#ifndef SPIKELM_ENCODE_STEP_H
#define SPIKELM_ENCODE_STEP_H

#include "../real.h"

#define ENCODE_LANES 32
#define ENCODE_BLOCK 1024
#define THRESHOLD_FLOOR 1e-8

#ifdef SPIKELM_DOUBLE
#define MAGNITUDE fabs
#define ROUND_TO_EVEN rint
#else
#define MAGNITUDE fabsf
#define ROUND_TO_EVEN rintf
#endif

/* Mean of |x|. A block is summed in lanes and the lanes pairwise, whatever the width of a vector. */
static real mean_magnitude(int64_t width, const real *restrict x) {
    real total = 0;
    for (int64_t first = 0; first < width; first += ENCODE_BLOCK) {
        const int64_t last = first + ENCODE_BLOCK < width ? first + ENCODE_BLOCK : width;
        real lane[ENCODE_LANES] = {0};
        int64_t i = first;
        for (; i + ENCODE_LANES <= last; i += ENCODE_LANES) {
#pragma omp simd
            for (int j = 0; j < ENCODE_LANES; j++) {
                lane[j] += MAGNITUDE(x[i + j]);
            }
        }
        for (int j = 0; i + j < last; j++) {
            lane[j] += MAGNITUDE(x[i + j]);
        }
        for (int half = ENCODE_LANES / 2; half > 0; half /= 2) {
            for (int j = 0; j < half; j++) {
                lane[j] += lane[j + half];
            }
        }
        total += lane[0];
    }
    return total / (real)width;
}

/* Count before the cap; zero where |x| < quiet. */
INLINE real uncapped_count(real x, real threshold, real quiet) {
    const real count = ROUND_TO_EVEN(x / threshold);
    return MAGNITUDE(x) < quiet ? (real)0 : count;
}

/* Threshold of a row, and the edge of its dead zone. */
INLINE void thresholds_of(int64_t width, double k, double dead_zone, const real *x, real *threshold, real *quiet) {
    const real mean = mean_magnitude(width, x), wanted = mean / (real)k;
    *threshold = wanted < (real)THRESHOLD_FLOOR ? (real)THRESHOLD_FLOOR : wanted;
    *quiet = (real)dead_zone * mean;
}

/* Counts of one row; returns whether the cap cut any. */
static int32_t encode_row(int64_t width, real threshold, real quiet, real cap, const real *restrict x,
                          real *restrict counts) {
    int32_t clipped = 0;
#pragma omp simd reduction(| : clipped)
    for (int64_t i = 0; i < width; i++) {
        const real count = uncapped_count(x[i], threshold, quiet);
        const real below = count > cap ? cap : count;
        counts[i] = below < -cap ? -cap : below;
        clipped |= MAGNITUDE(count) > cap ? 1 : 0;
    }
    return clipped;
}

/* The same counts as int8, for a cap of at most 127. A NaN becomes 0: its row's threshold is NaN. */
static void encode_row_int8(int64_t width, real threshold, real quiet, real cap, const real *restrict x,
                            int8_t *restrict counts) {
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        const real count = uncapped_count(x[i], threshold, quiet);
        const real below = count > cap ? cap : count;
        const real whole = below < -cap ? -cap : below;
        counts[i] = (int8_t)(int32_t)(whole == whole ? whole : (real)0);
    }
}

#endif
