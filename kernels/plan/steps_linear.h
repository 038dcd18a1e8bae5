/* Products with float weights, row-major [outputs][inputs]: read once for all rows of the batch.
 *
 * A dot product is summed in 16 lanes, the lanes at the end; the order depends on nothing but the number of
 * inputs. TILE outputs are computed at a time, one of every quarter of the matrix: each quarter is then a stream
 * that is read from its begin to its end, which processors fetch ahead by themselves, faster than when told.
 */
#include "machine.h"

#define TILE 4

#define SPIKES 1

/* The 16 lanes of a sum. */
#if defined(__AVX512F__)
typedef __m512 lanes;
INLINE lanes no_lanes(void) { return _mm512_setzero_ps(); }
INLINE lanes load_lanes(const float *from) { return _mm512_loadu_ps(from); }
INLINE lanes fma_lanes(lanes a, lanes b, lanes c) { return _mm512_fmadd_ps(a, b, c); }
INLINE v8 first_lanes(lanes x) { return (v8)_mm512_castps512_ps256(x); }
INLINE v8 last_lanes(lanes x) { return (v8)_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)); }
#else
typedef struct {
    v8 first, last;
} lanes;
INLINE lanes no_lanes(void) { return (lanes){{0}, {0}}; }
INLINE lanes load_lanes(const float *from) { return (lanes){load8(from), load8(from + 8)}; }
INLINE lanes fma_lanes(lanes a, lanes b, lanes c) {
    return (lanes){fma8(a.first, b.first, c.first), fma8(a.last, b.last, c.last)};
}
INLINE v8 first_lanes(lanes x) { return x.first; }
INLINE v8 last_lanes(lanes x) { return x.last; }
#endif

/* Dot products of some outputs (weights, apart from each other) and some rows (x, stride apart). */
INLINE void dot_tile(const int outputs, const int rows, int64_t inputs, const float *weights, int64_t apart,
                     const float *x, int64_t stride, v8 sums[TILE][2]) {
    lanes all[TILE][2];
#pragma GCC unroll 8
    for (int o = 0; o < outputs; o++) {
#pragma GCC unroll 8
        for (int b = 0; b < rows; b++) {
            all[o][b] = no_lanes();
        }
    }
    const int64_t whole = inputs / 16 * 16;
    for (int64_t i = 0; i < whole; i += 16) {
#pragma GCC unroll 8
        for (int o = 0; o < outputs; o++) {
            const lanes w = load_lanes(weights + o * apart + i);
#pragma GCC unroll 8
            for (int b = 0; b < rows; b++) {
                all[o][b] = fma_lanes(w, load_lanes(x + b * stride + i), all[o][b]);
            }
        }
    }
#pragma GCC unroll 8
    for (int o = 0; o < outputs; o++) {
#pragma GCC unroll 8
        for (int b = 0; b < rows; b++) {
            const float *w = weights + o * apart + whole, *z = x + b * stride + whole;
            v8 first = first_lanes(all[o][b]), last = last_lanes(all[o][b]);
            int64_t left = inputs - whole;
            if (left >= 8) {
                first = fma8(load8(w), load8(z), first);
                w += 8;
                z += 8;
                left -= 8;
            }
            if (left > 0) {
                last = fma8(load_part(w, left), load_part(z, left), last);
            }
            sums[o][b] = first + last;
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

/* Outputs first, first + apart, first + 2 * apart, ... */
INLINE void linear_tile(const struct machine *m, const struct record *r, const int outputs, int64_t first,
                        int64_t apart) {
    const int64_t inputs = r->a[2], stride = m->plan->width;
    const float *weights = (const float *)r->p[0] + first * inputs;
    v8 sums[TILE][2];
    int64_t row = 0;
    for (; row + 2 <= m->rows; row += 2) {
        const float *x = reg(m, row, r->a[0]);
        for (int half = 0; half < outputs; half += 2) {
            const int pair = outputs - half < 2 ? 1 : 2;
            dot_tile(pair, 2, inputs, weights + half * apart * inputs, apart * inputs, x, stride, sums);
            for (int o = 0; o < pair; o++) {
                finish(m, r, row, first + (half + o) * apart, sum8(sums[o][0]));
                finish(m, r, row + 1, first + (half + o) * apart, sum8(sums[o][1]));
            }
        }
    }
    if (row < m->rows) {
        dot_tile(outputs, 1, inputs, weights, apart * inputs, reg(m, row, r->a[0]), stride, sums);
        for (int o = 0; o < outputs; o++) {
            finish(m, r, row, first + o * apart, sum8(sums[o][0]));
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

/* Tiles [first, last) of all `tiles`, each of one output in every quarter. */
static void linear_tiles(const struct machine *m, const struct record *r, int64_t first, int64_t last,
                         int64_t tiles) {
    for (int64_t tile = first; tile < last; tile++) {
        linear_tile(m, r, TILE, tile, tiles);
    }
}

/* x, y, inputs, outputs, scale (a register of one float, or -1), statistics; weights [outputs][inputs], bias or
 * null; flags: SPIKES where x holds whole numbers */
STEP(linear) {
    tally_floats(m, r, r->a[5], r->a[2] * r->a[3] * (int64_t)sizeof(float));
    const int64_t outputs = r->a[3], tiles = outputs / TILE;
    const int threads = threads_for(m, r->a[2] * outputs);
    if (threads == 1) {
        linear_tiles(m, r, 0, tiles, tiles);
    } else {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
        for (int thread = 0; thread < threads; thread++) {
            linear_tiles(m, r, tiles * thread / threads, tiles * (thread + 1) / threads, tiles);
        }
    }
    for (int64_t output = tiles * TILE; output < outputs; output++) {
        linear_tile(m, r, 1, output, 1);
    }
}
