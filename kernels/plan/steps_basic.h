/* Steps without matrices: embedding, copies between registers and state, elementwise functions, norms.
 *
 * The comment before a step names its operands in the order of the record. n is the width of the registers.
 */
#include "machine.h"

/* y, n; weights [vocabulary][n]: the token's row. */
STEP(embed) {
    const float *weights = r->p[0];
    EACH_ROW { memcpy(reg(m, row, r->a[0]), weights + m->token[row] * r->a[1], (size_t)r->a[1] * 4); }
}

/* x, n: the caller's logits. */
STEP(output) {
    EACH_ROW {
        memcpy(m->logits + m->source[row] * m->plan->outputs, reg(m, row, r->a[0]), (size_t)r->a[1] * 4);
    }
}

/* x, y, n: y = x */
STEP(copy) {
    EACH_ROW { memcpy(reg(m, row, r->a[1]), reg(m, row, r->a[0]), (size_t)r->a[2] * 4); }
}

/* field, y, n: y = float32 field of the state */
STEP(load) {
    EACH_ROW { memcpy(reg(m, row, r->a[1]), field(m, row, r->a[0]), (size_t)r->a[2] * 4); }
}

/* x, field, n: float32 field of the state = x */
STEP(store) {
    EACH_ROW { memcpy(field(m, row, r->a[1]), reg(m, row, r->a[0]), (size_t)r->a[2] * 4); }
}

/* x, z, y, n: y = x + z; y may be either */
STEP(add) {
    EACH_ROW {
        const float *x = reg(m, row, r->a[0]), *z = reg(m, row, r->a[1]);
        float *y = reg(m, row, r->a[2]);
#pragma omp simd
        for (int64_t i = 0; i < r->a[3]; i++) {
            y[i] = x[i] + z[i];
        }
    }
}

/* x, z, y, n: y = x * z; y may be either */
STEP(multiply) {
    EACH_ROW {
        const float *x = reg(m, row, r->a[0]), *z = reg(m, row, r->a[1]);
        float *y = reg(m, row, r->a[2]);
#pragma omp simd
        for (int64_t i = 0; i < r->a[3]; i++) {
            y[i] = x[i] * z[i];
        }
    }
}

/* x, y, n; vector [n]: y = x * vector; y may be x. Without a vector f0 is the factor. */
STEP(scale) {
    const float *vector = r->p[0];
    const float factor = (float)r->f[0];
    EACH_ROW {
        const float *x = reg(m, row, r->a[0]);
        float *y = reg(m, row, r->a[1]);
#pragma omp simd
        for (int64_t i = 0; i < r->a[2]; i++) {
            y[i] = x[i] * (vector ? vector[i] : factor);
        }
    }
}

/* start, end, y, n; weight [n]: torch.lerp */
STEP(lerp) {
    EACH_ROW {
        lerp_row(r->a[3], reg(m, row, r->a[0]), reg(m, row, r->a[1]), r->p[0], reg(m, row, r->a[2]));
    }
}

/* x, field, n, mixtures, y_0, y_1, ...; weight_0 [n], ...: RWKV's token shift. y_i = lerp(last, x, weight_i) with
 * last = the field, which then becomes x. */
STEP(shift) {
    EACH_ROW {
        const float *x = reg(m, row, r->a[0]);
        float *last = field(m, row, r->a[1]);
        for (int64_t i = 0; i < r->a[3]; i++) {
            lerp_row(r->a[2], last, x, r->p[i], reg(m, row, r->a[4 + i]));
        }
        memcpy(last, x, (size_t)r->a[2] * sizeof *x);
    }
}

/* x, y, n, function (enum unary): y = function(x); y may be x */
STEP(unary) {
    EACH_ROW { unary_row(r->a[3], r->a[2], reg(m, row, r->a[0]), reg(m, row, r->a[1])); }
}

/* x, z, y, n: y = sigmoid(x) * z; y may be either */
STEP(gate) {
    EACH_ROW {
        const float *x = reg(m, row, r->a[0]), *z = reg(m, row, r->a[1]);
        float *y = reg(m, row, r->a[2]);
#pragma omp simd
        for (int64_t i = 0; i < r->a[3]; i++) {
            y[i] = sigmoid_of(x[i]) * z[i];
        }
    }
}

/* x, z, y, n: y = silu(x) * z; y may be either */
STEP(swish) {
    EACH_ROW {
        const float *x = reg(m, row, r->a[0]), *z = reg(m, row, r->a[1]);
        float *y = reg(m, row, r->a[2]);
#pragma omp simd
        for (int64_t i = 0; i < r->a[3]; i++) {
            y[i] = silu_of(x[i]) * z[i];
        }
    }
}

/* x, y, n: y = relu(x)^2; y may be x */
STEP(relu_squared) {
    EACH_ROW {
        const float *x = reg(m, row, r->a[0]);
        float *y = reg(m, row, r->a[1]);
#pragma omp simd
        for (int64_t i = 0; i < r->a[2]; i++) {
            const float positive = x[i] < 0 ? 0.0f : x[i];
            y[i] = positive * positive;
        }
    }
}

/* x, y, n, groups; f: epsilon; weight [n] or null, bias [n] or null: LayerNorm of each of the groups (heads)
 * of n; y may be x */
STEP(layernorm) {
    EACH_ROW {
        for (int64_t group = 0; group < r->a[3]; group++) {
            const int64_t at = group * r->a[2];
            layernorm_row(r->a[2], (float)r->f[0], reg(m, row, r->a[0] + at), r->p[0], r->p[1],
                          reg(m, row, r->a[1] + at));
        }
    }
}

/* x, y, n, groups; f: epsilon; weight [n] or null: RMSNorm of each group of n; y may be x */
STEP(rmsnorm) {
    EACH_ROW {
        for (int64_t group = 0; group < r->a[3]; group++) {
            const int64_t at = group * r->a[2];
            rmsnorm_row(r->a[2], (float)r->f[0], reg(m, row, r->a[0] + at), r->p[0], reg(m, row, r->a[1] + at));
        }
    }
}
