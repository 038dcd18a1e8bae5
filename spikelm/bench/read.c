/* Reads every byte once, as fast as the processor can: independent sums, nothing written.
 *
 * Which form is fastest depends on the processor: one stream fetched ahead by instruction, or several plain
 * streams that it fetches ahead by itself. The caller takes the best.
 */
#include <stdint.h>

typedef int64_t lanes __attribute__((vector_size(64), aligned(64)));

#define SUMS 8

static int64_t total(const lanes sums[SUMS]) {
    int64_t sum = 0;
    for (int j = 0; j < SUMS; j++) {
        for (int lane = 0; lane < 8; lane++) {
            sum += sums[j][lane];
        }
    }
    return sum;
}

/* One stream, fetched ahead. */
int64_t read_ahead(const void *memory, int64_t bytes) {
    const lanes *block = memory;
    lanes sums[SUMS] = {{0}};
    const int64_t blocks = bytes / (int64_t)sizeof(lanes);
    for (int64_t i = 0; i + SUMS <= blocks; i += SUMS) {
        for (int j = 0; j < SUMS; j++) {
            __builtin_prefetch((const char *)(block + i + j) + 4096);
            sums[j] += block[i + j];
        }
    }
    return total(sums);
}

/* Parts of the memory at once. */
static inline __attribute__((always_inline)) int64_t streams(const int parts, const void *memory, int64_t bytes) {
    const lanes *block = memory;
    lanes sums[SUMS] = {{0}};
    const int run = SUMS / parts;
    const int64_t each = bytes / (int64_t)sizeof(lanes) / SUMS * run;
    for (int64_t i = 0; i < each; i += run) {
#pragma GCC unroll 8
        for (int j = 0; j < SUMS; j++) {
            sums[j] += block[j / run * each + i + j % run];
        }
    }
    return total(sums);
}

int64_t read_one(const void *memory, int64_t bytes) { return streams(1, memory, bytes); }

int64_t read_two(const void *memory, int64_t bytes) { return streams(2, memory, bytes); }

int64_t read_four(const void *memory, int64_t bytes) { return streams(4, memory, bytes); }
