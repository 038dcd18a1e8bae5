/* gla with a gate per key channel: a piece forward (equations in reference.py, decomposition in op.c).
 *
 * The weight of token j for token i is sum_c q_ic k_jc P_ijc. Within a block of LANES tokens the decayed keys
 * stand in lanes, lane j of channel c holding k_jc P_ijc: the next token multiplies them by its decay and sets
 * its own lane. Larger blocks are joined in pairs as in doubling.py: queries carry the product of the decays
 * from their block's start to themselves, keys that of the decays after themselves to their block's end, and
 * one product of right queries with left keys gives all weights between the two.
 */
#ifndef SPIKELM_GLA_CHANNEL_H
#define SPIKELM_GLA_CHANNEL_H

#include "../group.h"

#define ROUNDS 4  /* joins of blocks in a chunk, at most (vectors of 2 lanes) */
#define PARTS (LANES < 4 ? LANES : 4)

struct channel {
    struct rows row;
    real *q;       /* [rows][key]: scaled queries, decayed from their block's start */
    real *k;       /* [tokens][key] */
    real *v;       /* [tokens][value] */
    real *decay;   /* [tokens][key] */
    real *since;   /* [tokens][key]: products of decays from the start of a block of LANES tokens */
    real *lanes;   /* [key][token]: keys decayed to their block's end */
    real *total;   /* [blocks][key]: products of the decays of whole blocks */
    real *weights; /* [rows][token] */
    real *o;       /* [rows][value] */
    real *state;   /* [key][value] */
};

/* What backward needs of the joins: queries of right blocks and keys of left blocks before they decay further,
 * products of whole blocks. */
struct joins {
    real *q[ROUNDS], *k[ROUNDS], *total[ROUNDS];
};

static void take_channel(struct channel *own, const struct group *group, real **free) {
    const struct rows row = rows_of(group);
    const int64_t lanes_rows = whole_vectors(group->key_dim);
    own->row = row;
    own->q = take(free, CHUNK * group->share * row.key);
    own->k = take(free, CHUNK * row.key);
    own->v = take(free, CHUNK * row.value);
    own->decay = take(free, CHUNK * row.key);
    own->since = take(free, CHUNK * row.key);
    own->lanes = take(free, lanes_rows * row.token);
    own->total = take(free, CHUNK / LANES * row.key);
    own->weights = take(free, CHUNK * group->share * row.token);
    own->o = take(free, CHUNK * group->share * row.value);
    own->state = take(free, group->key_dim * row.value);
}

/* Decays of the tokens: 1 at invalid ones and past the end. */
static void load_channel_decays(const struct group *group, const struct piece *piece, real *to, int64_t row) {
    const int64_t width = group->key_dim, whole = whole_vectors(width);
    for (int64_t t = 0; t < piece->full; t++, to += row) {
        const int here = t < piece->count && (!piece->valid || piece->valid[t]);
        const real *g = group->g + (piece->first + (here ? t : 0)) * group->g_token;
        int64_t c = 0;
        for (; here && c + LANES <= width; c += LANES) {
            vector_store(to + c, vector_exp_nonpositive(vector_load(g + c)));
        }
        for (; c < whole; c++) {
            to[c] = here && c < width ? exp_nonpositive(g[c]) : (real)1;
        }
    }
}

/* Token `i` of a block: every lane decays, its own lane takes its key; weights of its first query. */
INLINE vector add_to_lanes(int64_t width, int i, const real *restrict q, const real *restrict k,
                           const real *restrict decay, real *restrict lanes, int64_t lanes_row) {
    vector own = {0}, sum[PARTS];
    own[i] = 1;
    for (int p = 0; p < PARTS; p++) {
        sum[p] = (vector){0};
    }
    for (int64_t c = 0; c < width; c += PARTS) {
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) {
            real *restrict at = lanes + (c + p) * lanes_row;
            const vector old = i > 0 ? vector_load(at) * vector_of(decay[c + p]) : (vector){0};
            const vector now = vector_multiply_add(vector_of(k[c + p]), own, old);
            vector_store(at, now);
            sum[p] = vector_multiply_add(vector_of(q[c + p]), now, sum[p]);
        }
    }
    for (int p = 1; p < PARTS; p++) {
        sum[0] += sum[p];
    }
    return sum[0];
}

/* Weights within blocks of LANES tokens; queries, keys (in lanes) and totals of these blocks. */
static void block_weights(const struct group *group, const struct piece *piece, const struct channel *own) {
    const int64_t width = whole_vectors(group->key_dim), share = group->share;
    for (int64_t start = 0; start < piece->full; start += LANES) {
        real *lanes = own->lanes + start, *since = own->since + start * own->row.key;
        for (int i = 0; i < LANES; i++) {
            const int64_t t = start + i;
            prefetch_token(group, piece, t);
            const real *decay = own->decay + t * own->row.key;
            real *q = own->q + t * share * own->row.key;
            real *weights = own->weights + t * share * own->row.token + start;
            vector_store(weights, add_to_lanes(width, i, q, own->k + t * own->row.key, decay, lanes,
                                               own->row.token));
            if (share > 1) {
                product(share - 1, LANES, group->key_dim, q + own->row.key, own->row.key, 1, lanes,
                        own->row.token, weights + own->row.token, own->row.token, FORGET, NULL);
            }
            copy_row(width, decay, since);
            if (i > 0) {
                scale_row(width, since, since - own->row.key);
            }
            for (int64_t h = 0; h < share; h++) {
                scale_row(width, q + h * own->row.key, since);
            }
            since += own->row.key;
        }
        copy_row(width, since - own->row.key, own->total + start / LANES * own->row.key);
    }
}

/* Joins pairs of blocks of `size` tokens: the weights between them, then queries, keys and totals of the pair.
 * `kept`, where given, gets what backward needs. */
static void join_blocks(const struct group *group, const struct piece *piece, const struct channel *own,
                        int64_t size, const struct joins *kept, int round) {
    const int64_t width = whole_vectors(group->key_dim), share = group->share, key = own->row.key;
    const int64_t token = own->row.token;
    for (int64_t left = 0; left + size < piece->full; left += 2 * size) {
        const int64_t right = left + size, end = right + size < piece->full ? right + size : piece->full;
        const int64_t rows = (end - right) * share;
        real *q = own->q + right * share * key, *lanes = own->lanes + left;
        real *total_left = own->total + left / LANES * key, *total_right = own->total + right / LANES * key;
        product(rows, size, group->key_dim, q, key, 1, lanes, token,
                own->weights + right * share * token + left, token, FORGET, NULL);
        if (kept) {
            store_rows(rows, width, q, key, kept->q[round] + right * share * key, key);
            store_rows(1, width, total_left, key, kept->total[round] + left / LANES * key, key);
            store_rows(1, width, total_right, key, kept->total[round] + right / LANES * key, key);
        }
        for (int64_t r = 0; r < rows; r++) {
            scale_row(width, q + r * key, total_left);
        }
        for (int64_t c = 0; c < group->key_dim; c++) {
            scale_by(size, lanes + c * token, total_right[c]);
        }
        scale_row(width, total_left, total_right);
    }
}

/* Loads a piece; weights of its tokens for each other. Queries then carry the decays from the piece's start,
 * keys those to its end, and the first total is that of the piece. */
static void channel_weights(const struct group *group, const struct piece *piece, const struct channel *own,
                            const struct joins *kept) {
    load_inputs(group, piece, own->row, own->q, own->k, own->v);
    load_channel_decays(group, piece, own->decay, own->row.key);
    block_weights(group, piece, own);
    int round = 0;
    for (int64_t size = LANES; size < piece->full; size *= 2) {
        join_blocks(group, piece, own, size, kept, round++);
    }
}

/* A piece from own->state on, which becomes the state after it. */
static void channel_forward(const struct group *group, const struct piece *piece, const struct channel *own,
                            real *o) {
    const struct rows row = own->row;
    channel_weights(group, piece, own, NULL);
    weighted_values(group, piece, own->weights, row.token, own->v, row.value, own->o);
    product(piece->rows, group->value_dim, group->key_dim, own->q, row.key, 1, own->state, row.value, own->o,
            row.value, ADD, NULL);
    product(group->key_dim, group->value_dim, piece->count, own->lanes, row.token, 1, own->v, row.value,
            own->state, row.value, DECAY, own->total);
    store_tokens(piece->count, group->share, group->value_dim, 1, own->o, row.value, piece->valid,
                 o + piece->first * group->o_token, group->o_token);
}

#endif
