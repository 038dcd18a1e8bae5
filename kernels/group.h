/* One key-value head of one sequence with the query heads that share it, and what the chunked forms of gated
 * linear attention and of the delta rule do alike on a piece of it. */
#ifndef SPIKELM_GROUP_H
#define SPIKELM_GROUP_H

#include "chunk.h"

/* Pointers stand at the group's first token; the *_token are distances from token to token. */
struct group {
    int64_t steps, share; /* share: query heads that read this key-value head */
    int64_t key_dim, value_dim, gates;
    int64_t q_token, k_token, v_token, g_token, o_token;
    real scale;
    const real *q, *k, *v, *g;
    const uint8_t *reset, *valid;
    const real *grad_o; /* backward: gradient of the outputs, at the group's first token; else NULL */
    /* what is written: o, or backward the gradients of q, k, v (and of g per channel, else NULL) */
    const real *targets[4];
    int64_t target_token[4], target_width[4];
    int64_t ahead;      /* distance to the same token of the next chunk: CHUNK, or backward -CHUNK */
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
    real *q, *k, *v, *g; /* at the group's first token; g may be NULL */
};

/* Names a tensor that is written, rows of `width` values. */
INLINE void add_target(struct group *group, const real *first, int64_t token, int64_t width) {
    int i = 0;
    while (group->targets[i]) {
        i++;
    }
    group->targets[i] = first;
    group->target_token[i] = token;
    group->target_width[i] = width;
}

/* Asks for what the next chunk reads of a token, in step with the work on this chunk's, and for what this one
 * will write of it: requests in one heap would have to wait for each other. */
INLINE void prefetch_token(const struct group *group, const struct piece *piece, int64_t token) {
    const int64_t t = piece->first + token, next = t + group->ahead;
    for (int i = 0; i < 4 && group->targets[i] && token < piece->count; i++) {
        prefetch_target(group->targets[i] + t * group->target_token[i], group->target_width[i]);
    }
    if (next < 0 || next >= group->steps) {
        return;
    }
    prefetch_row(group->q + next * group->q_token, group->share * group->key_dim);
    prefetch_row(group->k + next * group->k_token, group->key_dim);
    prefetch_row(group->v + next * group->v_token, group->value_dim);
    if (group->gates > 1) {
        prefetch_row(group->g + next * group->g_token, group->gates);
    }
    if (group->grad_o) {
        prefetch_row(group->grad_o + next * group->o_token, group->share * group->value_dim);
    }
}

/* Row lengths of buffers: of keys and queries, of values, of tokens. */
struct rows {
    int64_t key, value, token;
};

INLINE struct rows rows_of(const struct group *group) {
    return (struct rows){padded(group->key_dim), padded(group->value_dim), padded(CHUNK)};
}

/* Whether a piece holds a gate that is none: NaN or above zero (minus infinity closes one). Asked after the work
 * on the piece, when its gates lie in the nearest cache. */
static int wrong_gates(const struct group *group, const struct piece *piece) {
    int wrong = 0;
    for (int64_t t = 0; group->g && t < piece->count; t++) {
        if (!piece->valid || piece->valid[t]) {
            wrong |= any_above_zero(group->gates, group->g + (piece->first + t) * group->g_token);
        }
    }
    return wrong;
}

/* Queries (scaled), keys and values of a piece; one decay per token, 1 where nothing decays. */
static void load_inputs(const struct group *group, const struct piece *piece, struct rows row, real *q, real *k,
                        real *v) {
    const int64_t first = piece->first;
    load_tokens(piece->count, piece->full, group->share, group->key_dim, group->scale,
                group->q + first * group->q_token, group->q_token, piece->valid, q, row.key);
    load_tokens(piece->count, piece->full, 1, group->key_dim, 1, group->k + first * group->k_token,
                group->k_token, piece->valid, k, row.key);
    load_tokens(piece->count, piece->full, 1, group->value_dim, 1, group->v + first * group->v_token,
                group->v_token, piece->valid, v, row.value);
}

static void load_head_decays(const struct group *group, const struct piece *piece, real *decay) {
    for (int64_t t = 0; t < piece->full; t++) {
        const int here = group->g && t < piece->count && (!piece->valid || piece->valid[t]);
        decay[t] = here ? exp_nonpositive(group->g[(piece->first + t) * group->g_token]) : (real)1;
    }
}

/* Rows of `share` per token times one number per token. */
static void scale_tokens(int64_t tokens, int64_t share, int64_t width, const real *by, real *x, int64_t row) {
    for (int64_t r = 0; r < tokens * share; r++) {
        scale_by(whole_vectors(width), x + r * row, by[r / share]);
    }
}

/* weights = (q k^T) P elementwise, keys in lanes [key][token], for one decay per token. */
static void kept_weights(const struct group *group, const struct piece *piece, int64_t share, const real *q,
                         int64_t q_row, const real *lanes, const real *kept, int64_t token, real *weights) {
    const int64_t full = piece->full, key_dim = group->key_dim;
    for (int64_t t = 0; t < full; t += LANES) {
        for (int i = 0; i < LANES; i++) {
            prefetch_token(group, piece, t + i);
        }
        product(LANES * share, t + LANES, key_dim, q + t * share * q_row, q_row, 1, lanes, token,
                weights + t * share * token, token, FORGET, NULL);
    }
    for (int64_t r = 0; r < full * share; r++) {
        scale_row(whole_vectors(r / share + 1), weights + r * token, kept + r / share * token);
    }
}

/* The gradient of kept_weights' last step, in place: grad becomes that of q k^T; pairs [tokens][token] get what
 * each pair of tokens passes to the decays between them. */
static void unkeep(int64_t full, int64_t share, const real *kept, const real *weights, int64_t token,
                   real *grad, real *pairs) {
    for (int64_t i = 0; i < full; i++) {
        for (int64_t j = 0; j < whole_vectors(i + 1); j += LANES) {
            const vector share_kept = vector_load(kept + i * token + j);
            vector sum = {0};
            for (int64_t r = i * share; r < (i + 1) * share; r++) {
                const vector here = vector_load(grad + r * token + j);
                sum = vector_multiply_add(here, vector_load(weights + r * token + j), sum);
                vector_store(grad + r * token + j, here * share_kept);
            }
            vector_store(pairs + i * token + j, sum);
        }
    }
}

/* Sum of the products of two states [key][value]. */
static real states_product(const struct group *group, int64_t row, const real *a, const real *b) {
    real all = 0;
    for (int64_t c = 0; c < group->key_dim; c++) {
        all += row_product(whole_vectors(group->value_dim), a + c * row, b + c * row);
    }
    return all;
}

/* grad q += grad (q k^T) k and grad k += its transpose times q, of the pairs that see each other. */
static void products_gradient(const struct piece *piece, int64_t share, int64_t key_dim, const real *grad,
                              int64_t token, const real *q, const real *k, int64_t key, real *grad_q,
                              real *grad_k) {
    for (int64_t t = 0; t < piece->full; t += LANES) {
        const real *here = grad + t * share * token;
        product(LANES * share, key_dim, t + LANES, here, token, 1, k, key, grad_q + t * share * key, key, ADD,
                NULL);
        product(LANES, key_dim, (piece->full - t) * share, here + t, 1, token, q + t * share * key, key,
                grad_k + t * key, key, ADD, NULL);
    }
}

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
