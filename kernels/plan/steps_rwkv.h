/* Steps of RWKV-4. */
#include "../wkv4/step.h"
#include "machine.h"

/* k, v, y, field [3][n], n; decay [n], bonus [n] */
STEP(wkv4) {
    const float *decay = r->p[0], *bonus = r->p[1];
    const int64_t n = r->a[4];
    EACH_ROW {
        const float *k = reg(m, row, r->a[0]), *v = reg(m, row, r->a[1]);
        float *y = reg(m, row, r->a[2]);
        float *num = field(m, row, r->a[3]), *den = num + n, *max = num + 2 * n;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            y[i] = wkv4_token(decay[i], bonus[i], k[i], v[i], num + i, den + i, max + i);
        }
    }
}
