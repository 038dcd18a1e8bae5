/* gated_delta: a piece of a chunk forward (equations in reference.py, decomposition in op.c). */
#ifndef SPIKELM_GATED_DELTA_PIECE_H
#define SPIKELM_GATED_DELTA_PIECE_H

#include "../group.h"

struct delta {
    struct rows row;
    real *q;      /* [rows][key]: scaled queries */
    real *k;      /* [tokens][key] */
    real *v;      /* [tokens][value] */
    real *lanes;  /* [key][token]: keys */
    real *decay, *since, *until, *beta; /* [tokens] */
    real *kept;   /* [tokens][token]: P */
    real *total;  /* [key]: the decay of the piece, for every channel */
    real *weights;  /* [rows][token]: (q k^T) P */
    real *overlap;  /* [tokens][token]: (k k^T) P, zero on the diagonal and above */
    real *system;   /* [tokens][token]: -beta overlap */
    real *known;    /* [tokens][value]: what the state before the piece says about the keys */
    real *written;  /* [tokens][value]: u, what the tokens write */
    real *o;      /* [rows][value] */
    real *state;  /* [key][value] */
};

static void take_delta(struct delta *own, const struct group *group, real **free) {
    const struct rows row = rows_of(group);
    own->row = row;
    own->q = take(free, CHUNK * group->share * row.key);
    own->k = take(free, CHUNK * row.key);
    own->v = take(free, CHUNK * row.value);
    own->lanes = take(free, group->key_dim * row.token);
    own->decay = take(free, CHUNK);
    own->since = take(free, CHUNK);
    own->until = take(free, CHUNK);
    own->beta = take(free, CHUNK);
    own->kept = take(free, CHUNK * row.token);
    own->total = take(free, row.key);
    own->weights = take(free, CHUNK * group->share * row.token);
    own->overlap = take(free, CHUNK * row.token);
    own->system = take(free, CHUNK * row.token);
    own->known = take(free, CHUNK * row.value);
    own->written = take(free, CHUNK * row.value);
    own->o = take(free, CHUNK * group->share * row.value);
    own->state = take(free, group->key_dim * row.value);
}

/* Write strengths: 0 at invalid tokens and past the end. */
static void load_strengths(const struct piece *piece, const real *beta, int64_t beta_token, real *to) {
    for (int64_t t = 0; t < piece->full; t++) {
        const int here = t < piece->count && (!piece->valid || piece->valid[t]);
        to[t] = here ? beta[(piece->first + t) * beta_token] : (real)0;
    }
}

/* x[i] += sum over j < i of system[i][j] x[j], row after row; outside of blocks of LANES rows as products. */
static void solve(int64_t full, int64_t width, const real *system, int64_t token, real *x, int64_t row) {
    for (int64_t start = 0; start < full; start += LANES) {
        if (start > 0) {
            product(LANES, width, start, system + start * token, token, 1, x, row, x + start * row, row, ADD, NULL);
        }
        for (int r = 1; r < LANES; r++) {
            const int64_t i = start + r;
            for (int64_t c = 0; c < width; c += LANES) {
                vector sum = vector_load(x + i * row + c);
                for (int64_t j = start; j < i; j++) {
                    sum = vector_multiply_add(vector_of(system[i * token + j]), vector_load(x + j * row + c), sum);
                }
                vector_store(x + i * row + c, sum);
            }
        }
    }
}

/* x[j] += sum over i > j of system[i][j] x[i], from the last row: the transposed system, for the gradient. */
static void solve_transposed(int64_t full, int64_t width, const real *system, int64_t token, real *x,
                             int64_t row) {
    for (int64_t start = full - LANES; start >= 0; start -= LANES) {
        const int64_t after = start + LANES;
        if (after < full) {
            product(LANES, width, full - after, system + after * token + start, 1, token, x + after * row, row,
                    x + start * row, row, ADD, NULL);
        }
        for (int64_t j = after - 2; j >= start; j--) {
            for (int64_t c = 0; c < width; c += LANES) {
                vector sum = vector_load(x + j * row + c);
                for (int64_t i = after - 1; i > j; i--) {
                    sum = vector_multiply_add(vector_of(system[i * token + j]), vector_load(x + i * row + c), sum);
                }
                vector_store(x + j * row + c, sum);
            }
        }
    }
}

/* Loads a piece; weights of its tokens, and what they write into the state. */
static void delta_writes(const struct group *group, const struct piece *piece, const struct delta *own,
                         const real *beta, int64_t beta_token) {
    const struct rows row = own->row;
    const int64_t width = whole_vectors(group->value_dim);
    load_inputs(group, piece, row, own->q, own->k, own->v);
    load_head_decays(group, piece, own->decay);
    load_strengths(piece, beta, beta_token, own->beta);
    const real total = head_decays(piece->count, piece->full, own->decay, own->kept, row.token, own->since,
                                   own->until);
    for (int64_t c = 0; c < group->key_dim; c++) {
        own->total[c] = total;
    }
    transpose(piece->full, group->key_dim, own->k, row.key, own->lanes, row.token);
    kept_weights(group, piece, group->share, own->q, row.key, own->lanes, own->kept, row.token,
                 own->weights);
    kept_weights(group, piece, 1, own->k, row.key, own->lanes, own->kept, row.token,
                 own->overlap);
    product(piece->full, group->value_dim, group->key_dim, own->k, row.key, 1, own->state, row.value, own->known,
            row.value, FORGET, NULL);
    scale_tokens(piece->full, 1, group->value_dim, own->since, own->known, row.value);
    for (int64_t i = 0; i < piece->full; i++) {
        real *overlap = own->overlap + i * row.token, *system = own->system + i * row.token;
        const int64_t seen = whole_vectors(i + 1);
        for (int64_t j = i; j < seen; j++) {
            overlap[j] = 0;
        }
        memcpy(system, overlap, (size_t)seen * sizeof(real));
        scale_by(seen, system, -own->beta[i]);
        for (int64_t c = 0; c < width; c += LANES) {
            const int64_t at = i * row.value + c;
            vector_store(own->written + at,
                         vector_of(own->beta[i]) * (vector_load(own->v + at) - vector_load(own->known + at)));
        }
    }
    solve(piece->full, group->value_dim, own->system, row.token, own->written, row.value);
}

/* A piece from own->state on, which becomes the state after it. */
static void delta_forward(const struct group *group, const struct piece *piece, const struct delta *own,
                          const real *beta, int64_t beta_token, real *o) {
    const struct rows row = own->row;
    delta_writes(group, piece, own, beta, beta_token);
    weighted_values(group, piece, own->weights, row.token, own->written, row.value, own->o);
    scale_tokens(piece->full, group->share, group->key_dim, own->since, own->q, row.key);
    product(piece->rows, group->value_dim, group->key_dim, own->q, row.key, 1, own->state, row.value, own->o,
            row.value, ADD, NULL);
    scale_tokens(piece->full, 1, group->value_dim, own->until, own->written, row.value);
    product(group->key_dim, group->value_dim, piece->count, own->lanes, row.token, 1, own->written, row.value,
            own->state, row.value, DECAY, own->total);
    store_tokens(piece->count, group->share, group->value_dim, 1, own->o, row.value, piece->valid,
                 o + piece->first * group->o_token, group->o_token);
}

#endif
