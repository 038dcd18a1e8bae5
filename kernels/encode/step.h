/* Adaptive spike encoding of one row (equations in reference.py); used by the ops and by decode plans, with the
 * same bits: a row's sum has one fixed order, whatever stands beside it.
 *
 * NaN stays NaN in floating counts: comparisons are written so that it falls through them. In int8 it is 0.
 */
#ifndef SPIKELM_ENCODE_STEP_H
#define SPIKELM_ENCODE_STEP_H

#include "../real.h"

#define ENCODE_LANES 32
#define ENCODE_BLOCK 1024
#define THRESHOLD_FLOOR 1e-8

#ifdef SPIKELM_DOUBLE
#define ROUND_TO_EVEN rint
#else
#define ROUND_TO_EVEN rintf
#endif

/* Figures of a row of counts, in this order. */
enum { ENCODE_SILENT, ENCODE_SUMMED, ENCODE_CLIPPED, ENCODE_LARGEST, ENCODE_STATISTICS };

/* Mean of |x|. A block is summed in lanes and the lanes pairwise, whatever the width of a vector. */
static inline real mean_magnitude(int64_t width, const real *restrict x) {
    real total = 0;
    for (int64_t first = 0; first < width; first += ENCODE_BLOCK) {
        const int64_t last = first + ENCODE_BLOCK < width ? first + ENCODE_BLOCK : width;
        real lane[ENCODE_LANES] = {0};
        int64_t i = first;
        for (; i + ENCODE_LANES <= last; i += ENCODE_LANES) {
#pragma omp simd
            for (int j = 0; j < ENCODE_LANES; j++) {
                lane[j] += REAL_ABS(x[i + j]);
            }
        }
        for (int j = 0; i + j < last; j++) {
            lane[j] += REAL_ABS(x[i + j]);
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

/* Threshold of a row whose mean |x| is known, and the edge of its dead zone. */
INLINE void thresholds_from(real mean, double k, double dead_zone, real *threshold, real *quiet) {
    const real wanted = mean / (real)k;
    *threshold = wanted < (real)THRESHOLD_FLOOR ? (real)THRESHOLD_FLOOR : wanted;
    *quiet = (real)dead_zone * mean;
}

/* Threshold of a row, and the edge of its dead zone. */
INLINE void thresholds_of(int64_t width, double k, double dead_zone, const real *x, real *threshold,
                          real *quiet) {
    thresholds_from(mean_magnitude(width, x), k, dead_zone, threshold, quiet);
}

/* Count before the cap; zero where |x| < quiet. */
INLINE real uncapped_count(real x, real threshold, real quiet) {
    const real count = ROUND_TO_EVEN(x / threshold);
    return REAL_ABS(x) < quiet ? (real)0 : count;
}

INLINE real capped(real count, real cap) {
    const real below = count > cap ? cap : count;
    return below < -cap ? -cap : below;
}

/* Counts of one row; returns whether the cap cut any. */
static inline int32_t encode_row(int64_t width, real threshold, real quiet, real cap, const real *restrict x,
                                 real *restrict counts) {
    int32_t clipped = 0;
#pragma omp simd reduction(| : clipped)
    for (int64_t i = 0; i < width; i++) {
        const real count = uncapped_count(x[i], threshold, quiet);
        counts[i] = capped(count, cap);
        clipped |= REAL_ABS(count) > cap ? 1 : 0;
    }
    return clipped;
}

/* The same counts as int8, for a cap of at most 127. A NaN becomes 0: its row's threshold is NaN. */
INLINE int32_t whole_count(real count, real cap) {
    const real kept = capped(count, cap);
    return (int32_t)(kept == kept ? kept : (real)0);
}

static inline void encode_row_int8(int64_t width, real threshold, real quiet, real cap, const real *restrict x,
                                   int8_t *restrict counts) {
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        counts[i] = (int8_t)whole_count(uncapped_count(x[i], threshold, quiet), cap);
    }
}

/* The same, and the row's statistics. */
static inline void encode_row_counted(int64_t width, real threshold, real quiet, real cap,
                                      const real *restrict x, int8_t *restrict counts,
                                      int64_t *restrict statistics) {
    int64_t all_silent = 0, all_summed = 0, all_clipped = 0;
    int32_t largest = 0;
    for (int64_t first = 0; first < width; first += ENCODE_BLOCK) {
        const int n = (int)(width - first < ENCODE_BLOCK ? width - first : ENCODE_BLOCK);
        const real *restrict from = x + first;
        int8_t *restrict to = counts + first;
        int32_t silent = 0, sum = 0, clipped = 0; /* of a block: int32 vectorises, and cannot overflow here */
#pragma omp simd reduction(+ : silent, sum, clipped) reduction(max : largest)
        for (int i = 0; i < n; i++) {
            const real count = uncapped_count(from[i], threshold, quiet);
            const int32_t whole = whole_count(count, cap);
            const int32_t size = whole < 0 ? -whole : whole;
            to[i] = (int8_t)whole;
            silent += size == 0 ? 1 : 0;
            sum += size;
            clipped += REAL_ABS(count) > cap ? 1 : 0;
            largest = largest > size ? largest : size;
        }
        all_silent += silent;
        all_summed += sum;
        all_clipped += clipped;
    }
    statistics[ENCODE_SILENT] = all_silent;
    statistics[ENCODE_SUMMED] = all_summed;
    statistics[ENCODE_CLIPPED] = all_clipped;
    statistics[ENCODE_LARGEST] = largest;
}

#endif
