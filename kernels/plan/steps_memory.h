/* Linear attention: one token through the matrices that are the memory of its heads. */
#include "machine.h"

#include "../gated_delta/step.h"
#include "../gla/step.h"

/* q [heads][keys], k [groups][keys], v [groups][values], log gates [groups][keys], o [heads][values], heads,
 * groups, keys, values, memory (field) [groups][keys][values]; f: scale */
STEP(gla) {
    const int64_t groups = r->a[6], share = r->a[5] / groups, keys = r->a[7], values = r->a[8];
#pragma omp parallel for schedule(static) num_threads(m->threads) if (m->threads > 1)
    for (int64_t task = 0; task < m->rows * groups; task++) {
        const int64_t row = task / groups, g = task % groups;
        gla_step_group(share, keys, values, keys, (float)r->f[0], reg(m, row, r->a[0]) + g * share * keys,
                       reg(m, row, r->a[1]) + g * keys, reg(m, row, r->a[2]) + g * values,
                       reg(m, row, r->a[3]) + g * keys, (float *)field(m, row, r->a[9]) + g * keys * values,
                       reg(m, row, r->a[4]) + g * share * values);
    }
}

/* q [heads][keys], k [groups][keys], v [groups][values], log decay [groups], beta [groups], o [heads][values],
 * heads, groups, keys, values, memory (field) [groups][keys][values]; f: scale */
STEP(gated_delta) {
    const int64_t groups = r->a[7], share = r->a[6] / groups, keys = r->a[8], values = r->a[9];
#pragma omp parallel for schedule(static) num_threads(m->threads) if (m->threads > 1)
    for (int64_t task = 0; task < m->rows * groups; task++) {
        const int64_t row = task / groups, g = task % groups;
        gated_delta_step_group(share, keys, values, (float)r->f[0], reg(m, row, r->a[0]) + g * share * keys,
                               reg(m, row, r->a[1]) + g * keys, reg(m, row, r->a[2]) + g * values,
                               reg(m, row, r->a[3])[g], reg(m, row, r->a[4])[g],
                               (float *)field(m, row, r->a[10]) + g * keys * values,
                               reg(m, row, r->a[5]) + g * share * values);
    }
}
