/* The innermost dense product: rows of counts times a panel of weights, in exact int32.
 *
 * A panel holds INT8_BLOCK outputs and four inputs side by side: [quads][INT8_BLOCK][4] bytes w + 128. Sums are
 * too large by INT8_BIAS times the sum of the row's counts (vector.h says why).
 */
#ifndef SPIKELM_INT8_DOT_H
#define SPIKELM_INT8_DOT_H

#include "vector.h"

#define INT8_STREAM 8192   /* bytes that the weights of a single row are fetched ahead */
#define INT8_SHORT_STEPS 4 /* quads added in 16 bits that make that worth while */

#ifndef INT8_PLAIN

/* sum [rows][vectors] += four inputs. */
INLINE void int8_quad(int rows, int vectors, int in_pairs, const uint8_t *panel, const int8_t *counts,
                      int64_t stride, int8_vector (*sum)[INT8_BLOCK / INT8_LANES]) {
    int8_vector weights[INT8_BLOCK / INT8_LANES];
    (void)in_pairs;
#pragma GCC unroll 16
    for (int v = 0; v < vectors; v++) {
        weights[v] = int8_load(panel + v * 4 * INT8_LANES);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        int32_t four;
        memcpy(&four, counts + r * stride, 4);
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) {
#if INT8_SHORT
            sum[r][v] = in_pairs ? int8_pairs(sum[r][v], weights[v], four) : int8_dot(sum[r][v], weights[v], four);
#else
            sum[r][v] = int8_dot(sum[r][v], weights[v], four);
#endif
        }
    }
    if (rows == 1) {
#pragma GCC unroll 4
        for (int line = 0; line < vectors * 4 * INT8_LANES; line += 64) {
            __builtin_prefetch(panel + line + INT8_STREAM);
        }
    }
}

/* sums [rows][INT8_BLOCK] += panel times counts, for outputs of `vectors` vectors and at least one quad. The rows
 * lie `stride` bytes apart. */
INLINE void int8_tile(int rows, int vectors, int64_t quads, const uint8_t *panel, const int8_t *counts,
                      int64_t stride, int32_t *sums) {
    int8_vector sum[INT8_ROWS_AT_ONCE][INT8_BLOCK / INT8_LANES];
    const int8_t *end = counts + 4 * quads;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) {
            sum[r][v] = int8_load(sums + r * INT8_BLOCK + v * INT8_LANES);
        }
    }
    do {
        int8_quad(rows, vectors, 0, panel, counts, stride, sum);
        panel += INT8_QUAD;
        counts += 4;
    } while (counts < end);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) {
            int8_store(sums + r * INT8_BLOCK + v * INT8_LANES, sum[r][v]);
        }
    }
}

/* The same, adding `steps` quads in 16 bits before they are widened. */
INLINE void int8_short_tile(int rows, int vectors, int64_t quads, int64_t steps, const uint8_t *panel,
                            const int8_t *counts, int64_t stride, int32_t *sums) {
#if INT8_SHORT
    const int8_t *end = counts + 4 * quads;
    do {
        int8_vector sum[INT8_ROWS_AT_ONCE][INT8_BLOCK / INT8_LANES];
        const int8_t *until = counts + 4 * steps < end ? counts + 4 * steps : end;
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++) {
                sum[r][v] = _mm256_setzero_si256();
            }
        }
        do {
            int8_quad(rows, vectors, 1, panel, counts, stride, sum);
            panel += INT8_QUAD;
            counts += 4;
        } while (counts < until);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++) {
                int32_t *to = sums + r * INT8_BLOCK + v * INT8_LANES;
                int8_store(to, int8_widen(int8_load(to), sum[r][v]));
            }
        }
    } while (counts < end);
#else
    (void)steps;
    int8_tile(rows, vectors, quads, panel, counts, stride, sums);
#endif
}

/* Quads of these rows that 16 bits hold, 0 if that is not worth while. largest: each row's largest magnitude. */
INLINE int64_t int8_steps(int rows, const uint8_t *largest, int64_t apart) {
    int64_t most = 1;
    for (int64_t r = 0; r < rows; r++) {
        most = largest[r * apart] > most ? largest[r * apart] : most;
    }
    return INT8_SHORT && INT8_HALF / most >= INT8_SHORT_STEPS ? INT8_HALF / most : 0;
}

/* Functions of their own, so that each has all registers. */
#define INT8_OWN static __attribute__((noinline, unused))
INT8_OWN void int8_rows_tile(int64_t quads, const uint8_t *panel, const int8_t *counts, int64_t stride,
                             int32_t *sums) {
    int8_tile(INT8_ROWS_AT_ONCE, INT8_VECTORS_AT_ONCE, quads, panel, counts, stride, sums);
}
INT8_OWN void int8_rows_short_tile(int64_t quads, int64_t steps, const uint8_t *panel, const int8_t *counts,
                                   int64_t stride, int32_t *sums) {
    int8_short_tile(INT8_ROWS_AT_ONCE, INT8_VECTORS_AT_ONCE, quads, steps, panel, counts, stride, sums);
}
INT8_OWN void int8_row_tile(int64_t quads, const uint8_t *panel, const int8_t *counts, int32_t *sums) {
    int8_tile(1, INT8_BLOCK / INT8_LANES, quads, panel, counts, 0, sums);
}
INT8_OWN void int8_row_short_tile(int64_t quads, int64_t steps, const uint8_t *panel, const int8_t *counts,
                                  int32_t *sums) {
    int8_short_tile(1, INT8_BLOCK / INT8_LANES, quads, steps, panel, counts, 0, sums);
}

/* sums [rows][INT8_BLOCK] += panel times counts, any number of rows; the magnitudes of `largest` lie `apart`
 * bytes apart. */
static inline void int8_panel(int64_t rows, int64_t quads, const uint8_t *panel, const int8_t *counts,
                              int64_t stride, const uint8_t *largest, int64_t apart, int32_t *sums) {
    int64_t r = 0;
    for (; r + INT8_ROWS_AT_ONCE <= rows; r += INT8_ROWS_AT_ONCE) {
        const int64_t steps = int8_steps(INT8_ROWS_AT_ONCE, largest + r * apart, apart);
        const int8_t *n = counts + r * stride;
        for (int o = 0; o < INT8_BLOCK; o += INT8_LANES * INT8_VECTORS_AT_ONCE) {
            int32_t *to = sums + r * INT8_BLOCK + o;
            if (steps) {
                int8_rows_short_tile(quads, steps, panel + 4 * o, n, stride, to);
            } else {
                int8_rows_tile(quads, panel + 4 * o, n, stride, to);
            }
        }
    }
    for (; r < rows; r++) {
        const int64_t steps = int8_steps(1, largest + r * apart, apart);
        if (steps) {
            int8_row_short_tile(quads, steps, panel, counts + r * stride, sums + r * INT8_BLOCK);
        } else {
            int8_row_tile(quads, panel, counts + r * stride, sums + r * INT8_BLOCK);
        }
    }
}

#else

static inline void int8_panel(int64_t rows, int64_t quads, const uint8_t *panel, const int8_t *counts,
                              int64_t stride, const uint8_t *largest, int64_t apart, int32_t *sums) {
    (void)largest;
    (void)apart;
    for (int64_t r = 0; r < rows; r++) {
        int32_t *restrict sum = sums + r * INT8_BLOCK;
        for (int64_t q = 0; q < quads; q++) {
            const int8_t *n = counts + r * stride + 4 * q;
            const int16_t n0 = n[0], n1 = n[1], n2 = n[2], n3 = n[3];
            const uint8_t *restrict w = panel + q * INT8_QUAD;
            for (int o = 0; o < INT8_BLOCK; o++) {
                sum[o] = (int32_t)((uint32_t)sum[o] + (uint32_t)(n0 * w[4 * o] + n1 * w[4 * o + 1] +
                                                                 n2 * w[4 * o + 2] + n3 * w[4 * o + 3]));
            }
        }
    }
}

#endif
#endif
