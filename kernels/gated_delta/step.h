/* gated_delta: one token of one sequence, the state updated in place (equations in reference.py).
 *
 * A block of value columns stays in the first cache while it is read for what it knows about the key and read
 * again for the update and the outputs of every query head of the group, so that a step moves the state from
 * memory once. Sums run over the key channels in their order, whatever the width of a vector.
 */
#ifndef SPIKELM_GATED_DELTA_STEP_H
#define SPIKELM_GATED_DELTA_STEP_H

#include "../real.h"

#define DELTA_STEP_COLUMNS 64

/* `count` columns of one key-value head; pointers stand at the first of them (q and k at the first channel). */
INLINE void gated_delta_step_columns(int count, int64_t heads, int64_t key_dim, int64_t value_dim, real decay,
                                     real beta, real scale, const real *restrict q, const real *restrict k,
                                     const real *restrict v, real *restrict state, real *restrict o) {
    real known[DELTA_STEP_COLUMNS] = {0}, fresh[DELTA_STEP_COLUMNS];
    for (int64_t c = 0; c < key_dim; c++) {
        const real *restrict row = state + c * value_dim;
#pragma omp simd
        for (int j = 0; j < count; j++) {
            known[j] = multiply_add(k[c], row[j], known[j]);
        }
    }
#pragma omp simd
    for (int j = 0; j < count; j++) {
        fresh[j] = beta * (v[j] - decay * known[j]);
    }
    for (int64_t c = 0; c < key_dim; c++) {
        real *restrict row = state + c * value_dim;
#pragma omp simd
        for (int j = 0; j < count; j++) {
            row[j] = multiply_add(k[c], fresh[j], decay * row[j]);
        }
        for (int64_t h = 0; h < heads; h++) {
            const real query = scale * q[h * key_dim + c];
            real *restrict out = o + h * value_dim;
#pragma omp simd
            for (int j = 0; j < count; j++) {
                out[j] = multiply_add(query, row[j], out[j]);
            }
        }
    }
}

/* One key-value head and the `heads` query heads that share it: q [heads][K], k [K], v [V], log decay g, write
 * strength beta, state [K][V], o [heads][V]. */
static inline void gated_delta_step_group(int64_t heads, int64_t key_dim, int64_t value_dim, real scale,
                                          const real *restrict q, const real *restrict k,
                                          const real *restrict v, real g, real beta, real *restrict state,
                                          real *restrict o) {
    const real decay = exp_nonpositive(g);
    memset(o, 0, (size_t)(heads * value_dim) * sizeof(real));
    for (int64_t left = 0; left < value_dim; left += DELTA_STEP_COLUMNS) {
        const int64_t rest = value_dim - left;
        if (rest >= DELTA_STEP_COLUMNS) {
            gated_delta_step_columns(DELTA_STEP_COLUMNS, heads, key_dim, value_dim, decay, beta, scale, q, k,
                                     v + left, state + left, o + left);
        } else {
            gated_delta_step_columns((int)rest, heads, key_dim, value_dim, decay, beta, scale, q, k, v + left,
                                     state + left, o + left);
        }
    }
}

/* All heads of one token: q [H][K], k [G][K], v [G][V], g and beta [G], state [G][K][V], o [H][V]. */
static inline void gated_delta_step(int64_t heads, int64_t groups, int64_t key_dim, int64_t value_dim,
                                    real scale, const real *restrict q, const real *restrict k,
                                    const real *restrict v, const real *restrict g, const real *restrict beta,
                                    real *restrict state, real *restrict o) {
    const int64_t share = heads / groups;
    for (int64_t group = 0; group < groups; group++) {
        gated_delta_step_group(share, key_dim, value_dim, scale, q + group * share * key_dim,
                               k + group * key_dim, v + group * value_dim, g[group], beta[group],
                               state + group * key_dim * value_dim, o + group * share * value_dim);
    }
}

#endif
