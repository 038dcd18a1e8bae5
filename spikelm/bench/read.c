/* Reads every byte once, as fast as the processor can: eight independent sums, nothing written. */
#include <stdint.h>

typedef int64_t lanes __attribute__((vector_size(64), aligned(64)));

int64_t read_bytes(const void *memory, int64_t bytes) {
    const lanes *block = memory;
    lanes sums[8] = {{0}};
    const int64_t blocks = bytes / (int64_t)sizeof(lanes);
    for (int64_t i = 0; i + 8 <= blocks; i += 8) {
        for (int j = 0; j < 8; j++) {
            __builtin_prefetch((const char *)(block + i + j) + 4096);
            sums[j] += block[i + j];
        }
    }
    int64_t total = 0;
    for (int j = 0; j < 8; j++) {
        for (int lane = 0; lane < 8; lane++) {
            total += sums[j][lane];
        }
    }
    return total;
}
