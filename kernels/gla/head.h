/* gla with one gate per head, or none: a piece forward and backward.
 *
 * The decays factor out of the products: weights are (q k^T) P elementwise (chunk.h).
 */
#ifndef SPIKELM_GLA_HEAD_H
#define SPIKELM_GLA_HEAD_H

#include "../group.h"

struct head {
    struct rows row;
    real *q;       /* [rows][key]: scaled queries */
    real *k;       /* [tokens][key] */
    real *v;       /* [tokens][value] */
    real *lanes;   /* [key][token]: keys */
    real *decay, *since, *until; /* [tokens] */
    real *kept;    /* [tokens][token]: P */
    real *total;   /* [key]: the decay of the piece, for every channel */
    real *weights; /* [rows][token] */
    real *o;       /* [rows][value] */
    real *state;   /* [key][value] */
};

struct head_backward {
    struct head forward;
    real *v_lanes;                        /* [value][token] */
    real *state_lanes, *grad_state_lanes; /* [value][key] */
    real *grad_state;                     /* [key][value]: after the piece, then before it */
    real *grad_o, *grad_weights, *grad_q, *grad_k, *grad_v;
    real *pairs;                          /* [tokens][token] */
};

static void take_head(struct head *own, const struct group *group, real **free) {
    const struct rows row = rows_of(group);
    own->row = row;
    own->q = take(free, CHUNK * group->share * row.key);
    own->k = take(free, CHUNK * row.key);
    own->v = take(free, CHUNK * row.value);
    own->lanes = take(free, group->key_dim * row.token);
    own->decay = take(free, CHUNK);
    own->since = take(free, CHUNK);
    own->until = take(free, CHUNK);
    own->kept = take(free, CHUNK * row.token);
    own->total = take(free, row.key);
    own->weights = take(free, CHUNK * group->share * row.token);
    own->o = take(free, CHUNK * group->share * row.value);
    own->state = take(free, group->key_dim * row.value);
}

static void take_head_backward(struct head_backward *own, const struct group *group, real **free) {
    take_head(&own->forward, group, free);
    const struct rows row = own->forward.row;
    own->v_lanes = take(free, group->value_dim * row.token);
    own->state_lanes = take(free, group->value_dim * row.key);
    own->grad_state_lanes = take(free, group->value_dim * row.key);
    own->grad_state = take(free, group->key_dim * row.value);
    own->grad_o = take(free, CHUNK * group->share * row.value);
    own->grad_weights = take(free, CHUNK * group->share * row.token);
    own->grad_q = take(free, CHUNK * group->share * row.key);
    own->grad_k = take(free, CHUNK * row.key);
    own->grad_v = take(free, CHUNK * row.value);
    own->pairs = take(free, CHUNK * row.token);
}

/* Loads a piece; decays, and weights of its tokens for each other. */
static void head_weights(const struct group *group, const struct piece *piece, const struct head *own) {
    const struct rows row = own->row;
    load_inputs(group, piece, row, own->q, own->k, own->v);
    load_head_decays(group, piece, own->decay);
    const real total = head_decays(piece->count, piece->full, own->decay, own->kept, row.token, own->since,
                                   own->until);
    for (int64_t c = 0; c < group->key_dim; c++) {
        own->total[c] = total;
    }
    transpose(piece->full, group->key_dim, own->k, row.key, own->lanes, row.token);
    kept_weights(group, piece, group->share, own->q, row.key, own->lanes, own->kept, row.token,
                 own->weights);
}

/* A piece from own->state on, which becomes the state after it. */
static void head_forward(const struct group *group, const struct piece *piece, const struct head *own, real *o) {
    const struct rows row = own->row;
    head_weights(group, piece, own);
    weighted_values(group, piece, own->weights, row.token, own->v, row.value, own->o);
    scale_tokens(piece->full, group->share, group->key_dim, own->since, own->q, row.key);
    product(piece->rows, group->value_dim, group->key_dim, own->q, row.key, 1, own->state, row.value, own->o,
            row.value, ADD, NULL);
    scale_tokens(piece->full, 1, group->value_dim, own->until, own->v, row.value);
    product(group->key_dim, group->value_dim, piece->count, own->lanes, row.token, 1, own->v, row.value,
            own->state, row.value, DECAY, own->total);
    store_tokens(piece->count, group->share, group->value_dim, 1, own->o, row.value, piece->valid,
                 o + piece->first * group->o_token, group->o_token);
}

/* The gradient of the gates, of grad q and grad k through the states alone; `all` past every token. */
static void head_gates(const struct group *group, const struct piece *piece, const struct head_backward *own,
                       real all, real *grad_g) {
    const struct head *forward = &own->forward;
    const int64_t width = whole_vectors(group->key_dim), key = forward->row.key;
    real from_start[CHUNK], to_end[CHUNK], grad[CHUNK];
    for (int64_t t = 0; t < piece->count; t++) {
        from_start[t] = 0;
        for (int64_t r = t * group->share; r < (t + 1) * group->share; r++) {
            from_start[t] += row_product(width, forward->q + r * key, own->grad_q + r * key);
        }
        to_end[t] = row_product(width, forward->k + t * key, own->grad_k + t * key);
    }
    head_gate_gradient(piece->count, own->pairs, forward->row.token, from_start, to_end, all, grad);
    for (int64_t t = 0; t < piece->count; t++) {
        grad_g[(piece->first + t) * group->g_token] = piece->valid && !piece->valid[t] ? (real)0 : grad[t];
    }
}

/* A piece that started from own->forward.state; own->grad_state goes from after it to before it. */
static void head_backward(const struct group *group, const struct piece *piece, const struct head_backward *own,
                          const struct gradients *grads) {
    const struct head *forward = &own->forward;
    const struct rows row = forward->row;
    const int64_t share = group->share, first = piece->first, keys = group->key_dim, values = group->value_dim;
    load_tokens(piece->count, piece->full, share, values, 1, group->grad_o + first * group->o_token, group->o_token,
                piece->valid, own->grad_o, row.value);
    head_weights(group, piece, forward);
    transpose(piece->full, values, forward->v, row.value, own->v_lanes, row.token);
    transpose(keys, values, forward->state, row.value, own->state_lanes, row.key);
    transpose(keys, values, own->grad_state, row.value, own->grad_state_lanes, row.key);
    weights_gradient(group, piece, own->grad_o, row.value, own->v_lanes, row.token, own->grad_weights, row.token);
    unkeep(piece->full, share, forward->kept, forward->weights, row.token, own->grad_weights, own->pairs);

    /* through the states */
    product(piece->rows, keys, values, own->grad_o, row.value, 1, own->state_lanes, row.key, own->grad_q,
            row.key, FORGET, NULL);
    scale_tokens(piece->full, share, keys, forward->since, own->grad_q, row.key);
    product(piece->full, keys, values, forward->v, row.value, 1, own->grad_state_lanes, row.key, own->grad_k,
            row.key, FORGET, NULL);
    scale_tokens(piece->full, 1, keys, forward->until, own->grad_k, row.key);
    product(piece->full, values, keys, forward->k, row.key, 1, own->grad_state, row.value, own->grad_v,
            row.value, FORGET, NULL);
    scale_tokens(piece->full, 1, values, forward->until, own->grad_v, row.value);
    if (grads->g) {
        const real all = states_product(group, row.value, forward->state, own->grad_state);
        head_gates(group, piece, own, all * forward->total[0], grads->g);
    }

    /* through the weights */
    values_gradient(group, piece, forward->weights, row.token, own->grad_o, row.value, own->grad_v);
    products_gradient(piece, share, keys, own->grad_weights, row.token, forward->q, forward->k, row.key,
                      own->grad_q, own->grad_k);
    scale_tokens(piece->full, share, values, forward->since, own->grad_o, row.value);
    product(keys, values, piece->rows, forward->q, 1, row.key, own->grad_o, row.value, own->grad_state,
            row.value, DECAY, forward->total);

    store_tokens(piece->count, share, keys, group->scale, own->grad_q, row.key, piece->valid,
                 grads->q + first * group->q_token, group->q_token);
    store_tokens(piece->count, 1, keys, 1, own->grad_k, row.key, piece->valid,
                 grads->k + first * group->k_token, group->k_token);
    store_tokens(piece->count, 1, values, 1, own->grad_v, row.value, piece->valid,
                 grads->v + first * group->v_token, group->v_token);
}

#endif
