/* Where packed weights and the scratch of a call lie.
 *
 * Layouts of the weights, bytes w + 128 but in PACKED_ROWS (dot.h and event.h say why):
 *   PACKED_OUT_IN  [blocks of 64 outputs][quads of inputs][64][4]; a group is filled up to whole quads with zeros
 *   PACKED_IN_OUT  [tiles of 128 outputs][inputs][128]; the last tile is 64 wide if that is enough
 *   PACKED_ROWS    [outputs][inputs], signed, as torch holds them: panels are made on the way
 * Scales are [groups][outputs, filled up to whole blocks] in the first two, [outputs][groups] in PACKED_ROWS.
 */
#ifndef SPIKELM_INT8_LAYOUT_H
#define SPIKELM_INT8_LAYOUT_H

#include "event.h"
#include "panel.h"

enum packed_layout { PACKED_OUT_IN = 0, PACKED_IN_OUT = 1, PACKED_ROWS = 2 };

struct packed_int8 {
    int64_t outputs, inputs, group, groups;
    int32_t layout;
    int32_t finite; /* no scale is infinite or NaN: a group without events adds nothing */
    const int8_t *weights;
    const float *scales;
};

#define INT8_ROW_BLOCK 32 /* rows for which weights are read once */

static inline int64_t packed_blocks(const struct packed_int8 *w) {
    return (w->outputs + INT8_BLOCK - 1) / INT8_BLOCK;
}

/* Inputs of a group, filled up to whole quads. */
static inline int64_t packed_padded(const struct packed_int8 *w) { return (w->group + 3) / 4 * 4; }

/* Quads of a block of PACKED_OUT_IN. */
static inline int64_t packed_quads(const struct packed_int8 *w) {
    const int64_t tail = w->inputs - (w->groups - 1) * w->group;
    return w->groups ? (w->groups - 1) * packed_padded(w) / 4 + (tail + 3) / 4 : 0;
}

/* Outputs of the tile of IN_OUT that begins at an output. */
static inline int64_t packed_tile_width(const struct packed_int8 *w, int64_t base) {
    const int64_t left = packed_blocks(w) * INT8_BLOCK - base;
    return left < INT8_TILE ? left : INT8_TILE;
}

static inline int64_t packed_width(const struct packed_int8 *w) { return w->groups * packed_padded(w); }

/* Where the parts of scratch lie, for at most INT8_ROW_BLOCK rows. */
struct int8_scratch {
    int64_t width;
    int8_t *counts;             /* [rows or 2 * rows][width] groups filled up to whole quads; second halves */
    int32_t *totals;            /* [rows][groups] sums of counts */
    uint8_t *largest;           /* [rows][groups] largest magnitudes */
    int32_t *sums;              /* [rows][INT8_BLOCK], or [INT8_TILE] */
    float *y;                   /* likewise */
    float *scales;              /* [groups][INT8_BLOCK] */
    uint8_t *panel;             /* [INT8_PANEL][INT8_QUAD] */
    struct int8_events *events; /* [rows], with lists of their own */
    int64_t bytes;
};

static inline void *int8_scratch_part(uint8_t *base, int64_t *used, int64_t bytes) {
    void *part = base ? base + *used : NULL;
    *used += (bytes + 63) / 64 * 64;
    return part;
}

static inline struct int8_scratch packed_layout_scratch(const struct packed_int8 *w, int64_t rows, void *memory) {
    struct int8_scratch s;
    int64_t used = 0;
    uint8_t *base = memory ? (uint8_t *)(((uintptr_t)memory + 63) / 64 * 64) : NULL;
    rows = rows < INT8_ROW_BLOCK ? rows : INT8_ROW_BLOCK;
    s.width = packed_width(w);
    s.counts = int8_scratch_part(base, &used, (1 + INT8_SHORT) * rows * s.width + 4);
    s.totals = int8_scratch_part(base, &used, 4 * rows * w->groups);
    s.largest = int8_scratch_part(base, &used, rows * w->groups);
    s.sums = int8_scratch_part(base, &used, 4 * rows * INT8_TILE);
    s.y = int8_scratch_part(base, &used, 4 * rows * INT8_TILE);
    s.scales = int8_scratch_part(base, &used, w->layout == PACKED_ROWS ? 4 * w->groups * INT8_BLOCK : 0);
    s.panel = int8_scratch_part(base, &used, w->layout == PACKED_OUT_IN ? 0 : INT8_PANEL * INT8_QUAD);
    s.events = NULL;
    if (w->layout == PACKED_IN_OUT) {
        s.events = int8_scratch_part(base, &used, rows * (int64_t)sizeof(struct int8_events));
        for (int64_t r = 0; r < rows; r++) {
            int32_t *inputs = int8_scratch_part(base, &used, 4 * int8_events_entries(w->inputs));
            int8_t *counts = int8_scratch_part(base, &used, int8_events_entries(w->inputs));
            void *segment = int8_scratch_part(base, &used, (int64_t)sizeof(struct int8_segment) * (w->inputs + 1));
            if (base) {
                s.events[r] = (struct int8_events){.inputs = inputs, .counts = counts, .segment = segment};
            }
        }
    }
    s.bytes = used + 64;
    return s;
}

/* Bytes that packed_rows needs as scratch for this many rows. */
static inline int64_t packed_scratch_bytes(const struct packed_int8 *w, int64_t rows) {
    return packed_layout_scratch(w, rows, NULL).bytes;
}

/* Outputs of one of several threads: whole blocks (tiles), shared out evenly. */
static inline void packed_share(const struct packed_int8 *w, int64_t thread, int64_t threads, int64_t *first,
                                int64_t *last) {
    const int64_t step = w->layout == PACKED_IN_OUT ? INT8_TILE : INT8_BLOCK, units = (w->outputs + step - 1) / step;
    const int64_t begin = units * thread / threads * step, end = units * (thread + 1) / threads * step;
    *first = begin < w->outputs ? begin : w->outputs;
    *last = end < w->outputs ? end : w->outputs;
}

#endif
