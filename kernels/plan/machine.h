/* What a decode plan is made of, as C sees it; records.py has the same structures.
 *
 * A plan is an array of records. A record is one operation on all rows of the batch: which (op), where its
 * operands are (a: registers, fields of the state, sizes; p: weights), and its constants (f). Registers are
 * offsets in floats into a row of the workspace, fields are offsets in bytes into a row's slot of the state
 * pool. Rows of a negative slot are left out before the first record, so that no step knows about them.
 */
#ifndef SPIKELM_PLAN_MACHINE_H
#define SPIKELM_PLAN_MACHINE_H

#include "../rowwise/step.h"

struct record {
    int32_t op, flags;
    int64_t a[12];
    double f[6];
    void *p[10];
};

/* A counter in the state that must stay below a capacity (memory that grows with every token). */
struct limit {
    int64_t field, capacity;
};

struct plan {
    int64_t records, width, state_bytes, slots, vocabulary, limits, outputs;
    const struct record *record;
    const struct limit *limit;
    float *workspace;    /* [slots][width], a second time where records run on gathered rows */
    uint8_t *pool;       /* [slots][state_bytes] */
    int64_t *statistics; /* [projections][STATISTICS] */
    void *scratch;       /* for one record at a time */
    int64_t *seen;       /* [slots], number of the step that used the slot last */
    int64_t step;
    int64_t *rows;       /* [5][slots]: row of the caller's batch, slot, token of every active row; gathered rows */
    int64_t observing;   /* whether a meter wants to know of spikes */
};

/* Columns of the statistics of a projection. */
enum statistic { STATISTIC_CALLS, STATISTIC_SILENT, STATISTIC_MAGNITUDE, STATISTIC_BYTES, STATISTICS };

/* A step of the plan: what every record sees. */
struct machine {
    const struct plan *plan;
    int64_t rows; /* active ones */
    const int64_t *source, *slot, *token;
    float *logits; /* [batch][outputs] of the caller */
    int threads;
};

/* Register of one row. */
INLINE float *reg(const struct machine *m, int64_t row, int64_t offset) {
    return m->plan->workspace + row * m->plan->width + offset;
}

/* Field of the state of one row. */
INLINE void *field(const struct machine *m, int64_t row, int64_t offset) {
    return m->plan->pool + m->slot[row] * m->plan->state_bytes + offset;
}

/* Multiplications below which starting a team of threads costs more than it saves. */
#define SERIAL_BELOW (1 << 16)

INLINE int threads_for(const struct machine *m, int64_t work) {
    return m->rows * work < SERIAL_BELOW ? 1 : m->threads;
}

#define STEP(name) static void step_##name(const struct machine *m, const struct record *r)
#define EACH_ROW for (int64_t row = 0; row < m->rows; row++)

#endif
