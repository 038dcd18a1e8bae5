/* lif: leaky integrate-and-fire over a sequence, forward and backward (equations in reference.py).
 *
 * Layout: x, spikes [rows][steps][channels]; membranes [rows][channels]. A task is one row and one block of
 * channels, walked over all steps; tasks are independent, so the result does not depend on the number of
 * threads. Forward keeps the membrane at every SEGMENT-th step (checkpoints [rows][segments][channels]);
 * backward recomputes one segment at a time from its checkpoint, last to first, instead of storing the
 * charged membrane of every step.
 */
#include "step.h"

/* Channels of a task: rows of memory as long as possible, so that a page is visited once and not in pieces. */
#define WIDEST 2048
/* Channels whose segment is differentiated at once: its tape stays in the nearest caches. */
#define BLOCK 128
#define SEGMENT 32

/* All pointers already point at the first channel of the block in the row. */
INLINE void forward_block(int count, int decay_input, int soft_reset, int64_t steps,
                          int64_t channels, const struct neuron *neuron, const real *restrict x,
                          const real *restrict v_in, const real *restrict rate, const uint8_t *restrict reset,
                          const uint8_t *restrict valid, real *restrict spikes, real *restrict v_out,
                          real *restrict checkpoints) {
    const real threshold = (real)neuron->threshold, v_reset = (real)neuron->v_reset;
    const real rest = soft_reset ? 0 : v_reset;
    real v[WIDEST];
    for (int i = 0; i < count; i++) {
        v[i] = v_in[i];
    }
    for (int64_t t = 0; t < steps; t++, x += channels, spikes += channels) {
        if (t % SEGMENT == 0) {
            for (int i = 0; i < count; i++) {
                checkpoints[i] = v[i];
            }
            checkpoints += channels;
        }
        if (reset && reset[t]) {
            for (int i = 0; i < count; i++) {
                v[i] = rest;
            }
        }
        if (valid && !valid[t]) {
            memset(spikes, 0, (size_t)count * sizeof(real));
            continue;
        }
        lif_channels(count, decay_input, soft_reset, threshold, v_reset, x, rate, v, spikes);
    }
    for (int i = 0; i < count; i++) {
        v_out[i] = v[i];
    }
}

/* slope[i] = surrogate derivative of the spike at h[i] */
static void surrogate_slope(int count, const struct neuron *neuron, const real *restrict h,
                            real *restrict slope) {
    const real threshold = (real)neuron->threshold, alpha = (real)neuron->alpha;
    switch (neuron->surrogate) {
    case ATAN: {
        const real half = alpha / 2, width = (real)(1.57079632679489661923 * neuron->alpha);
#pragma omp simd
        for (int i = 0; i < count; i++) {
            const real z = width * (h[i] - threshold);
            slope[i] = half / (1 + z * z);
        }
        break;
    }
    case SIGMOID:
#pragma omp simd
        for (int i = 0; i < count; i++) {
            const real z = alpha * (h[i] - threshold);
            const real e = exp_nonpositive(z < 0 ? z : -z);
            slope[i] = alpha * e / ((1 + e) * (1 + e));
        }
        break;
    case TRIANGLE:
#pragma omp simd
        for (int i = 0; i < count; i++) {
            const real z = alpha * (h[i] - threshold);
            const real height = 1 - (z < 0 ? -z : z);
            slope[i] = alpha * (height < 0 ? (real)0 : height);
        }
        break;
    default:
        for (int i = 0; i < count; i++) {
            slope[i] = 1;
        }
    }
}

/* What the backward pass needs of every step of one segment. */
struct tape {
    real h[SEGMENT][BLOCK];     /* charged membrane */
    real drive[SEGMENT][BLOCK]; /* d h / d rate */
};

INLINE void recompute_segment(int count, int decay_input, int soft_reset, int64_t first,
                              int64_t last, int64_t channels, const struct neuron *neuron,
                              const real *restrict x, const real *restrict rate,
                              const real *restrict checkpoint, const uint8_t *restrict reset,
                              const uint8_t *restrict valid, const real *grad_spikes, const real *grad_x,
                              struct tape *restrict tape) {
    const real threshold = (real)neuron->threshold, v_reset = (real)neuron->v_reset;
    const real rest = soft_reset ? 0 : v_reset;
    real v[BLOCK];
    for (int i = 0; i < count; i++) {
        v[i] = checkpoint[i];
    }
    for (int64_t t = first; t < last; t++) {
        const real *restrict xt = x + t * channels;
        real *restrict h = tape->h[t - first], *restrict drives = tape->drive[t - first];
        fetch_row(count, grad_spikes + t * channels);
        fetch_row(count, grad_x + t * channels);
        if (reset && reset[t]) {
            for (int i = 0; i < count; i++) {
                v[i] = rest;
            }
        }
        if (valid && !valid[t]) {
            continue;
        }
#pragma omp simd
        for (int i = 0; i < count; i++) {
            real drive;
            const real charged = charge(decay_input, xt[i], v[i], rate[i], v_reset, &drive);
            h[i] = charged;
            drives[i] = drive;
            v[i] = after_charge(soft_reset, charged, threshold, v_reset);
        }
    }
}

/* One segment of up to BLOCK channels, from its end to its start; grad_v goes on by it. next: the first row of x
 * that is needed afterwards; pieces of rows that lie this far apart are nothing that processors fetch ahead. */
INLINE void backward_segment(int count, int decay_input, int soft_reset, int64_t first, int64_t last,
                             int64_t channels, const struct neuron *neuron, const real *restrict x,
                             const real *restrict rate, const uint8_t *restrict reset,
                             const uint8_t *restrict valid, const real *restrict checkpoint,
                             const real *restrict grad_spikes, const real *next, real *restrict grad_x,
                             real *restrict grad_v, real *restrict grad_rate) {
    const real threshold = (real)neuron->threshold, v_reset = (real)neuron->v_reset;
    /* d v_new / d h = kept - (by_h * h + constant) * slope; without the second term when detached */
    const real by_h = !neuron->detach_reset && !soft_reset ? 1 : 0;
    const real constant = neuron->detach_reset ? 0 : soft_reset ? threshold : -v_reset;
    struct tape tape;
    real slope[BLOCK], sum_rate[BLOCK];
    recompute_segment(count, decay_input, soft_reset, first, last, channels, neuron, x, rate, checkpoint, reset,
                      valid, grad_spikes, grad_x, &tape);
    for (int i = 0; i < count; i++) {
        sum_rate[i] = 0;
    }
    for (int64_t t = last - 1; t >= first; t--) {
        const real *restrict h = tape.h[t - first], *restrict drive = tape.drive[t - first];
        const real *restrict gs = grad_spikes + t * channels;
        real *restrict gx = grad_x + t * channels;
        fetch_row(count, next + (last - 1 - t) * channels);
        if (valid && !valid[t]) {
            memset(gx, 0, (size_t)count * sizeof(real));
        } else {
            surrogate_slope(count, neuron, h, slope);
#pragma omp simd
            for (int i = 0; i < count; i++) {
                const real kept = soft_reset || h[i] < threshold ? (real)1 : (real)0;
                const real through = kept - (by_h * h[i] + constant) * slope[i];
                const real grad_h = gs[i] * slope[i] + grad_v[i] * through;
                gx[i] = decay_input ? grad_h * rate[i] : grad_h;
                sum_rate[i] += grad_h * drive[i];
                grad_v[i] = grad_h * (1 - rate[i]);
            }
        }
        if (reset && reset[t]) {
            for (int i = 0; i < count; i++) {
                grad_v[i] = 0;
            }
        }
    }
    for (int i = 0; i < count; i++) {
        grad_rate[i] += sum_rate[i];
    }
}

INLINE void backward_block(int count, int decay_input, int soft_reset, int64_t steps,
                           int64_t channels, const struct neuron *neuron, const real *restrict x,
                           const real *restrict rate, const uint8_t *restrict reset,
                           const uint8_t *restrict valid, const real *restrict checkpoints,
                           const real *restrict grad_spikes, const real *restrict grad_v_out,
                           real *restrict grad_x, real *restrict grad_v_in, real *restrict grad_rate) {
    for (int i = 0; i < count; i++) {
        grad_v_in[i] = grad_v_out[i];
        grad_rate[i] = 0;
    }
    const int64_t segments = (steps + SEGMENT - 1) / SEGMENT;
    for (int64_t segment = segments - 1; segment >= 0; segment--) {
        const int64_t first = segment * SEGMENT;
        const int64_t last = first + SEGMENT < steps ? first + SEGMENT : steps;
        for (int c = 0; c < count; c += BLOCK) {
            const int own = count - c < BLOCK ? count - c : BLOCK;
            const real *next = c + BLOCK < count ? x + first * channels + c + BLOCK
                                                 : x + (segment ? first - SEGMENT : 0) * channels;
            backward_segment(own, decay_input, soft_reset, first, last, channels, neuron, x + c, rate + c, reset,
                             valid, checkpoints + segment * channels + c, grad_spikes + c, next, grad_x + c,
                             grad_v_in + c, grad_rate + c);
        }
    }
}

/* Returns whether a rate is NaN or infinite: the results are then of no use. */
int lif_forward(int64_t rows, int64_t steps, int64_t channels, const struct neuron *neuron, const real *x,
                const real *v_in, const real *rate, const uint8_t *reset, const uint8_t *valid, real *spikes,
                real *v_out, real *checkpoints, int threads) {
    const int64_t width = task_width(rows, channels, WIDEST, threads), segments = (steps + SEGMENT - 1) / SEGMENT;
    const int64_t blocks = (channels + width - 1) / width;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t c = block * width, at = row * steps * channels + c;
            const int count = (int)(channels - c < width ? channels - c : width);
            DISPATCH_VARIANT(forward_block, count, neuron, steps, channels, neuron, x + at,
                             v_in + row * channels + c, rate + c, reset ? reset + row * steps : NULL,
                             valid ? valid + row * steps : NULL, spikes + at, v_out + row * channels + c,
                             checkpoints + row * segments * channels + c);
        }
    }
    return any_not_finite(channels, rate);
}

/* rate_rows [rows][channels] is scratch for the rows' shares of grad_rate [channels]. */
void lif_backward(int64_t rows, int64_t steps, int64_t channels, const struct neuron *neuron, const real *x,
                  const real *rate, const uint8_t *reset, const uint8_t *valid, const real *checkpoints,
                  const real *grad_spikes, const real *grad_v_out, real *grad_x, real *grad_v_in,
                  real *rate_rows, real *grad_rate, int threads) {
    const int64_t width = task_width(rows, channels, WIDEST, threads), segments = (steps + SEGMENT - 1) / SEGMENT;
    const int64_t blocks = (channels + width - 1) / width;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t c = block * width, at = row * steps * channels + c, s = row * channels + c;
            const int count = (int)(channels - c < width ? channels - c : width);
            DISPATCH_VARIANT(backward_block, count, neuron, steps, channels, neuron, x + at, rate + c,
                             reset ? reset + row * steps : NULL, valid ? valid + row * steps : NULL,
                             checkpoints + row * segments * channels + c, grad_spikes + at, grad_v_out + s,
                             grad_x + at, grad_v_in + s, rate_rows + s);
        }
    }
    sum_rows(rows, channels, rate_rows, grad_rate);
}
