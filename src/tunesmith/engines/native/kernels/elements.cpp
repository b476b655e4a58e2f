// Element-wise operations outside attention: norms, the gated MLP's middle, the loss. Each passes over memory once.

#include "kernels.h"

// A function of OpenMP 5, called with the number of omp_pause_soft. Runtimes older than GCC 9's do not have it.
extern "C" int omp_pause_resource_all(int) __attribute__((weak));

// Ends the OpenMP workers of the calling thread. Its next parallel region starts new ones.
extern "C" void release_threads() {
    if (omp_pause_resource_all) omp_pause_resource_all(1);
}

template <class T>
static inline void normalise(const T* from, const T* weight, float factor, float offset, T* to, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        T normal;
        down(up(from[i]) * factor, &normal);  // rounds here, as the reference does
        down(up(normal) * (up(weight[i]) + offset), to + i);
    }
}

// sum = x + y [rows, width]; y null: sum is x and not written. scale [rows] = 1 / rms(sum), and
// out = sum * scale * (weight + offset). offset: 1 in families whose stored weights are reduced by 1.
template <class T>
static void add_norm(const T* x, const T* y, const T* weight, T* sum, T* out, float* scale, int64_t rows, int64_t width,
                     float epsilon, float offset, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T* from = x + row * width;
        if (y) {
            const T* other = y + row * width;
            T* to = sum + row * width;
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
template <class T>
static void norm_backward(const T* gradient, const T* x, const T* weight, const float* scale, const T* sum_gradient,
                          T* out, T* again, int64_t rows, int64_t width, float offset, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T *g = gradient + row * width, *from = x + row * width;
        float factor = scale[row], dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < width; ++i) dot += up(g[i]) * (up(weight[i]) + offset) * up(from[i]);
        float mean = dot * factor / float(width);
        T* to = out + row * width;
        if (sum_gradient) {
            const T* past = sum_gradient + row * width;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i)
                down(factor * (up(g[i]) * (up(weight[i]) + offset) - up(from[i]) * factor * mean) + up(past[i]), to + i);
        } else {
#pragma omp simd
            for (int64_t i = 0; i < width; ++i)
                down(factor * (up(g[i]) * (up(weight[i]) + offset) - up(from[i]) * factor * mean), to + i);
        }
        if (again) normalise(from, weight, factor, offset, again + row * width, width);
    }
}

// Prefetches part of the next row. The processor's own prefetching comes too late, because each row takes long to
// compute.
static const int64_t PIECE = 256;
template <class T>
static inline void prefetch(const T* row, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

// out [rows, width] = silu(gate) * up, where gate_up [rows, 2 * width] holds gate in its first half and up in the
// other.
template <class T>
static void gated(const T* gate_up, T* out, int64_t rows, int64_t width, int threads) {
    bool past = rows * width * int64_t(sizeof(T)) > PAST_BYTES;
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> made(width);
        T* to = made.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const T *gate = gate_up + row * 2 * width, *other = gate + width;
            for (int64_t first = 0; first < width; first += PIECE) {
                int64_t last = std::min(width, first + PIECE);
                if (row + 1 < rows) {
                    prefetch(gate + 2 * width, first, last);
                    prefetch(other + 2 * width, first, last);
                }
#pragma omp simd
                for (int64_t i = first; i < last; ++i) {
                    float g = up(gate[i]);
                    down(g * sigmoid<T>(g) * up(other[i]), to + i);
                }
            }
            put(to, out + row * width, width, past);
        }
        settled();
    }
}

// out [rows, 2 * width] = gradient of gate_up. again [rows, width]: receives gated's output, computed again (null: not
// wanted).
template <class T>
static void gated_backward(const T* gradient, const T* gate_up, T* out, T* again, int64_t rows, int64_t width,
                           int threads) {
    bool past = 2 * rows * width * int64_t(sizeof(T)) > PAST_BYTES;
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> made(3 * width);
        T *to_gate = made.data(), *to_up = to_gate + width, *to_out = to_up + width;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const T *gate = gate_up + row * 2 * width, *other = gate + width, *from = gradient + row * width;
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
                    float s = sigmoid<T>(g), silu = g * s;
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

// loss[row] = -log p(label) under the logits scores [rows, vocabulary]. gradient: replace scores by the gradient of the
// sum of share[row] * loss[row].
template <class T>
static void cross_entropy(T* scores, const int64_t* labels, float* loss, int64_t rows, int64_t vocabulary,
                          const float* share, bool gradient, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        T* s = scores + row * vocabulary;
        float most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < vocabulary; ++i) most = std::max(most, up(s[i]));
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < vocabulary; ++i) total += exponential<T>(up(s[i]) - most);
        int64_t label = labels[row];
        float wanted = up(s[label]) - most, log_total = std::log(total);
        loss[row] = log_total - wanted;
        if (!gradient) continue;
        float inverse = share[row] / total;
#pragma omp simd
        for (int64_t i = 0; i < vocabulary; ++i) down(exponential<T>(up(s[i]) - most) * inverse, s + i);
        down((std::exp(wanted - log_total) - 1.0f) * share[row], s + label);
    }
}

#define EXPORTS(T, NAME)                                                                                               \
    extern "C" void add_norm_##NAME(const T* x, const T* y, const T* w, T* sum, T* out, float* scale, int64_t rows,    \
                                    int64_t width, float epsilon, float offset, int threads) {                         \
        add_norm<T>(x, y, w, sum, out, scale, rows, width, epsilon, offset, threads);                                  \
    }                                                                                                                  \
    extern "C" void norm_backward_##NAME(const T* g, const T* x, const T* w, const float* scale, const T* above,       \
                                         T* out, T* again, int64_t rows, int64_t width, float offset, int threads) {   \
        norm_backward<T>(g, x, w, scale, above, out, again, rows, width, offset, threads);                             \
    }                                                                                                                  \
    extern "C" void gated_##NAME(const T* x, T* out, int64_t rows, int64_t width, int threads) {                       \
        gated<T>(x, out, rows, width, threads);                                                                        \
    }                                                                                                                  \
    extern "C" void gated_backward_##NAME(const T* g, const T* x, T* out, T* again, int64_t rows, int64_t width,       \
                                          int threads) {                                                               \
        gated_backward<T>(g, x, out, again, rows, width, threads);                                                     \
    }                                                                                                                  \
    extern "C" void cross_entropy_##NAME(T* scores, const int64_t* labels, float* loss, int64_t rows,                  \
                                         int64_t vocabulary, const float* share, int gradient, int threads) {          \
        cross_entropy<T>(scores, labels, loss, rows, vocabulary, share, gradient != 0, threads);                       \
    }

EXPORTS(float, f32)
EXPORTS(bf16, bf16)
