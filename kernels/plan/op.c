/* plan: one token of a batch through a whole model, as a loop over its records (machine.h).
 *
 * No model and no architecture has code here: a record names a step, steps_*.h hold one function per step.
 */
#include "machine.h"
#include "steps_attention.h"
#include "steps_basic.h"
#include "steps_experts.h"
#include "steps_heads.h"
#include "steps_int8.h"
#include "steps_linear.h"
#include "steps_memory.h"
#include "steps_meter.h"
#include "steps_neurons.h"
#include "steps_rwkv.h"
#include "steps_spiking.h"

enum op {
#define OP(name) OP_##name,
#include "ops.def"
#undef OP
};

/* Records first to last - 1, one after the other. */
static void run(const struct machine *m, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
        const struct record *r = m->plan->record + i;
        switch (r->op) {
#define OP(name)                                                                                               \
    case OP_##name: step_##name(m, r); break;
#include "ops.def"
#undef OP
        }
        if (r->op == OP_expert) {
            i += r->a[7]; /* it has run them, or nobody chose it */
        }
    }
}

/* What is wrong with a call; the row it happened in is stored in rows[0], and the full counter in rows[1]. */
enum problem { FINE, BAD_TOKEN, BAD_SLOT, SLOT_TWICE, FULL };

/* Finds the rows that take part; nothing is changed in the pool before all of them are known to be right. */
static int check(struct plan *plan, int64_t batch, const int64_t *tokens, const int64_t *slots, int64_t *active) {
    int64_t *source = plan->rows, *slot = source + plan->slots, *token = slot + plan->slots;
    int64_t count = 0;
    plan->step++;
    for (int64_t row = 0; row < batch; row++) {
        const int64_t at = slots ? slots[row] : row;
        if (at < 0) {
            continue;
        }
        int problem = FINE;
        if (at >= plan->slots) {
            problem = BAD_SLOT;
        } else if (plan->seen[at] == plan->step) {
            problem = SLOT_TWICE;
        } else if (tokens[row] < 0 || tokens[row] >= plan->vocabulary) {
            problem = BAD_TOKEN;
        } else {
            for (int64_t i = 0; i < plan->limits; i++) {
                int64_t used;
                memcpy(&used, plan->pool + at * plan->state_bytes + plan->limit[i].field, sizeof used);
                if (used >= plan->limit[i].capacity) {
                    problem = FULL;
                    plan->rows[1] = i;
                }
            }
        }
        if (problem != FINE) {
            plan->rows[0] = row;
            return problem;
        }
        plan->seen[at] = plan->step;
        source[count] = row;
        slot[count] = at;
        token[count] = tokens[row];
        count++;
    }
    *active = count;
    return FINE;
}

/* One token of every row; rows of a negative slot get logits of zero. Returns enum problem. */
int plan_step(struct plan *plan, int64_t batch, const int64_t *tokens, const int64_t *slots, float *logits,
              int threads) {
    struct machine machine = {.plan = plan, .logits = logits, .threads = threads};
    const int problem = check(plan, batch, tokens, slots, &machine.rows);
    if (problem != FINE) {
        return problem;
    }
    machine.source = plan->rows;
    machine.slot = plan->rows + plan->slots;
    machine.token = plan->rows + 2 * plan->slots;
    if (machine.rows < batch) {
        memset(logits, 0, (size_t)(batch * plan->outputs) * sizeof *logits);
    }
    if (machine.rows == 0) {
        return FINE;
    }
    run(&machine, 0, plan->records);
    return FINE;
}
