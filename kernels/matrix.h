/* Products of small row-major matrices that lie in the caches, written once for every vector width.
 *
 * The vectors are GCC's and Clang's own (vector_size), as wide as the processor's registers. A product keeps a
 * tile of up to TILE_ROWS x 2 vectors of the result in registers and walks the inner dimension in order, so
 * the bits of an element depend neither on its place in the matrix nor on the matrix's size. Buffers are padded
 * to whole vectors: `padded` gives their row length. Columns past the end hold zeros.
 */
#ifndef SPIKELM_MATRIX_H
#define SPIKELM_MATRIX_H

#include "real.h"

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#if defined(__FMA__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifdef SPIKELM_DOUBLE
#define LANES (VECTOR_BYTES / 8)
#else
#define LANES (VECTOR_BYTES / 4)
#endif
#define TILE_ROWS 6
/* Row lengths are odd multiples of a cache line: columns then spread over all sets of the first cache. */
#define LINE ((int64_t)(64 / sizeof(real)))

typedef real vector __attribute__((vector_size(VECTOR_BYTES)));

INLINE vector vector_load(const real *from) {
    vector x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void vector_store(real *to, vector x) { memcpy(to, &x, sizeof x); }

INLINE vector vector_of(real x) { return x - (vector){0}; }

/* Compilers fuse no plain expression here (-ffp-contract=off). */
INLINE vector vector_multiply_add(vector a, vector b, vector c) {
#if defined(__AVX512F__) && defined(SPIKELM_DOUBLE)
    return (vector)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX512F__)
    return (vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(SPIKELM_DOUBLE)
    return (vector)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__FMA__)
    return (vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    for (int i = 0; i < LANES; i++) {
        c[i] = multiply_add(a[i], b[i], c[i]);
    }
    return c;
#endif
}

/* exp of the lanes, as exp_nonpositive (real.h), bit for bit. */
#ifdef SPIKELM_DOUBLE
INLINE vector vector_exp_nonpositive(vector x) {
    for (int i = 0; i < LANES; i++) {
        x[i] = exp_nonpositive(x[i]);
    }
    return x;
}
#else
typedef uint32_t vector_bits __attribute__((vector_size(VECTOR_BYTES)));

INLINE vector vector_exp_nonpositive(vector x) {
    const vector least = vector_of(-87.0f), round_to_integer = vector_of(12582912.0f);
    const vector_bits low = (vector_bits)(x < least);
    const vector z = (vector)((low & (vector_bits)least) | (~low & (vector_bits)x));
    const vector shifted = vector_multiply_add(z, vector_of(1.44269504f), round_to_integer);
    const vector n = shifted - round_to_integer;
    vector r = vector_multiply_add(n, vector_of(-0.693359375f), z);
    r = vector_multiply_add(n, vector_of(2.12194440e-4f), r);
    vector p = vector_of(1.9875691500e-4f);
    p = vector_multiply_add(p, r, vector_of(1.3981999507e-3f));
    p = vector_multiply_add(p, r, vector_of(8.3334519073e-3f));
    p = vector_multiply_add(p, r, vector_of(4.1665795894e-2f));
    p = vector_multiply_add(p, r, vector_of(1.6666665459e-1f));
    p = vector_multiply_add(p, r, vector_of(5.0000001201e-1f));
    p = vector_multiply_add(p, r * r, r) + vector_of(1.0f);
    const vector_bits scale = ((vector_bits)shifted << 23) + 0x3f800000u;
    return (vector)(~low & (vector_bits)(p * (vector)scale));
}
#endif

/* Smallest multiple of a vector that is not below x. */
INLINE int64_t whole_vectors(int64_t x) { return (x + LANES - 1) / LANES * LANES; }

/* Row length of a buffer of `width` columns. */
INLINE int64_t padded(int64_t width) { return ((width + LINE - 1) / LINE | 1) * LINE; }

/* What a product does with the result's old rows: forget them, add to them, or add to decay[row] times them. */
enum before { FORGET, ADD, DECAY };

INLINE void product_tile(const int rows, const int vectors, int64_t depth, const real *restrict a,
                         int64_t a_row, int64_t a_step, const real *restrict b, int64_t b_row,
                         real *restrict c, int64_t c_row, enum before before, const real *restrict decay) {
    vector sum[TILE_ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            sum[r][v] = before == FORGET ? (vector){0} : vector_load(c + r * c_row + v * LANES);
            if (before == DECAY) {
                sum[r][v] *= vector_of(decay[r]);
            }
        }
    }
    for (int64_t p = 0; p < depth; p++) {
        vector right[2];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            right[v] = vector_load(b + p * b_row + v * LANES);
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            const vector left = vector_of(a[r * a_row + p * a_step]);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) {
                sum[r][v] = vector_multiply_add(left, right[v], sum[r][v]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            vector_store(c + r * c_row + v * LANES, sum[r][v]);
        }
    }
}

INLINE void product_columns(const int vectors, int64_t rows, int64_t depth, const real *a, int64_t a_row,
                            int64_t a_step, const real *b, int64_t b_row, real *c, int64_t c_row,
                            enum before before, const real *decay) {
    int64_t r = 0;
    while (r < rows) {
        const int64_t rest = rows - r;
        /* 8 rows are two tiles of 4, 7 are 4 and 3: tiles of one or two rows wait for their own sums */
        const int take = rest == 7 || rest == 8 ? 4 : rest < TILE_ROWS ? (int)rest : TILE_ROWS;
        const real *left = a + r * a_row, *share = before == DECAY ? decay + r : NULL;
        real *result = c + r * c_row;
        switch (take) {
#define CASE(count)                                                                                            \
    case count:                                                                                                \
        product_tile(count, vectors, depth, left, a_row, a_step, b, b_row, result, c_row, before, share);      \
        break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
        }
        r += take;
    }
}

/* c [rows][columns] = a [rows][depth] b [depth][columns], after what `before` leaves of c. Element (i, p) of a
 * lies at a[i a_row + p a_step], so that a may be read transposed. Writes whole vectors of columns. */
static void product(int64_t rows, int64_t columns, int64_t depth, const real *a, int64_t a_row,
                    int64_t a_step, const real *b, int64_t b_row, real *c, int64_t c_row,
                    enum before before, const real *decay) {
    const int64_t vectors = whole_vectors(columns) / LANES;
    int64_t v = 0;
    for (; v + 2 <= vectors; v += 2) {
        product_columns(2, rows, depth, a, a_row, a_step, b + v * LANES, b_row, c + v * LANES, c_row, before,
                        decay);
    }
    if (v < vectors) {
        product_columns(1, rows, depth, a, a_row, a_step, b + v * LANES, b_row, c + v * LANES, c_row, before,
                        decay);
    }
}

/* Lanes of two vectors in turns: of their first halves, and of their second halves. */
#if LANES == 2
#define FIRST_HALVES 0, 2
#define SECOND_HALVES 1, 3
#elif LANES == 4
#define FIRST_HALVES 0, 4, 1, 5
#define SECOND_HALVES 2, 6, 3, 7
#elif LANES == 8
#define FIRST_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define SECOND_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define FIRST_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SECOND_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define IN_TURNS(a, b, lanes) __builtin_shufflevector(a, b, lanes)
#elif defined(SPIKELM_DOUBLE)
typedef int64_t vector_lanes __attribute__((vector_size(VECTOR_BYTES)));
#define IN_TURNS(a, b, lanes) __builtin_shuffle(a, b, (vector_lanes){lanes})
#else
typedef int32_t vector_lanes __attribute__((vector_size(VECTOR_BYTES)));
#define IN_TURNS(a, b, lanes) __builtin_shuffle(a, b, (vector_lanes){lanes})
#endif

/* to [columns][rows] = from [rows][columns] transposed, rows of zeros up to whole vectors. A square of LANES rows
 * is transposed by merging its halves in turns, log2(LANES) times. */
static void transpose(int64_t rows, int64_t columns, const real *restrict from, int64_t from_row,
                      real *restrict to, int64_t to_row) {
    for (int64_t r = 0; r < rows; r += LANES) {
        for (int64_t c = 0; c < columns; c += LANES) {
            vector x[LANES], y[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                x[i] = r + i < rows ? vector_load(from + (r + i) * from_row + c) : (vector){0};
            }
#pragma GCC unroll 4
            for (int size = 1; size < LANES; size *= 2) {
#pragma GCC unroll 8
                for (int i = 0; i < LANES / 2; i++) {
                    y[2 * i] = IN_TURNS(x[i], x[i + LANES / 2], FIRST_HALVES);
                    y[2 * i + 1] = IN_TURNS(x[i], x[i + LANES / 2], SECOND_HALVES);
                }
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) {
                    x[i] = y[i];
                }
            }
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                if (c + i < columns) {
                    vector_store(to + (c + i) * to_row + r, x[i]);
                }
            }
        }
    }
}

/* to [width] = scale from [width] */
INLINE void scaled_row(int64_t width, real scale, const real *restrict from, real *restrict to) {
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES) {
        vector_store(to + c, vector_of(scale) * vector_load(from + c));
    }
    for (; c < width; c++) {
        to[c] = scale * from[c];
    }
}

/* to [width] = from [width], whole vectors */
INLINE void copy_row(int64_t width, const real *restrict from, real *restrict to) {
    for (int64_t c = 0; c < width; c += LANES) {
        vector_store(to + c, vector_load(from + c));
    }
}

/* rows of `width` values become rows of the buffer `to`, zero up to whole vectors. */
static void load_rows(int64_t rows, int64_t width, const real *restrict from, int64_t from_row,
                      real *restrict to, int64_t to_row) {
    const int64_t full = whole_vectors(width);
    for (int64_t r = 0; r < rows; r++) {
        scaled_row(width, 1, from + r * from_row, to + r * to_row);
        for (int64_t c = width; c < full; c++) {
            to[r * to_row + c] = 0;
        }
    }
}

static void store_rows(int64_t rows, int64_t width, const real *restrict from, int64_t from_row,
                       real *restrict to, int64_t to_row) {
    for (int64_t r = 0; r < rows; r++) {
        scaled_row(width, 1, from + r * from_row, to + r * to_row);
    }
}

/* x [width] *= by [width], whole vectors. */
INLINE void scale_row(int64_t width, real *restrict x, const real *restrict by) {
    for (int64_t c = 0; c < width; c += LANES) {
        vector_store(x + c, vector_load(x + c) * vector_load(by + c));
    }
}

#endif
