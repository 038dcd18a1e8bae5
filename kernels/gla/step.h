/* gla: one token of one sequence, the state updated in place (equations in reference.py).
 *
 * Every query head of a group reads the state in the same pass that updates it, so a step moves the state
 * through the cache once. Sums run over the key channels in their order, whatever the width of a vector.
 */
#ifndef SPIKELM_GLA_STEP_H
#define SPIKELM_GLA_STEP_H

#include "../real.h"

#define GLA_STEP_ROWS 64    /* channels whose gates are taken at a time */
#define GLA_STEP_COLUMNS 64 /* values that stay in the first cache while all channels pass */

/* One channel for every head: s <- decay s + k v, then o_h += q_h s. */
INLINE void gla_step_channel(int count, int64_t heads, int64_t key_dim, int64_t value_dim, real decay,
                             real scale, const real *restrict q, real k, const real *restrict v,
                             real *restrict state, real *restrict o) {
#pragma omp simd
    for (int j = 0; j < count; j++) {
        state[j] = multiply_add(k, v[j], decay * state[j]);
    }
    for (int64_t h = 0; h < heads; h++) {
        const real query = scale * q[h * key_dim];
        real *restrict out = o + h * value_dim;
#pragma omp simd
        for (int j = 0; j < count; j++) {
            out[j] = multiply_add(query, state[j], out[j]);
        }
    }
}

/* One key-value head and the `heads` query heads that share it: q [heads][K], k [K], v [V], log gates g
 * [gates] (gates is 0 for none, 1 for one of the head, K for one per channel), state [K][V], o [heads][V]. */
static inline void gla_step_group(int64_t heads, int64_t key_dim, int64_t value_dim, int64_t gates, real scale,
                                  const real *restrict q, const real *restrict k, const real *restrict v,
                                  const real *restrict g, real *restrict state, real *restrict o) {
    const real one_decay = gates == 1 ? exp_nonpositive(g[0]) : (real)1;
    memset(o, 0, (size_t)(heads * value_dim) * sizeof(real));
    for (int64_t first = 0; first < key_dim; first += GLA_STEP_ROWS) {
        const int rows = (int)(key_dim - first < GLA_STEP_ROWS ? key_dim - first : GLA_STEP_ROWS);
        real decay[GLA_STEP_ROWS];
        if (gates > 1) {
#pragma omp simd
            for (int c = 0; c < rows; c++) {
                decay[c] = exp_nonpositive(g[first + c]);
            }
        } else {
            for (int c = 0; c < rows; c++) {
                decay[c] = one_decay;
            }
        }
        for (int64_t left = 0; left < value_dim; left += GLA_STEP_COLUMNS) {
            const int64_t rest = value_dim - left;
            real *restrict block = state + first * value_dim + left;
            for (int c = 0; c < rows; c++, block += value_dim) {
                const real *restrict query = q + first + c;
                if (rest >= GLA_STEP_COLUMNS) {
                    gla_step_channel(GLA_STEP_COLUMNS, heads, key_dim, value_dim, decay[c], scale, query,
                                     k[first + c], v + left, block, o + left);
                } else {
                    gla_step_channel((int)rest, heads, key_dim, value_dim, decay[c], scale, query,
                                     k[first + c], v + left, block, o + left);
                }
            }
        }
    }
}

/* All heads of one token: q [H][K], k [G][K], v [G][V], g [G][gates] or NULL, state [G][K][V], o [H][V]. */
static inline void gla_step(int64_t heads, int64_t groups, int64_t key_dim, int64_t value_dim, int64_t gates,
                            real scale, const real *restrict q, const real *restrict k, const real *restrict v,
                            const real *restrict g, real *restrict state, real *restrict o) {
    const int64_t share = heads / groups;
    for (int64_t group = 0; group < groups; group++) {
        gla_step_group(share, key_dim, value_dim, gates, scale, q + group * share * key_dim,
                       k + group * key_dim, v + group * value_dim, g ? g + group * gates : NULL,
                       state + group * key_dim * value_dim, o + group * share * value_dim);
    }
}

#endif
