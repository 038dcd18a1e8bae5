/* gated_delta: a piece backward.
 *
 * The forward pass of the piece is repeated from the state before it. With u = R + N u (N strictly lower
 * triangular, the system) the gradient of R solves the transposed system, that of N is grad R u^T. The gradient
 * of a log decay is the sum over the paths that cross its token (chunk.h), so nothing has to cancel.
 */
#ifndef SPIKELM_GATED_DELTA_BACKWARD_H
#define SPIKELM_GATED_DELTA_BACKWARD_H

#include "piece.h"

struct delta_gradients {
    real *q, *k, *v, *g, *beta; /* at the group's first token */
};

struct delta_backward {
    struct delta forward;
    real *written_lanes;                  /* [value][token] */
    real *state_lanes, *grad_state_lanes; /* [value][key] */
    real *grad_state;                     /* [key][value]: after the piece, then before it */
    real *grad_o, *grad_weights, *grad_system, *grad_written;
    real *grad_known; /* [tokens][value] */
    real *grad_q, *grad_k, *grad_v;
    real *pairs; /* [tokens][token] */
    real *grad_beta, *grad_g, *from_start, *to_end; /* [tokens] */
};

static void take_delta_backward(struct delta_backward *own, const struct group *group, real **free) {
    take_delta(&own->forward, group, free);
    const struct rows row = own->forward.row;
    own->written_lanes = take(free, group->value_dim * row.token);
    own->state_lanes = take(free, group->value_dim * row.key);
    own->grad_state_lanes = take(free, group->value_dim * row.key);
    own->grad_state = take(free, group->key_dim * row.value);
    own->grad_o = take(free, CHUNK * group->share * row.value);
    own->grad_weights = take(free, CHUNK * group->share * row.token);
    own->grad_system = take(free, CHUNK * row.token);
    own->grad_written = take(free, CHUNK * row.value);
    own->grad_known = take(free, CHUNK * row.value);
    own->grad_q = take(free, CHUNK * group->share * row.key);
    own->grad_k = take(free, CHUNK * row.key);
    own->grad_v = take(free, CHUNK * row.value);
    own->pairs = take(free, CHUNK * row.token);
    own->grad_beta = take(free, CHUNK);
    own->grad_g = take(free, CHUNK);
    own->from_start = take(free, CHUNK);
    own->to_end = take(free, CHUNK);
}

/* From the gradient of R (in grad_written): gradients of v, of what was known, of beta and of k k^T (in
 * grad_system); pairs get what the system passes to the decays. */
static void strengths_gradient(const struct group *group, const struct piece *piece,
                               const struct delta_backward *own) {
    const struct delta *forward = &own->forward;
    const struct rows row = forward->row;
    const int64_t width = whole_vectors(group->value_dim);
    for (int64_t i = 0; i < piece->full; i++) {
        const real *grad = own->grad_written + i * row.value, *v = forward->v + i * row.value;
        const real *known = forward->known + i * row.value;
        const real *overlap = forward->overlap + i * row.token, *kept = forward->kept + i * row.token;
        real *grad_system = own->grad_system + i * row.token, *pairs = own->pairs + i * row.token;
        real from_system = 0;
        for (int64_t j = 0; j < i; j++) {
            const real both = grad_system[j] * overlap[j];
            from_system += both;
            pairs[j] -= forward->beta[i] * both;
            grad_system[j] *= -forward->beta[i] * kept[j];
        }
        for (int64_t j = i; j < whole_vectors(i + 1); j++) {
            grad_system[j] = 0;
        }
        own->grad_beta[i] = row_product(width, grad, v) - row_product(width, grad, known) - from_system;
        for (int64_t c = 0; c < width; c += LANES) {
            const vector here = vector_of(forward->beta[i]) * vector_load(grad + c);
            vector_store(own->grad_v + i * row.value + c, here);
            vector_store(own->grad_known + i * row.value + c, -here);
        }
    }
}

/* Gradients through the tokens' weights for each other, and of what the tokens write. */
static void through_system(const struct group *group, const struct piece *piece,
                           const struct delta_backward *own) {
    const struct delta *forward = &own->forward;
    const struct rows row = forward->row;
    const int64_t keys = group->key_dim, values = group->value_dim;
    product(piece->full, values, keys, forward->k, row.key, 1, own->grad_state, row.value, own->grad_written,
            row.value, FORGET, NULL);
    scale_tokens(piece->full, 1, values, forward->until, own->grad_written, row.value);
    values_gradient(group, piece, forward->weights, row.token, own->grad_o, row.value, own->grad_written);
    transpose(piece->full, values, forward->written, row.value, own->written_lanes, row.token);
    weights_gradient(group, piece, own->grad_o, row.value, own->written_lanes, row.token, own->grad_weights,
                     row.token);
    unkeep(piece->full, group->share, forward->kept, forward->weights, row.token, own->grad_weights, own->pairs);
    solve_transposed(piece->full, values, forward->system, row.token, own->grad_written, row.value);
    for (int64_t t = 0; t < piece->full; t += LANES) {
        product(LANES, t + LANES, values, own->grad_written + t * row.value, row.value, 1, own->written_lanes,
                row.token, own->grad_system + t * row.token, row.token, FORGET, NULL);
    }
    strengths_gradient(group, piece, own);
}

/* A piece that started from own->forward.state; own->grad_state goes from after it to before it. */
static void delta_backward(const struct group *group, const struct piece *piece,
                           const struct delta_backward *own, const real *beta, int64_t beta_token,
                           const struct delta_gradients *grads) {
    const struct delta *forward = &own->forward;
    const struct rows row = forward->row;
    const int64_t share = group->share, first = piece->first, keys = group->key_dim, values = group->value_dim;
    load_tokens(piece->count, piece->full, share, values, 1, group->grad_o + first * group->o_token,
                group->o_token, piece->valid, own->grad_o, row.value);
    delta_writes(group, piece, forward, beta, beta_token);
    transpose(keys, values, forward->state, row.value, own->state_lanes, row.key);
    transpose(keys, values, own->grad_state, row.value, own->grad_state_lanes, row.key);
    through_system(group, piece, own);

    /* through the states */
    const int64_t key_width = whole_vectors(keys), value_width = whole_vectors(values);
    product(piece->rows, keys, values, own->grad_o, row.value, 1, own->state_lanes, row.key, own->grad_q,
            row.key, FORGET, NULL);
    scale_tokens(piece->full, share, keys, forward->since, own->grad_q, row.key);
    product(piece->full, keys, values, forward->written, row.value, 1, own->grad_state_lanes, row.key,
            own->grad_k, row.key, FORGET, NULL);
    scale_tokens(piece->full, 1, keys, forward->until, own->grad_k, row.key);
    for (int64_t t = 0; t < piece->full; t++) {
        real sum = row_product(value_width, forward->known + t * row.value, own->grad_known + t * row.value);
        for (int64_t r = t * share; r < (t + 1) * share; r++) {
            sum += row_product(key_width, forward->q + r * row.key, own->grad_q + r * row.key);
        }
        own->from_start[t] = sum;
        own->to_end[t] = row_product(key_width, forward->k + t * row.key, own->grad_k + t * row.key);
    }
    const real all = forward->total[0] * states_product(group, row.value, forward->state, own->grad_state);
    head_gate_gradient(piece->count, own->pairs, row.token, own->from_start, own->to_end, all, own->grad_g);
    scale_tokens(piece->full, 1, values, forward->since, own->grad_known, row.value);
    product(piece->full, keys, values, own->grad_known, row.value, 1, own->state_lanes, row.key, own->grad_k,
            row.key, ADD, NULL);

    /* through the weights: of queries for keys, and of keys for keys */
    products_gradient(piece, share, keys, own->grad_weights, row.token, forward->q, forward->k, row.key,
                      own->grad_q, own->grad_k);
    for (int64_t t = 0; t < piece->full; t += LANES) {
        const real *grad = own->grad_system + t * row.token;
        product(LANES, keys, t + LANES, grad, row.token, 1, forward->k, row.key, own->grad_k + t * row.key,
                row.key, ADD, NULL);
        product(LANES, keys, piece->full - t, grad + t, 1, row.token, forward->k + t * row.key, row.key,
                own->grad_k + t * row.key, row.key, ADD, NULL);
    }

    scale_tokens(piece->full, share, values, forward->since, own->grad_o, row.value);
    product(keys, values, piece->rows, forward->q, 1, row.key, own->grad_o, row.value, own->grad_state,
            row.value, DECAY, forward->total);
    product(keys, values, piece->full, forward->k, 1, row.key, own->grad_known, row.value, own->grad_state,
            row.value, ADD, NULL);

    store_tokens(piece->count, share, keys, group->scale, own->grad_q, row.key, piece->valid,
                 grads->q + first * group->q_token, group->q_token);
    store_tokens(piece->count, 1, keys, 1, own->grad_k, row.key, piece->valid,
                 grads->k + first * group->k_token, group->k_token);
    store_tokens(piece->count, 1, values, 1, own->grad_v, row.value, piece->valid,
                 grads->v + first * group->v_token, group->v_token);
    store_tokens(piece->count, 1, 1, 1, own->grad_g, 1, piece->valid, grads->g + first * group->g_token,
                 group->g_token);
    store_tokens(piece->count, 1, 1, 1, own->grad_beta, 1, piece->valid, grads->beta + first * beta_token,
                 beta_token);
}

#endif
