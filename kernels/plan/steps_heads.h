/* What stands between the projections and the memory of an attention-like mixer: rotary positions, short
 * convolutions, unit vectors, gates.
 */
#include "machine.h"

/* A rotation's table in a register: the position it was made for plus one (0: none), cosines, sines. */
#define TABLE_HEAD 2

/* Cosines [pairs] and sines [pairs] of position * frequency in double, times the magnitude. Layers that turn
 * alike share a table, which is then made once per token. */
static const float *rope_table(int64_t position, int64_t pairs, const double *restrict frequency, double magnitude,
                               float *restrict table) {
    int64_t made;
    memcpy(&made, table, sizeof made);
    float *restrict cosine = table + TABLE_HEAD, *restrict sine = cosine + pairs;
    if (made == position + 1) {
        return cosine;
    }
    for (int64_t i = 0; i < pairs; i++) {
        const double angle = (double)position * frequency[i];
        cosine[i] = (float)(cos(angle) * magnitude);
        sine[i] = (float)(sin(angle) * magnitude);
    }
    made = position + 1;
    memcpy(table, &made, sizeof made);
    return cosine;
}

/* x [heads][dim]: features i and i + pairs of every head turn, those from 2 * pairs on stay. */
INLINE void rotate(int64_t heads, int64_t dim, int64_t pairs, const float *restrict cosine, float *restrict x) {
    const float *restrict sine = cosine + pairs;
    for (int64_t h = 0; h < heads; h++) {
        float *restrict a = x + h * dim, *restrict b = a + pairs;
#pragma omp simd
        for (int64_t i = 0; i < pairs; i++) {
            const float left = a[i], right = b[i];
            a[i] = left * cosine[i] - right * sine[i];
            b[i] = right * cosine[i] + left * sine[i];
        }
    }
}

/* q, heads, k, groups, dim, pairs, table, position (field), first; frequencies (double [pairs]); f: magnitude.
 * q and k turn in place at the rotary position first + position; with flags 1 the position then moves on. */
STEP(rope) {
    EACH_ROW {
        int64_t *position = field(m, row, r->a[7]);
        const float *table = rope_table(*position + r->a[8], r->a[5], r->p[0], r->f[0], reg(m, row, r->a[6]));
        rotate(r->a[1], r->a[4], r->a[5], table, reg(m, row, r->a[0]));
        rotate(r->a[3], r->a[4], r->a[5], table, reg(m, row, r->a[2]));
        *position += r->flags;
    }
}

/* The newest token first, as the Python form adds them up; the window [past][width], oldest first, moves on.
 * weight [past + 1][width], that of the newest token last; bias may be null. */
INLINE void convolve_row(int64_t width, int64_t past, const float *restrict x, float *restrict window,
                         const float *restrict weight, const float *restrict bias, float *restrict y) {
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        y[i] = x[i] * weight[past * width + i];
    }
    for (int64_t j = past - 1; j >= 0; j--) {
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            y[i] += window[j * width + i] * weight[j * width + i];
        }
    }
    for (int64_t i = 0; bias && i < width; i++) {
        y[i] += bias[i];
    }
    memmove(window, window + width, (size_t)((past - 1) * width) * sizeof *window);
    memcpy(window + (past - 1) * width, x, (size_t)width * sizeof *window);
}

/* x, y, n, past, window (field); weight, bias or null; flags 1: silu behind */
STEP(convolve) {
    EACH_ROW {
        float *y = reg(m, row, r->a[1]);
        convolve_row(r->a[2], r->a[3], reg(m, row, r->a[0]), field(m, row, r->a[4]), r->p[0], r->p[1], y);
        if (r->flags) {
            unary_row(UNARY_SILU, r->a[2], y, y);
        }
    }
}

/* x, y, n: y = relu(x); NaN stays NaN; y may be x */
STEP(relu) {
    EACH_ROW {
        const float *x = reg(m, row, r->a[0]);
        float *y = reg(m, row, r->a[1]);
#pragma omp simd
        for (int64_t i = 0; i < r->a[2]; i++) {
            y[i] = x[i] < 0 ? 0.0f : x[i];
        }
    }
}

/* x, y, n; f: sign, divisor: y = log sigmoid(sign * x) / divisor; y may be x */
STEP(log_gate) {
    const float sign = (float)r->f[0], divisor = (float)r->f[1];
    EACH_ROW {
        const float *x = reg(m, row, r->a[0]);
        float *y = reg(m, row, r->a[1]);
#pragma omp simd
        for (int64_t i = 0; i < r->a[2]; i++) {
            y[i] = logsigmoid_of(sign * x[i]) / divisor;
        }
    }
}

/* x, y, n; rate [n], bias [n]: y = rate * softplus(x + bias); y may be x */
STEP(rate_gate) {
    const float *rate = r->p[0], *bias = r->p[1];
    EACH_ROW {
        const float *x = reg(m, row, r->a[0]);
        float *y = reg(m, row, r->a[1]);
#pragma omp simd
        for (int64_t i = 0; i < r->a[2]; i++) {
            y[i] = rate[i] * softplus_of(x[i] + bias[i]);
        }
    }
}

/* x, y, n, groups; f: epsilon: each group of n divided by its length; y may be x */
STEP(unit) {
    EACH_ROW {
        for (int64_t group = 0; group < r->a[3]; group++) {
            const float *x = reg(m, row, r->a[0]) + group * r->a[2];
            float *y = reg(m, row, r->a[1]) + group * r->a[2];
            const float scale = 1.0f / sqrtf(row_squares(r->a[2], x, 0.0f) + (float)r->f[0]);
#pragma omp simd
            for (int64_t i = 0; i < r->a[2]; i++) {
                y[i] = x[i] * scale;
            }
        }
    }
}
