/* gla: gated linear attention, forward and backward (equations in reference.py).
 *
 * Layout: q [B][T][H][K], k [B][T][G][K], v [B][T][G][V], g [B][T][G][gates] (gates: 0 none, 1 per head, K per
 * key channel), o [B][T][H][V], states [B][G][K][V]. A task is one key-value head of one sequence with all the
 * query heads that share it; tasks are independent, so the bits depend neither on the number of threads nor on
 * the rest of the batch.
 *
 * A task walks its chunks (chunk.h). In a chunk the weights W of its tokens for each other are formed, then
 *     o = W v + q~ S          S <- (decay of the chunk) S + k~^T v
 * with queries q~ decayed from the chunk's start and keys k~ decayed to its end, as products of small matrices
 * that stay in the caches (matrix.h). Training keeps the state at the start of every chunk, K V values per
 * CHUNK tokens; backward walks the chunks from the last to the first and forms everything else again.
 */
#include "channel_backward.h"
#include "head.h"
#include "step.h"

struct sizes {
    int64_t batch, steps, heads, groups, key_dim, value_dim, gates;
};

/* A thread's buffers for the kind of gate at hand. */
struct own {
    struct channel_backward channel;
    struct head_backward head;
};

INLINE int by_channel(const struct sizes *sizes) { return sizes->gates > 1; }

static int64_t take_own(struct own *own, const struct group *group, int by_channel, int backward, real *scratch) {
    real *free = scratch;
    if (by_channel && backward) {
        take_channel_backward(&own->channel, group, &free);
    } else if (by_channel) {
        take_channel(&own->channel.forward, group, &free);
    } else if (backward) {
        take_head_backward(&own->head, group, &free);
    } else {
        take_head(&own->head.forward, group, &free);
    }
    return free - scratch;
}

static struct group group_of(const struct sizes *sizes, int64_t task, double scale, const real *q, const real *k,
                             const real *v, const real *g, const uint8_t *reset, const uint8_t *valid) {
    const int64_t row = task / sizes->groups, head = task % sizes->groups, at = row * sizes->steps;
    const int64_t share = sizes->heads / sizes->groups;
    struct group group = {.steps = sizes->steps,
                          .share = share,
                          .key_dim = sizes->key_dim,
                          .value_dim = sizes->value_dim,
                          .gates = sizes->gates,
                          .q_token = sizes->heads * sizes->key_dim,
                          .k_token = sizes->groups * sizes->key_dim,
                          .v_token = sizes->groups * sizes->value_dim,
                          .g_token = sizes->groups * sizes->gates,
                          .o_token = sizes->heads * sizes->value_dim,
                          .scale = (real)scale,
                          .reset = reset ? reset + at : NULL,
                          .valid = valid ? valid + at : NULL,
                          .ahead = CHUNK};
    group.q = q + at * group.q_token + head * share * sizes->key_dim;
    group.k = k + at * group.k_token + head * sizes->key_dim;
    group.v = v + at * group.v_token + head * sizes->value_dim;
    group.g = g ? g + at * group.g_token + head * sizes->gates : NULL;
    return group;
}

/* Returns whether a gate is none (see wrong_gates). */
static int forward_group(const struct group *group, const struct own *own, int by_channel, const real *state_in,
                         real *o, real *state_out, real *states) {
    int wrong = 0;
    const struct rows row = rows_of(group);
    const int64_t size = group->key_dim * group->value_dim;
    real *state = by_channel ? own->channel.forward.state : own->head.forward.state;
    load_rows(group->key_dim, group->value_dim, state_in, group->value_dim, state, row.value);
    for (int64_t start = 0; start < group->steps; start += CHUNK) {
        const int64_t last = start + CHUNK < group->steps ? start + CHUNK : group->steps;
        if (states) {
            store_rows(group->key_dim, group->value_dim, state, row.value, states, group->value_dim);
            states += size;
        }
        for (int64_t first = start; first < last;) {
            const struct piece piece = piece_of(group, first, piece_end(group->reset, first, last));
            if (group->reset && group->reset[first]) {
                memset(state, 0, (size_t)(group->key_dim * row.value) * sizeof(real));
            }
            if (by_channel) {
                channel_forward(group, &piece, &own->channel.forward, o);
            } else {
                head_forward(group, &piece, &own->head.forward, o);
            }
            wrong |= wrong_gates(group, &piece);
            first += piece.count;
        }
    }
    store_rows(group->key_dim, group->value_dim, state, row.value, state_out, group->value_dim);
    return wrong;
}

/* The pieces of one chunk from the last to the first; `state` is the one at the chunk's start. */
static void backward_chunk(const struct group *group, const struct own *own, int by_channel, int64_t start,
                           int64_t last, const real *state_in, real *state, real *grad_state,
                           const struct gradients *grads) {
    const struct rows row = rows_of(group);
    int64_t starts[CHUNK + 1], pieces = 0;
    for (int64_t first = start; first < last; first = piece_end(group->reset, first, last)) {
        starts[pieces++] = first;
    }
    starts[pieces] = last;
    while (pieces-- > 0) {
        const struct piece piece = piece_of(group, starts[pieces], starts[pieces + 1]);
        const int empty = group->reset && group->reset[piece.first];
        if (empty) {
            memset(state, 0, (size_t)(group->key_dim * row.value) * sizeof(real));
        } else {
            load_rows(group->key_dim, group->value_dim, state_in, group->value_dim, state, row.value);
        }
        if (by_channel) {
            channel_backward(group, &piece, &own->channel, grads);
        } else {
            head_backward(group, &piece, &own->head, grads);
        }
        if (empty) {
            memset(grad_state, 0, (size_t)(group->key_dim * row.value) * sizeof(real));
        }
    }
}

static void backward_group(const struct group *group, const struct own *own, int by_channel, const real *states,
                           const real *grad_state_out, const struct gradients *grads, real *grad_state_in) {
    const struct rows row = rows_of(group);
    const int64_t size = group->key_dim * group->value_dim;
    real *state = by_channel ? own->channel.forward.state : own->head.forward.state;
    real *grad_state = by_channel ? own->channel.grad_state : own->head.grad_state;
    load_rows(group->key_dim, group->value_dim, grad_state_out, group->value_dim, grad_state, row.value);
    for (int64_t chunk = (group->steps + CHUNK - 1) / CHUNK - 1; chunk >= 0; chunk--) {
        const int64_t start = chunk * CHUNK;
        const int64_t last = start + CHUNK < group->steps ? start + CHUNK : group->steps;
        backward_chunk(group, own, by_channel, start, last, states + chunk * size, state, grad_state, grads);
    }
    store_rows(group->key_dim, group->value_dim, grad_state, row.value, grad_state_in, group->value_dim);
}

/* One token: no chunk, the same bits as the step of a decode plan. */
static int step_group(const struct group *group, const real *state_in, real *o, real *state_out) {
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
        gla_step_group(group->share, group->key_dim, group->value_dim, group->gates, group->scale, group->q,
                       group->k, group->v, group->g, state_out, o);
    }
    return wrong_gates(group, &piece);
}

/* Values of scratch that one thread needs. */
int64_t gla_scratch(int64_t heads, int64_t groups, int64_t key_dim, int64_t value_dim, int64_t gates,
                    int backward) {
    struct own own;
    real origin[1];
    const struct group group = {.share = heads / groups, .key_dim = key_dim, .value_dim = value_dim};
    return take_own(&own, &group, gates > 1, backward, origin);
}

/* states [B][G][chunks][K][V], those at the chunks' starts, may be NULL; scratch [threads][gla_scratch].
 * Returns whether a gate at a valid token is NaN or above zero: the results are then of no use. */
int gla_forward(int64_t batch, int64_t steps, int64_t heads, int64_t groups, int64_t key_dim, int64_t value_dim,
                int64_t gates, double scale, const real *q, const real *k, const real *v, const real *g,
                const real *state_in, const uint8_t *reset, const uint8_t *valid, real *o, real *state_out,
                real *states, real *scratch, int64_t scratch_size, int threads) {
    int wrong = 0;
    const struct sizes sizes = {batch, steps, heads, groups, key_dim, value_dim, gates};
    const int64_t size = key_dim * value_dim, chunks = (steps + CHUNK - 1) / CHUNK;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) reduction(| : wrong)
    for (int64_t task = 0; task < batch * groups; task++) {
        struct group group = group_of(&sizes, task, scale, q, k, v, g, reset, valid);
        const int64_t row = task / groups, head = task % groups;
        real *o_group = o + row * steps * group.o_token + head * group.share * value_dim;
        add_target(&group, o_group, group.o_token, group.share * value_dim);
        real *kept = states ? states + task * chunks * size : NULL;
        if (steps == 1) {
            wrong |= step_group(&group, state_in + task * size, o_group, state_out + task * size);
            if (kept) {
                memcpy(kept, state_in + task * size, (size_t)size * sizeof(real));
            }
            continue;
        }
        struct own own;
        take_own(&own, &group, by_channel(&sizes), 0, scratch + thread_number() * scratch_size);
        wrong |= forward_group(&group, &own, by_channel(&sizes), state_in + task * size, o_group,
                               state_out + task * size, kept);
    }
    return wrong;
}

void gla_backward(int64_t batch, int64_t steps, int64_t heads, int64_t groups, int64_t key_dim,
                  int64_t value_dim, int64_t gates, double scale, const real *q, const real *k, const real *v,
                  const real *g, const uint8_t *reset, const uint8_t *valid, const real *states,
                  const real *grad_o, const real *grad_state_out, real *grad_q, real *grad_k, real *grad_v,
                  real *grad_g, real *grad_state_in, real *scratch, int64_t scratch_size, int threads) {
    const struct sizes sizes = {batch, steps, heads, groups, key_dim, value_dim, gates};
    const int64_t size = key_dim * value_dim, chunks = (steps + CHUNK - 1) / CHUNK;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < batch * groups; task++) {
        struct group group = group_of(&sizes, task, scale, q, k, v, g, reset, valid);
        const int64_t row = task / groups, head = task % groups, at = row * steps;
        group.grad_o = grad_o + at * group.o_token + head * group.share * value_dim;
        group.ahead = -CHUNK;
        const struct gradients grads = {
            .q = grad_q + at * group.q_token + head * group.share * key_dim,
            .k = grad_k + at * group.k_token + head * key_dim,
            .v = grad_v + at * group.v_token + head * value_dim,
            .g = grad_g ? grad_g + at * group.g_token + head * gates : NULL};
        add_target(&group, grads.q, group.q_token, group.share * key_dim);
        add_target(&group, grads.k, group.k_token, key_dim);
        add_target(&group, grads.v, group.v_token, value_dim);
        if (gates > 1) {
            add_target(&group, grads.g, group.g_token, gates);
        }
        struct own own;
        take_own(&own, &group, by_channel(&sizes), 1, scratch + thread_number() * scratch_size);
        backward_group(&group, &own, by_channel(&sizes), states + task * chunks * size,
                       grad_state_out + task * size, &grads, grad_state_in + task * size);
    }
}
