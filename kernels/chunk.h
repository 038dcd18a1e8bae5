/* What the chunked forms of gated linear attention and of the delta rule share: chunks, and decays of a head.
 *
 * A row of tokens is cut into chunks of CHUNK tokens, and a chunk into pieces at its resets, so that a piece
 * starts from the state before it or from an empty one, and nothing is ever multiplied by a reset's zero.
 * Within a piece token i sees token j <= i through P_ij, the product of the decays of the tokens j + 1 to i.
 * All such products are formed from their own factors, numbers between 0 and 1: nothing overflows, and a
 * closed gate (g = -inf, a factor of zero) is exact.
 */
#ifndef SPIKELM_CHUNK_H
#define SPIKELM_CHUNK_H

#include "matrix.h"

#ifdef _OPENMP
#include <omp.h>
#endif

/* Tokens of a chunk, as in c.py of the ops: a power of 2, at least LANES. */
#define CHUNK 32

INLINE int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* Place of a new buffer in a thread's scratch: whole cache lines. */
INLINE real *take(real **free, int64_t count) {
    real *start = *free;
    *free += (count + LINE - 1) / LINE * LINE;
    return start;
}

/* End of the piece that starts at `first`: the next reset or `last`. */
INLINE int64_t piece_end(const uint8_t *reset, int64_t first, int64_t last) {
    for (int64_t t = first + 1; reset && t < last; t++) {
        if (reset[t]) {
            return t;
        }
    }
    return last;
}

/* Asks for a row that the next chunk reads: the rows of one head lie too far apart for the processor to guess. */
INLINE void prefetch_row(const real *row, int64_t width) {
    for (int64_t c = 0; c < width; c += LINE) {
        __builtin_prefetch(row + c);
    }
}

/* Asks for a row that this chunk will write. */
INLINE void prefetch_target(const real *row, int64_t width) {
    for (int64_t c = 0; c < width; c += LINE) {
        __builtin_prefetch(row + c, 1);
    }
}

/* Tokens of `per_token` rows each become rows of `to`, times scale; what stands at invalid tokens (it may be
 * NaN) and after `count` tokens is zero. */
static void load_tokens(int64_t count, int64_t full, int64_t per_token, int64_t width, real scale,
                        const real *from, int64_t from_token, const uint8_t *valid, real *to, int64_t to_row) {
    const int64_t whole = whole_vectors(width);
    for (int64_t t = 0; t < full; t++) {
        for (int64_t h = 0; h < per_token; h++, to += to_row) {
            if (t >= count || (valid && !valid[t])) {
                memset(to, 0, (size_t)whole * sizeof(real));
                continue;
            }
            scaled_row(width, scale, from + t * from_token + h * width, to);
            for (int64_t c = width; c < whole; c++) {
                to[c] = 0;
            }
        }
    }
}

/* The way back; zero at invalid tokens. */
static void store_tokens(int64_t count, int64_t per_token, int64_t width, real scale, const real *from,
                         int64_t from_row, const uint8_t *valid, real *to, int64_t to_token) {
    for (int64_t t = 0; t < count; t++) {
        for (int64_t h = 0; h < per_token; h++, from += from_row) {
            real *target = to + t * to_token + h * width;
            if (valid && !valid[t]) {
                memset(target, 0, (size_t)width * sizeof(real));
                continue;
            }
            scaled_row(width, scale, from, target);
        }
    }
}

/* Products of one decay per token: kept P [full][kept_row], zero above the diagonal; since [full] from the
 * piece's start to each token; until [full] from after each token to the piece's end. Returns that of all. */
static real head_decays(int64_t count, int64_t full, const real *restrict decay, real *restrict kept,
                        int64_t kept_row, real *restrict since, real *restrict until) {
    real product = 1;
    for (int64_t i = 0; i < full; i++) {
        real *restrict row = kept + i * kept_row;
        for (int64_t j = 0; j < full; j++) {
            row[j] = i > 0 ? row[j - kept_row] * decay[i] : (real)0;
        }
        row[i] = 1;
        product *= decay[i];
        since[i] = product;
    }
    for (int64_t j = 0; j < full; j++) {
        until[j] = j < count ? kept[(count - 1) * kept_row + j] : (real)0;
    }
    return product;
}

/* Gradient of the log decays [count] of a piece. Each is the sum of what the paths over its token carry:
 * pairs [count][pairs_row] from token j to token i (it crosses j + 1 to i), from_start [count] from the state
 * before the piece to token i, to_end [count] from token j to the state after it, and all, past every token.
 * No two large sums are subtracted: what does not cross a token is not in its sum. */
static void head_gate_gradient(int64_t count, const real *pairs, int64_t pairs_row, const real *from_start,
                               const real *to_end, real all, real *grad) {
    real until_here[CHUNK], left = 0;
    real columns[CHUNK] = {0};
    for (int64_t t = 0; t < count; t++) {
        until_here[t] = left;
        left += to_end[t];
    }
    real right = 0;
    for (int64_t t = count - 1; t >= 0; t--) {
        const real *row = pairs + t * pairs_row;
        real across = 0;
        right += from_start[t];
        for (int64_t j = 0; j < t; j++) {
            columns[j] += row[j];
        }
        for (int64_t j = 0; j < t; j++) {
            across += columns[j];
        }
        grad[t] = across + (right + (until_here[t] + all));
    }
}

/* Dot product of two rows. Rows are zero up to whole vectors. */
INLINE real row_product(int64_t width, const real *a, const real *b) {
    vector sum[2] = {{0}, {0}};
    int64_t c = 0;
    for (; c + 2 * LANES <= width; c += 2 * LANES) {
        sum[0] = vector_multiply_add(vector_load(a + c), vector_load(b + c), sum[0]);
        sum[1] = vector_multiply_add(vector_load(a + c + LANES), vector_load(b + c + LANES), sum[1]);
    }
    for (; c < width; c += LANES) {
        sum[0] = vector_multiply_add(vector_load(a + c), vector_load(b + c), sum[0]);
    }
    const vector both = sum[0] + sum[1];
    real total = 0;
    for (int i = 0; i < LANES; i++) {
        total += both[i];
    }
    return total;
}

/* to [width] *= factor, whole vectors. */
INLINE void scale_by(int64_t width, real *restrict x, real factor) {
    for (int64_t c = 0; c < width; c += LANES) {
        vector_store(x + c, vector_load(x + c) * vector_of(factor));
    }
}

#endif
