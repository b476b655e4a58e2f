// Attention of rows with a shared prefix as block products: copies between tokens and blocks, and softmax.

#include "kernels.h"

// The index of a token's head in the blocks [kv, rows, group * longest, D], or [kv, group * prefix, D] for the prefix.
// group: heads for each key/value head, 1 in blocks of keys and values.
static inline int64_t index_of(const Layout& l, int64_t token, int64_t head, int64_t group) {
    int64_t row = l.row_of[token], place = l.place_of[token];
    if (row < 0) return (head * l.prefix + place) * l.size;
    return (((head / group * l.rows + row) * group + head % group) * l.longest + place) * l.size;
}

// Sets slots after a row's end to 0, in blocks of queries (heads = group), keys or values (heads = 1).
static void clear(const Layout& l, bf16* blocks, int64_t heads) {
    for (int64_t each = 0; each < l.kv * l.rows * heads; ++each) {
        int64_t row = each / heads % l.rows, length = l.starts[row + 1] - l.starts[row];
        bf16* from = blocks + (each * l.longest + length) * l.size;
        std::memset((void*)from, 0, (l.longest - length) * l.size * 2);
    }
}

// Copies qkv [T, (heads + 2 kv) * D] to blocks, qp, kp, vp of the prefix and q, k, v of the rows (to_blocks), or the
// reverse for gradients. Queries and keys are rotated by their angles, cosine and sine [T, D / 2], or rotated back.
extern "C" void split(const Layout* layout, bf16* qkv, const float* cosine, const float* sine, bf16* qp, bf16* kp,
                      bf16* vp, bf16* q, bf16* k, bf16* v, bool to_blocks, int threads) {
    const Layout& l = *layout;
    int64_t heads = l.kv * l.group, half = l.size / 2;
    if (to_blocks) {
        clear(l, q, l.group);
        clear(l, k, 1);
        clear(l, v, 1);
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < l.tokens; ++token) {
        bf16* flat = qkv + token * (heads + 2 * l.kv) * l.size;
        const float *c = cosine + token * half, *s = sine + token * half;
        bool early = l.row_of[token] < 0;
        auto turned = [&](int64_t head, bf16* block) {
            bf16* here = flat + head * l.size;
            to_blocks ? rotate(here, block, c, s, half, 1.0f) : rotate(block, here, c, s, half, -1.0f);
        };
        for (int64_t h = 0; h < heads; ++h) turned(h, (early ? qp : q) + index_of(l, token, h, l.group));
        for (int64_t h = 0; h < l.kv; ++h) {
            int64_t place = index_of(l, token, h, 1);
            turned(heads + h, (early ? kp : k) + place);
            bf16 *value = flat + (heads + l.kv + h) * l.size, *block = (early ? vp : v) + place;
            std::memcpy((void*)(to_blocks ? block : value), to_blocks ? value : block, l.size * 2);
        }
    }
}

// Copies blocks of queries qp and q to tokens [T, heads * D] (to_tokens), or the reverse, with 0 in slots of no token.
extern "C" void gather(const Layout* layout, bf16* tokens, bf16* qp, bf16* q, bool to_tokens, int threads) {
    const Layout& l = *layout;
    int64_t heads = l.kv * l.group;
    if (!to_tokens) clear(l, q, l.group);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < l.tokens; ++token) {
        bool early = l.row_of[token] < 0;
        for (int64_t h = 0; h < heads; ++h) {
            bf16* flat = tokens + (token * heads + h) * l.size;
            bf16* block = (early ? qp : q) + index_of(l, token, h, l.group);
            std::memcpy((void*)(to_tokens ? flat : block), to_tokens ? block : flat, l.size * 2);
        }
    }
}

// Turns scores into weights, in place. A row's softmax is over its row of `shared` [rows, prefix] and the first row %
// longest + 1 numbers of its row of `own` [rows, longest]; the rest of `own` becomes 0. prefix 0: shared is not read.
extern "C" void softmax(bf16* shared, bf16* own, int64_t rows, int64_t prefix, int64_t longest, float scale,
                        int threads) {
#pragma omp parallel num_threads(threads)
    {
        // A row is copied to a buffer and computed in blocks of 16, since its length is rarely a multiple of 16.
        std::vector<float> scratch(prefix + longest + 16);
        float* held = scratch.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            bf16 *first = shared + row * prefix, *second = own + row * longest;
            int64_t seen = row % longest + 1, all = prefix + seen;
            for (int64_t i = 0; i < prefix; ++i) held[i] = up(first[i]) * scale;
            for (int64_t i = 0; i < seen; ++i) held[prefix + i] = up(second[i]) * scale;
            float inverse = 1.0f / exponentials(held, all);
            for (int64_t i = 0; i < prefix; ++i) down(held[i] * inverse, first + i);
            for (int64_t i = 0; i < seen; ++i) down(held[prefix + i] * inverse, second + i);
            std::memset((void*)(second + seen), 0, (longest - seen) * 2);
        }
    }
}

// Turns gradients of weights, dshared and down_, into gradients of scores, in place: ds = w * (dw - sum(w * dw)) *
// scale.
extern "C" void softmax_backward(const bf16* shared, const bf16* own, bf16* dshared, bf16* down_, int64_t rows,
                                 int64_t prefix, int64_t longest, float scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const bf16 *w1 = shared + row * prefix, *w2 = own + row * longest;
        bf16 *d1 = dshared + row * prefix, *d2 = down_ + row * longest;
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
