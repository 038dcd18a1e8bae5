/* planes: int8 counts to packed bit planes and back (layout in reference.py).
 *
 * counts [rows][width]; packed [planes + 1][rows][bytes], bytes = ceil(width / 8). A task is one row. AVX2 takes
 * 32 channels at a time, every processor 8 at a time in one 64-bit word whose byte i is channel i.
 */
#include <stdint.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define ONES UINT64_C(0x0101010101010101)

/* The first n channels (at most 8) as one word, whatever the processor's byte order. */
static inline uint64_t load_word(const int8_t *from, int n) {
    uint64_t word = 0;
    if (n == 8) {
        memcpy(&word, from, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        word = __builtin_bswap64(word);
#endif
        return word;
    }
    for (int i = 0; i < n; i++) {
        word |= (uint64_t)(uint8_t)from[i] << (8 * i);
    }
    return word;
}

static inline void store_word(int8_t *to, uint64_t word, int n) {
    if (n == 8) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        word = __builtin_bswap64(word);
#endif
        memcpy(to, &word, 8);
        return;
    }
    for (int i = 0; i < n; i++) {
        to[i] = (int8_t)(uint8_t)(word >> (8 * i));
    }
}

/* Bit 0 of byte i becomes bit i: the products 2^(8 i + 7 j) of the two factors are all different, so that nothing
 * is carried. */
static inline uint8_t gather_bits(uint64_t bits) {
    return (uint8_t)(((bits & ONES) * UINT64_C(0x0102040810204080)) >> 56);
}

/* Bit i becomes bit 0 of byte i. */
static inline uint64_t spread_bits(uint8_t byte) {
    const uint64_t chosen = (byte * ONES) & UINT64_C(0x8040201008040201);
    return ((chosen | ((chosen & ~(ONES << 7)) + (ONES << 7) - ONES)) >> 7) & ONES;
}

/* |n| of every byte; -128 gives 128. sign has bit 0 set where n < 0. */
static inline uint64_t magnitudes(uint64_t word, uint64_t sign) { return (word ^ (sign * 0xff)) + sign; }

/* Returns the OR of all magnitudes: with a bit above the planes, some count does not fit. */
static uint32_t expand_row(int64_t width, int planes, int64_t stride, const int8_t *restrict counts,
                           uint8_t *restrict packed) {
    int64_t i = 0;
    uint32_t seen = 0;
#ifdef __AVX2__
    __m256i all = _mm256_setzero_si256();
    for (; i + 32 <= width; i += 32) {
        const __m256i n = _mm256_loadu_si256((const __m256i *)(counts + i));
        const __m256i size = _mm256_abs_epi8(n);
        all = _mm256_or_si256(all, size);
        uint32_t bits = (uint32_t)_mm256_movemask_epi8(n);
        memcpy(packed + i / 8, &bits, 4);
        for (int b = 0; b < planes; b++) {
            bits = (uint32_t)_mm256_movemask_epi8(_mm256_sll_epi16(size, _mm_cvtsi32_si128(7 - b)));
            memcpy(packed + (b + 1) * stride + i / 8, &bits, 4);
        }
    }
    uint8_t bytes[32];
    memcpy(bytes, &all, 32);
    for (int j = 0; j < 32; j++) {
        seen |= bytes[j];
    }
#endif
    for (; i < width; i += 8) {
        const uint64_t word = load_word(counts + i, width - i < 8 ? (int)(width - i) : 8);
        const uint64_t sign = (word >> 7) & ONES, size = magnitudes(word, sign);
        packed[i / 8] = gather_bits(sign);
        for (int b = 0; b < planes; b++) {
            packed[(b + 1) * stride + i / 8] = gather_bits(size >> b);
        }
        for (int j = 0; j < 8; j++) {
            seen |= (uint8_t)(size >> (8 * j));
        }
    }
    return seen;
}

static void collapse_row(int64_t width, int planes, int64_t stride, const uint8_t *restrict packed,
                         int8_t *restrict counts) {
    int64_t i = 0;
#ifdef __AVX2__
    /* byte j of four goes to the channels 8 j to 8 j + 7, and each keeps its own bit of it */
    const __m256i from = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2,
                                          3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i own = _mm256_set1_epi64x((long long)UINT64_C(0x8040201008040201));
    for (; i + 32 <= width; i += 32) {
        __m256i size = _mm256_setzero_si256(), sign = size;
        for (int b = planes; b >= 0; b--) {
            int32_t four;
            memcpy(&four, packed + b * stride + i / 8, 4);
            const __m256i bits = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(four), from), own);
            const __m256i set = _mm256_cmpeq_epi8(bits, own); /* -1 where the bit is set */
            if (b > 0) {
                size = _mm256_sub_epi8(_mm256_add_epi8(size, size), set);
            } else {
                sign = set;
            }
        }
        const __m256i n = _mm256_sub_epi8(_mm256_xor_si256(size, sign), sign);
        _mm256_storeu_si256((__m256i *)(counts + i), n);
    }
#endif
    for (; i < width; i += 8) {
        uint64_t size = 0;
        for (int b = planes; b > 0; b--) {
            size = (size << 1) | spread_bits(packed[b * stride + i / 8]);
        }
        /* -n = ~n + 1; a zero has no sign, so that no byte overflows into the next */
        const uint64_t some = ((size + (ONES << 7) - ONES) >> 7) & ONES;
        const uint64_t sign = spread_bits(packed[i / 8]) & some;
        store_word(counts + i, (size ^ (sign * 0xff)) + sign, width - i < 8 ? (int)(width - i) : 8);
    }
}

/* Returns 1 if a count needs more planes, else 0. */
int planes_expand(int64_t rows, int64_t width, int planes, const int8_t *counts, uint8_t *packed, int threads) {
    const int64_t bytes = (width + 7) / 8;
    uint32_t seen = 0;
    (void)threads;
#pragma omp parallel for schedule(static) reduction(| : seen) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        seen |= expand_row(width, planes, rows * bytes, counts + row * width, packed + row * bytes);
    }
    return seen >> planes != 0;
}

void planes_collapse(int64_t rows, int64_t width, int planes, const uint8_t *packed, int8_t *counts,
                     int threads) {
    const int64_t bytes = (width + 7) / 8;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        collapse_row(width, planes, rows * bytes, packed + row * bytes, counts + row * width);
    }
}
