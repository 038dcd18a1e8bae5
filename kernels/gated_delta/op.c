/* gated_delta: the gated delta rule, forward and backward (equations in reference.py).
 *
 * Layout: q [B][T][H][K], k [B][T][G][K], v [B][T][G][V], g and beta [B][T][G], o [B][T][H][V], states
 * [B][G][K][V]. A task is one key-value head of one sequence with all the query heads that share it; tasks are
 * independent, so the bits depend neither on the number of threads nor on the rest of the batch.
 *
 * A task walks its chunks (chunk.h). Token i of a chunk that starts from the state S writes k_i^T u_i with
 *     u_i = beta_i (v_i - exp(D_i) k_i S - sum_{j<i} P_ij (k_i k_j^T) u_j)
 * (chunked.py); the system is solved for the u at once, as S is known, by forward substitution in blocks. Then
 *     o = ((q k^T) P) u + q~ S          S <- (decay of the chunk) S + k~^T u
 * as products of small matrices that stay in the caches (matrix.h). Training keeps the state at the start of
 * every chunk, K V values per CHUNK tokens; backward walks the chunks from the last to the first and forms
 * everything else again.
 */
#include "backward.h"
#include "step.h"

static struct group group_of(int64_t steps, int64_t heads, int64_t groups, int64_t key_dim, int64_t value_dim,
                             int64_t task, double scale, const real *q, const real *k, const real *v,
                             const real *g, const uint8_t *reset, const uint8_t *valid) {
    const int64_t row = task / groups, head = task % groups, at = row * steps, share = heads / groups;
    struct group group = {.steps = steps,
                          .share = share,
                          .key_dim = key_dim,
                          .value_dim = value_dim,
                          .gates = 1,
                          .q_token = heads * key_dim,
                          .k_token = groups * key_dim,
                          .v_token = groups * value_dim,
                          .g_token = groups,
                          .o_token = heads * value_dim,
                          .scale = (real)scale,
                          .reset = reset ? reset + at : NULL,
                          .valid = valid ? valid + at : NULL,
                          .ahead = CHUNK};
    group.q = q + at * group.q_token + head * share * key_dim;
    group.k = k + at * group.k_token + head * key_dim;
    group.v = v + at * group.v_token + head * value_dim;
    group.g = g + at * group.g_token + head;
    return group;
}

/* Whether a write strength of a piece is NaN or infinite. */
static int wrong_strengths(const struct group *group, const struct piece *piece, const real *beta) {
    int wrong = 0;
    for (int64_t t = 0; t < piece->count; t++) {
        if (!piece->valid || piece->valid[t]) {
            wrong |= any_not_finite(1, beta + (piece->first + t) * group->g_token);
        }
    }
    return wrong;
}

/* Returns whether a gate or a strength is none (see wrong_gates). */
static int forward_group(const struct group *group, const struct delta *own, const real *beta,
                         const real *state_in, real *o, real *state_out, real *states) {
    int wrong = 0;
    const struct rows row = own->row;
    const int64_t keys = group->key_dim, values = group->value_dim;
    load_rows(keys, values, state_in, values, own->state, row.value);
    for (int64_t start = 0; start < group->steps; start += CHUNK) {
        const int64_t last = start + CHUNK < group->steps ? start + CHUNK : group->steps;
        if (states) {
            store_rows(keys, values, own->state, row.value, states, values);
            states += keys * values;
        }
        for (int64_t first = start; first < last;) {
            const struct piece piece = piece_of(group, first, piece_end(group->reset, first, last));
            if (group->reset && group->reset[first]) {
                memset(own->state, 0, (size_t)(keys * row.value) * sizeof(real));
            }
            delta_forward(group, &piece, own, beta, group->g_token, o);
            wrong |= wrong_gates(group, &piece) | wrong_strengths(group, &piece, beta);
            first += piece.count;
        }
    }
    store_rows(keys, values, own->state, row.value, state_out, values);
    return wrong;
}

/* The pieces of one chunk from the last to the first; `state_in` is the one at the chunk's start. */
static void backward_chunk(const struct group *group, const struct delta_backward *own, const real *beta,
                           int64_t start, int64_t last, const real *state_in,
                           const struct delta_gradients *grads) {
    const int64_t keys = group->key_dim, values = group->value_dim, row = own->forward.row.value;
    int64_t starts[CHUNK + 1], pieces = 0;
    for (int64_t first = start; first < last; first = piece_end(group->reset, first, last)) {
        starts[pieces++] = first;
    }
    starts[pieces] = last;
    while (pieces-- > 0) {
        const struct piece piece = piece_of(group, starts[pieces], starts[pieces + 1]);
        const int empty = group->reset && group->reset[piece.first];
        if (empty) {
            memset(own->forward.state, 0, (size_t)(keys * row) * sizeof(real));
        } else {
            load_rows(keys, values, state_in, values, own->forward.state, row);
        }
        delta_backward(group, &piece, own, beta, group->g_token, grads);
        if (empty) {
            memset(own->grad_state, 0, (size_t)(keys * row) * sizeof(real));
        }
    }
}

/* One token: no chunk, the same bits as the step of a decode plan. */
static int step_group(const struct group *group, const real *beta, const real *state_in, real *o,
                      real *state_out) {
    const struct piece piece = piece_of(group, 0, 1);
    const size_t size = (size_t)(group->key_dim * group->value_dim) * sizeof(real);
    if (group->reset && group->reset[0]) {
        memset(state_out, 0, size);
    } else {
        memcpy(state_out, state_in, size);
    }
    if (group->valid && !group->valid[0]) {
        memset(o, 0, (size_t)(group->share * group->value_dim) * sizeof(real));
    } else {
        gated_delta_step_group(group->share, group->key_dim, group->value_dim, group->scale, group->q, group->k,
                               group->v, group->g[0], beta[0], state_out, o);
    }
    return wrong_gates(group, &piece) | wrong_strengths(group, &piece, beta);
}

/* Values of scratch that one thread needs. */
int64_t gated_delta_scratch(int64_t heads, int64_t groups, int64_t key_dim, int64_t value_dim, int backward) {
    struct delta_backward own;
    real origin[1], *free = origin;
    const struct group group = {.share = heads / groups, .key_dim = key_dim, .value_dim = value_dim};
    if (backward) {
        take_delta_backward(&own, &group, &free);
    } else {
        take_delta(&own.forward, &group, &free);
    }
    return free - origin;
}

/* states [B][G][chunks][K][V], those at the chunks' starts, may be NULL; scratch [threads][scratch_size].
 * Returns whether at a valid token g is NaN or above zero, or beta not finite: the results are then of no use. */
int gated_delta_forward(int64_t batch, int64_t steps, int64_t heads, int64_t groups, int64_t key_dim,
                        int64_t value_dim, double scale, const real *q, const real *k, const real *v,
                        const real *g, const real *beta, const real *state_in, const uint8_t *reset,
                        const uint8_t *valid, real *o, real *state_out, real *states, real *scratch,
                        int64_t scratch_size, int threads) {
    const int64_t size = key_dim * value_dim, chunks = (steps + CHUNK - 1) / CHUNK;
    int wrong = 0;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) reduction(| : wrong)
    for (int64_t task = 0; task < batch * groups; task++) {
        struct group group =
            group_of(steps, heads, groups, key_dim, value_dim, task, scale, q, k, v, g, reset, valid);
        const int64_t row = task / groups, head = task % groups;
        const real *strength = beta + row * steps * groups + head, *state = state_in + task * size;
        real *o_group = o + row * steps * group.o_token + head * group.share * value_dim;
        real *kept = states ? states + task * chunks * size : NULL;
        add_target(&group, o_group, group.o_token, group.share * value_dim);
        if (steps == 1) {
            wrong |= step_group(&group, strength, state, o_group, state_out + task * size);
            if (kept) {
                memcpy(kept, state, (size_t)size * sizeof(real));
            }
            continue;
        }
        struct delta own;
        real *free = scratch + thread_number() * scratch_size;
        take_delta(&own, &group, &free);
        wrong |= forward_group(&group, &own, strength, state, o_group, state_out + task * size, kept);
    }
    return wrong;
}

void gated_delta_backward(int64_t batch, int64_t steps, int64_t heads, int64_t groups, int64_t key_dim,
                          int64_t value_dim, double scale, const real *q, const real *k, const real *v,
                          const real *g, const real *beta, const uint8_t *reset, const uint8_t *valid,
                          const real *states, const real *grad_o, const real *grad_state_out, real *grad_q,
                          real *grad_k, real *grad_v, real *grad_g, real *grad_beta, real *grad_state_in,
                          real *scratch, int64_t scratch_size, int threads) {
    const int64_t size = key_dim * value_dim, chunks = (steps + CHUNK - 1) / CHUNK;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < batch * groups; task++) {
        struct group group =
            group_of(steps, heads, groups, key_dim, value_dim, task, scale, q, k, v, g, reset, valid);
        const int64_t row = task / groups, head = task % groups, at = row * steps;
        const struct delta_gradients grads = {.q = grad_q + at * group.q_token + head * group.share * key_dim,
                                              .k = grad_k + at * group.k_token + head * key_dim,
                                              .v = grad_v + at * group.v_token + head * value_dim,
                                              .g = grad_g + at * groups + head,
                                              .beta = grad_beta + at * groups + head};
        add_target(&group, grads.q, group.q_token, group.share * key_dim);
        add_target(&group, grads.k, group.k_token, key_dim);
        add_target(&group, grads.v, group.v_token, value_dim);
        group.grad_o = grad_o + at * group.o_token + head * group.share * value_dim;
        group.ahead = -CHUNK;
        struct delta_backward own;
        real *free = scratch + thread_number() * scratch_size;
        take_delta_backward(&own, &group, &free);
        load_rows(key_dim, value_dim, grad_state_out + task * size, value_dim, own.grad_state,
                  own.forward.row.value);
        for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
            const int64_t start = chunk * CHUNK, last = start + CHUNK < steps ? start + CHUNK : steps;
            backward_chunk(&group, &own, beta + at * groups + head, start, last,
                           states + (task * chunks + chunk) * size, &grads);
        }
        store_rows(key_dim, value_dim, own.grad_state, own.forward.row.value, grad_state_in + task * size,
                   value_dim);
    }
}
