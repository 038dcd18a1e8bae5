/* Softmax attention of one token over a ring of keys and values, in one pass with a running maximum.
 *
 * Layout: q, o [heads][dim]; keys, values [room][groups][dim]; sink keys and values [sinks][groups][dim]. Query
 * head h reads group h / (heads / groups). The order of all sums depends on the number of keys alone, never on
 * the batch or on threads.
 */
#include "machine.h"

/* Keys whose scores are held at once: with 128 features they and their values take 64 KiB. */
#define KEYS 64

struct attention {
    int64_t heads, groups, dim, room, sinks;
};

/* What a query head knows so far: the largest score, the sum of the weights, the weighted values (in o). */
struct running {
    float max, sum;
};

/* Products of one or two queries with four keys: what is loaded is used several times, and all sums are under way
 * together. Every sum has one order, whatever is computed beside it. */
INLINE void dot_keys(const int queries, const float *restrict q, const float *restrict keys, int64_t stride,
                     int64_t dim, float *restrict products) {
    v8 sum[2][4] = {{{0}}};
    int64_t i = 0;
    for (; i + 8 <= dim; i += 8) {
        for (int s = 0; s < 4; s++) {
            const v8 lanes = load8(keys + s * stride + i);
            for (int h = 0; h < queries; h++) {
                sum[h][s] = fma8(load8(q + h * dim + i), lanes, sum[h][s]);
            }
        }
    }
    if (i < dim) {
        for (int s = 0; s < 4; s++) {
            const v8 lanes = load_part(keys + s * stride + i, dim - i);
            for (int h = 0; h < queries; h++) {
                sum[h][s] = fma8(load_part(q + h * dim + i, dim - i), lanes, sum[h][s]);
            }
        }
    }
    for (int h = 0; h < queries; h++) {
        const v4 a = halves(sum[h][0]), b = halves(sum[h][1]), c = halves(sum[h][2]), d = halves(sum[h][3]);
        const v4 left = (v4){a[0], b[0], a[1], b[1]} + (v4){a[2], b[2], a[3], b[3]};
        const v4 right = (v4){c[0], d[0], c[1], d[1]} + (v4){c[2], d[2], c[3], d[3]};
        const v4 total = (v4){left[0], left[1], right[0], right[1]} + (v4){left[2], left[3], right[2], right[3]};
        memcpy(products + h * KEYS, &total, sizeof total); /* each as sum8 adds it up */
    }
}

INLINE float dot_key(const float *restrict q, const float *restrict key, int64_t dim) {
    v8 sum = {0};
    int64_t i = 0;
    for (; i + 8 <= dim; i += 8) {
        sum = fma8(load8(q + i), load8(key + i), sum);
    }
    if (i < dim) {
        sum = fma8(load_part(q + i, dim - i), load_part(key + i, dim - i), sum);
    }
    return sum8(sum);
}

/* o_h = kept_h * o_h + sum_s weight[h][s] * values[s], in columns of lanes * 8 */
INLINE int64_t weigh_columns(const int lanes, const int queries, int64_t i, int64_t count, int64_t stride,
                             int64_t dim, const float *restrict kept, const float *restrict weight,
                             const float *restrict values, float *restrict o) {
    for (; i + 8 * lanes <= dim; i += 8 * lanes) {
        v8 sum[2][4];
        for (int h = 0; h < queries; h++) {
            for (int j = 0; j < lanes; j++) {
                sum[h][j] = kept[h] * load8(o + h * dim + i + 8 * j);
            }
        }
        for (int64_t s = 0; s < count; s++) {
            for (int j = 0; j < lanes; j++) {
                const v8 value = load8(values + s * stride + i + 8 * j);
                for (int h = 0; h < queries; h++) {
                    sum[h][j] = fma8((v8){0} + weight[h * KEYS + s], value, sum[h][j]);
                }
            }
        }
        for (int h = 0; h < queries; h++) {
            for (int j = 0; j < lanes; j++) {
                store8(o + h * dim + i + 8 * j, sum[h][j]);
            }
        }
    }
    return i;
}

INLINE void weigh_values(const int queries, int64_t count, int64_t stride, int64_t dim, const float *restrict kept,
                         const float *restrict weight, const float *restrict values, float *restrict o) {
    int64_t i = weigh_columns(4, queries, 0, count, stride, dim, kept, weight, values, o);
    i = weigh_columns(1, queries, i, count, stride, dim, kept, weight, values, o);
    for (; i < dim; i++) {
        for (int h = 0; h < queries; h++) {
            float sum = kept[h] * o[h * dim + i];
            for (int64_t s = 0; s < count; s++) {
                sum = multiply_add(weight[h * KEYS + s], values[s * stride + i], sum);
            }
            o[h * dim + i] = sum;
        }
    }
}

/* Up to KEYS keys of one or two query heads. */
INLINE void attend_keys(const int queries, int64_t dim, int64_t stride, float scale, int64_t count,
                        const float *restrict q, const float *restrict keys, const float *restrict values,
                        struct running *running, float *restrict o) {
    float weight[2 * KEYS], kept[2];
    int64_t known = 0;
    for (; known + 4 <= count; known += 4) {
        dot_keys(queries, q, keys + known * stride, stride, dim, weight + known);
    }
    for (; known < count; known++) {
        for (int h = 0; h < queries; h++) {
            weight[h * KEYS + known] = dot_key(q + h * dim, keys + known * stride, dim);
        }
    }
    for (int h = 0; h < queries; h++) {
        float *restrict own = weight + h * KEYS;
        float best = running[h].max;
#pragma omp simd reduction(max : best)
        for (int64_t s = 0; s < count; s++) {
            own[s] *= scale;
            best = own[s] > best ? own[s] : best;
        }
        for (int64_t s = count; s < KEYS; s++) {
            own[s] = -INFINITY; /* weights of zero: the loop and the sum below have one length */
        }
#pragma omp simd
        for (int s = 0; s < KEYS; s++) {
            own[s] = exp_nonpositive(own[s] - best);
        }
        kept[h] = exp_nonpositive(running[h].max - best);
        running[h].sum = kept[h] * running[h].sum + row_sum(KEYS, own);
        running[h].max = best;
    }
    weigh_values(queries, count, stride, dim, kept, weight, values, o);
}

/* count keys for the query heads of one group; a block of keys is read from memory once for all of them. */
static void attend_group(const struct attention *shape, float scale, int64_t count, const float *restrict q,
                         const float *restrict keys, const float *restrict values, struct running *running,
                         float *restrict o) {
    const int64_t heads = shape->heads / shape->groups, dim = shape->dim, stride = shape->groups * dim;
    for (int64_t first = 0; first < count; first += KEYS) {
        const int64_t left = count - first < KEYS ? count - first : KEYS;
        const float *k = keys + first * stride, *v = values + first * stride;
        int64_t h = 0;
        for (; h + 2 <= heads; h += 2) {
            attend_keys(2, dim, stride, scale, left, q + h * dim, k, v, running + h, o + h * dim);
        }
        if (h < heads) {
            attend_keys(1, dim, stride, scale, left, q + h * dim, k, v, running + h, o + h * dim);
        }
    }
}

/* q, k, v, o, running (2 * heads floats), fields: keys, values, position, sink keys, sink values (or -1);
 * shape (struct attention); f: scale.
 *
 * Key and value take their slot of the ring, o is what the queries read, the position moves on. */
STEP(attend) {
    const struct attention *shape = r->p[0];
    const int64_t dim = shape->dim, heads = shape->heads / shape->groups, width = shape->groups * dim;
    const float scale = (float)r->f[0];
    EACH_ROW {
        const int64_t slot = *(int64_t *)field(m, row, r->a[7]) % shape->room;
        memcpy((float *)field(m, row, r->a[5]) + slot * width, reg(m, row, r->a[1]), (size_t)width * 4);
        memcpy((float *)field(m, row, r->a[6]) + slot * width, reg(m, row, r->a[2]), (size_t)width * 4);
    }
    const int64_t tasks = m->rows * shape->groups;
#pragma omp parallel for schedule(static) num_threads(m->threads) if (m->threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t row = task / shape->groups, group = task % shape->groups, first = group * heads;
        const int64_t position = *(int64_t *)field(m, row, r->a[7]);
        const int64_t filled = position < shape->room ? position + 1 : shape->room;
        const float *q = reg(m, row, r->a[0]) + first * dim;
        float *o = reg(m, row, r->a[3]) + first * dim;
        struct running *running = (struct running *)reg(m, row, r->a[4]) + first;
        for (int64_t h = 0; h < heads; h++) {
            running[h] = (struct running){.max = -INFINITY, .sum = 0};
        }
        memset(o, 0, (size_t)(heads * dim) * sizeof *o);
        if (shape->sinks) {
            attend_group(shape, scale, shape->sinks, q, (float *)field(m, row, r->a[8]) + group * dim,
                         (float *)field(m, row, r->a[9]) + group * dim, running, o);
        }
        attend_group(shape, scale, filled, q, (float *)field(m, row, r->a[5]) + group * dim,
                     (float *)field(m, row, r->a[6]) + group * dim, running, o);
        for (int64_t h = 0; h < heads; h++) {
            for (int64_t i = 0; i < dim; i++) {
                o[h * dim + i] /= running[h].sum;
            }
        }
    }
    EACH_ROW { *(int64_t *)field(m, row, r->a[7]) += 1; }
}
