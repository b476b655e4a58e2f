// The element-wise work outside attention: norms, the gated middle, the loss. One pass over memory each.

#include "kernels.h"

// OpenMP's, by its number for "soft"; runtimes before GCC 9's have none.
extern "C" int omp_pause_resource_all(int) __attribute__((weak));

// Ends the helpers of the calling thread; its next parallel work starts others.
extern "C" void release_threads() {
    if (omp_pause_resource_all) omp_pause_resource_all(1);
}

template <class T>
static inline void normalise(const T* from, const T* weight, float factor, float offset, T* to, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        T normal;
        down(up(from[i]) * factor, &normal);  // rounded here in the reference too
        down(up(normal) * (up(weight[i]) + offset), to + i);
    }
}

// sum = x + y (y may be absent: then sum is not written), out = sum * scale * weight, scale = 1 / rms.
// offset: added to the weight (1 in the families that store it less one).
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

// Gradient of the norm's input, plus what reaches it past the norm (above may be absent). again: where the norm's output
// is made once more, if it is asked for.
template <class T>
static void norm_backward(const T* gradient, const T* x, const T* weight, const float* scale, const T* above, T* out,
                          T* again, int64_t rows, int64_t width, float offset, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T *g = gradient + row * width, *from = x + row * width;
        float factor = scale[row], dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < width; ++i) dot += up(g[i]) * (up(weight[i]) + offset) * up(from[i]);
        float mean = dot * factor / float(width);
        T* to = out + row * width;
        if (above) {
            const T* past = above + row * width;
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

// Asks for what is read a row later, a piece at a time: the processor alone asks too late where so much is computed.
static const int64_t PIECE = 256;
template <class T>
static inline void ahead(const T* row, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

// out = silu(gate) * up; gate_up [rows, 2 * width].
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
                    ahead(gate + 2 * width, first, last);
                    ahead(other + 2 * width, first, last);
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

// The gradient of gate_up; again: where gated's own output is made once more, if it is asked for.
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
                    ahead(gate + 2 * width, first, last);
                    ahead(other + 2 * width, first, last);
                    ahead(from + width, first, last);
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

// Scores [rows, vocabulary] to the gradient of the summed loss times `share`, in place; loss[row] = -log p(label).
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
