/* The innermost product: rows of counts times a panel of weights, in exact int32.
 *
 * A panel holds INT8_BLOCK outputs and four inputs side by side, [quads][INT8_BLOCK][4] bytes, each weight stored as
 * w + 128 (unsigned). Instructions that multiply unsigned by signed bytes then take it as it is, and what is too
 * much is INT8_BIAS times the sum of the counts: one number for all outputs, subtracted at the end (modulo 2^32, which
 * leaves the true sum, because that fits int32).
 *
 * Variants, chosen by the target: AVX-512 VNNI, AVX-VNNI, AVX2, NEON with dot products, plain C
 * (SPIKELM_PORTABLE asks for that one). Without VNNI a pair of products must fit 16 bits: 255 * 64 * 2 does, so
 * counts beyond INT8_HALF come in two halves, the second in a plane of its own.
 */
#ifndef SPIKELM_INT8_DOT_H
#define SPIKELM_INT8_DOT_H

#include "../real.h"

#define INT8_BLOCK 64
#define INT8_QUAD (4 * INT8_BLOCK) /* bytes of four inputs in a panel */
#define INT8_HALF 64

#ifndef SPIKELM_PORTABLE
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define DOT_AVX512
#elif defined(__AVXVNNI__) && defined(__AVX2__)
#define DOT_AVXVNNI
#elif defined(__AVX2__)
#define DOT_AVX2
#elif defined(__ARM_FEATURE_DOTPROD)
#define DOT_NEON
#endif
#if defined(__AVX2__)
#define HAVE_AVX2
#endif
#if defined(__SSE2__)
#define HAVE_SSE2
#endif
#endif

#if defined(DOT_AVX512) || defined(HAVE_AVX2) || defined(HAVE_SSE2)
#if defined(SPIKELM_SIMDE)
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif
#elif defined(DOT_NEON)
#include <arm_neon.h>
#endif

#if defined(DOT_AVX512)

#define INT8_BIAS 128
#define INT8_WIDE_COUNTS 0
#define INT8_LANES 16
#define INT8_ROWS_AT_ONCE 4
#define INT8_VECTORS_AT_ONCE 4
typedef __m512i int8_vector;
INLINE int8_vector int8_vector_zero(void) { return _mm512_setzero_si512(); }
INLINE int8_vector int8_vector_load(const void *from) { return _mm512_loadu_si512(from); }
INLINE void int8_vector_store(void *to, int8_vector v) { _mm512_storeu_si512(to, v); }
INLINE int8_vector int8_vector_dot(int8_vector sum, int8_vector weights, int32_t counts) {
    return _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(counts));
}

#elif defined(DOT_AVXVNNI) || defined(DOT_AVX2)

#define INT8_BIAS 128
#define INT8_LANES 8
#define INT8_ROWS_AT_ONCE 4
#define INT8_VECTORS_AT_ONCE 2
typedef __m256i int8_vector;
INLINE int8_vector int8_vector_zero(void) { return _mm256_setzero_si256(); }
INLINE int8_vector int8_vector_load(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE void int8_vector_store(void *to, int8_vector v) { _mm256_storeu_si256((__m256i *)to, v); }
#if defined(DOT_AVXVNNI)
#define INT8_WIDE_COUNTS 0
INLINE int8_vector int8_vector_dot(int8_vector sum, int8_vector weights, int32_t counts) {
    return _mm256_dpbusd_avx_epi32(sum, weights, _mm256_set1_epi32(counts));
}
#else
#define INT8_WIDE_COUNTS 1
INLINE int8_vector int8_vector_dot(int8_vector sum, int8_vector weights, int32_t counts) {
    const __m256i pairs = _mm256_maddubs_epi16(weights, _mm256_set1_epi32(counts));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

#elif defined(DOT_NEON)

#define INT8_BIAS 0
#define INT8_WIDE_COUNTS 0
#define INT8_LANES 4
#define INT8_ROWS_AT_ONCE 4
#define INT8_VECTORS_AT_ONCE 4
typedef int32x4_t int8_vector;
INLINE int8_vector int8_vector_zero(void) { return vdupq_n_s32(0); }
INLINE int8_vector int8_vector_load(const void *from) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t *)from)); }
INLINE void int8_vector_store(void *to, int8_vector v) { vst1q_s32((int32_t *)to, v); }
INLINE int8_vector int8_vector_dot(int8_vector sum, int8_vector weights, int32_t counts) {
    const uint8x16_t sign = veorq_u8(vreinterpretq_u8_s32(weights), vdupq_n_u8(128));
    return vdotq_s32(sum, vreinterpretq_s8_u8(sign), vreinterpretq_s8_s32(vdupq_n_s32(counts)));
}

#else

#define INT8_BIAS 128
#define INT8_WIDE_COUNTS 0
#define INT8_ROWS_AT_ONCE 1
#define PLAIN_DOT

#endif

#ifndef PLAIN_DOT

/* sums [rows][INT8_BLOCK] += panel times counts; row r of the counts at counts + r * stride */
INLINE void int8_dot_tile(int rows, int vectors, int64_t quads, const uint8_t *panel, const int8_t *counts,
                     int64_t stride, int32_t *sums) {
    int8_vector sum[INT8_ROWS_AT_ONCE][INT8_BLOCK / INT8_LANES];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) {
            sum[r][v] = int8_vector_load(sums + r * INT8_BLOCK + v * INT8_LANES);
        }
    }
    for (int64_t q = 0; q < quads; q++) {
        int8_vector weights[INT8_BLOCK / INT8_LANES];
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) {
            weights[v] = int8_vector_load(panel + q * INT8_QUAD + v * 4 * INT8_LANES);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, counts + r * stride + 4 * q, 4);
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++) {
                sum[r][v] = int8_vector_dot(sum[r][v], weights[v], four);
            }
        }
        if (rows == 1) {
            /* One row is bound by memory: the stream of weights is fetched two pages' worth ahead. */
            for (int line = 0; line < vectors * 4 * INT8_LANES; line += 64) {
                __builtin_prefetch(panel + q * INT8_QUAD + line + 8192);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) {
            int8_vector_store(sums + r * INT8_BLOCK + v * INT8_LANES, sum[r][v]);
        }
    }
}

/* sums [rows][INT8_BLOCK] += panel times counts, any number of rows */
static inline void int8_dot_panel(int64_t rows, int64_t quads, const uint8_t *panel, const int8_t *counts, int64_t stride,
                             int32_t *sums) {
    int64_t r = 0;
    for (; r + INT8_ROWS_AT_ONCE <= rows; r += INT8_ROWS_AT_ONCE) {
        for (int o = 0; o < INT8_BLOCK; o += INT8_LANES * INT8_VECTORS_AT_ONCE) {
            int8_dot_tile(INT8_ROWS_AT_ONCE, INT8_VECTORS_AT_ONCE, quads, panel + 4 * o, counts + r * stride, stride,
                     sums + r * INT8_BLOCK + o);
        }
    }
    for (; r < rows; r++) {
        int8_dot_tile(1, INT8_BLOCK / INT8_LANES, quads, panel, counts + r * stride, stride, sums + r * INT8_BLOCK);
    }
}

#else

static inline void int8_dot_panel(int64_t rows, int64_t quads, const uint8_t *panel, const int8_t *counts, int64_t stride,
                             int32_t *sums) {
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
