/* int8_linear over packed weights: rows of int8 counts to float32 outputs (the equation is in reference.py).
 *
 *     y_o = V * sum over groups j of s_oj * (sum over i in group j of n_i W_oi) + b_o
 *
 * The inner sums are exact, and floats are computed element by element in one order (groups from the first to
 * the last, starting from zero; then threshold, then bias), so that y has the same bits in every layout, variant,
 * batch and number of threads, and those of the reference.
 *
 * Layouts of the weights, bytes w + 128 but in PACKED_ROWS (dot.h and event.h say why):
 *   PACKED_OUT_IN  [blocks of 64 outputs][quads of inputs][64][4]; a group is filled up to whole quads with zeros
 *   PACKED_IN_OUT  [tiles of 128 outputs][inputs][128]; the last tile is 64 wide if that is enough
 *   PACKED_ROWS    [outputs][inputs], signed, as torch holds them: panels are made on the way
 * Scales are [groups][outputs, filled up to whole blocks] in the first two, [outputs][groups] in PACKED_ROWS.
 *
 * Included by op.c and by the decode plan. Scratch belongs to one call: threads need one each.
 */
#ifndef SPIKELM_INT8_STEP_H
#define SPIKELM_INT8_STEP_H

#include "dot.h"
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

/* y += scales * (sums - bias) for `outputs` outputs. Addition and multiplication are rounded apart. */
INLINE void int8_add_scaled(int outputs, int32_t bias, const int32_t *restrict sums, const float *restrict scales,
                       float *restrict y) {
#pragma omp simd
    for (int o = 0; o < outputs; o++) {
        y[o] = y[o] + scales[o] * (float)(int32_t)((uint32_t)sums[o] - (uint32_t)bias);
    }
}

/* Threshold and bias, and out: outputs [from, to) of a block that begins at output `base`. */
static inline void int8_put_out(int64_t base, int64_t from, int64_t to, const float *y, const float *threshold,
                           const float *bias, float *out) {
    for (int64_t o = from; o < to; o++) {
        float value = y[o - base];
        value = threshold ? value * *threshold : value;
        out[o] = bias ? value + bias[o] : value;
    }
}

/* Prepare the dense form of rows: counts with groups filled up, their sums, and halves of large ones. */
static inline void int8_prepare_dense(const struct packed_int8 *w, const int8_t *counts, int64_t rows,
                                      int64_t stride, const struct int8_scratch *s) {
    const int64_t padded = packed_padded(w);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t j = 0; j < w->groups; j++) {
            const int64_t first = j * w->group, left = w->inputs - first, n = left < w->group ? left : w->group;
            const int8_t *from = counts + r * stride + first;
            int8_t *to = s->counts + r * s->width + j * padded;
            int32_t total = 0;
            int8_t low = 0, high = 0;
            memcpy(to, from, n);
            memset(to + n, 0, padded - n);
            for (int64_t i = 0; i < n; i++) {
                total += from[i];
            }
            for (int64_t i = 0; i < n; i++) {
                low = from[i] < low ? from[i] : low;
                high = from[i] > high ? from[i] : high;
            }
            const uint8_t largest = (uint8_t)(-low > high ? -low : high);
            s->totals[r * w->groups + j] = total;
            s->largest[r * w->groups + j] = largest;
            if (INT8_SHORT && largest > INT8_HALF) {
                int8_t *rest = to + rows * s->width;
                for (int64_t i = 0; i < padded; i++) {
                    const int32_t count = to[i];
                    to[i] = (int8_t)(count > INT8_HALF ? INT8_HALF : count < -INT8_HALF ? -INT8_HALF : count);
                    rest[i] = (int8_t)(count - to[i]);
                }
            }
        }
    }
}

/* sums [rows][INT8_BLOCK] of group j += the panel that holds its quads from `quad` on */
static inline void int8_dense_sums(const struct packed_int8 *w, const struct int8_scratch *s, int64_t rows,
                                   int64_t j, int64_t quad, int64_t quads, const uint8_t *panel) {
    const int8_t *counts = s->counts + j * packed_padded(w) + 4 * quad;
    const uint8_t *largest = s->largest + j;
    int8_panel(rows, quads, panel, counts, s->width, largest, w->groups, s->sums);
    for (int64_t r = 0; INT8_SHORT && r < rows; r++) {
        const uint8_t *own = largest + r * w->groups;
        if (*own > INT8_HALF) {
            int8_panel(1, quads, panel, counts + (rows + r) * s->width, 0, own, 0, s->sums + r * INT8_BLOCK);
        }
    }
}

/* Integer sums of one block of outputs and one group, biased by INT8_BIAS * totals. */
static inline void int8_dense_group(const struct packed_int8 *w, const struct int8_scratch *s, int64_t rows,
                               int64_t base, int64_t j) {
    const int64_t first = j * w->group, left = w->inputs - first, n = left < w->group ? left : w->group;
    const int64_t quads = (n + 3) / 4, padded = packed_padded(w);
    memset(s->sums, 0, 4 * rows * INT8_BLOCK);
    if (w->layout == PACKED_OUT_IN) {
        const uint8_t *panel =
            (const uint8_t *)w->weights + (base / INT8_BLOCK * packed_quads(w) + j * padded / 4) * INT8_QUAD;
        int8_dense_sums(w, s, rows, j, 0, quads, panel);
        return;
    }
    for (int64_t quad = 0; quad < quads; quad += INT8_PANEL) {
        const int64_t now = quads - quad < INT8_PANEL ? quads - quad : INT8_PANEL;
        const int64_t from = first + 4 * quad, count = n - 4 * quad < 4 * now ? n - 4 * quad : 4 * now;
        if (w->layout == PACKED_IN_OUT) {
            const int64_t tile = base / INT8_TILE * INT8_TILE, width = packed_tile_width(w, tile);
            const uint8_t *weights = (const uint8_t *)w->weights + tile * w->inputs + (base - tile);
            int8_panel_of_inputs(count, width, weights + from * width, s->panel);
        } else {
            const int64_t outputs = w->outputs - base < INT8_BLOCK ? w->outputs - base : INT8_BLOCK;
            int8_panel_of_rows(outputs, count, w->inputs, w->weights + base * w->inputs + from, s->panel);
        }
        int8_dense_sums(w, s, rows, j, quad, now, s->panel);
    }
}

static inline const float *int8_block_scales(const struct packed_int8 *w, const struct int8_scratch *s,
                                             int64_t base) {
    if (w->layout != PACKED_ROWS) {
        return w->scales + base;
    }
    for (int64_t o = 0; o < INT8_BLOCK; o++) {
        for (int64_t j = 0; j < w->groups; j++) {
            s->scales[j * INT8_BLOCK + o] = base + o < w->outputs ? w->scales[(base + o) * w->groups + j] : 0.0f;
        }
    }
    return s->scales;
}

static inline void int8_dense_block(const struct packed_int8 *w, const struct int8_scratch *s, int64_t rows,
                               int64_t base, int64_t from, int64_t to, const float *thresholds, const float *bias,
                               float *y, int64_t y_stride) {
    const float *scales = int8_block_scales(w, s, base);
    const int64_t stride = w->layout == PACKED_ROWS ? INT8_BLOCK : packed_blocks(w) * INT8_BLOCK;
    memset(s->y, 0, 4 * rows * INT8_BLOCK);
    for (int64_t j = 0; j < w->groups; j++) {
        int8_dense_group(w, s, rows, base, j);
        for (int64_t r = 0; r < rows; r++) {
            const int32_t excess = (int32_t)((uint32_t)INT8_BIAS * (uint32_t)s->totals[r * w->groups + j]);
            int8_add_scaled(INT8_BLOCK, excess, s->sums + r * INT8_BLOCK, scales + j * stride,
                            s->y + r * INT8_BLOCK);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        const float *threshold = thresholds ? thresholds + r : NULL;
        int8_put_out(base, from, to, s->y + r * INT8_BLOCK, threshold, bias, y + r * y_stride);
    }
}

/* One tile of one row from its events. */
INLINE void int8_event_groups(const struct packed_int8 *w, int width, const struct int8_events *e,
                              const int32_t *totals, const uint8_t *tile, const float *scales, int32_t *sums,
                              float *y) {
    const int64_t stride = packed_blocks(w) * INT8_BLOCK;
    int32_t begin = 0, next = 0;
    memset(y, 0, 4 * width);
    memset(sums, 0, 4 * width);
    for (int32_t k = 0; k < e->segments; k++) {
        const struct int8_segment segment = e->segment[k];
        if (e->binary) {
            int8_add_binary(width / 32, begin, segment.end, e->inputs, tile, sums);
        } else {
            int8_add_graded(width / 32, begin, segment.end, e->inputs, e->counts, tile, sums);
        }
        begin = segment.end;
        if (segment.group < 0) {
            continue;
        }
        for (; !w->finite && next < segment.group; next++) {
            const int32_t nothing[INT8_TILE] = {0};
            int8_add_scaled(width, 0, nothing, scales + next * stride, y);
        }
        const int32_t excess = (int32_t)(128u * (uint32_t)totals[segment.group]);
        int8_add_scaled(width, excess, sums, scales + segment.group * stride, y);
        memset(sums, 0, 4 * width);
        next = segment.group + 1;
    }
    for (; !w->finite && next < w->groups; next++) {
        int8_add_scaled(width, 0, sums, scales + next * stride, y);
    }
}

static inline void int8_event_tile(const struct packed_int8 *w, const struct int8_scratch *s, int64_t r,
                                   int64_t base) {
    const uint8_t *tile = (const uint8_t *)w->weights + base * w->inputs;
    const int32_t *totals = s->totals + r * w->groups;
    if (packed_tile_width(w, base) == INT8_TILE) {
        int8_event_groups(w, INT8_TILE, s->events + r, totals, tile, w->scales + base, s->sums, s->y);
    } else {
        int8_event_groups(w, INT8_BLOCK, s->events + r, totals, tile, w->scales + base, s->sums, s->y);
    }
}

/* Lists the events of rows; returns whether reading them one by one pays. Several rows with more than half of
 * their inputs firing are faster as a dense product, whose panels they share. */
static inline int int8_prepare_events(const struct packed_int8 *w, const int8_t *counts, int64_t rows,
                                      int64_t stride, const struct int8_scratch *s) {
    int64_t fired = 0;
    for (int64_t r = 0; r < rows && rows > 1; r++) {
        int32_t own = 0;
        for (int64_t i = 0; i < w->inputs; i++) {
            own += counts[r * stride + i] != 0;
        }
        fired += own;
    }
    if (2 * fired > rows * w->inputs) {
        return 0;
    }
    for (int64_t r = 0; r < rows; r++) {
        const int8_t *row = counts + r * stride;
        int8_t any = 0;
        for (int64_t j = 0; j < w->groups; j++) {
            const int64_t first = j * w->group, end = first + w->group, last = end < w->inputs ? end : w->inputs;
            int32_t total = 0;
            for (int64_t i = first; i < last; i++) {
                total += row[i];
                any |= row[i];
            }
            s->totals[r * w->groups + j] = total;
        }
        int8_list_events(w->inputs, w->group, row, (any & ~1) == 0, s->events + r);
    }
    return 1;
}

/* Outputs [first, last) of rows of counts.
 *
 * counts: row r at counts + r * counts_stride. thresholds [rows] and bias [outputs] may be NULL. y: output o of
 * row r at y[r * y_stride + o]; nothing outside [first, last) is written. scratch: packed_scratch_bytes(w, rows),
 * any alignment, contents do not matter. Shares that begin at multiples of 128 outputs waste nothing
 * (packed_share).
 */
static inline void packed_rows(const struct packed_int8 *w, const int8_t *counts, int64_t rows, int64_t counts_stride,
                               const float *thresholds, const float *bias, float *y, int64_t y_stride, void *scratch,
                               int64_t first_output, int64_t last_output) {
    const struct int8_scratch s = packed_layout_scratch(w, rows, scratch);
    for (int64_t row = 0; row < rows && first_output < last_output; row += INT8_ROW_BLOCK) {
        const int64_t n = rows - row < INT8_ROW_BLOCK ? rows - row : INT8_ROW_BLOCK;
        const int8_t *now = counts + row * counts_stride;
        const float *scale = thresholds ? thresholds + row : NULL;
        float *to = y + row * y_stride;
        if (w->layout == PACKED_IN_OUT && int8_prepare_events(w, now, n, counts_stride, &s)) {
            for (int64_t base = first_output / INT8_TILE * INT8_TILE; base < last_output; base += INT8_TILE) {
                const int64_t begin = base > first_output ? base : first_output;
                const int64_t end = base + INT8_TILE < last_output ? base + INT8_TILE : last_output;
                for (int64_t r = 0; r < n; r++) {
                    int8_event_tile(w, &s, r, base);
                    int8_put_out(base, begin, end, s.y, scale ? scale + r : NULL, bias, to + r * y_stride);
                }
            }
            continue;
        }
        int8_prepare_dense(w, now, n, counts_stride, &s);
        for (int64_t base = first_output / INT8_BLOCK * INT8_BLOCK; base < last_output; base += INT8_BLOCK) {
            const int64_t begin = base > first_output ? base : first_output;
            const int64_t end = base + INT8_BLOCK < last_output ? base + INT8_BLOCK : last_output;
            int8_dense_block(w, &s, n, base, begin, end, scale, bias, to, y_stride);
        }
    }
}

/* Exact inner sums, int32 [groups][rows][outputs], outputs [first, last); arguments as above. */
static inline void packed_sums(const struct packed_int8 *w, const int8_t *counts, int64_t rows, int64_t counts_stride,
                               int32_t *sums, void *scratch, int64_t first_output, int64_t last_output) {
    const struct int8_scratch s = packed_layout_scratch(w, rows, scratch);
    for (int64_t row = 0; row < rows && first_output < last_output; row += INT8_ROW_BLOCK) {
        const int64_t n = rows - row < INT8_ROW_BLOCK ? rows - row : INT8_ROW_BLOCK;
        int8_prepare_dense(w, counts + row * counts_stride, n, counts_stride, &s);
        for (int64_t base = first_output / INT8_BLOCK * INT8_BLOCK; base < last_output; base += INT8_BLOCK) {
            const int64_t end = base + INT8_BLOCK < last_output ? base + INT8_BLOCK : last_output;
            for (int64_t j = 0; j < w->groups; j++) {
                int8_dense_group(w, &s, n, base, j);
                for (int64_t r = 0; r < n; r++) {
                    const uint32_t excess = (uint32_t)INT8_BIAS * (uint32_t)s.totals[r * w->groups + j];
                    for (int64_t o = base > first_output ? base : first_output; o < end; o++) {
                        sums[(j * rows + row + r) * w->outputs + o] =
                            (int32_t)((uint32_t)s.sums[r * INT8_BLOCK + o - base] - excess);
                    }
                }
            }
        }
    }
}

#endif
