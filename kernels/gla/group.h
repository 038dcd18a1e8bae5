/* gla: one key-value head of one sequence, as the chunked forms see it. */
#ifndef SPIKELM_GLA_GROUP_H
#define SPIKELM_GLA_GROUP_H

#include "../chunk.h"

/* Pointers stand at the group's first token; the *_token are distances from token to token. */
struct group {
    int64_t steps, share; /* share: query heads that read this key-value head */
    int64_t key_dim, value_dim, gates;
    int64_t q_token, k_token, v_token, g_token, o_token;
    real scale;
    const real *q, *k, *v, *g;
    const uint8_t *reset, *valid;
};

/* A piece of a chunk. Rows of queries and outputs are (token, query head) pairs. */
struct piece {
    int64_t first, count;   /* tokens */
    int64_t full, rows;     /* tokens up to whole vectors, and the rows of queries of so many tokens */
    const uint8_t *valid;   /* of the piece's tokens, or NULL */
};

INLINE struct piece piece_of(const struct group *group, int64_t first, int64_t end) {
    const int64_t full = whole_vectors(end - first);
    return (struct piece){first, end - first, full, full * group->share,
                          group->valid ? group->valid + first : NULL};
}

struct gradients {
    const real *o;          /* of the outputs, at the group's first token */
    real *q, *k, *v, *g;    /* what is wanted; g may be NULL */
};

/* o = weights v, row blocks of LANES tokens, each over the tokens that it may see. */
static void weighted_values(const struct group *group, const struct piece *piece, const real *weights,
                            int64_t weights_row, const real *v, int64_t v_row, real *o) {
    const int64_t rows = LANES * group->share;
    for (int64_t t = 0; t < piece->full; t += LANES) {
        product(rows, group->value_dim, t + LANES, weights + t * group->share * weights_row, weights_row, 1, v,
                v_row, o + t * group->share * v_row, v_row, FORGET, NULL);
    }
}

/* grad weights = grad o v^T, of the tokens that a row may see (in blocks: of a few more). */
static void weights_gradient(const struct group *group, const struct piece *piece, const real *grad_o,
                             int64_t o_row, const real *v_lanes, int64_t lanes_row, real *grad,
                             int64_t grad_row) {
    const int64_t rows = LANES * group->share;
    for (int64_t t = 0; t < piece->full; t += LANES) {
        product(rows, t + LANES, group->value_dim, grad_o + t * group->share * o_row, o_row, 1, v_lanes,
                lanes_row, grad + t * group->share * grad_row, grad_row, FORGET, NULL);
    }
}

/* grad v += weights^T grad o, of the rows that see a token. */
static void values_gradient(const struct group *group, const struct piece *piece, const real *weights,
                            int64_t weights_row, const real *grad_o, int64_t v_row, real *grad_v) {
    for (int64_t t = 0; t < piece->full; t += LANES) {
        const int64_t from = t * group->share;
        product(LANES, group->value_dim, piece->rows - from, weights + from * weights_row + t, 1, weights_row,
                grad_o + from * v_row, v_row, grad_v + t * v_row, v_row, ADD, NULL);
    }
}

#endif
