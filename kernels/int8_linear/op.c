/* int8_linear: whole calls for torch, threads over outputs (the product is in step.h), and packing. */
#include "step.h"

#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* Bytes of scratch for a call with this many threads. */
int64_t int8_scratch_bytes(const struct packed_int8 *w, int64_t rows, int threads) {
    return threads * packed_scratch_bytes(w, rows);
}

void int8_rows(const struct packed_int8 *w, const int8_t *counts, int64_t rows, const float *thresholds,
               const float *bias, float *y, void *scratch, int threads) {
    const int64_t each = packed_scratch_bytes(w, rows);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        int64_t first, last;
        packed_share(w, t, threads, &first, &last);
        packed_rows(w, counts, rows, w->inputs, thresholds, bias, y, w->outputs, (uint8_t *)scratch + t * each, first,
                    last);
    }
}

/* Exact inner sums [groups][rows][outputs]. */
void int8_sums(const struct packed_int8 *w, const int8_t *counts, int64_t rows, int32_t *sums, void *scratch,
               int threads) {
    const int64_t each = packed_scratch_bytes(w, rows);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        int64_t first, last;
        packed_share(w, t, threads, &first, &last);
        packed_sums(w, counts, rows, w->inputs, sums, (uint8_t *)scratch + t * each, first, last);
    }
}

/* Bytes of the weights in a layout. */
int64_t int8_packed_bytes(const struct packed_int8 *w) {
    const int64_t outputs = packed_blocks(w) * INT8_BLOCK;
    return w->layout == PACKED_IN_OUT ? outputs * w->inputs : outputs * 4 * packed_quads(w);
}

/* Place of weight (output, input) in a layout. */
static int64_t place(const struct packed_int8 *w, int64_t output, int64_t input) {
    if (w->layout == PACKED_IN_OUT) {
        const int64_t tile = output / INT8_TILE * INT8_TILE, whole = packed_blocks(w) * INT8_BLOCK - tile;
        return tile * w->inputs + input * (whole < INT8_TILE ? whole : INT8_TILE) + output - tile;
    }
    const int64_t quad = input / w->group * packed_padded(w) / 4 + input % w->group / 4;
    return (output / INT8_BLOCK * packed_quads(w) + quad) * INT8_QUAD + output % INT8_BLOCK * 4 + input % w->group % 4;
}

/* Packed weights (all bytes of them) from rows [outputs][inputs]. */
void int8_pack(const struct packed_int8 *w, const int8_t *rows, uint8_t *packed) {
    memset(packed, 128, int8_packed_bytes(w));
    for (int64_t o = 0; o < w->outputs; o++) {
        for (int64_t i = 0; i < w->inputs; i++) {
            packed[place(w, o, i)] = (uint8_t)(rows[o * w->inputs + i] ^ 0x80);
        }
    }
}

void int8_unpack(const struct packed_int8 *w, int8_t *rows) {
    for (int64_t o = 0; o < w->outputs; o++) {
        for (int64_t i = 0; i < w->inputs; i++) {
            rows[o * w->inputs + i] = (int8_t)(((const uint8_t *)w->weights)[place(w, o, i)] ^ 0x80);
        }
    }
}
