/* One row times blocks of outputs in PACKED_OUT_IN: decoding a single sequence.
 *
 * The time is the memory's, so that the loop is kept short: whatever is added to it delays the next loads. The
 * sums of a group and the scaled sums of all groups stay in registers. Two blocks that lie far apart are read at
 * once, and nothing is fetched ahead by instruction: processors fetch two plain streams faster than one that is
 * helped. Sums of even and of odd quads are apart, which halves the chains of dependent additions.
 */
#ifndef SPIKELM_INT8_ROW_H
#define SPIKELM_INT8_ROW_H

#include "vector.h"

#if defined(INT8_AVX512)

#define INT8_ROW_BLOCKS
#define INT8_STREAMS 2 /* blocks that are read at once */
#define INT8_ROW_VECTORS (INT8_BLOCK / INT8_LANES)

typedef int8_vector int8_row_sums[INT8_STREAMS][INT8_ROW_VECTORS];
typedef uint32_t int8_unsigned __attribute__((vector_size(4 * INT8_LANES))); /* modulo 2^32 */
typedef int32_t int8_wholes __attribute__((vector_size(4 * INT8_LANES)));
typedef float int8_floats __attribute__((vector_size(4 * INT8_LANES)));

INLINE int8_unsigned int8_unsigned_of(int8_vector v) {
    int8_unsigned u;
    memcpy(&u, &v, sizeof u);
    return u;
}

INLINE void int8_row_clear(const int streams, int8_row_sums sums) {
#pragma GCC unroll 2
    for (int s = 0; s < streams; s++) {
#pragma GCC unroll 4
        for (int v = 0; v < INT8_ROW_VECTORS; v++) {
            sums[s][v] = _mm512_setzero_si512();
        }
    }
}

/* sums += one quad of every stream. */
INLINE void int8_row_quad(const int streams, const uint8_t *weights, int64_t apart, const int8_t *counts,
                          int8_row_sums sums) {
    int32_t four;
    memcpy(&four, counts, 4);
#pragma GCC unroll 2
    for (int s = 0; s < streams; s++) {
#pragma GCC unroll 4
        for (int v = 0; v < INT8_ROW_VECTORS; v++) {
            sums[s][v] = int8_dot(sums[s][v], int8_load(weights + s * apart + 4 * INT8_LANES * v), four);
        }
    }
}

/* y [streams][INT8_BLOCK] = sum over groups of scales * (sum of weights * counts), groups from the first to the
 * last: the operations of int8_add_scaled.
 *
 * weights [quads of all groups][INT8_BLOCK][4], those of the second stream `apart` bytes further; counts with
 * groups filled up to `padded`; tail: quads of the last group; totals [groups]; scales [groups], `stride` floats
 * apart, those of the second stream `scales_apart` floats further. */
INLINE void int8_row_blocks(const int streams, int64_t groups, int64_t padded, int64_t tail,
                            const uint8_t *weights, int64_t apart, const int8_t *counts, const int32_t *totals,
                            const float *scales, int64_t stride, int64_t scales_apart, float *y) {
    int8_floats scaled[INT8_STREAMS][INT8_ROW_VECTORS];
#pragma GCC unroll 2
    for (int s = 0; s < streams; s++) {
#pragma GCC unroll 4
        for (int v = 0; v < INT8_ROW_VECTORS; v++) {
            scaled[s][v] = (int8_floats){0};
        }
    }
    for (int64_t j = 0; j < groups; j++, scales += stride) {
        const int8_t *end = counts + (j + 1 < groups ? padded : 4 * tail);
        int8_row_sums even, odd;
        int8_row_clear(streams, even);
        int8_row_clear(streams, odd);
        for (; counts + 8 <= end; counts += 8, weights += 2 * INT8_QUAD) {
            int8_row_quad(streams, weights, apart, counts, even);
            int8_row_quad(streams, weights + INT8_QUAD, apart, counts + 4, odd);
        }
        if (counts < end) {
            int8_row_quad(streams, weights, apart, counts, even);
            counts += 4;
            weights += INT8_QUAD;
        }
        const uint32_t excess = (uint32_t)INT8_BIAS * (uint32_t)totals[j];
#pragma GCC unroll 2
        for (int s = 0; s < streams; s++) {
#pragma GCC unroll 4
            for (int v = 0; v < INT8_ROW_VECTORS; v++) {
                const int8_unsigned both = int8_unsigned_of(even[s][v]) + int8_unsigned_of(odd[s][v]);
                int8_floats scale;
                memcpy(&scale, scales + s * scales_apart + INT8_LANES * v, sizeof scale);
                scaled[s][v] = scaled[s][v] + scale * __builtin_convertvector((int8_wholes)(both - excess), int8_floats);
            }
        }
    }
#pragma GCC unroll 2
    for (int s = 0; s < streams; s++) {
#pragma GCC unroll 4
        for (int v = 0; v < INT8_ROW_VECTORS; v++) {
            memcpy(y + s * INT8_BLOCK + INT8_LANES * v, &scaled[s][v], sizeof scaled[s][v]);
        }
    }
}

#endif
#endif
