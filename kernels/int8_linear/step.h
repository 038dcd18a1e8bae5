/* int8_linear over packed weights: rows of int8 counts to float32 outputs (the equation is in reference.py).
 *
 *     y_o = V * sum over groups j of s_oj * (sum over i in group j of n_i W_oi) + b_o
 *
 * The inner sums are exact, and floats are computed element by element in one order (groups from the first to
 * the last, starting from zero; then threshold, then bias), so that y has the same bits in every layout, variant,
 * batch and number of threads, and those of the reference.
 *
 * Layouts of the weights: layout.h. Included by op.c and by the decode plan. Scratch belongs to one call: threads
 * need one each.
 */
#ifndef SPIKELM_INT8_STEP_H
#define SPIKELM_INT8_STEP_H

#include "dot.h"
#include "layout.h"
#include "row.h"

/* y += scales * (sums - bias) for `outputs` outputs. Addition and multiplication are rounded apart. */
INLINE void int8_add_scaled(int outputs, int32_t bias, const int32_t *restrict sums, const float *restrict scales,
                       float *restrict y) {
#pragma omp simd
    for (int o = 0; o < outputs; o++) {
        y[o] = y[o] + scales[o] * (float)(int32_t)((uint32_t)sums[o] - (uint32_t)bias);
    }
}

/* Threshold and bias, and out: outputs [from, to) of a block that begins at output `base`. */
INLINE void int8_put_out(int64_t base, int64_t from, int64_t to, const float *restrict y, const float *threshold,
                         const float *restrict bias, float *restrict out) {
    const float factor = threshold ? *threshold : 1.0f; /* times one: the same bits */
    if (bias) {
#pragma omp simd
        for (int64_t o = from; o < to; o++) {
            out[o] = y[o - base] * factor + bias[o];
        }
        return;
    }
#pragma omp simd
    for (int64_t o = from; o < to; o++) {
        out[o] = y[o - base] * factor;
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
            memcpy(to, from, n);
            memset(to + n, 0, padded - n);
            const uint8_t largest = INT8_SHORT ? int8_largest(n, from) : 0;
            s->totals[r * w->groups + j] = int8_total(n, from);
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

/* One row's outputs [first, last), prepared by int8_prepare_dense. The two halves of the blocks are read at
 * once. */
static inline void int8_dense_row(const struct packed_int8 *w, const struct int8_scratch *s, int64_t first,
                                  int64_t last, const float *threshold, const float *bias, float *y) {
    const int64_t begin = first / INT8_BLOCK, end = (last + INT8_BLOCK - 1) / INT8_BLOCK;
#if defined(INT8_ROW_BLOCKS)
    if (w->layout == PACKED_OUT_IN) {
        const int64_t padded = packed_padded(w), quads = packed_quads(w), stride = packed_blocks(w) * INT8_BLOCK;
        const int64_t tail = quads - (w->groups - 1) * padded / 4, half = (end - begin + 1) / 2;
        for (int64_t block = begin; block < begin + half; block++) {
            const uint8_t *weights = (const uint8_t *)w->weights + block * quads * INT8_QUAD;
            const float *scales = w->scales + block * INT8_BLOCK;
            const int streams = block + half < end ? 2 : 1;
            if (streams == 2) {
                int8_row_blocks(2, w->groups, padded, tail, weights, half * quads * INT8_QUAD, s->counts, s->totals,
                                scales, stride, half * INT8_BLOCK, s->y);
            } else {
                int8_row_blocks(1, w->groups, padded, tail, weights, 0, s->counts, s->totals, scales, stride, 0, s->y);
            }
            for (int k = 0; k < streams; k++) {
                const int64_t base = (block + k * half) * INT8_BLOCK, next = base + INT8_BLOCK;
                int8_put_out(base, base > first ? base : first, next < last ? next : last, s->y + k * INT8_BLOCK,
                             threshold, bias, y);
            }
        }
        return;
    }
#endif
    for (int64_t block = begin; block < end; block++) {
        const int64_t base = block * INT8_BLOCK, next = base + INT8_BLOCK;
        int8_dense_block(w, s, 1, base, base > first ? base : first, next < last ? next : last, threshold, bias, y, 0);
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
            for (int64_t i = first; i < last; i++) {
                any |= row[i];
            }
            s->totals[r * w->groups + j] = int8_total(last - first, row + first);
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
        if (n == 1) {
            int8_dense_row(w, &s, first_output, last_output, scale, bias, to);
            continue;
        }
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
