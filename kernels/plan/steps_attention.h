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

/* Products of a query with four keys: its lanes are loaded once, and four sums are under way at a time. */
INLINE void dot_keys(const float *restrict q, const float *restrict keys, int64_t stride, int64_t dim,
                     float *restrict products) {
    v8 sum[4] = {{0}};
    int64_t i = 0;
    for (; i + 8 <= dim; i += 8) {
        const v8 lanes = load8(q + i);
        for (int s = 0; s < 4; s++) {
            sum[s] = fma8(lanes, load8(keys + s * stride + i), sum[s]);
        }
    }
    if (i < dim) {
        const v8 lanes = load_part(q + i, dim - i);
        for (int s = 0; s < 4; s++) {
            sum[s] = fma8(lanes, load_part(keys + s * stride + i, dim - i), sum[s]);
        }
    }
    for (int s = 0; s < 4; s++) {
        products[s] = sum8(sum[s]);
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

/* o = kept * o + sum_s weight[s] * values[s] */
INLINE void weigh_values(int64_t count, int64_t stride, int64_t dim, float kept, const float *restrict weight,
                         const float *restrict values, float *restrict o) {
    int64_t i = 0;
    for (; i + 32 <= dim; i += 32) {
        v8 sum[4];
        for (int j = 0; j < 4; j++) {
            sum[j] = kept * load8(o + i + 8 * j);
        }
        for (int64_t s = 0; s < count; s++) {
            const v8 lanes = (v8){0} + weight[s];
            for (int j = 0; j < 4; j++) {
                sum[j] = fma8(lanes, load8(values + s * stride + i + 8 * j), sum[j]);
            }
        }
        for (int j = 0; j < 4; j++) {
            store8(o + i + 8 * j, sum[j]);
        }
    }
    for (; i + 8 <= dim; i += 8) {
        v8 sum = kept * load8(o + i);
        for (int64_t s = 0; s < count; s++) {
            sum = fma8((v8){0} + weight[s], load8(values + s * stride + i), sum);
        }
        store8(o + i, sum);
    }
    for (; i < dim; i++) {
        float sum = kept * o[i];
        for (int64_t s = 0; s < count; s++) {
            sum = multiply_add(weight[s], values[s * stride + i], sum);
        }
        o[i] = sum;
    }
}

/* Up to KEYS keys of one query head. */
INLINE void attend_keys(const struct attention *shape, float scale, int64_t count, const float *restrict q,
                        const float *restrict keys, const float *restrict values, struct running *running,
                        float *restrict o) {
    const int64_t stride = shape->groups * shape->dim;
    float weight[KEYS];
    int64_t known = 0;
    for (; known + 4 <= count; known += 4) {
        dot_keys(q, keys + known * stride, stride, shape->dim, weight + known);
    }
    for (; known < count; known++) {
        weight[known] = dot_key(q, keys + known * stride, shape->dim);
    }
    float best = running->max;
#pragma omp simd reduction(max : best)
    for (int64_t s = 0; s < count; s++) {
        weight[s] *= scale;
        best = weight[s] > best ? weight[s] : best;
    }
    for (int64_t s = count; s < KEYS; s++) {
        weight[s] = -INFINITY; /* weights of zero: the loop and the sum below have one length */
    }
#pragma omp simd
    for (int s = 0; s < KEYS; s++) {
        weight[s] = exp_nonpositive(weight[s] - best);
    }
    const float kept = exp_nonpositive(running->max - best);
    running->sum = kept * running->sum + row_sum(KEYS, weight);
    running->max = best;
    weigh_values(count, stride, shape->dim, kept, weight, values, o);
}

/* count keys for the query heads of one group; a block of keys is read from memory once for all of them. */
INLINE void attend_group(const struct attention *shape, float scale, int64_t count, const float *restrict q,
                         const float *restrict keys, const float *restrict values, struct running *running,
                         float *restrict o) {
    const int64_t heads = shape->heads / shape->groups, dim = shape->dim, stride = shape->groups * dim;
    for (int64_t first = 0; first < count; first += KEYS) {
        const int64_t left = count - first < KEYS ? count - first : KEYS;
        for (int64_t h = 0; h < heads; h++) {
            attend_keys(shape, scale, left, q + h * dim, keys + first * stride, values + first * stride,
                        running + h, o + h * dim);
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
