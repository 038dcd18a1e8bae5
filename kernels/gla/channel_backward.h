/* gla with a gate per key channel: a piece backward.
 *
 * The forward pass of the piece is repeated from the state before it; then the joins are undone from the largest
 * to the smallest, and the blocks last. The gradient of a log gate is summed over the paths that cross its
 * token, at every level the products x grad x of what a decay multiplied: queries of right blocks from their
 * block's start on (running sums from the right), keys of left blocks to their block's end (running sums from
 * the left), and pairs within a block one by one. Nothing that does not cross a token enters its sum, so that
 * nothing has to cancel, however strong the decay.
 */
#ifndef SPIKELM_GLA_CHANNEL_BACKWARD_H
#define SPIKELM_GLA_CHANNEL_BACKWARD_H

#include "channel.h"

struct channel_backward {
    struct channel forward;
    struct joins joins;
    real *q;               /* [rows][key]: scaled queries as they came */
    real *k;               /* [tokens][key]: keys, decayed to their block's end */
    real *until;           /* [tokens][key]: products of decays to the end of a block of LANES tokens */
    real *v_lanes;         /* [value][token] */
    real *state_lanes;     /* [value][key] */
    real *grad_state_lanes;
    real *grad_state;      /* [key][value]: after the piece, then before it */
    real *grad_o, *grad_weights, *grad_q, *grad_k, *grad_v, *grad_g;
    real *part;            /* [rows][key]: what one join contributes */
};

static void take_channel_backward(struct channel_backward *own, const struct group *group, real **free) {
    take_channel(&own->forward, group, free);
    const struct rows row = own->forward.row;
    const int64_t queries = CHUNK * group->share * row.key, keys = CHUNK * row.key;
    int round = 0;
    for (int64_t size = LANES; size < CHUNK; size *= 2, round++) {
        own->joins.q[round] = take(free, queries);
        own->joins.k[round] = take(free, keys);
        own->joins.total[round] = take(free, CHUNK / LANES * row.key);
    }
    own->q = take(free, queries);
    own->k = take(free, keys);
    own->until = take(free, keys);
    own->v_lanes = take(free, group->value_dim * row.token);
    own->state_lanes = take(free, group->value_dim * row.key);
    own->grad_state_lanes = take(free, group->value_dim * row.key);
    own->grad_state = take(free, group->key_dim * row.value);
    own->grad_o = take(free, CHUNK * group->share * row.value);
    own->grad_weights = take(free, CHUNK * group->share * row.token);
    own->grad_q = take(free, queries);
    own->grad_k = take(free, keys);
    own->grad_v = take(free, CHUNK * row.value);
    own->grad_g = take(free, keys);
    own->part = take(free, queries);
}

/* Keys decayed to the end of their blocks of LANES tokens, then through the joins, which backward keeps. */
static void decay_keys(const struct piece *piece, int64_t width, const struct channel_backward *own) {
    const int64_t key = own->forward.row.key;
    for (int64_t start = 0; start < piece->full; start += LANES) {
        for (int i = LANES - 1; i >= 0; i--) {
            real *until = own->until + (start + i) * key;
            for (int64_t c = 0; c < width; c += LANES) {
                vector_store(until + c, i == LANES - 1 ? vector_of(1)
                                                       : vector_load(until + key + c)
                                                             * vector_load(own->forward.decay + (start + i + 1) * key + c));
            }
            copy_row(width, own->forward.k + (start + i) * key, own->k + (start + i) * key);
            scale_row(width, own->k + (start + i) * key, until);
        }
    }
    int round = 0;
    for (int64_t size = LANES; size < piece->full; size *= 2, round++) {
        for (int64_t left = 0; left + size < piece->full; left += 2 * size) {
            const real *total_right = own->joins.total[round] + (left + size) / LANES * key;
            store_rows(size, width, own->k + left * key, key, own->joins.k[round] + left * key, key);
            for (int64_t t = left; t < left + size; t++) {
                scale_row(width, own->k + t * key, total_right);
            }
        }
    }
}

/* grad g[t] += sum of x grad_x over the rows of tokens >= t. */
static void sum_from_right(int64_t tokens, int64_t share, int64_t width, int64_t row, const real *restrict x,
                           const real *restrict grad_x, real *restrict grad_g) {
    for (int64_t c = 0; c < width; c += LANES) {
        vector sum = {0};
        for (int64_t t = tokens - 1; t >= 0; t--) {
            for (int64_t r = t * share; r < (t + 1) * share; r++) {
                sum = vector_multiply_add(vector_load(x + r * row + c), vector_load(grad_x + r * row + c), sum);
            }
            vector_store(grad_g + t * row + c, vector_load(grad_g + t * row + c) + sum);
        }
    }
}

/* grad g[t] += sum of x grad_x over tokens < t. */
static void sum_from_left(int64_t tokens, int64_t width, int64_t row, const real *restrict x,
                          const real *restrict grad_x, real *restrict grad_g) {
    for (int64_t c = 0; c < width; c += LANES) {
        vector sum = {0};
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t at = t * row + c;
            vector_store(grad_g + at, vector_load(grad_g + at) + sum);
            sum = vector_multiply_add(vector_load(x + at), vector_load(grad_x + at), sum);
        }
    }
}

/* grad[r] = grad[r] decay + part[r] */
static void decay_and_add(int64_t rows, int64_t width, int64_t row, const real *restrict decay,
                          const real *restrict part, real *restrict grad) {
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < width; c += LANES) {
            const int64_t at = r * row + c;
            vector_store(grad + at, vector_multiply_add(vector_load(grad + at), vector_load(decay + c),
                                                        vector_load(part + at)));
        }
    }
}

/* The gradient of one round of join_blocks. */
static void unjoin_blocks(const struct group *group, const struct piece *piece,
                          const struct channel_backward *own, int64_t size, int round) {
    const int64_t width = whole_vectors(group->key_dim), share = group->share;
    const int64_t key = own->forward.row.key, token = own->forward.row.token;
    for (int64_t left = 0; left + size < piece->full; left += 2 * size) {
        const int64_t right = left + size, end = right + size < piece->full ? right + size : piece->full;
        const int64_t rows = (end - right) * share;
        const real *grad = own->grad_weights + right * share * token + left;
        const real *q = own->joins.q[round] + right * share * key, *k = own->joins.k[round] + left * key;
        const real *total_left = own->joins.total[round] + left / LANES * key;
        const real *total_right = own->joins.total[round] + right / LANES * key;
        product(rows, group->key_dim, size, grad, token, 1, k, key, own->part, key, FORGET, NULL);
        sum_from_right(end - right, share, width, key, q, own->part, own->grad_g + right * key);
        decay_and_add(rows, width, key, total_left, own->part, own->grad_q + right * share * key);
        product(size, group->key_dim, rows, grad, 1, token, q, key, own->part, key, FORGET, NULL);
        sum_from_left(size, width, key, k, own->part, own->grad_g + left * key);
        decay_and_add(size, width, key, total_right, own->part, own->grad_k + left * key);
    }
}

/* The gradient of block_weights: one block of LANES tokens and one vector of channels. */
static void unmake_block(int64_t share, int64_t key, int64_t token, const real *restrict decay,
                         const real *restrict since, const real *restrict until, const real *restrict q,
                         const real *restrict k, const real *restrict grad, real *restrict grad_q,
                         real *restrict grad_k, real *restrict grad_g) {
    vector path[LANES], decayed[LANES], through[LANES], to_key[LANES];
    for (int j = 0; j < LANES; j++) {
        to_key[j] = vector_load(grad_k + j * key) * vector_load(until + j * key);
    }
    for (int i = 0; i < LANES; i++) {
        const vector now = vector_load(decay + i * key);
        for (int j = 0; j < i; j++) {
            path[j] *= now;
            decayed[j] = path[j] * vector_load(k + j * key);
            through[j] = (vector){0};
        }
        path[i] = vector_of(1);
        decayed[i] = vector_load(k + i * key);
        through[i] = (vector){0};
        for (int64_t r = i * share; r < (i + 1) * share; r++) {
            const vector query = vector_load(q + r * key);
            vector sum = vector_load(grad_q + r * key) * vector_load(since + i * key);
            for (int j = 0; j <= i; j++) {
                const vector weight = vector_of(grad[r * token + j]);
                sum = vector_multiply_add(weight, decayed[j], sum);
                through[j] = vector_multiply_add(weight, query, through[j]);
            }
            vector_store(grad_q + r * key, sum);
        }
        vector crossing = {0};
        for (int j = 0; j < i; j++) {
            to_key[j] = vector_multiply_add(through[j], path[j], to_key[j]);
            crossing = vector_multiply_add(through[j], decayed[j], crossing);
            vector_store(grad_g + (j + 1) * key, vector_load(grad_g + (j + 1) * key) + crossing);
        }
        to_key[i] += through[i];
    }
    for (int j = 0; j < LANES; j++) {
        vector_store(grad_k + j * key, to_key[j]);
    }
}

/* What the state before the piece and the state after it pass to queries, keys and gates; and the gradient of
 * the state, from after the piece to before it. */
static void through_states(const struct group *group, const struct piece *piece,
                           const struct channel_backward *own) {
    const struct channel *forward = &own->forward;
    const struct rows row = forward->row;
    const int64_t width = whole_vectors(group->key_dim), values = group->value_dim, keys = group->key_dim;
    transpose(keys, values, forward->state, row.value, own->state_lanes, row.key);
    transpose(keys, values, own->grad_state, row.value, own->grad_state_lanes, row.key);
    product(piece->rows, keys, values, own->grad_o, row.value, 1, own->state_lanes, row.key, own->grad_q,
            row.key, FORGET, NULL);
    product(piece->full, keys, values, forward->v, row.value, 1, own->grad_state_lanes, row.key, own->grad_k,
            row.key, FORGET, NULL);
    for (int64_t c = 0; c < width; c += LANES) {
        vector all = {0};
        for (int64_t v = 0; v < values; v++) {
            all = vector_multiply_add(vector_load(own->state_lanes + v * row.key + c),
                                      vector_load(own->grad_state_lanes + v * row.key + c), all);
        }
        all *= vector_load(forward->total + c);
        for (int64_t t = 0; t < piece->full; t++) {
            vector_store(own->grad_g + t * row.key + c, all);
        }
    }
    sum_from_right(piece->full, group->share, width, row.key, forward->q, own->grad_q, own->grad_g);
    sum_from_left(piece->full, width, row.key, own->k, own->grad_k, own->grad_g);
    product(piece->full, values, keys, own->k, row.key, 1, own->grad_state, row.value, own->grad_v, row.value,
            FORGET, NULL);
    product(keys, values, piece->rows, forward->q, 1, row.key, own->grad_o, row.value, own->grad_state,
            row.value, DECAY, forward->total);
}

/* A piece that started from own->forward.state; own->grad_state goes from after it to before it. */
static void channel_backward(const struct group *group, const struct piece *piece,
                             const struct channel_backward *own, const struct gradients *grads) {
    const struct channel *forward = &own->forward;
    const struct rows row = forward->row;
    const int64_t width = whole_vectors(group->key_dim), share = group->share, first = piece->first;
    load_tokens(piece->count, piece->full, share, group->value_dim, 1, group->grad_o + first * group->o_token,
                group->o_token, piece->valid, own->grad_o, row.value);
    load_tokens(piece->count, piece->full, share, group->key_dim, group->scale, group->q + first * group->q_token,
                group->q_token, piece->valid, own->q, row.key);
    channel_weights(group, piece, forward, &own->joins);
    decay_keys(piece, width, own);
    through_states(group, piece, own);
    transpose(piece->full, group->value_dim, forward->v, row.value, own->v_lanes, row.token);
    weights_gradient(group, piece, own->grad_o, row.value, own->v_lanes, row.token, own->grad_weights, row.token);
    values_gradient(group, piece, forward->weights, row.token, own->grad_o, row.value, own->grad_v);
    int round = 0;
    for (int64_t size = LANES; size < piece->full; size *= 2) {
        round++;
    }
    for (int64_t size = (int64_t)LANES << round; round-- > 0;) {
        size /= 2;
        unjoin_blocks(group, piece, own, size, round);
    }
    for (int64_t t = 0; t < piece->full; t += LANES) {
        for (int64_t c = 0; c < width; c += LANES) {
            const int64_t at = t * row.key + c, query = t * share * row.key + c;
            unmake_block(share, row.key, row.token, forward->decay + at, forward->since + at, own->until + at,
                         own->q + query, forward->k + at, own->grad_weights + t * share * row.token + t,
                         own->grad_q + query, own->grad_k + at, own->grad_g + at);
        }
    }
    store_tokens(piece->count, share, group->key_dim, group->scale, own->grad_q, row.key, piece->valid,
                 grads->q + first * group->q_token, group->q_token);
    store_tokens(piece->count, 1, group->key_dim, 1, own->grad_k, row.key, piece->valid,
                 grads->k + first * group->k_token, group->k_token);
    store_tokens(piece->count, 1, group->value_dim, 1, own->grad_v, row.value, piece->valid,
                 grads->v + first * group->v_token, group->v_token);
    store_tokens(piece->count, 1, group->key_dim, 1, own->grad_g, row.key, piece->valid,
                 grads->g + first * group->g_token, group->g_token);
}

#endif
