// Attention of rows with a shared prefix as block products: copies between tokens and blocks, and softmax.

#include "layout.h"

// The index of a token's query head in the blocks: [kv, rows, group * longest, D], or [kv, group * prefix, D] for the
// prefix. key_place: the same for keys and values, [kv, rows, longest, D] or [kv, prefix, D].
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

// Sets slots after a row's end to 0, in blocks of queries (heads = group), keys or values (heads = 1).
template <class T>
static void clear(const Layout& l, T* blocks, int64_t heads) {
    for (int64_t each = 0; each < l.kv * l.rows * heads; ++each) {
        int64_t row = each / heads % l.rows, length = l.starts[row + 1] - l.starts[row];
        T* from = blocks + (each * l.longest + length) * l.size;
        std::memset((void*)from, 0, (l.longest - length) * l.size * sizeof(T));
    }
}

// Copies qkv [T, (heads + 2 kv) * D] to blocks: qp, kp, vp of the prefix and q, k, v of the rows. Queries and keys are
// rotated by their angles, cosine and sine [T, D / 2].
template <class T>
static void split(const Layout& l, const T* qkv, const float* cosine, const float* sine, T* qp, T* kp, T* vp, T* q,
                  T* k, T* v, int threads) {
    int64_t heads = l.kv * l.group, half = l.size / 2;
    clear(l, q, l.group);
    clear(l, k, 1);
    clear(l, v, 1);
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

// The reverse for gradients: copies blocks to dqkv [T, (heads + 2 kv) * D], queries and keys rotated back.
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

// Copies blocks of queries qp and q to tokens [T, heads * D] (to_tokens), or the reverse, with 0 in slots of no token.
template <class T>
static void gather(const Layout& l, T* tokens, T* qp, T* q, bool to_tokens, int threads) {
    int64_t heads = l.kv * l.group;
    if (!to_tokens) clear(l, q, l.group);
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

// Turns scores into weights, in place. A row's softmax is over its row of `shared` [rows, prefix] and the first row %
// longest + 1 numbers of its row of `own` [rows, longest]; the rest of `own` becomes 0. prefix 0: shared is not read.
template <class T>
static void softmax(T* shared, T* own, int64_t rows, int64_t prefix, int64_t longest, float scale, int threads) {
#pragma omp parallel num_threads(threads)
    {
        // A row is copied to a buffer and computed in blocks of 16, since its length is rarely a multiple of 16.
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

// Turns gradients of weights, dshared and down_, into gradients of scores, in place: ds = w * (dw - sum(w * dw)) *
// scale.
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

#define EXPORTS(T, NAME)                                                                                               \
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
    }

EXPORTS(float, f32)
EXPORTS(bf16, bf16)
