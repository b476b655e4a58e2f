// Element-wise operations outside attention: norms, the gated MLP's middle, the loss, tokens that a schema forbids. Each
// passes over memory once.

#include "kernels.h"

// A function of OpenMP 5, called with the number of omp_pause_soft. Runtimes older than GCC 9's do not have it.
extern "C" int omp_pause_resource_all(int) __attribute__((weak));

// Ends the OpenMP workers of the calling thread. Its next parallel region starts new ones.
extern "C" void release_threads() {
    if (omp_pause_resource_all) omp_pause_resource_all(1);
}

static inline void normalise(const bf16* from, const bf16* weight, float factor, float offset, bf16* to,
                             int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        bf16 normal;
        down(up(from[i]) * factor, &normal);  // rounds here, as the reference does
        down(up(normal) * (up(weight[i]) + offset), to + i);
    }
}

// sum = x + y [rows, width]; y null: sum is x and not written. scale [rows] = 1 / rms(sum), and
// out = sum * scale * (weight + offset). offset: 1 in families whose stored weights are reduced by 1.
extern "C" void add_norm(const bf16* x, const bf16* y, const bf16* weight, bf16* sum, bf16* out, float* scale,
                         int64_t rows, int64_t width, float epsilon, float offset, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const bf16* from = x + row * width;
        if (y) {
            const bf16* other = y + row * width;
            bf16* to = sum + row * width;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) down(up(from[i]) + up(other[i]), to + i);
            from = to;
        }
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < width; ++i) total += up(from[i]) * up(from[i]);
        float factor = 1.0f / std::sqrt(total / float(width) + epsilon);
        scale[row] = factor;
        normalise(from, weight, factor, offset, out + row * width, width);
    }
}

// out [rows, width] = gradient of the norm's input x, plus sum_gradient, which reaches x without passing the norm
// (null: none). again: receives the norm's output, computed again (null: not wanted).
extern "C" void norm_backward(const bf16* gradient, const bf16* x, const bf16* weight, const float* scale,
                              const bf16* sum_gradient, bf16* out, bf16* again, int64_t rows, int64_t width,
                              float offset, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const bf16 *g = gradient + row * width, *from = x + row * width;
        float factor = scale[row], dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < width; ++i) dot += up(g[i]) * (up(weight[i]) + offset) * up(from[i]);
        float mean = dot * factor / float(width);
        bf16* to = out + row * width;
        const bf16* past = sum_gradient ? sum_gradient + row * width : nullptr;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i)
            down(factor * (up(g[i]) * (up(weight[i]) + offset) - up(from[i]) * factor * mean) +
                     (past ? up(past[i]) : -0.0f),  // which changes no number
                 to + i);
        if (again) normalise(from, weight, factor, offset, again + row * width, width);
    }
}

// Prefetches part of the next row. The processor's own prefetching comes too late, because each row takes long to
// compute.
static const int64_t PIECE = 256;
static inline void prefetch(const bf16* row, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += 32) __builtin_prefetch(row + i, 0, 2);
}

// out [rows, width] = silu(gate) * up, where gate_up [rows, 2 * width] holds gate in its first half and up in the
// other.
extern "C" void gated(const bf16* gate_up, bf16* out, int64_t rows, int64_t width, int threads) {
    bool past = rows * width * 2 > PAST_BYTES;
#pragma omp parallel num_threads(threads)
    {
        std::vector<bf16> made(width);
        bf16* to = made.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const bf16 *gate = gate_up + row * 2 * width, *other = gate + width;
            for (int64_t first = 0; first < width; first += PIECE) {
                int64_t last = std::min(width, first + PIECE);
                if (row + 1 < rows) {
                    prefetch(gate + 2 * width, first, last);
                    prefetch(other + 2 * width, first, last);
                }
#pragma omp simd
                for (int64_t i = first; i < last; ++i) {
                    float g = up(gate[i]);
                    down(g * sigmoid(g) * up(other[i]), to + i);
                }
            }
            put(to, out + row * width, width, past);
        }
        settled();
    }
}

// out [rows, 2 * width] = gradient of gate_up. again [rows, width]: receives gated's output, computed again (null: not
// wanted).
extern "C" void gated_backward(const bf16* gradient, const bf16* gate_up, bf16* out, bf16* again, int64_t rows,
                               int64_t width, int threads) {
    bool past = 2 * rows * width * 2 > PAST_BYTES;
#pragma omp parallel num_threads(threads)
    {
        std::vector<bf16> made(3 * width);
        bf16 *to_gate = made.data(), *to_up = to_gate + width, *to_out = to_up + width;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const bf16 *gate = gate_up + row * 2 * width, *other = gate + width, *from = gradient + row * width;
            for (int64_t first = 0; first < width; first += PIECE) {
                int64_t last = std::min(width, first + PIECE);
                if (row + 1 < rows) {
                    prefetch(gate + 2 * width, first, last);
                    prefetch(other + 2 * width, first, last);
                    prefetch(from + width, first, last);
                }
#pragma omp simd
                for (int64_t i = first; i < last; ++i) {
                    float g = up(gate[i]), d = up(from[i]), o = up(other[i]);
                    float s = sigmoid(g), silu = g * s;
                    down(d * silu, to_up + i);
                    down(d * o * (s + silu * (1.0f - s)), to_gate + i);
                    down(silu * o, to_out + i);
                }
            }
            put(to_gate, out + row * 2 * width, 2 * width, past);
            if (again) put(to_out, again + row * width, width, past);
        }
        settled();
    }
}

// loss[row] = -log p(label) under the logits scores [rows, vocabulary]. Where share [rows] is
// given, scores are replaced by the gradient of the sum of share[row] * loss[row].
extern "C" void cross_entropy(bf16* scores, const int64_t* labels, float* loss, int64_t rows, int64_t vocabulary,
                              const float* share, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        bf16* s = scores + row * vocabulary;
        float most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < vocabulary; ++i) most = std::max(most, up(s[i]));
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < vocabulary; ++i) total += exponential(up(s[i]) - most);
        int64_t label = labels[row];
        float wanted = up(s[label]) - most, log_total = std::log(total);
        loss[row] = log_total - wanted;
        if (!share) continue;
        float inverse = share[row] / total;
#pragma omp simd
        for (int64_t i = 0; i < vocabulary; ++i) down(exponential(up(s[i]) - most) * inverse, s + i);
        down((std::exp(wanted - log_total) - 1.0f) * share[row], s + label);
    }
}

// Sets scores [rows, width] of tokens that are not allowed to minus infinity. bits [held, words]: a bit for each token
// of row row[h], 1: allowed.
extern "C" void forbid(bf16* scores, const int64_t* row, const uint32_t* bits, int64_t held, int64_t words,
                       int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t h = 0; h < held; ++h) {
        bf16 *s = scores + row[h] * width, none;
        down(-INFINITY, &none);
        for (int64_t w = 0; w < words; ++w) {
            uint32_t allowed = bits[h * words + w];
            if (allowed == 0xffffffffu) continue;
            int64_t last = std::min<int64_t>(32, width - w * 32);
            for (int64_t i = 0; i < last; ++i)
                if (!(allowed >> i & 1)) s[w * 32 + i] = none;
        }
    }
}
