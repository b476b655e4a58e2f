// One new token for each row of a decoding batch.

#include "numbers.h"

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

#define EXPORTS(T, NAME)                                                                                               \
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
    }

EXPORTS(float, f32)
EXPORTS(bf16, bf16)
