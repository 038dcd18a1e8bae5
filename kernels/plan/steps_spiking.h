/* The running sums of the spiking attentions (spikelm/mixers/spiking_attention.py). */
#include "machine.h"

/* M = kept * M + k^T v; o = q M.   q, k [keys]; v, o [values]; memory M [keys][values].
 *
 * Without decay only the rows of channels that fired are touched: a zero adds nothing. */
INLINE void spiking_head(int64_t keys, int64_t values, int decays, float kept, const float *restrict q,
                         const float *restrict k, const float *restrict v, float *restrict memory,
                         float *restrict o) {
    memset(o, 0, (size_t)values * sizeof(float));
    for (int64_t i = 0; i < keys; i++) {
        float *restrict row = memory + i * values;
        if (decays) {
#pragma omp simd
            for (int64_t j = 0; j < values; j++) {
                row[j] = kept * row[j] + k[i] * v[j];
            }
        } else if (k[i] != 0) {
#pragma omp simd
            for (int64_t j = 0; j < values; j++) {
                row[j] += k[i] * v[j];
            }
        }
        if (q[i] != 0) {
#pragma omp simd
            for (int64_t j = 0; j < values; j++) {
                o[j] += q[i] * row[j];
            }
        }
    }
}

/* q, k (or -1 both: sums per channel), v, o, heads, keys, values, fields: memory, count (or -1: no mean);
 * kept [heads] or null for no decay; f: scale */
STEP(spiking) {
    const int64_t heads = r->a[4], keys = r->a[5], values = r->a[6];
    const float *kept = r->p[0], one = 1, scale = (float)r->f[0];
    EACH_ROW {
        const float *q = r->a[0] < 0 ? NULL : reg(m, row, r->a[0]), *k = q ? reg(m, row, r->a[1]) : NULL;
        float *memory = field(m, row, r->a[7]), *count = r->a[8] < 0 ? NULL : field(m, row, r->a[8]);
        for (int64_t h = 0; h < heads; h++) {
            const float decay = kept ? kept[h] : 1;
            float *o = reg(m, row, r->a[3]) + h * values;
            spiking_head(keys, values, kept != NULL, decay, q ? q + h * keys : &one, k ? k + h * keys : &one,
                         reg(m, row, r->a[2]) + h * values, memory + h * keys * values, o);
            float tokens = 1;
            if (count) {
                count[h] = decay * count[h] + 1;
                tokens = count[h] < 1 ? 1 : count[h];
            }
#pragma omp simd
            for (int64_t j = 0; j < values; j++) {
                o[j] = scale * (o[j] / tokens);
            }
        }
    }
}
