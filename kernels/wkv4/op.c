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

/* Channels of a task: rows of memory as long as possible, so that a page is visited once and not in pieces. */
#define WIDEST 2048
/* Channels whose segment is differentiated at once: its tape stays in the nearest caches. */
#define BLOCK 128
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
    real num[WIDEST], den[WIDEST], max[WIDEST];
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
    real num[SEGMENT][BLOCK], den[SEGMENT][BLOCK];           /* state before the step */
    real out_past[SEGMENT][BLOCK], out_now[SEGMENT][BLOCK]; /* weights in the output, over its denominator */
    real new_past[SEGMENT][BLOCK], new_now[SEGMENT][BLOCK]; /* weights in the new state */
};

INLINE void recompute_segment(int count, int64_t first, int64_t last, int64_t channels,
                              const real *restrict decay, const real *restrict bonus, const real *restrict k,
                              const real *restrict v, const real *restrict checkpoint,
                              const uint8_t *restrict reset, const uint8_t *restrict valid, const real *grad_y,
                              const real *grad_k, const real *grad_v, struct tape *restrict tape) {
    real num[BLOCK], den[BLOCK], max[BLOCK];
    load_state(count, checkpoint, channels, num, den, max);
    for (int64_t t = first; t < last; t++) {
        const int64_t j = t - first;
        const real *restrict kt = k + t * channels, *restrict vt = v + t * channels;
        fetch_row(count, grad_y + t * channels);
        fetch_row(count, grad_k + t * channels);
        fetch_row(count, grad_v + t * channels);
        if (reset && reset[t]) {
            empty_state(count, num, den, max);
        }
        if (valid && !valid[t]) {
            continue;
        }
        real *restrict nums = tape->num[j], *restrict dens = tape->den[j];
        real *restrict out_past = tape->out_past[j], *restrict out_now = tape->out_now[j];
        real *restrict new_past = tape->new_past[j], *restrict new_now = tape->new_now[j];
#pragma omp simd
        for (int i = 0; i < count; i++) {
            const real decayed = max[i] + decay[i];
            const struct weights w = weigh(max[i], decayed, bonus[i] + kt[i], kt[i]);
            const real inverse = 1 / (w.out_past * den[i] + w.out_now);
            nums[i] = num[i];
            dens[i] = den[i];
            out_past[i] = w.out_past * inverse;
            out_now[i] = w.out_now * inverse;
            new_past[i] = w.new_past;
            new_now[i] = w.new_now;
            num[i] = w.new_past * num[i] + w.new_now * vt[i];
            den[i] = w.new_past * den[i] + w.new_now;
            max[i] = larger(decayed, kt[i]);
        }
    }
}

/* One step of a segment, from its end to its start. Gradients of num and den are taken at a fixed max. */
INLINE void backward_step(int count, const struct tape *restrict tape, int64_t j, const real *restrict v,
                          const real *restrict grad_y, real *restrict grad_k, real *restrict grad_v,
                          real *restrict grad_num, real *restrict grad_den, real *restrict sum_decay,
                          real *restrict sum_bonus) {
    const real *restrict num = tape->num[j], *restrict den = tape->den[j];
    const real *restrict out_past = tape->out_past[j], *restrict out_now = tape->out_now[j];
    const real *restrict new_past = tape->new_past[j], *restrict new_now = tape->new_now[j];
#pragma omp simd
    for (int i = 0; i < count; i++) {
        const real y = multiply_add(out_past[i], num[i], out_now[i] * v[i]);
        const real through_now = out_now[i] * grad_y[i], through_past = out_past[i] * grad_y[i];
        const real through_output = through_now * (v[i] - y);
        grad_k[i] = multiply_add(new_now[i], multiply_add(grad_num[i], v[i], grad_den[i]), through_output);
        grad_v[i] = multiply_add(new_now[i], grad_num[i], through_now);
        sum_bonus[i] += through_output;
        const real past_num = new_past[i] * grad_num[i], past_den = new_past[i] * grad_den[i];
        sum_decay[i] = multiply_add(past_num, num[i], multiply_add(past_den, den[i], sum_decay[i]));
        grad_num[i] = past_num + through_past;
        grad_den[i] = multiply_add(-through_past, y, past_den);
    }
}

/* One segment of up to BLOCK channels, from its end to its start; grad_num and grad_den go on by it. next: how far
 * from the first row of k and v lie the first rows that are needed afterwards; pieces of rows are nothing that
 * processors fetch ahead. */
INLINE void backward_segment(int count, int64_t first, int64_t last, int64_t channels,
                             const real *restrict decay, const real *restrict bonus, const real *restrict k,
                             const real *restrict v, const uint8_t *restrict reset,
                             const uint8_t *restrict valid, const real *restrict checkpoint,
                             const real *restrict grad_y, int64_t next, real *restrict grad_k,
                             real *restrict grad_v, real *restrict grad_num, real *restrict grad_den,
                             real *restrict grad_decay, real *restrict grad_bonus) {
    struct tape tape;
    real sum_decay[BLOCK], sum_bonus[BLOCK];
    recompute_segment(count, first, last, channels, decay, bonus, k, v, checkpoint, reset, valid, grad_y, grad_k,
                      grad_v, &tape);
    for (int i = 0; i < count; i++) {
        sum_decay[i] = 0;
        sum_bonus[i] = 0;
    }
    for (int64_t t = last - 1; t >= first; t--) {
        real *restrict gk = grad_k + t * channels, *restrict gv = grad_v + t * channels;
        fetch_row(count, k + next + (last - 1 - t) * channels);
        fetch_row(count, v + next + (last - 1 - t) * channels);
        if (valid && !valid[t]) {
            memset(gk, 0, (size_t)count * sizeof(real));
            memset(gv, 0, (size_t)count * sizeof(real));
        } else {
            backward_step(count, &tape, t - first, v + t * channels, grad_y + t * channels, gk, gv, grad_num,
                          grad_den, sum_decay, sum_bonus);
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

INLINE void backward_block(int count, int64_t steps, int64_t channels, const real *restrict decay,
                           const real *restrict bonus, const real *restrict k, const real *restrict v,
                           const uint8_t *restrict reset, const uint8_t *restrict valid,
                           const real *restrict checkpoints, const real *restrict grad_y,
                           const real *restrict grad_state_out, real *restrict grad_k, real *restrict grad_v,
                           real *restrict grad_state_in, real *restrict grad_decay,
                           real *restrict grad_bonus) {
    real *restrict grad_num = grad_state_in, *restrict grad_den = grad_state_in + channels;
    for (int i = 0; i < count; i++) {
        grad_num[i] = grad_state_out[i];
        grad_den[i] = grad_state_out[channels + i];
        grad_state_in[2 * channels + i] = 0;
        grad_decay[i] = 0;
        grad_bonus[i] = 0;
    }
    const int64_t segments = (steps + SEGMENT - 1) / SEGMENT;
    for (int64_t segment = segments - 1; segment >= 0; segment--) {
        const int64_t first = segment * SEGMENT;
        const int64_t last = first + SEGMENT < steps ? first + SEGMENT : steps;
        for (int c = 0; c < count; c += BLOCK) {
            const int own = count - c < BLOCK ? count - c : BLOCK;
            const int64_t before = segment ? first - SEGMENT : 0;
            const int64_t next = c + BLOCK < count ? first * channels + BLOCK : before * channels - c;
            backward_segment(own, first, last, channels, decay + c, bonus + c, k + c, v + c, reset, valid,
                             checkpoints + segment * 3 * channels + c, grad_y + c, next, grad_k + c, grad_v + c,
                             grad_num + c, grad_den + c, grad_decay + c, grad_bonus + c);
        }
    }
}

/* Returns whether a decay is NaN or above zero, or a bonus not finite: the results are then of no use. */
int wkv4_forward(int64_t rows, int64_t steps, int64_t channels, const real *decay, const real *bonus,
                 const real *k, const real *v, const real *state_in, const uint8_t *reset,
                 const uint8_t *valid, real *y, real *state_out, real *checkpoints, int threads) {
    const int64_t width = task_width(rows, channels, WIDEST, threads), segments = (steps + SEGMENT - 1) / SEGMENT;
    const int64_t blocks = (channels + width - 1) / width;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t c = block * width, at = row * steps * channels + c, s = row * 3 * channels + c;
            const int count = (int)(channels - c < width ? channels - c : width);
            forward_block(count, steps, channels, decay + c, bonus + c, k + at, v + at,
                           state_in + s, reset ? reset + row * steps : NULL,
                           valid ? valid + row * steps : NULL, y + at, state_out + s,
                           checkpoints + row * segments * 3 * channels + c);
        }
    }
    return any_above_zero(channels, decay) | any_not_finite(channels, bonus);
}

/* decay_rows and bonus_rows [rows][channels] are scratch for the rows' shares of the two sums. */
void wkv4_backward(int64_t rows, int64_t steps, int64_t channels, const real *decay, const real *bonus,
                   const real *k, const real *v, const uint8_t *reset, const uint8_t *valid,
                   const real *checkpoints, const real *grad_y, const real *grad_state_out, real *grad_k,
                   real *grad_v, real *grad_state_in, real *decay_rows, real *bonus_rows, real *grad_decay,
                   real *grad_bonus, int threads) {
    const int64_t width = task_width(rows, channels, WIDEST, threads), segments = (steps + SEGMENT - 1) / SEGMENT;
    const int64_t blocks = (channels + width - 1) / width;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t c = block * width, at = row * steps * channels + c, s = row * 3 * channels + c;
            const int count = (int)(channels - c < width ? channels - c : width);
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
