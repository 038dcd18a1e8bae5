/* shift_encode: norm, token shift and spike encoding of M projections in one pass (equations in reference.py).
 *
 * Layout: x [rows][steps][width]; mixes [mixes][width]; counts [mixes][rows][steps][width]. A task is one row and
 * CHUNK tokens of it. It begins by looking for the token before its own (the last valid one since a reset) and
 * normalises that one again, so that tasks are independent and a token's bits depend on its own features and those
 * of one other token, not on threads, batch or where a sequence is split.
 */
#include "../encode/step.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef SPIKELM_DOUBLE

static void layernorm_row(int64_t count, double epsilon, const double *x, const double *weight,
                          const double *bias, double *y) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < count; i++) {
        sum += x[i];
    }
    const double mean = sum / (double)count;
    for (int64_t i = 0; i < count; i++) {
        squares += (x[i] - mean) * (x[i] - mean);
    }
    const double scale = 1 / sqrt(squares / (double)count + epsilon);
    for (int64_t i = 0; i < count; i++) {
        y[i] = (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0);
    }
}

static void rmsnorm_row(int64_t count, double epsilon, const double *x, const double *weight, double *y) {
    double squares = 0;
    for (int64_t i = 0; i < count; i++) {
        squares += x[i] * x[i];
    }
    const double scale = 1 / sqrt(squares / (double)count + epsilon);
    for (int64_t i = 0; i < count; i++) {
        y[i] = x[i] * scale * weight[i];
    }
}

INLINE double lerp_of(double start, double end, double weight) {
    return fabs(weight) < 0.5 ? start + weight * (end - start) : end - (end - start) * (1 - weight);
}

#else
/* The norms and the mixing of the rowwise ops and of decode plans: the same bits. */
#include "../rowwise/step.h"
#endif

#define CHUNK 32

/* What does not vary over tokens; k, dead_zone and cap hold one value for each of the projections. */
struct shift_encode {
    int64_t rows, steps, width, mixes;
    double epsilon;
    const double *k, *dead_zone, *cap;
    const real *norm_weight, *norm_bias, *mix;
    int32_t rms, pad;
};

static void normalise(const struct shift_encode *op, const real *x, real *z) {
    if (op->rms) {
        rmsnorm_row(op->width, (real)op->epsilon, x, op->norm_weight, z);
    } else {
        layernorm_row(op->width, (real)op->epsilon, x, op->norm_weight, op->norm_bias, z);
    }
}

/* Features before token t of a row: those of the last valid token since a reset, or the incoming ones. */
static void find_previous(const struct shift_encode *op, int64_t t, const real *x, const real *last,
                          const uint8_t *reset, const uint8_t *valid, real *previous) {
    for (t--; t >= 0; t--) {
        if (!valid || valid[t]) {
            normalise(op, x + t * op->width, previous);
            return;
        }
        if (reset && reset[t]) {
            memset(previous, 0, (size_t)op->width * sizeof(real));
            return;
        }
    }
    memcpy(previous, last, (size_t)op->width * sizeof(real));
}

static void mix_and_encode(const struct shift_encode *op, int64_t at, const real *previous, const real *z,
                           real *mixed, int8_t *counts, real *thresholds, int64_t *statistics) {
    const int64_t width = op->width, tokens = op->rows * op->steps;
    for (int64_t m = 0; m < op->mixes; m++) {
        const real *restrict mix = op->mix + m * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            mixed[i] = lerp_of(previous[i], z[i], mix[i]);
        }
        const int64_t token = m * tokens + at;
        real quiet;
        thresholds_of(width, op->k[m], op->dead_zone[m], mixed, thresholds + token, &quiet);
        encode_row_counted(width, thresholds[token], quiet, (real)op->cap[m], mixed, counts + token * width,
                           statistics + token * ENCODE_STATISTICS);
    }
}

/* An invalid token: counts and figures 0, the threshold of a row of zeros. */
static void skip_token(const struct shift_encode *op, int64_t at, int8_t *counts, real *thresholds,
                       int64_t *statistics) {
    for (int64_t m = 0; m < op->mixes; m++) {
        const int64_t token = m * op->rows * op->steps + at;
        memset(counts + token * op->width, 0, (size_t)op->width);
        memset(statistics + token * ENCODE_STATISTICS, 0, ENCODE_STATISTICS * sizeof *statistics);
        thresholds[token] = (real)THRESHOLD_FLOOR;
    }
}

static void encode_chunk(const struct shift_encode *op, int64_t row, int64_t first, const real *x,
                         const real *last, const uint8_t *reset, const uint8_t *valid, real *scratch,
                         int8_t *counts, real *thresholds, int64_t *statistics, real *new_last) {
    const int64_t width = op->width, steps = op->steps;
    const int64_t end = first + CHUNK < steps ? first + CHUNK : steps;
    real *previous = scratch, *z = scratch + width, *mixed = scratch + 2 * width;
    x += row * steps * width;
    reset = reset ? reset + row * steps : NULL;
    valid = valid ? valid + row * steps : NULL;
    find_previous(op, first, x, last + row * width, reset, valid, previous);
    for (int64_t t = first; t < end; t++) {
        if (reset && reset[t]) {
            memset(previous, 0, (size_t)width * sizeof(real));
        }
        if (valid && !valid[t]) {
            skip_token(op, row * steps + t, counts, thresholds, statistics);
            continue;
        }
        normalise(op, x + t * width, z);
        mix_and_encode(op, row * steps + t, previous, z, mixed, counts, thresholds, statistics);
        real *swapped = previous;
        previous = z;
        z = swapped;
    }
    if (end == steps) {
        memcpy(new_last + row * width, previous, (size_t)width * sizeof(real));
    }
}

/* scratch [threads][3][width] */
void shift_encode(const struct shift_encode *op, const real *x, const real *last, const uint8_t *reset,
                  const uint8_t *valid, real *scratch, int8_t *counts, real *thresholds, int64_t *statistics,
                  real *new_last, int threads) {
    const int64_t chunks = op->steps > 0 ? (op->steps + CHUNK - 1) / CHUNK : 1;
    (void)threads;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < op->rows; row++) {
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
#ifdef _OPENMP
            real *own = scratch + 3 * op->width * omp_get_thread_num();
#else
            real *own = scratch;
#endif
            encode_chunk(op, row, chunk * CHUNK, x, last, reset, valid, own, counts, thresholds, statistics,
                         new_last);
        }
    }
}
