/* int8_linear: whole calls for torch, threads over outputs (the product is in step.h), and packing. */
#include "step.h"

#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* Which instructions the dense product uses. */
const char *int8_variant(void) {
#if defined(INT8_AVX512)
    return "avx512-vnni";
#elif defined(INT8_AVXVNNI)
    return "avx-vnni";
#elif defined(INT8_AVX2)
    return "avx2";
#elif defined(INT8_NEON)
    return "neon";
#else
    return "portable";
#endif
}

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

/* Packed weights (all bytes of them) from rows [outputs][inputs]. */
void int8_pack(const struct packed_int8 *w, const int8_t *rows, uint8_t *packed) {
    memset(packed, 128, int8_packed_bytes(w));
    if (w->layout == PACKED_OUT_IN) {
        for (int64_t base = 0; base < w->outputs; base += INT8_BLOCK) {
            const int64_t outputs = w->outputs - base < INT8_BLOCK ? w->outputs - base : INT8_BLOCK;
            uint8_t *block = packed + base / INT8_BLOCK * packed_quads(w) * INT8_QUAD;
            for (int64_t j = 0; j < w->groups; j++) {
                const int64_t first = j * w->group, left = w->inputs - first;
                int8_panel_of_rows(outputs, left < w->group ? left : w->group, w->inputs,
                                   rows + base * w->inputs + first, block + j * packed_padded(w) / 4 * INT8_QUAD);
            }
        }
        return;
    }
    for (int64_t base = 0; base < w->outputs; base += INT8_TILE) {
        const int64_t width = packed_tile_width(w, base);
        const int64_t outputs = w->outputs - base < width ? w->outputs - base : width;
        uint8_t *tile = packed + base * w->inputs;
        for (int64_t first = 0; first < w->inputs; first += INT8_BLOCK) {
            const int64_t last = first + INT8_BLOCK < w->inputs ? first + INT8_BLOCK : w->inputs;
            for (int64_t o = 0; o < outputs; o++) {
                for (int64_t i = first; i < last; i++) {
                    tile[i * width + o] = (uint8_t)(rows[(base + o) * w->inputs + i] ^ 0x80);
                }
            }
        }
    }
}

/* Rows [outputs][inputs] from packed weights. */
void int8_unpack(const struct packed_int8 *w, int8_t *rows) {
    const uint8_t *packed = (const uint8_t *)w->weights;
    for (int64_t o = 0; o < w->outputs; o++) {
        int8_t *row = rows + o * w->inputs;
        if (w->layout == PACKED_IN_OUT) {
            const int64_t base = o / INT8_TILE * INT8_TILE, width = packed_tile_width(w, base);
            for (int64_t i = 0; i < w->inputs; i++) {
                row[i] = (int8_t)(packed[base * w->inputs + i * width + o - base] ^ 0x80);
            }
            continue;
        }
        const uint8_t *block = packed + o / INT8_BLOCK * packed_quads(w) * INT8_QUAD + o % INT8_BLOCK * 4;
        for (int64_t j = 0; j < w->groups; j++) {
            const int64_t first = j * w->group, left = w->inputs - first, n = left < w->group ? left : w->group;
            const uint8_t *quads = block + j * packed_padded(w) / 4 * INT8_QUAD;
            for (int64_t i = 0; i < n; i++) {
                row[first + i] = (int8_t)(quads[i / 4 * INT8_QUAD + i % 4] ^ 0x80);
            }
        }
    }
}

/* Whole numbers as int8. Returns what was found: 1 beyond 127, 2 NaN, 4 a fraction; those become 0. */
int32_t int8_counts(int64_t n, const float *restrict from, int8_t *restrict to) {
    int32_t beyond = 0, missing = 0, fraction = 0;
#pragma omp simd reduction(| : beyond, missing, fraction)
    for (int64_t i = 0; i < n; i++) {
        const float x = from[i], size = fabsf(x);
        const float within = size <= 127.0f ? x : 0.0f;
        const int32_t whole = (int32_t)within;
        beyond |= size > 127.0f;
        missing |= x != x;
        fraction |= (float)whole != within;
        to[i] = (int8_t)whole;
    }
    return beyond | missing << 1 | fraction << 2;
}
