/* The event-driven product of one row: only the weights of inputs that fired are read.
 *
 * Weights lie in tiles, [tiles][inputs][INT8_TILE outputs] bytes w + 128 (the last tile may be INT8_BLOCK wide):
 * what one input adds to a tile is one run of bytes. The inputs that fired are listed once per row, for all tiles:
 *   binary spikes: one entry each, their bytes are added without multiplication, in 16 bits;
 *   graded counts: pairs of entries, n0 w0 + n1 w1 in 16 bits.
 * The list is cut into segments, within which 16 bits hold every partial sum: 256 bytes of binary spikes, and
 * graded counts whose positive and negative parts reach at most 128 (255 * 128 < 2^15). A segment never crosses
 * a group. Behind its end the list goes on with the next tile's first entries (same inputs, one tile
 * further), so that what is fetched ahead is right across tiles.
 */
#ifndef SPIKELM_INT8_EVENT_H
#define SPIKELM_INT8_EVENT_H

#include "vector.h"

#define INT8_TILE 128
#define INT8_AHEAD 64 /* entries whose weights are fetched ahead */

struct int8_segment {
    int32_t end;   /* entry behind the last */
    int32_t group; /* the group that is complete with it, or -1 */
};

struct int8_events {
    int32_t binary, entries, segments;
    int32_t *inputs;          /* [entries + INT8_AHEAD] */
    int8_t *counts;           /* [entries] */
    struct int8_segment *segment;  /* [segments] */
};

/* Most entries of a row: every count could need a partner of its own. */
static inline int64_t int8_events_entries(int64_t inputs) { return 2 * inputs + INT8_AHEAD + 2; }

#if defined(INT8_HAS_AVX2)
INLINE __m256i int8_event_load(const uint8_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
#endif

/* Bit i is set where counts[i] is not zero, for at most 64 counts. */
INLINE uint64_t int8_fired(const int8_t *counts, int64_t n) {
#if defined(INT8_HAS_AVX2)
    if (n == 64) {
        const __m256i zero = _mm256_setzero_si256();
        const __m256i low = _mm256_cmpeq_epi8(int8_event_load((const uint8_t *)counts), zero);
        const __m256i high = _mm256_cmpeq_epi8(int8_event_load((const uint8_t *)counts + 32), zero);
        return ~((uint64_t)(uint32_t)_mm256_movemask_epi8(high) << 32 | (uint32_t)_mm256_movemask_epi8(low));
    }
#endif
    uint64_t fired = 0;
    for (int64_t i = 0; i < n; i++) {
        fired |= (uint64_t)(counts[i] != 0) << i;
    }
    return fired;
}

/* Close a segment at entry n; graded ones hold whole pairs. Returns the entry behind it. */
INLINE int32_t int8_close(struct int8_events *events, int32_t n, int32_t group) {
    if (!events->binary && (n & 1)) {
        events->inputs[n] = events->inputs[n - 1];
        events->counts[n++] = 0;
    }
    events->segment[events->segments++] = (struct int8_segment){n, group};
    return n;
}

/* List the events of one row. */
static inline void int8_list_events(int64_t inputs, int64_t group, const int8_t *counts, int binary,
                                    struct int8_events *events) {
    int32_t n = 0;
    events->binary = binary;
    events->segments = 0;
    for (int64_t first = 0, j = 0; first < inputs; first += group, j++) {
        const int64_t last = first + group < inputs ? first + group : inputs;
        const int32_t begin = n;
        int32_t start = n, positive = 0, negative = 0;
        for (int64_t i = first; i < last; i += 64) {
            uint64_t fired = int8_fired(counts + i, last - i < 64 ? last - i : 64);
            for (; fired; fired &= fired - 1) {
                const int64_t at = i + __builtin_ctzll(fired);
                const int32_t count = counts[at];
                positive += count > 0 ? count : 0;
                negative += count < 0 ? -count : 0;
                if (binary ? n - start == 256 : (positive > 128) | (negative > 128)) {
                    start = n = int8_close(events, n, -1);
                    positive = count > 0 ? count : 0;
                    negative = count < 0 ? -count : 0;
                }
                events->inputs[n] = (int32_t)at;
                events->counts[n++] = (int8_t)count;
            }
        }
        if (n > begin) {
            n = int8_close(events, n, (int32_t)j);
        }
    }
    events->entries = n;
    for (int32_t k = 0; k < INT8_AHEAD; k++) {
        events->inputs[n + k] = n ? events->inputs[k % n] + (int32_t)((1 + k / n) * inputs) : 0;
    }
}

#if defined(INT8_AVX512) && defined(__AVX512BW__)

/* sums [64] += two vectors of 32 whole numbers of 16 bits in the order that unpacking gives: of every 16 outputs
 * the first holds eight, the second the other eight */
INLINE void int8_event_add(int32_t *sums, __m512i first, __m512i second, int is_signed) {
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512i half[2] = {_mm512_permutex2var_epi64(first, low, second),
                             _mm512_permutex2var_epi64(first, high, second)};
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        const __m256i part = k % 2 ? _mm512_extracti64x4_epi64(half[k / 2], 1) : _mm512_castsi512_si256(half[k / 2]);
        const __m512i wide = is_signed ? _mm512_cvtepi16_epi32(part) : _mm512_cvtepu16_epi32(part);
        int32_t *to = sums + 16 * k;
        _mm512_storeu_si512(to, _mm512_add_epi32(_mm512_loadu_si512(to), wide));
    }
}

/* Binary spikes: as below, in vectors of 64 outputs. */
INLINE void int8_add_binary(int halves, int32_t begin, int32_t end, const int32_t *inputs, const uint8_t *tile,
                            int32_t *sums) {
    const int vectors = halves / 2, width = 64 * vectors;
    __m512i both[INT8_TILE / 64], high[INT8_TILE / 64];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) {
        both[v] = high[v] = _mm512_setzero_si512();
    }
    for (int32_t k = begin; k < end; k++) {
        const uint8_t *row = tile + (int64_t)inputs[k] * width;
        const uint8_t *later = tile + (int64_t)inputs[k + INT8_AHEAD] * width;
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            const __m512i w = _mm512_loadu_si512(row + 64 * v);
            __builtin_prefetch(later + 64 * v);
            both[v] = _mm512_add_epi16(both[v], w);
            high[v] = _mm512_add_epi16(high[v], _mm512_srli_epi16(w, 8));
        }
    }
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) {
        const __m512i low = _mm512_sub_epi16(both[v], _mm512_slli_epi16(high[v], 8));
        int8_event_add(sums + 64 * v, _mm512_unpacklo_epi16(low, high[v]), _mm512_unpackhi_epi16(low, high[v]), 0);
    }
}

INLINE void int8_add_graded(int halves, int32_t begin, int32_t end, const int32_t *inputs, const int8_t *counts,
                            const uint8_t *tile, int32_t *sums) {
    const int vectors = halves / 2, width = 64 * vectors;
    __m512i first[INT8_TILE / 64], second[INT8_TILE / 64];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) {
        first[v] = second[v] = _mm512_setzero_si512();
    }
    for (int32_t k = begin; k < end; k += 2) {
        int16_t pair;
        memcpy(&pair, counts + k, 2);
        const __m512i n = _mm512_set1_epi16(pair);
        const uint8_t *one = tile + (int64_t)inputs[k] * width, *two = tile + (int64_t)inputs[k + 1] * width;
        const uint8_t *later = tile + (int64_t)inputs[k + INT8_AHEAD] * width;
        const uint8_t *last = tile + (int64_t)inputs[k + INT8_AHEAD + 1] * width;
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            const __m512i a = _mm512_loadu_si512(one + 64 * v), b = _mm512_loadu_si512(two + 64 * v);
            __builtin_prefetch(later + 64 * v);
            __builtin_prefetch(last + 64 * v);
            first[v] = _mm512_add_epi16(first[v], _mm512_maddubs_epi16(_mm512_unpacklo_epi8(a, b), n));
            second[v] = _mm512_add_epi16(second[v], _mm512_maddubs_epi16(_mm512_unpackhi_epi8(a, b), n));
        }
    }
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) {
        int8_event_add(sums + 64 * v, first[v], second[v], 1);
    }
}

#elif defined(INT8_HAS_AVX2)

/* sums [16] += two vectors of 16 whole numbers of 16 bits in the order that unpacking gives: first holds outputs
 * 0-7 and 16-23, second 8-15 and 24-31 */
INLINE void int8_event_add(int32_t *sums, __m256i first, __m256i second, int is_signed) {
    const __m128i part[4] = {_mm256_castsi256_si128(first), _mm256_castsi256_si128(second),
                             _mm256_extracti128_si256(first, 1), _mm256_extracti128_si256(second, 1)};
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        __m256i *to = (__m256i *)(sums + 8 * k);
        const __m256i wide = is_signed ? _mm256_cvtepi16_epi32(part[k]) : _mm256_cvtepu16_epi32(part[k]);
        _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), wide));
    }
}

/* Binary spikes. A vector of bytes is added twice, as 16-bit numbers (low byte + 256 high byte, modulo 2^16) and
 * shifted (high bytes alone); the difference is the sum of the low bytes. */
INLINE void int8_add_binary(int vectors, int32_t begin, int32_t end, const int32_t *inputs, const uint8_t *tile,
                       int32_t *sums) {
    const int width = 32 * vectors;
    __m256i both[INT8_TILE / 32], high[INT8_TILE / 32];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        both[v] = high[v] = _mm256_setzero_si256();
    }
    for (int32_t k = begin; k < end; k++) {
        const uint8_t *row = tile + (int64_t)inputs[k] * width;
        const uint8_t *later = tile + (int64_t)inputs[k + INT8_AHEAD] * width;
        __builtin_prefetch(later);
        if (width > 64) {
            __builtin_prefetch(later + 64);
        }
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            const __m256i w = int8_event_load(row + 32 * v);
            both[v] = _mm256_add_epi16(both[v], w);
            high[v] = _mm256_add_epi16(high[v], _mm256_srli_epi16(w, 8));
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        const __m256i low = _mm256_sub_epi16(both[v], _mm256_slli_epi16(high[v], 8));
        int8_event_add(sums + 32 * v, _mm256_unpacklo_epi16(low, high[v]), _mm256_unpackhi_epi16(low, high[v]), 0);
    }
}

INLINE void int8_add_graded(int vectors, int32_t begin, int32_t end, const int32_t *inputs, const int8_t *counts,
                       const uint8_t *tile, int32_t *sums) {
    const int width = 32 * vectors;
    __m256i first[INT8_TILE / 32], second[INT8_TILE / 32];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        first[v] = second[v] = _mm256_setzero_si256();
    }
    for (int32_t k = begin; k < end; k += 2) {
        int16_t pair;
        memcpy(&pair, counts + k, 2);
        const __m256i n = _mm256_set1_epi16(pair);
        const uint8_t *one = tile + (int64_t)inputs[k] * width, *two = tile + (int64_t)inputs[k + 1] * width;
        for (int e = 0; e < 2; e++) {
            const uint8_t *later = tile + (int64_t)inputs[k + INT8_AHEAD + e] * width;
            __builtin_prefetch(later);
            if (width > 64) {
                __builtin_prefetch(later + 64);
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            const __m256i a = int8_event_load(one + 32 * v), b = int8_event_load(two + 32 * v);
            first[v] = _mm256_add_epi16(first[v], _mm256_maddubs_epi16(_mm256_unpacklo_epi8(a, b), n));
            second[v] = _mm256_add_epi16(second[v], _mm256_maddubs_epi16(_mm256_unpackhi_epi8(a, b), n));
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        int8_event_add(sums + 32 * v, first[v], second[v], 1);
    }
}

#else

INLINE void int8_add_binary(int vectors, int32_t begin, int32_t end, const int32_t *inputs, const uint8_t *tile,
                       int32_t *sums) {
    const int width = 32 * vectors;
    uint16_t sum[INT8_TILE] = {0};
    for (int32_t k = begin; k < end; k++) {
        const uint8_t *restrict row = tile + (int64_t)inputs[k] * width;
        __builtin_prefetch(tile + (int64_t)inputs[k + INT8_AHEAD] * width);
        for (int o = 0; o < width; o++) {
            sum[o] = (uint16_t)(sum[o] + row[o]);
        }
    }
    for (int o = 0; o < width; o++) {
        sums[o] += sum[o];
    }
}

INLINE void int8_add_graded(int vectors, int32_t begin, int32_t end, const int32_t *inputs, const int8_t *counts,
                       const uint8_t *tile, int32_t *sums) {
    const int width = 32 * vectors;
    int16_t sum[INT8_TILE] = {0};
    for (int32_t k = begin; k < end; k++) {
        const uint8_t *restrict row = tile + (int64_t)inputs[k] * width;
        const int16_t n = counts[k];
        __builtin_prefetch(tile + (int64_t)inputs[k + INT8_AHEAD] * width);
        for (int o = 0; o < width; o++) {
            sum[o] = (int16_t)(sum[o] + n * row[o]);
        }
    }
    for (int o = 0; o < width; o++) {
        sums[o] += sum[o];
    }
}

#endif
#endif
