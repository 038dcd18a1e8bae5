/* A mixture of experts: which of them a token goes to (the arithmetic of spikelm/channels/routing.py), and the
 * records of an expert for the rows that chose it.
 */
#include "machine.h"

/* Whether a stands before b in a descending sort, in which NaN is the greatest. */
INLINE int before(float a, float b) { return a > b || (a != a && b == b); }

/* logits (become the scores), chosen (top_k int32), weights (top_k), taken (scratch of experts), experts, top_k;
 * bias [experts] or null; f: scale; flags: 1 softmax instead of sigmoid, 2 weights divided by their sum.
 *
 * The experts with the largest score + bias, best first, of equal ones the first; weights are the scores. */
STEP(route) {
    const int64_t experts = r->a[4], top_k = r->a[5];
    const float *bias = r->p[0], scale = (float)r->f[0];
    EACH_ROW {
        float *scores = reg(m, row, r->a[0]), *weights = reg(m, row, r->a[2]), *taken = reg(m, row, r->a[3]);
        int32_t *chosen = (int32_t *)reg(m, row, r->a[1]);
        if (r->flags & 1) {
            softmax_row(experts, scores, scores);
        } else {
            unary_row(UNARY_SIGMOID, experts, scores, scores);
        }
        memset(taken, 0, (size_t)experts * sizeof *taken);
        float total = 0;
        for (int64_t j = 0; j < top_k; j++) {
            int64_t best = -1;
            float most = 0;
            for (int64_t i = 0; i < experts; i++) {
                const float wanted = bias ? scores[i] + bias[i] : scores[i];
                if (taken[i] == 0 && (best < 0 || before(wanted, most))) {
                    best = i;
                    most = wanted;
                }
            }
            taken[best] = 1;
            chosen[j] = (int32_t)best;
            weights[j] = scores[best];
            total += scores[best];
        }
        total = total < 1e-20f ? 1e-20f : total;
        for (int64_t j = 0; j < top_k; j++) {
            weights[j] = (r->flags & 2 ? weights[j] / total : weights[j]) * scale;
        }
    }
}

static void run(const struct machine *m, int64_t first, int64_t last);

/* chosen (top_k int32), top_k, expert, x, n, y, found (top_k * n), records: the records that follow make y of x;
 * they run on the rows that chose this expert, and found[j] of a row whose choice j it is becomes y.
 *
 * Where some rows did not choose it the others are gathered in the second half of the workspace. Steps inside
 * have no state. */
STEP(expert) {
    const int64_t top_k = r->a[1], width = r->a[4], next = r - m->plan->record + 1;
    int64_t *source = m->plan->rows + 3 * m->plan->slots, *choice = source + m->plan->slots, count = 0;
    EACH_ROW {
        const int32_t *chosen = (const int32_t *)reg(m, row, r->a[0]);
        for (int64_t j = 0; j < top_k; j++) {
            if (chosen[j] == r->a[2]) {
                source[count] = row;
                choice[count++] = j;
            }
        }
    }
    if (count == 0) {
        return;
    }
    struct plan plan = *m->plan;
    struct machine inner = *m;
    if (count < m->rows) {
        inner.plan = &plan;
        inner.rows = count;
        plan.workspace += plan.slots * plan.width;
        for (int64_t i = 0; i < count; i++) {
            memcpy(reg(&inner, i, r->a[3]), reg(m, source[i], r->a[3]), (size_t)width * sizeof(float));
        }
    }
    run(&inner, next, next + r->a[7]);
    for (int64_t i = 0; i < count; i++) {
        memcpy(reg(m, source[i], r->a[6]) + choice[i] * width, reg(&inner, i, r->a[5]), (size_t)width * sizeof(float));
    }
}

/* found (top_k * n), weights, y, n, top_k: y = sum_j weights[j] * found[j], in the order of the choices */
STEP(combine) {
    EACH_ROW {
        const float *found = reg(m, row, r->a[0]), *weights = reg(m, row, r->a[1]);
        float *restrict y = reg(m, row, r->a[2]);
#pragma omp simd
        for (int64_t i = 0; i < r->a[3]; i++) {
            float sum = found[i] * weights[0];
            for (int64_t j = 1; j < r->a[4]; j++) {
                sum += found[j * r->a[3] + i] * weights[j];
            }
            y[i] = sum;
        }
    }
}
