/* rowwise: elementwise functions and norms over whole tensors for torch (the mathematics is in step.h). */
#include "step.h"

#define BLOCK 4096

/* y[i] = function(x[i]) */
void rowwise_unary(int64_t count, int64_t function, const float *x, float *y, int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < count; first += BLOCK) {
        unary_row(function, count - first < BLOCK ? count - first : BLOCK, x + first, y + first);
    }
}

/* y[row] = lerp(start[row], end[row], weight) */
void rowwise_lerp(int64_t rows, int64_t width, const float *start, const float *end, const float *weight, float *y,
                  int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        lerp_row(width, start + row * width, end + row * width, weight, y + row * width);
    }
}

/* y[row] = softmax(x[row]) */
void rowwise_softmax(int64_t rows, int64_t width, const float *x, float *y, int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        softmax_row(width, x + row * width, y + row * width);
    }
}

/* LayerNorm (centred) or RMSNorm of every row; weight and bias may be null. */
void rowwise_norm(int64_t rows, int64_t width, int centred, double epsilon, const float *x, const float *weight,
                  const float *bias, float *y, int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        if (centred) {
            layernorm_row(width, (float)epsilon, x + row * width, weight, bias, y + row * width);
        } else {
            rmsnorm_row(width, (float)epsilon, x + row * width, weight, y + row * width);
        }
    }
}
