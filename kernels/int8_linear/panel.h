/* Panels [quads][INT8_BLOCK][4] of bytes w + 128 made from other layouts, for the rows that pass through them. */
#ifndef SPIKELM_INT8_PANEL_H
#define SPIKELM_INT8_PANEL_H

#include "vector.h"

#define INT8_PANEL 64 /* quads at a time: 16 KiB, which stay in the first cache */

/* From rows of inputs: `inputs` runs of INT8_BLOCK bytes, `stride` apart. Missing inputs are zeros. */
static inline void int8_panel_of_inputs(int64_t inputs, int64_t stride, const uint8_t *from, uint8_t *panel) {
    uint8_t zeros[INT8_BLOCK];
    memset(zeros, 128, INT8_BLOCK);
    for (int64_t i = 0; i < inputs; i += 4) {
        const uint8_t *row[4];
        for (int64_t k = 0; k < 4; k++) {
            row[k] = i + k < inputs ? from + (i + k) * stride : zeros;
        }
        uint8_t *to = panel + i / 4 * INT8_QUAD;
#if defined(INT8_HAS_SSE2)
        for (int o = 0; o < INT8_BLOCK; o += 16) {
            const __m128i a = _mm_loadu_si128((const __m128i *)(row[0] + o));
            const __m128i b = _mm_loadu_si128((const __m128i *)(row[1] + o));
            const __m128i c = _mm_loadu_si128((const __m128i *)(row[2] + o));
            const __m128i d = _mm_loadu_si128((const __m128i *)(row[3] + o));
            const __m128i ab = _mm_unpacklo_epi8(a, b), cd = _mm_unpacklo_epi8(c, d);
            const __m128i ab8 = _mm_unpackhi_epi8(a, b), cd8 = _mm_unpackhi_epi8(c, d);
            __m128i *quads = (__m128i *)(to + 4 * o);
            _mm_storeu_si128(quads, _mm_unpacklo_epi16(ab, cd));
            _mm_storeu_si128(quads + 1, _mm_unpackhi_epi16(ab, cd));
            _mm_storeu_si128(quads + 2, _mm_unpacklo_epi16(ab8, cd8));
            _mm_storeu_si128(quads + 3, _mm_unpackhi_epi16(ab8, cd8));
        }
#else
        for (int o = 0; o < INT8_BLOCK; o++) {
            for (int k = 0; k < 4; k++) {
                to[4 * o + k] = row[k][o];
            }
        }
#endif
    }
}

/* From rows of outputs as torch holds them, signed: `outputs` (at most INT8_BLOCK) runs of `inputs` bytes. */
static inline void int8_panel_of_rows(int64_t outputs, int64_t inputs, int64_t stride, const int8_t *from,
                                 uint8_t *panel) {
    const int64_t quads = (inputs + 3) / 4;
    int64_t o = 0;
#if defined(INT8_HAS_SSE2)
    const __m128i flip = _mm_set1_epi8((char)-128);
    for (; o + 4 <= outputs; o += 4) {
        int64_t i = 0;
        for (; i + 16 <= inputs; i += 16) {
            const int8_t *at = from + o * stride + i;
            const __m128i a = _mm_xor_si128(_mm_loadu_si128((const __m128i *)at), flip);
            const __m128i b = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(at + stride)), flip);
            const __m128i c = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(at + 2 * stride)), flip);
            const __m128i d = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(at + 3 * stride)), flip);
            const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
            const __m128i ab2 = _mm_unpackhi_epi32(a, b), cd2 = _mm_unpackhi_epi32(c, d);
            uint8_t *to = panel + i / 4 * INT8_QUAD + 4 * o;
            _mm_storeu_si128((__m128i *)to, _mm_unpacklo_epi64(ab, cd));
            _mm_storeu_si128((__m128i *)(to + INT8_QUAD), _mm_unpackhi_epi64(ab, cd));
            _mm_storeu_si128((__m128i *)(to + 2 * INT8_QUAD), _mm_unpacklo_epi64(ab2, cd2));
            _mm_storeu_si128((__m128i *)(to + 3 * INT8_QUAD), _mm_unpackhi_epi64(ab2, cd2));
        }
        for (int64_t k = 0; k < 4; k++) {
            for (int64_t q = i / 4; q < quads; q++) {
                uint8_t *to = panel + q * INT8_QUAD + 4 * (o + k);
                for (int64_t b = 0; b < 4; b++) {
                    to[b] = (uint8_t)((4 * q + b < inputs ? from[(o + k) * stride + 4 * q + b] : 0) ^ 0x80);
                }
            }
        }
    }
#endif
    for (; o < INT8_BLOCK; o++) {
        for (int64_t q = 0; q < quads; q++) {
            uint8_t *to = panel + q * INT8_QUAD + 4 * o;
            for (int64_t b = 0; b < 4; b++) {
                to[b] = (uint8_t)((o < outputs && 4 * q + b < inputs ? from[o * stride + 4 * q + b] : 0) ^ 0x80);
            }
        }
    }
}

#endif
