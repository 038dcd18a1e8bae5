/* Products with float weights, row-major [outputs][inputs]: read once for all rows of the batch.
 *
 * A dot product is summed in 16 lanes, the lanes at the end; the order depends on nothing but the number of
 * inputs. TILE outputs are computed at a time, which gives as many streams of memory.
 */
#include "machine.h"

#define TILE 4

/* Bytes from a weight to the one to prefetch: the same column of the next tile, or where a tile would fill the
 * first-level cache, a little further in the same row. */
INLINE int64_t ahead(int64_t inputs) {
    const int64_t row = inputs * (int64_t)sizeof(float);
    return row <= 4096 ? TILE * row : 2048;
}

#define SPIKES 1

/* Dot products of some outputs (weights, inputs apart) and some rows (x, stride apart). */
INLINE void dot_tile(const int outputs, const int rows, int64_t inputs, const float *weights, const float *x,
                     int64_t stride, v8 sums[TILE][2]) {
    v8 even[TILE][2], odd[TILE][2];
#pragma GCC unroll 8
    for (int o = 0; o < outputs; o++) {
#pragma GCC unroll 8
        for (int b = 0; b < rows; b++) {
            even[o][b] = odd[o][b] = (v8){0};
        }
    }
    const int64_t distance = ahead(inputs);
    int64_t i = 0;
    for (; i + 16 <= inputs; i += 16) {
#pragma GCC unroll 8
        for (int o = 0; o < outputs; o++) {
            const float *w = weights + o * inputs + i;
            __builtin_prefetch((const char *)w + distance);
            const v8 w0 = load8(w), w1 = load8(w + 8);
#pragma GCC unroll 8
            for (int b = 0; b < rows; b++) {
                even[o][b] = fma8(w0, load8(x + b * stride + i), even[o][b]);
                odd[o][b] = fma8(w1, load8(x + b * stride + i + 8), odd[o][b]);
            }
        }
    }
    if (i + 8 <= inputs) {
        for (int o = 0; o < outputs; o++) {
            for (int b = 0; b < rows; b++) {
                even[o][b] = fma8(load8(weights + o * inputs + i), load8(x + b * stride + i), even[o][b]);
            }
        }
        i += 8;
    }
    if (i < inputs) {
        for (int o = 0; o < outputs; o++) {
            for (int b = 0; b < rows; b++) {
                const v8 w = load_part(weights + o * inputs + i, inputs - i);
                odd[o][b] = fma8(w, load_part(x + b * stride + i, inputs - i), odd[o][b]);
            }
        }
    }
#pragma GCC unroll 8
    for (int o = 0; o < outputs; o++) {
#pragma GCC unroll 8
        for (int b = 0; b < rows; b++) {
            sums[o][b] = even[o][b] + odd[o][b];
        }
    }
}

/* y = (sum * scale) + bias, as a projection does it. */
INLINE void finish(const struct machine *m, const struct record *r, int64_t row, int64_t output, float sum) {
    const float *bias = r->p[1];
    if (r->a[4] >= 0) {
        sum = sum * *reg(m, row, r->a[4]);
    }
    reg(m, row, r->a[1])[output] = bias ? sum + bias[output] : sum;
}

INLINE void linear_tile(const struct machine *m, const struct record *r, const int outputs, int64_t first) {
    const int64_t inputs = r->a[2], stride = m->plan->width;
    const float *weights = (const float *)r->p[0] + first * inputs;
    v8 sums[TILE][2];
    int64_t row = 0;
    for (; row + 2 <= m->rows; row += 2) {
        const float *x = reg(m, row, r->a[0]);
        for (int half = 0; half < outputs; half += 2) {
            const int pair = outputs - half < 2 ? 1 : 2;
            dot_tile(pair, 2, inputs, weights + half * inputs, x, stride, sums);
            for (int o = 0; o < pair; o++) {
                finish(m, r, row, first + half + o, sum8(sums[o][0]));
                finish(m, r, row + 1, first + half + o, sum8(sums[o][1]));
            }
        }
    }
    if (row < m->rows) {
        dot_tile(outputs, 1, inputs, weights, reg(m, row, r->a[0]), stride, sums);
        for (int o = 0; o < outputs; o++) {
            finish(m, r, row, first + o, sum8(sums[o][0]));
        }
    }
}

/* Adds a call of a projection with float inputs to its row of the statistics. */
static void tally_floats(const struct machine *m, const struct record *r, int64_t place, int64_t bytes) {
    int64_t *statistics = m->plan->statistics + place * STATISTICS;
    statistics[STATISTIC_CALLS] += m->rows;
    statistics[STATISTIC_BYTES] += bytes;
    EACH_ROW {
        const float *x = reg(m, row, r->a[0]);
        int64_t silent = 0;
        float magnitude = 0; /* of whole numbers: exact */
#pragma omp simd reduction(+ : silent, magnitude)
        for (int64_t i = 0; i < r->a[2]; i++) {
            silent += x[i] == 0;
            magnitude += fabsf(x[i]);
        }
        statistics[STATISTIC_SILENT] += silent;
        if (r->flags & SPIKES && magnitude < 0x1p62f) { /* NaN and infinity count as none */
            statistics[STATISTIC_MAGNITUDE] += (int64_t)magnitude;
        }
    }
}

/* x, y, inputs, outputs, scale (a register of one float, or -1), statistics; weights [outputs][inputs], bias or
 * null; flags: SPIKES where x holds whole numbers */
STEP(linear) {
    tally_floats(m, r, r->a[5], r->a[2] * r->a[3] * (int64_t)sizeof(float));
    const int64_t outputs = r->a[3], tiles = outputs / TILE;
    const int threads = threads_for(m, r->a[2] * outputs);
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t tile = 0; tile < tiles; tile++) {
        linear_tile(m, r, TILE, tile * TILE);
    }
    for (int64_t output = tiles * TILE; output < outputs; output++) {
        linear_tile(m, r, 1, output);
    }
}
