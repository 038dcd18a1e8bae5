/* The instructions of the dense product: a vector of sums plus four bytes of weights times four counts each.
 *
 * Weights are stored as w + 128 (unsigned), because unsigned by signed is what most instructions multiply. The
 * sum is then too large by INT8_BIAS times the sum of the counts: one number for all outputs, subtracted at the
 * end (modulo 2^32, which leaves the true sum, because that fits int32).
 *
 * Variants, chosen by the target: AVX-512 VNNI, AVX-VNNI, AVX2 (or SPIKELM_AVX2), NEON with dot products, plain
 * C (SPIKELM_PORTABLE). AVX2 multiplies in 16 bits, which hold a pair of products of counts up to INT8_HALF
 * (255 * 64 * 2 < 2^15): larger counts come in two halves, the second in a plane of its own, and with smaller
 * ones several pairs are added before they are widened.
 *
 * SPIKELM_SIMDE_AVX512, _AVXVNNI and _NEON build a variant that this processor lacks, with the emulation of
 * https://github.com/simd-everywhere/simde: for tests.
 */
#ifndef SPIKELM_INT8_VECTOR_H
#define SPIKELM_INT8_VECTOR_H

#include "../real.h"

#define INT8_BLOCK 64                /* outputs of a panel */
#define INT8_QUAD (4 * INT8_BLOCK)   /* bytes of four inputs in a panel */
#define INT8_HALF 64

/* A variant that was asked for goes before what the processor has. */
#if defined(SPIKELM_PORTABLE)
#elif defined(SPIKELM_SIMDE_AVX512)
#define INT8_AVX512
#elif defined(SPIKELM_SIMDE_AVXVNNI)
#define INT8_AVXVNNI
#elif defined(SPIKELM_SIMDE_NEON)
#define INT8_NEON
#elif defined(SPIKELM_AVX2)
#define INT8_AVX2
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define INT8_AVX512
#elif defined(__AVXVNNI__) && defined(__AVX2__)
#define INT8_AVXVNNI
#elif defined(__ARM_FEATURE_DOTPROD)
#define INT8_NEON
#elif defined(__AVX2__)
#define INT8_AVX2
#endif

#if !defined(SPIKELM_PORTABLE) && !defined(SPIKELM_SIMDE_NEON)
#if defined(__AVX2__)
#define INT8_HAS_AVX2
#endif
#if defined(__SSE2__)
#define INT8_HAS_SSE2
#endif
#endif

#if defined(SPIKELM_SIMDE_AVX512) || defined(SPIKELM_SIMDE_AVXVNNI)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#elif defined(SPIKELM_SIMDE_NEON)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/arm/neon.h>
#elif defined(INT8_NEON)
#include <arm_neon.h>
#elif defined(INT8_HAS_SSE2)
#include <immintrin.h>
#endif

#define INT8_BIAS 128
#define INT8_SHORT 0         /* whether products are of 16 bits */
#define INT8_ROWS_AT_ONCE 4  /* rows and vectors whose sums registers hold */

#if defined(INT8_AVX512)

#define INT8_LANES 16
#define INT8_VECTORS_AT_ONCE 4
typedef __m512i int8_vector;
INLINE int8_vector int8_load(const void *from) { return _mm512_loadu_si512(from); }
INLINE void int8_store(void *to, int8_vector v) { _mm512_storeu_si512(to, v); }
INLINE int8_vector int8_dot(int8_vector sum, int8_vector weights, int32_t counts) {
#if defined(SPIKELM_SIMDE_AVX512)
    return _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(counts));
#else
    /* GCC copies every sum to another register and back around the intrinsic, twice as many operations, and a
     * processor that has to look past them finds fewer loads to start. */
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(_mm512_set1_epi32(counts)));
    return sum;
#endif
}

#elif defined(INT8_AVXVNNI) || defined(INT8_AVX2)

#define INT8_LANES 8
#define INT8_VECTORS_AT_ONCE 2
typedef __m256i int8_vector;
INLINE int8_vector int8_load(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE void int8_store(void *to, int8_vector v) { _mm256_storeu_si256((__m256i *)to, v); }
#if defined(INT8_AVXVNNI)
INLINE int8_vector int8_dot(int8_vector sum, int8_vector weights, int32_t counts) {
    return _mm256_dpbusd_avx_epi32(sum, weights, _mm256_set1_epi32(counts));
}
#else
#undef INT8_SHORT
#define INT8_SHORT 1
INLINE int8_vector int8_pairs(int8_vector pairs, int8_vector weights, int32_t counts) {
    return _mm256_add_epi16(pairs, _mm256_maddubs_epi16(weights, _mm256_set1_epi32(counts)));
}
INLINE int8_vector int8_widen(int8_vector sum, int8_vector pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE int8_vector int8_dot(int8_vector sum, int8_vector weights, int32_t counts) {
    return int8_widen(sum, _mm256_maddubs_epi16(weights, _mm256_set1_epi32(counts)));
}
#endif

#elif defined(INT8_NEON)

#undef INT8_BIAS
#define INT8_BIAS 0
#define INT8_LANES 4
#define INT8_VECTORS_AT_ONCE 4
typedef int32x4_t int8_vector;
INLINE int8_vector int8_load(const void *from) { return vld1q_s32((const int32_t *)from); }
INLINE void int8_store(void *to, int8_vector v) { vst1q_s32((int32_t *)to, v); }
INLINE int8_vector int8_dot(int8_vector sum, int8_vector weights, int32_t counts) {
    const int32x4_t exact = veorq_s32(weights, vdupq_n_s32((int32_t)0x80808080));
    return vdotq_s32(sum, vreinterpretq_s8_s32(exact), vreinterpretq_s8_s32(vdupq_n_s32(counts)));
}

#else

#define INT8_PLAIN

#endif

/* Sum of counts. */
INLINE int32_t int8_total(int64_t n, const int8_t *counts) {
    int32_t total = 0;
    int64_t i = 0;
#if defined(INT8_AVX512)
    int8_vector sum = _mm512_setzero_si512();
    for (; i + 64 <= n; i += 64) {
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(0x01010101), int8_load(counts + i));
    }
    int32_t lanes[INT8_LANES];
    int8_store(lanes, sum);
    for (int l = 0; l < INT8_LANES; l++) {
        total += lanes[l];
    }
#endif
    for (; i < n; i++) {
        total += counts[i];
    }
    return total;
}

/* Largest magnitude of counts. */
INLINE uint8_t int8_largest(int64_t n, const int8_t *counts) {
    int8_t low = 0, high = 0;
    for (int64_t i = 0; i < n; i++) {
        low = counts[i] < low ? counts[i] : low;
        high = counts[i] > high ? counts[i] : high;
    }
    return (uint8_t)(-low > high ? -low : high);
}

#endif
