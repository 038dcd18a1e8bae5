/* Products of int8 counts with int8 weights: exact sums, see int8_linear/step.h. */
#include "../int8_linear/step.h"
#include "machine.h"

/* Adds a call of a projection to its row of the statistics. */
static void tally_counts(const struct machine *m, const struct record *r, const struct packed_int8 *w) {
    int64_t *statistics = m->plan->statistics + r->a[3] * STATISTICS;
    int64_t events = 0;
    statistics[STATISTIC_CALLS] += m->rows;
    EACH_ROW {
        const int8_t *counts = (const int8_t *)reg(m, row, r->a[0]);
        int64_t silent = 0, magnitude = 0;
        for (int64_t first = 0; first < w->inputs; first += 256) {
            const int64_t last = first + 256 < w->inputs ? first + 256 : w->inputs;
            int16_t zeros = 0, sum = 0; /* at most 256 * 127 */
#pragma omp simd reduction(+ : zeros, sum)
            for (int64_t i = first; i < last; i++) {
                zeros = (int16_t)(zeros + (counts[i] == 0));
                sum = (int16_t)(sum + (counts[i] < 0 ? -counts[i] : counts[i]));
            }
            silent += zeros;
            magnitude += sum;
        }
        statistics[STATISTIC_SILENT] += silent;
        statistics[STATISTIC_MAGNITUDE] += magnitude;
        events += w->inputs - silent;
    }
    /* The event-driven form reads a row's own weights, the dense one reads all of them once. */
    statistics[STATISTIC_BYTES] += w->outputs * (w->layout == PACKED_IN_OUT ? events : w->inputs);
}

/* Bytes of scratch of one record. */
int64_t plan_int8_scratch(const struct packed_int8 *w, int64_t rows, int threads) {
    return (rows * (int64_t)sizeof(float) + 63) / 64 * 64 + threads * packed_scratch_bytes(w, rows);
}

/* One thread's outputs of a product. */
static void linear_int8_share(const struct machine *m, const struct record *r, int thread, int threads) {
    const struct packed_int8 *w = r->p[0];
    const float *bias = r->p[1], *thresholds = r->a[2] < 0 ? NULL : m->plan->scratch;
    const int64_t stride = m->plan->width, each = packed_scratch_bytes(w, m->rows);
    uint8_t *scratch = (uint8_t *)m->plan->scratch + (m->rows * (int64_t)sizeof(float) + 63) / 64 * 64;
    int64_t first, last;
    packed_share(w, thread, threads, &first, &last);
    packed_rows(w, (const int8_t *)reg(m, 0, r->a[0]), m->rows, stride * (int64_t)sizeof(float), thresholds, bias,
                reg(m, 0, r->a[1]), stride, scratch + thread * each, first, last);
}

/* counts, y, threshold (a register of one float, or -1), statistics; packed_int8, bias or null */
STEP(linear_int8) {
    const struct packed_int8 *w = r->p[0];
    float *thresholds = m->plan->scratch;
    if (r->a[2] >= 0) {
        EACH_ROW { thresholds[row] = *reg(m, row, r->a[2]); }
    }
    tally_counts(m, r, w);
    const int threads = threads_for(m, w->inputs * w->outputs);
    if (threads == 1) {
        linear_int8_share(m, r, 0, 1); /* even a team of one takes half a microsecond */
        return;
    }
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        linear_int8_share(m, r, thread, threads);
    }
}

/* x, y, statistics; packed_int8 in PACKED_ROWS, bias or null: float inputs, y = scales * (x W) + bias group by
 * group. Nothing is exact here, but a row has the same bits in any batch. */
STEP(linear_int8_float) {
    const struct packed_int8 *w = r->p[0];
    const float *bias = r->p[1];
    int64_t *statistics = m->plan->statistics + r->a[2] * STATISTICS;
    statistics[STATISTIC_CALLS] += m->rows;
    statistics[STATISTIC_BYTES] += w->outputs * w->inputs;
    EACH_ROW {
        const float *x = reg(m, row, r->a[0]);
        for (int64_t i = 0; i < w->inputs; i++) {
            statistics[STATISTIC_SILENT] += x[i] == 0;
        }
    }
    const int threads = threads_for(m, w->inputs * w->outputs);
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t output = 0; output < w->outputs; output++) {
        EACH_ROW {
            const float *x = reg(m, row, r->a[0]);
            float y = 0;
            for (int64_t j = 0; j < w->groups; j++) {
                const int64_t first = j * w->group, left = w->inputs - first, n = left < w->group ? left : w->group;
                const int8_t *weights = w->weights + output * w->inputs + first;
                float lane[16] = {0};
                int64_t i = 0;
                for (; i + 16 <= n; i += 16) {
#pragma omp simd
                    for (int l = 0; l < 16; l++) {
                        lane[l] = multiply_add((float)weights[i + l], x[first + i + l], lane[l]);
                    }
                }
                for (int l = 0; i + l < n; l++) {
                    lane[l] = multiply_add((float)weights[i + l], x[first + i + l], lane[l]);
                }
                y += w->scales[output * w->groups + j] * sum8(load8(lane) + load8(lane + 8));
            }
            reg(m, row, r->a[1])[output] = bias ? y + bias[output] : y;
        }
    }
}
