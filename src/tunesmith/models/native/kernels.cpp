// The step's element-wise work, each piece in one pass over memory. Products stay with the tensor library.
//
// Plain C++ that any recent compiler turns into vector code; __init__.py compiles it for this machine at first use and
// ops.py holds the same arithmetic in PyTorch, for machines without a compiler and as the reference of the tests.
// Every row is computed by one thread in a fixed order: results do not depend on the number of threads.
//
// Activations are float or bf16 in memory and float in registers. Token-major tensors are [T, ...] and contiguous.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

struct bf16 {
    uint16_t bits;
};

static inline float up(float v) { return v; }
static inline float up(bf16 v) {
    uint32_t wide = uint32_t(v.bits) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
}
static inline void down(float v, float* to) { *to = v; }
static inline void down(float v, bf16* to) {  // to nearest even; the processor's own NaN stays one
    uint32_t wide;
    std::memcpy(&wide, &v, 4);
    to->bits = uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

// e^x as 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]: Cephes' expf for float, to about 2e-7 relative; the Taylor
// polynomial of degree 4 for bf16, to about 5e-5, a fortieth of what rounding to bf16 loses.
template <class T>
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = std::nearbyint(x * 1.44269504088896341f), p;
    if (sizeof(T) == 2) {
        float r = x - n * 0.69314718056f;
        p = ((((1.0f / 24) * r + 1.0f / 6) * r + 0.5f) * r + 1.0f) * r + 1.0f;
    } else {
        float r = x - n * 0.693359375f + n * 2.12194440e-4f;
        p = 1.9875691500e-4f;
        p = p * r + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * r * r + r + 1.0f;
    }
    int32_t scaled = (int32_t(n) + 127) << 23;
    float two;
    std::memcpy(&two, &scaled, 4);
    return p * two;
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
        T* to = out + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            T normal;
            down(up(from[i]) * factor, &normal);  // rounded here in the reference too
            down(up(normal) * (up(weight[i]) + offset), to + i);
        }
    }
}

// Gradient of the norm's input, plus what reaches it past the norm (above may be absent).
template <class T>
static void norm_backward(const T* gradient, const T* x, const T* weight, const float* scale, const T* above, T* out,
                          int64_t rows, int64_t width, float offset, int threads) {
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
    }
}

// out = silu(gate) * up; gate_up [rows, 2 * width].
template <class T>
static void gated(const T* gate_up, T* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T *gate = gate_up + row * 2 * width, *other = gate + width;
        T* to = out + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            float g = up(gate[i]);
            down(g / (1.0f + exponential<T>(-g)) * up(other[i]), to + i);
        }
    }
}

template <class T>
static void gated_backward(const T* gradient, const T* gate_up, T* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T *gate = gate_up + row * 2 * width, *other = gate + width, *from = gradient + row * width;
        T *to_gate = out + row * 2 * width, *to_up = to_gate + width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            float g = up(gate[i]), d = up(from[i]);
            float sigmoid = 1.0f / (1.0f + exponential<T>(-g));
            float silu = g * sigmoid;
            down(d * silu, to_up + i);
            down(d * up(other[i]) * (sigmoid + silu * (1.0f - sigmoid)), to_gate + i);
        }
    }
}

// How a batch lies in the attention blocks: `prefix` tokens first, then rows of starts[b + 1] - starts[b] tokens each,
// padded to `longest`. heads = kv * group. Angles: cosine and sine [T, half] of each token.
struct Layout {
    int64_t tokens, prefix, rows, longest, kv, group, size;
    const int64_t* row_of;    // [T]: row of a token, -1 in the prefix
    const int64_t* place_of;  // [T]: its place in the row, or in the prefix
};

// Rotates by the angle, or back where sign is -1.
template <class T>
static inline void rotate(const T* from, T* to, const float* cosine, const float* sine, int64_t half, float sign) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        float first = up(from[i]), second = up(from[half + i]), s = sign * sine[i];
        down(first * cosine[i] - second * s, to + i);
        down(second * cosine[i] + first * s, to + half + i);
    }
}

// Where head h of a token lies: queries [kv, rows, group * longest, D] (prefix: [kv, group * prefix, D]).
static inline int64_t query_place(const Layout& l, int64_t token, int64_t head) {
    int64_t k = head / l.group, g = head % l.group, row = l.row_of[token], place = l.place_of[token];
    if (row < 0) return ((k * l.group + g) * l.prefix + place) * l.size;
    return (((k * l.rows + row) * l.group + g) * l.longest + place) * l.size;
}
static inline int64_t key_place(const Layout& l, int64_t token, int64_t k) {
    int64_t row = l.row_of[token], place = l.place_of[token];
    if (row < 0) return (k * l.prefix + place) * l.size;
    return ((k * l.rows + row) * l.longest + place) * l.size;
}

// qkv [T, (heads + 2 kv) * D] -> rotated queries and keys, and values, in attention's layout.
template <class T>
static void split(const Layout& l, const T* qkv, const float* cosine, const float* sine, T* qp, T* kp, T* vp, T* q,
                  T* k, T* v, int threads) {
    int64_t heads = l.kv * l.group, half = l.size / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < l.tokens; ++token) {
        const T* from = qkv + token * (heads + 2 * l.kv) * l.size;
        const float *c = cosine + token * half, *s = sine + token * half;
        bool early = l.row_of[token] < 0;
        for (int64_t h = 0; h < heads; ++h)
            rotate(from + h * l.size, (early ? qp : q) + query_place(l, token, h), c, s, half, 1.0f);
        for (int64_t h = 0; h < l.kv; ++h) {
            int64_t place = key_place(l, token, h);
            rotate(from + (heads + h) * l.size, (early ? kp : k) + place, c, s, half, 1.0f);
            std::memcpy((early ? vp : v) + place, from + (heads + l.kv + h) * l.size, l.size * sizeof(T));
        }
    }
}

// The way back for gradients: dq, dk rotated back, and dv, to dqkv [T, ...].
template <class T>
static void split_backward(const Layout& l, T* dqkv, const float* cosine, const float* sine, const T* qp, const T* kp,
                           const T* vp, const T* q, const T* k, const T* v, int threads) {
    int64_t heads = l.kv * l.group, half = l.size / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < l.tokens; ++token) {
        T* to = dqkv + token * (heads + 2 * l.kv) * l.size;
        const float *c = cosine + token * half, *s = sine + token * half;
        bool early = l.row_of[token] < 0;
        for (int64_t h = 0; h < heads; ++h)
            rotate((early ? qp : q) + query_place(l, token, h), to + h * l.size, c, s, half, -1.0f);
        for (int64_t h = 0; h < l.kv; ++h) {
            int64_t place = key_place(l, token, h);
            rotate((early ? kp : k) + place, to + (heads + h) * l.size, c, s, half, -1.0f);
            std::memcpy(to + (heads + l.kv + h) * l.size, (early ? vp : v) + place, l.size * sizeof(T));
        }
    }
}

// Mixed values in attention's layout -> [T, heads * D] (to_tokens), or gradients the other way; slots of no token get 0.
template <class T>
static void gather(const Layout& l, T* tokens, T* qp, T* q, bool to_tokens, int threads) {
    int64_t heads = l.kv * l.group;
    if (!to_tokens) {
        int64_t total = heads * l.rows * l.longest * l.size;
        if (l.rows * l.longest != l.tokens - l.prefix) std::memset((void*)q, 0, total * sizeof(T));
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < l.tokens; ++token) {
        bool early = l.row_of[token] < 0;
        for (int64_t h = 0; h < heads; ++h) {
            T* flat = tokens + (token * heads + h) * l.size;
            T* block = (early ? qp : q) + query_place(l, token, h);
            if (to_tokens)
                std::memcpy((void*)flat, block, l.size * sizeof(T));
            else
                std::memcpy((void*)block, flat, l.size * sizeof(T));
        }
    }
}

// held [0, all) to e^(held - its maximum); returns their sum. Works in blocks of 16: held has room for 16 more.
template <class T>
static inline float exponentials(float* held, int64_t all) {
    float most[16], total[16] = {}, sum = 0;
    for (int j = 0; j < 16; ++j) held[all + j] = most[j] = -INFINITY;
    for (int64_t i = 0; i < all; i += 16)
#pragma omp simd
        for (int j = 0; j < 16; ++j) most[j] = std::max(most[j], held[i + j]);
    float shift = *std::max_element(most, most + 16);
    for (int64_t i = 0; i < all; i += 16)
#pragma omp simd
        for (int j = 0; j < 16; ++j) {
            float e = exponential<T>(held[i + j] - shift);
            e = held[i + j] == -INFINITY ? 0.0f : e;
            held[i + j] = e;
            total[j] += e;
        }
    for (int j = 0; j < 16; ++j) sum += total[j];
    return sum;
}

// Scores to weights, in place: softmax over a row of `shared` [.., prefix] and the first (place + 1) of a row of `own`
// [.., longest] together, place = row % longest; the rest of `own` becomes 0. Without a prefix, shared is not read.
template <class T>
static void softmax(T* shared, T* own, int64_t rows, int64_t prefix, int64_t longest, float scale, int threads) {
#pragma omp parallel num_threads(threads)
    {
        // A row is worked on in blocks of 16 in a scratch of its own: its length rarely fits the vectors.
        std::vector<float> scratch(prefix + longest + 16);
        float* held = scratch.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            T *first = shared + row * prefix, *second = own + row * longest;
            int64_t seen = row % longest + 1, all = prefix + seen;
            for (int64_t i = 0; i < prefix; ++i) held[i] = up(first[i]) * scale;
            for (int64_t i = 0; i < seen; ++i) held[prefix + i] = up(second[i]) * scale;
            float inverse = 1.0f / exponentials<T>(held, all);
            for (int64_t i = 0; i < prefix; ++i) down(held[i] * inverse, first + i);
            for (int64_t i = 0; i < seen; ++i) down(held[prefix + i] * inverse, second + i);
            std::memset((void*)(second + seen), 0, (longest - seen) * sizeof(T));
        }
    }
}

// Gradients of weights (d*) to gradients of scores, in place: ds = w * (dw - sum(w * dw)) * scale.
template <class T>
static void softmax_backward(const T* shared, const T* own, T* dshared, T* down_, int64_t rows, int64_t prefix,
                             int64_t longest, float scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T *w1 = shared + row * prefix, *w2 = own + row * longest;
        T *d1 = dshared + row * prefix, *d2 = down_ + row * longest;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < prefix; ++i) dot += up(w1[i]) * up(d1[i]);
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < longest; ++i) dot += up(w2[i]) * up(d2[i]);
#pragma omp simd
        for (int64_t i = 0; i < prefix; ++i) down(up(w1[i]) * (up(d1[i]) - dot) * scale, d1 + i);
#pragma omp simd
        for (int64_t i = 0; i < longest; ++i) down(up(w2[i]) * (up(d2[i]) - dot) * scale, d2 + i);
    }
}

// The keys and values of rows under way lie in pages of `page` places: [pages, kv, page, D]. table [rows, most] names the
// pages of each row in order.
struct Pages {
    int64_t rows, kv, group, size, page, most;
    const int64_t *table, *length;
};

// One new token for each row of a decoding batch: qkv [rows, (heads + 2 kv) * D] -> rotated queries [kv, rows, group, D];
// its key and value go to place length[row] of the row's pages.
template <class T>
static void decode_split(const Pages& p, const T* qkv, const float* cosine, const float* sine, T* q, T* keys, T* values,
                         int threads) {
    int64_t kv = p.kv, group = p.group, size = p.size;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < p.rows; ++row) {
        const T* from = qkv + row * kv * (group + 2) * size;
        const float *c = cosine + row * size / 2, *s = sine + row * size / 2;
        int64_t page = p.table[row * p.most + p.length[row] / p.page], within = p.length[row] % p.page;
        for (int64_t k = 0; k < kv; ++k) {
            for (int64_t g = 0; g < group; ++g)
                rotate(from + (k * group + g) * size, q + ((k * p.rows + row) * group + g) * size, c, s, size / 2, 1.0f);
            int64_t place = ((page * kv + k) * p.page + within) * size;
            rotate(from + (kv * group + k) * size, keys + place, c, s, size / 2, 1.0f);
            std::memcpy((void*)(values + place), from + (kv * (group + 1) + k) * size, size * sizeof(T));
        }
    }
}

// Attention of the new tokens of rows [first, first + count) over their own pages (length[row] + 1 places) and the prefix
// these rows share, whose scores [kv, count * group, prefix] become weights in place. out [rows, heads * D] gets the own
// part of the mixed values. longest: of the lengths.
template <class T>
static void decode_mix(const Pages& p, const T* q, T* shared, const T* keys, const T* values, T* out, int64_t first,
                       int64_t count, int64_t longest, int64_t prefix, float scale, int threads) {
    int64_t kv = p.kv, group = p.group, size = p.size;
#pragma omp parallel num_threads(threads)
    {
        int64_t wide = prefix + longest + 17;  // a query's scores
        std::vector<float> scratch(group * (wide + 2 * size) + size);
        float *held = scratch.data(), *query = held + group * wide, *mixed = query + group * size,
              *one = mixed + group * size;
#pragma omp for schedule(static) collapse(2)
        for (int64_t at = 0; at < count; ++at)
            for (int64_t k = 0; k < kv; ++k) {
                int64_t row = first + at, seen = p.length[row] + 1;
                const int64_t* pages = p.table + row * p.most;
                T* early = shared + (k * count + at) * group * prefix;
                const T* mine = q + (k * p.rows + row) * group * size;
                for (int64_t i = 0; i < group * size; ++i) query[i] = up(mine[i]) * scale;
                for (int64_t g = 0; g < group; ++g)
                    for (int64_t i = 0; i < prefix; ++i) held[g * wide + i] = up(early[g * prefix + i]) * scale;
                for (int64_t j = 0; j < seen; ++j) {
                    const T* key = keys + ((pages[j / p.page] * kv + k) * p.page + j % p.page) * size;
#pragma omp simd
                    for (int64_t i = 0; i < size; ++i) one[i] = up(key[i]);
                    for (int64_t g = 0; g < group; ++g) {
                        float dot = 0;
#pragma omp simd reduction(+ : dot)
                        for (int64_t i = 0; i < size; ++i) dot += query[g * size + i] * one[i];
                        held[g * wide + prefix + j] = dot;
                    }
                }
                for (int64_t g = 0; g < group; ++g) {
                    float inverse = 1.0f / exponentials<T>(held + g * wide, prefix + seen);
                    for (int64_t i = 0; i < prefix; ++i) down(held[g * wide + i] * inverse, early + g * prefix + i);
                    for (int64_t j = prefix; j < prefix + seen; ++j) held[g * wide + j] *= inverse;
                }
                std::fill(mixed, mixed + group * size, 0.0f);
                for (int64_t j = 0; j < seen; ++j) {
                    const T* value = values + ((pages[j / p.page] * kv + k) * p.page + j % p.page) * size;
#pragma omp simd
                    for (int64_t i = 0; i < size; ++i) one[i] = up(value[i]);
                    for (int64_t g = 0; g < group; ++g) {
                        float weight = held[g * wide + prefix + j];
#pragma omp simd
                        for (int64_t i = 0; i < size; ++i) mixed[g * size + i] += weight * one[i];
                    }
                }
                T* to = out + (row * kv + k) * group * size;
                for (int64_t i = 0; i < group * size; ++i) down(mixed[i], to + i);
            }
    }
}

// The place of each row's largest score, the first of equals.
template <class T>
static void largest(const T* scores, int64_t* place, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T* s = scores + row * width;
        float most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < width; ++i) most = std::max(most, up(s[i]));
        int64_t at = 0;
        while (at < width - 1 && up(s[at]) != most) ++at;
        place[row] = at;
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

// ---- products of bf16 matrices on AMX tiles ----
//
// C [M, N] = A [M, K] B + A2 [M, K2] B2 + bias, summed in float and rounded once. B lies packed: for each 32 columns, for
// each 32 rows of B, two tiles of 16 x 16 pairs, so that a panel of columns is read front to back. K, K2 and N are
// multiples of 32. Each thread has its own panels.

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

static const int64_t DEPTH = 256;         // a panel of so many rows stays in the first cache beside its block of A
static const int64_t GROUP = 4096;        // so many rows of B are summed before the next band of A
static const int64_t BAND_BYTES = 768 << 10;  // a band of A that stays in the second cache

struct TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static bool tiles_allowed() {
    const int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, request, tile_data) == 0;
    return allowed;
}

// One 32 x 32 block over `depth` of K: sums [32][32], added to what is there unless first.
static inline void block(const bf16* a, int64_t lda, const bf16* b, int64_t depth, float* sums, bool first) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 128);
        _tile_loadd(1, sums + 16, 128);
        _tile_loadd(2, sums + 16 * 32, 128);
        _tile_loadd(3, sums + 16 * 32 + 16, 128);
    }
    for (int64_t k = 0; k < depth; k += 32, b += 1024) {
        _tile_loadd(4, a + k, lda * 2);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + 512, 64);
        _tile_loadd(5, a + 16 * lda + k, lda * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 16 * 32, 128);
    _tile_stored(3, sums + 16 * 32 + 16, 128);
}

static void settle(const float* sums, const float* bias, bf16* c, int64_t ldc, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
        const float* from = sums + r * 32;
        bf16* to = c + r * ldc;
        if (bias) {
#pragma omp simd
            for (int i = 0; i < 32; ++i) down(from[i] + bias[i], to + i);
        } else {
            __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
            _mm512_storeu_si512((void*)to, (__m512i)both);
        }
    }
}

struct Operand {
    const bf16 *a, *b;
    int64_t lda, depth;
};

static void multiply(const Operand* operands, int count, const float* bias, bf16* c, int64_t ldc, int64_t m, int64_t n,
                     int threads) {
    tiles_allowed();
    int64_t panels = n / 32, blocks = (m + 31) / 32;
#pragma omp parallel num_threads(threads)
    {
        TileConfig config;
        _tile_loadconfig(&config);
        // A last block of fewer than 32 rows is read from a copy: tiles always load 32.
        int64_t deepest = 0, ragged = m % 32;
        for (int i = 0; i < count; ++i) deepest += operands[i].depth;
        bf16* tail = ragged ? (bf16*)std::calloc(32 * deepest, 2) : nullptr;
        for (int64_t r = 0, at = 0; ragged && r < count; at += 32 * operands[r].depth, ++r)
            for (int64_t i = 0; i < ragged; ++i)
                std::memcpy((void*)(tail + at + i * operands[r].depth),
                            operands[r].a + (m - ragged + i) * operands[r].lda, operands[r].depth * 2);
        int64_t band = std::min(blocks, std::max<int64_t>(2, BAND_BYTES / (64 * std::min(deepest, GROUP))));
        // A deep product is summed group by group, with sums for every panel: else A would be read anew for each.
        int64_t kept = deepest > GROUP ? (panels + threads - 1) / threads : 1;
        float* sums = (float*)std::aligned_alloc(64, kept * band * 1024 * 4);
        for (int64_t top = 0; top < blocks; top += band) {
            int64_t bottom = std::min(blocks, top + band);
            // Rows [from, to) of operand i into a panel's sums; the last of all settles them in C.
            auto add = [&](int i, int64_t at, int64_t panel, float* held, int64_t from, int64_t to) {
                const Operand& o = operands[i];
                for (int64_t k = from; k < to; k += DEPTH) {
                    int64_t depth = std::min<int64_t>(DEPTH, to - k);
                    const bf16* b = o.b + panel * o.depth * 32 + k * 32;
                    // What follows in B is what is read next; without asking early, the first block would wait for it.
                    const char* next = (const char*)(b + depth * 32);
                    int64_t share = (depth * 64 / (bottom - top) + 63) / 64 * 64;
                    bool settles = i == count - 1 && k + depth == o.depth;
                    for (int64_t r = top; r < bottom; ++r, next += share) {
                        for (int64_t line = 0; line < share; line += 64) __builtin_prefetch(next + line, 0, 2);
                        if (settles)
                            for (int64_t line = 0; line < 32; ++line)
                                __builtin_prefetch(c + (r * 32 + line) * ldc + panel * 32, 1, 3);
                        bool copied = ragged && r == blocks - 1;
                        const bf16* a = copied ? tail + at + k : o.a + r * 32 * o.lda + k;
                        float* into = held + (r - top) * 1024;
                        block(a, copied ? o.depth : o.lda, b, depth, into, i == 0 && k == 0);
                        if (settles)
                            settle(into, bias ? bias + panel * 32 : nullptr, c + r * 32 * ldc + panel * 32, ldc,
                                   copied ? ragged : 32);
                    }
                }
            };
            if (kept == 1) {
#pragma omp for schedule(static) nowait
                for (int64_t panel = 0; panel < panels; ++panel)
                    for (int64_t i = 0, at = 0; i < count; at += 32 * operands[i++].depth)
                        add(int(i), at, panel, sums, 0, operands[i].depth);
                continue;
            }
            for (int64_t i = 0, at = 0; i < count; at += 32 * operands[i++].depth)
                for (int64_t from = 0; from < operands[i].depth; from += GROUP) {
                    int64_t mine = 0;
#pragma omp for schedule(static) nowait
                    for (int64_t panel = 0; panel < panels; ++panel)
                        add(int(i), at, panel, sums + mine++ * band * 1024, from,
                            std::min(operands[i].depth, from + GROUP));
                }
        }
        std::free(sums);
        std::free(tail);
        _tile_release();
    }
}

extern "C" int tiles() { return tiles_allowed() ? 1 : 0; }
extern "C" void product(const bf16* a, int64_t lda, const bf16* b, int64_t depth, const bf16* a2, int64_t lda2,
                        const bf16* b2, int64_t depth2, const float* bias, bf16* c, int64_t m, int64_t n,
                        int threads) {
    Operand operands[2] = {{a, b, lda, depth}, {a2, b2, lda2, depth2}};
    multiply(operands, a2 ? 2 : 1, bias, c, n, m, n, threads);
}
// Packs w [n, k] as B [k, n] (across) and, where asked for, as B [n, k] (along).
extern "C" void pack(const bf16* w, int64_t n, int64_t k, bf16* across, bf16* along, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < (across ? n / 32 : 0); ++panel)
        for (int64_t deep = 0; deep < k / 32; ++deep)
            for (int64_t i = 0; i < 32; ++i) {
                const uint32_t* from = (const uint32_t*)(w + (panel * 32 + i) * k + deep * 32);
                uint32_t* to = (uint32_t*)across + ((panel * (k / 32) + deep) * 2 + i / 16) * 256 + i % 16;
                for (int64_t r = 0; r < 16; ++r) to[r * 16] = from[r];
            }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < (along ? k / 32 : 0); ++panel)
        for (int64_t deep = 0; deep < n / 32; ++deep)
            for (int64_t r = 0; r < 16; ++r) {
                const bf16 *first = w + (deep * 32 + 2 * r) * k + panel * 32, *second = first + k;
                bf16* to = along + (panel * (n / 32) + deep) * 1024 + r * 32;
                for (int64_t i = 0; i < 32; ++i) {
                    to[(i / 16) * 512 + (i % 16) * 2] = first[i];
                    to[(i / 16) * 512 + (i % 16) * 2 + 1] = second[i];
                }
            }
}
#else
extern "C" int tiles() { return 0; }
#endif

#define EXPORTS(T, NAME)                                                                                               \
    extern "C" void add_norm_##NAME(const T* x, const T* y, const T* w, T* sum, T* out, float* scale, int64_t rows,    \
                                    int64_t width, float epsilon, float offset, int threads) {                        \
        add_norm<T>(x, y, w, sum, out, scale, rows, width, epsilon, offset, threads);                                  \
    }                                                                                                                  \
    extern "C" void norm_backward_##NAME(const T* g, const T* x, const T* w, const float* scale, const T* above,       \
                                         T* out, int64_t rows, int64_t width, float offset, int threads) {            \
        norm_backward<T>(g, x, w, scale, above, out, rows, width, offset, threads);                                    \
    }                                                                                                                  \
    extern "C" void gated_##NAME(const T* x, T* out, int64_t rows, int64_t width, int threads) {                       \
        gated<T>(x, out, rows, width, threads);                                                                        \
    }                                                                                                                  \
    extern "C" void gated_backward_##NAME(const T* g, const T* x, T* out, int64_t rows, int64_t width, int threads) {  \
        gated_backward<T>(g, x, out, rows, width, threads);                                                            \
    }                                                                                                                  \
    extern "C" void split_##NAME(const Layout* l, const T* qkv, const float* c, const float* s, T* qp, T* kp, T* vp,   \
                                 T* q, T* k, T* v, int threads) {                                                      \
        split<T>(*l, qkv, c, s, qp, kp, vp, q, k, v, threads);                                                         \
    }                                                                                                                  \
    extern "C" void split_backward_##NAME(const Layout* l, T* dqkv, const float* c, const float* s, const T* qp,       \
                                          const T* kp, const T* vp, const T* q, const T* k, const T* v, int threads) { \
        split_backward<T>(*l, dqkv, c, s, qp, kp, vp, q, k, v, threads);                                               \
    }                                                                                                                  \
    extern "C" void gather_##NAME(const Layout* l, T* tokens, T* qp, T* q, int to_tokens, int threads) {               \
        gather<T>(*l, tokens, qp, q, to_tokens != 0, threads);                                                         \
    }                                                                                                                  \
    extern "C" void softmax_##NAME(T* shared, T* own, int64_t rows, int64_t prefix, int64_t longest, float scale,      \
                                   int threads) {                                                                      \
        softmax<T>(shared, own, rows, prefix, longest, scale, threads);                                                \
    }                                                                                                                  \
    extern "C" void softmax_backward_##NAME(const T* w1, const T* w2, T* d1, T* d2, int64_t rows, int64_t prefix,      \
                                            int64_t longest, float scale, int threads) {                               \
        softmax_backward<T>(w1, w2, d1, d2, rows, prefix, longest, scale, threads);                                    \
    }                                                                                                                  \
    extern "C" void decode_split_##NAME(const Pages* p, const T* qkv, const float* c, const float* s, T* q, T* keys,   \
                                        T* values, int threads) {                                                      \
        decode_split<T>(*p, qkv, c, s, q, keys, values, threads);                                                      \
    }                                                                                                                  \
    extern "C" void decode_mix_##NAME(const Pages* p, const T* q, T* shared, const T* keys, const T* values, T* out,   \
                                      int64_t first, int64_t count, int64_t longest, int64_t prefix, float scale,      \
                                      int threads) {                                                                   \
        decode_mix<T>(*p, q, shared, keys, values, out, first, count, longest, prefix, scale, threads);                \
    }                                                                                                                  \
    extern "C" void largest_##NAME(const T* scores, int64_t* place, int64_t rows, int64_t width, int threads) {        \
        largest<T>(scores, place, rows, width, threads);                                                               \
    }                                                                                                                  \
    extern "C" void cross_entropy_##NAME(T* scores, const int64_t* labels, float* loss, int64_t rows,                  \
                                         int64_t vocabulary, const float* share, int gradient, int threads) {          \
        cross_entropy<T>(scores, labels, loss, rows, vocabulary, share, gradient != 0, threads);                       \
    }

EXPORTS(float, f32)
EXPORTS(bf16, bf16)
