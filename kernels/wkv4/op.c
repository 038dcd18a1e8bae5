/* wkv4: the attention-like recurrence of RWKV-4, forward and backward (equations in reference.py).
 *
 * Layout: k, v, y [rows][steps][channels]; states [rows][3][channels] hold num, den and max, the true sums
 * being num * exp(max) and den * exp(max). A task is one row and one block of channels, walked over all
 * steps; tasks are independent, so the result does not depend on the number of threads.
 *
 * Forward keeps the state at every SEGMENT-th step (checkpoints [rows][segments][3][channels]); backward
 * walks the segments from the last to the first, recomputes one segment from its checkpoint into small
 * arrays and then differentiates it, so that memory stays far below one tensor of the size of k.
 */
#include "step.h"

#define BLOCK 64
#define SEGMENT 32

INLINE void load_state(int count, const real *state, int64_t channels, real *num, real *den, real *max) {
    for (int i = 0; i < count; i++) {
        num[i] = state[i];
        den[i] = state[channels + i];
        max[i] = state[2 * channels + i];
    }
}

INLINE void store_state(int count, real *state, int64_t channels, const real *num, const real *den,
                        const real *max) {
    for (int i = 0; i < count; i++) {
        state[i] = num[i];
        state[channels + i] = den[i];
        state[2 * channels + i] = max[i];
    }
}

INLINE void empty_state(int count, real *num, real *den, real *max) {
    for (int i = 0; i < count; i++) {
        num[i] = 0;
        den[i] = 0;
        max[i] = EMPTY_MAX;
    }
}

/* All pointers already point at the first channel of the block in the row. */
INLINE void forward_block(int count, int64_t steps, int64_t channels, const real *restrict decay,
                          const real *restrict bonus, const real *restrict k, const real *restrict v,
                          const real *restrict state_in, const uint8_t *restrict reset,
                          const uint8_t *restrict valid, real *restrict y, real *restrict state_out,
                          real *restrict checkpoints) {
    real num[BLOCK], den[BLOCK], max[BLOCK];
    load_state(count, state_in, channels, num, den, max);
    for (int64_t t = 0; t < steps; t++, k += channels, v += channels, y += channels) {
        if (t % SEGMENT == 0) {
            store_state(count, checkpoints, channels, num, den, max);
            checkpoints += 3 * channels;
        }
        if (reset && reset[t]) {
            empty_state(count, num, den, max);
        }
        if (valid && !valid[t]) {
            memset(y, 0, (size_t)count * sizeof(real));
            continue;
        }
        wkv4_channels(count, decay, bonus, k, v, num, den, max, y);
    }
    store_state(count, state_out, channels, num, den, max);
}

/* What the backward pass needs of every step of one segment. */
struct tape {
    real num[SEGMENT][BLOCK], den[SEGMENT][BLOCK];       /* state before the step */
    real out_past[SEGMENT][BLOCK], out_now[SEGMENT][BLOCK]; /* weights in the output */
    real new_past[SEGMENT][BLOCK], new_now[SEGMENT][BLOCK]; /* weights in the new state */
    real y[SEGMENT][BLOCK], inverse[SEGMENT][BLOCK];     /* output and 1 / its denominator */
};

INLINE void recompute_segment(int count, int64_t first, int64_t last, int64_t channels,
                              const real *restrict decay, const real *restrict bonus, const real *restrict k,
                              const real *restrict v, const real *restrict checkpoint,
                              const uint8_t *restrict reset, const uint8_t *restrict valid,
                              struct tape *restrict tape) {
    real num[BLOCK], den[BLOCK], max[BLOCK];
    load_state(count, checkpoint, channels, num, den, max);
    for (int64_t t = first; t < last; t++) {
        const int64_t j = t - first;
        const real *restrict kt = k + t * channels, *restrict vt = v + t * channels;
        if (reset && reset[t]) {
            empty_state(count, num, den, max);
        }
        if (valid && !valid[t]) {
            continue;
        }
#pragma omp simd
        for (int i = 0; i < count; i++) {
            real past, now;
            weigh(max[i], bonus[i] + kt[i], &past, &now);
            real inverse = 1 / (past * den[i] + now);
            tape->num[j][i] = num[i];
            tape->den[j][i] = den[i];
            tape->out_past[j][i] = past;
            tape->out_now[j][i] = now;
            tape->inverse[j][i] = inverse;
            tape->y[j][i] = (past * num[i] + now * vt[i]) * inverse;
            real decayed = max[i] + decay[i];
            weigh(decayed, kt[i], &past, &now);
            tape->new_past[j][i] = past;
            tape->new_now[j][i] = now;
            num[i] = past * num[i] + now * vt[i];
            den[i] = past * den[i] + now;
            max[i] = larger(decayed, kt[i]);
        }
    }
}

/* Gradients of num and den are taken at a fixed max, which only scales them. */
INLINE void backward_block(int count, int64_t steps, int64_t channels, const real *restrict decay,
                           const real *restrict bonus, const real *restrict k, const real *restrict v,
                           const uint8_t *restrict reset, const uint8_t *restrict valid,
                           const real *restrict checkpoints, const real *restrict grad_y,
                           const real *restrict grad_state_out, real *restrict grad_k, real *restrict grad_v,
                           real *restrict grad_state_in, real *restrict grad_decay,
                           real *restrict grad_bonus) {
    struct tape tape;
    real grad_num[BLOCK], grad_den[BLOCK], sum_decay[BLOCK], sum_bonus[BLOCK];
    for (int i = 0; i < count; i++) {
        grad_num[i] = grad_state_out[i];
        grad_den[i] = grad_state_out[channels + i];
        grad_decay[i] = 0;
        grad_bonus[i] = 0;
    }
    const int64_t segments = (steps + SEGMENT - 1) / SEGMENT;
    for (int64_t segment = segments - 1; segment >= 0; segment--) {
        const int64_t first = segment * SEGMENT;
        const int64_t last = first + SEGMENT < steps ? first + SEGMENT : steps;
        recompute_segment(count, first, last, channels, decay, bonus, k, v,
                          checkpoints + segment * 3 * channels, reset, valid, &tape);
        for (int i = 0; i < count; i++) {
            sum_decay[i] = 0;
            sum_bonus[i] = 0;
        }
        for (int64_t t = last - 1; t >= first; t--) {
            const int64_t j = t - first;
            const real *restrict vt = v + t * channels, *restrict gy = grad_y + t * channels;
            real *restrict gk = grad_k + t * channels, *restrict gv = grad_v + t * channels;
            if (valid && !valid[t]) {
                memset(gk, 0, (size_t)count * sizeof(real));
                memset(gv, 0, (size_t)count * sizeof(real));
            } else {
#pragma omp simd
                for (int i = 0; i < count; i++) {
                    const real numerator = gy[i] * tape.inverse[j][i]; /* gradient of the numerator */
                    const real through_output = tape.out_now[j][i] * numerator * (vt[i] - tape.y[j][i]);
                    gk[i] = through_output + tape.new_now[j][i] * (grad_num[i] * vt[i] + grad_den[i]);
                    gv[i] = tape.out_now[j][i] * numerator + tape.new_now[j][i] * grad_num[i];
                    sum_bonus[i] += through_output;
                    const real past_num = tape.new_past[j][i] * grad_num[i];
                    const real past_den = tape.new_past[j][i] * grad_den[i];
                    sum_decay[i] += past_num * tape.num[j][i] + past_den * tape.den[j][i];
                    grad_num[i] = past_num + tape.out_past[j][i] * numerator;
                    grad_den[i] = past_den - tape.out_past[j][i] * numerator * tape.y[j][i];
                }
            }
            if (reset && reset[t]) {
                for (int i = 0; i < count; i++) {
                    grad_num[i] = 0;
                    grad_den[i] = 0;
                }
            }
        }
        for (int i = 0; i < count; i++) {
            grad_decay[i] += sum_decay[i];
            grad_bonus[i] += sum_bonus[i];
        }
    }
    for (int i = 0; i < count; i++) {
        grad_state_in[i] = grad_num[i];
        grad_state_in[channels + i] = grad_den[i];
        grad_state_in[2 * channels + i] = 0;
    }
}

void wkv4_forward(int64_t rows, int64_t steps, int64_t channels, const real *decay, const real *bonus,
                  const real *k, const real *v, const real *state_in, const uint8_t *reset,
                  const uint8_t *valid, real *y, real *state_out, real *checkpoints, int threads) {
    const int64_t blocks = (channels + BLOCK - 1) / BLOCK, segments = (steps + SEGMENT - 1) / SEGMENT;
    (void)threads;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t c = block * BLOCK, at = row * steps * channels + c, s = row * 3 * channels + c;
            const int count = (int)(channels - c < BLOCK ? channels - c : BLOCK);
            forward_block(count, steps, channels, decay + c, bonus + c, k + at, v + at,
                           state_in + s, reset ? reset + row * steps : NULL,
                           valid ? valid + row * steps : NULL, y + at, state_out + s,
                           checkpoints + row * segments * 3 * channels + c);
        }
    }
}

/* decay_rows and bonus_rows [rows][channels] are scratch for the rows' shares of the two sums. */
void wkv4_backward(int64_t rows, int64_t steps, int64_t channels, const real *decay, const real *bonus,
                   const real *k, const real *v, const uint8_t *reset, const uint8_t *valid,
                   const real *checkpoints, const real *grad_y, const real *grad_state_out, real *grad_k,
                   real *grad_v, real *grad_state_in, real *decay_rows, real *bonus_rows, real *grad_decay,
                   real *grad_bonus, int threads) {
    const int64_t blocks = (channels + BLOCK - 1) / BLOCK, segments = (steps + SEGMENT - 1) / SEGMENT;
    (void)threads;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t c = block * BLOCK, at = row * steps * channels + c, s = row * 3 * channels + c;
            const int count = (int)(channels - c < BLOCK ? channels - c : BLOCK);
            backward_block(count, steps, channels, decay + c, bonus + c, k + at, v + at,
                           reset ? reset + row * steps : NULL, valid ? valid + row * steps : NULL,
                           checkpoints + row * segments * 3 * channels + c, grad_y + at, grad_state_out + s,
                           grad_k + at, grad_v + at, grad_state_in + s, decay_rows + row * channels + c,
                           bonus_rows + row * channels + c);
        }
    }
    sum_rows(rows, channels, decay_rows, grad_decay);
    sum_rows(rows, channels, bonus_rows, grad_bonus);
}
