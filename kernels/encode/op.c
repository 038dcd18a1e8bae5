/* encode: adaptive spike encoding, forward and backward (equations in reference.py, rows in step.h).
 *
 * Layout: x, counts, gradients [rows][width]; threshold, mean [rows]. A task is one row; rows are independent
 * and a row's sum has one fixed order, so a row's bits do not depend on threads, batch or place in the batch.
 *
 * What the cap cut off is rare, so the pass over x only notes whether it happened in a row. Rows where it did
 * get a place in mask [clipped rows][width], which a second pass over those rows fills; slots [rows] holds
 * that place, or -1.
 */
#include "step.h"

/* Mean |x| of a row, unless it is given: that of whole rows of which x holds a part. */
INLINE real row_mean(int64_t row, int64_t width, const real *x, const real *mean) {
    return mean ? mean[row] : mean_magnitude(width, x + row * width);
}

/* Returns the number of rows in which the cap cut a count: the rows that the mask must have. quiet [rows] keeps
 * the edges of the dead zone for encode_mask. mean may be null. */
int64_t encode_forward(int64_t rows, int64_t width, double k, double dead_zone, double cap, const real *x,
                       const real *mean, real *counts, real *threshold, real *quiet, int32_t *slots,
                       int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const real own = row_mean(row, width, x, mean);
        thresholds_from(own, k, dead_zone, threshold + row, quiet + row);
        slots[row] =
            encode_row(width, threshold[row], quiet[row], (real)cap, x + row * width, counts + row * width);
    }
    int32_t clipped_rows = 0;
    for (int64_t row = 0; row < rows; row++) {
        slots[row] = slots[row] ? clipped_rows++ : -1;
    }
    return clipped_rows;
}

/* statistics [rows][4]; mean may be null. */
void encode_int8(int64_t rows, int64_t width, double k, double dead_zone, double cap, const real *x,
                 const real *mean, int8_t *counts, real *threshold, int64_t *statistics, int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const real own = row_mean(row, width, x, mean);
        real quiet;
        thresholds_from(own, k, dead_zone, threshold + row, &quiet);
        encode_row_counted(width, threshold[row], quiet, (real)cap, x + row * width, counts + row * width,
                           statistics + row * ENCODE_STATISTICS);
    }
}

/* y = count * threshold */
void decode_counts(int64_t rows, int64_t width, const int8_t *counts, const real *threshold, real *y,
                   int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const int8_t *restrict from = counts + row * width;
        real *restrict to = y + row * width;
        const real v = threshold[row];
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            to[i] = (real)from[i] * v;
        }
    }
}

/* mask[slot][i] = 1 where the cap cut x[row][i] */
void encode_mask(int64_t rows, int64_t width, double cap, const real *x, const real *threshold,
                 const real *quiet, const int32_t *slots, uint8_t *mask, int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        if (slots[row] < 0) {
            continue;
        }
        const real *restrict from = x + row * width;
        uint8_t *restrict to = mask + slots[row] * width;
        const real v = threshold[row], edge = quiet[row], most = (real)cap;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            to[i] = REAL_ABS(uncapped_count(from[i], v, edge)) > most ? 1 : 0;
        }
    }
}

void encode_backward(int64_t rows, int64_t width, const real *grad_counts, const real *threshold,
                     const int32_t *slots, const uint8_t *mask, real *grad_x, int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const real *restrict from = grad_counts + row * width;
        real *restrict to = grad_x + row * width;
        const real v = threshold[row];
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            to[i] = from[i] / v;
        }
        if (slots[row] >= 0) {
            const uint8_t *restrict clipped = mask + slots[row] * width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) {
                to[i] = clipped[i] ? (real)0 : to[i];
            }
        }
    }
}
