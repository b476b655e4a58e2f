// Attention of rows with a shared prefix on tiles, forward and backward. For each key/value head there is one pass over
// a row's queries, whose data all fit the caches. For the backward pass only each query's largest score and sum are
// kept; the weights are computed again. (Like FlashAttention, Dao et al. 2022.)
//
// Scores are transposed, [keys, 32 queries], so that a query is a lane and softmax needs no sum across lanes. Query i
// of a row is head i % group of its token i / group, in memory order. Keys and queries are padded to multiples of 32
// with zeros. Weights and gradients of scores are rounded to bf16 before products; all sums are float. The head size D
// is a multiple of 32.
//
// A task is one key/value head of a fixed part of the rows, or of the prefix's tokens. The gradients of the prefix's
// keys and values are summed within a task, then over the tasks in order. So results do not depend on the number of
// threads.

#pragma once
#include "blocks.h"
#include "kernels.h"

#ifdef TILES
static const int64_t SHARES = 8;  // parts of the rows, each with separate sums of the prefix's gradients

// The input of both passes: a layer's qkv [T, (heads + 2 kv) * D], not yet rotated, and cosines and sines [T, D / 2].
struct Input {
    const Layout& l;
    const bf16* qkv;
    const float *cosine, *sine;
    float scale;
    int64_t width() const { return (l.kv * l.group + 2 * l.kv) * l.size; }
    int64_t shares() const { return std::min(l.rows, SHARES); }
    int64_t early() const { return padded(l.prefix); }
    int64_t most_keys() const { return early() + padded(std::max(l.longest, l.prefix)); }
};

// `length` tokens of one key/value head, which also see `prefix` earlier tokens (0, or the layout's prefix).
struct Row {
    int64_t head, start, length, prefix;
    int64_t early() const { return padded(prefix); }
    int64_t keys() const { return early() + padded(length); }
    // Number of keys that the 32 queries from `first` on see, padded.
    int64_t seen(int64_t first, int64_t group) const {
        return early() + padded(std::min(length, (first + 31) / group + 1));
    }
};

// The rotated keys and the values [count, D] of tokens, filled up to a multiple of 32 with zeros.
static void take_keys(const Input& in, int64_t head, int64_t start, int64_t count, bf16* keys, bf16* values) {
    int64_t size = in.l.size, heads = in.l.kv * in.l.group, half = size / 2;
    for (int64_t i = 0; i < count; ++i) {
        const bf16* from = in.qkv + (start + i) * in.width() + (heads + head) * size;
        turn(from, keys + i * size, in.cosine + (start + i) * half, in.sine + (start + i) * half, size, 1.0f);
        std::memcpy((void*)(values + i * size), from + in.l.kv * size, size * 2);
    }
    int64_t rest = (padded(count) - count) * size * 2;
    std::memset((void*)(keys + count * size), 0, rest);
    std::memset((void*)(values + count * size), 0, rest);
}

// The rotated queries [first, first + 32) of a row, and their part of `other` [T, heads * D] into `others` (other null:
// no such part). Zeros after the row's end.
static void take_queries(const Input& in, const Row& row, int64_t first, bf16* queries, const bf16* other,
                         bf16* others) {
    int64_t size = in.l.size, half = size / 2, group = in.l.group, token = row.start + first / group, g = first % group;
    for (int64_t i = 0; i < 32; ++i, queries += size, others += other ? size : 0) {
        if (token >= row.start + row.length) {
            std::memset((void*)queries, 0, size * 2);
            if (other) std::memset((void*)others, 0, size * 2);
            continue;
        }
        int64_t head = row.head * group + g;
        turn(in.qkv + token * in.width() + head * size, queries, in.cosine + token * half, in.sine + token * half, size,
             1.0f);
        if (other) std::memcpy((void*)others, other + (token * in.l.kv * group + head) * size, size * 2);
        if (++g == group) g = 0, ++token;
    }
}

// Prefetches what the 32 queries from `first` on will write, what the next 32 will read (including their part of
// `other` [T, heads * D], if there is one), and the next row's keys and values. Otherwise each cache line would be
// waited for.
static void prefetch(const Input& in, const Row& row, int64_t first, const bf16* other, const bf16* out,
                      int64_t out_width) {
    int64_t size = in.l.size, group = in.l.group, heads = in.l.kv * group, queries = row.head * group * size;
    int64_t end = row.start + row.length, token = row.start + first / group, count = 32 / group + 1;
    for (int64_t t = token; t < std::min(token + count, end); ++t)
        for (int64_t d = 0; d < group * size; d += 32) __builtin_prefetch(out + t * out_width + queries + d, 1, 2);
    token = row.start + (first + 32) / group;
    for (int64_t t = token; t < std::min(token + count, end); ++t)
        for (int64_t d = 0; d < group * size; d += 32) {
            __builtin_prefetch(in.qkv + t * in.width() + queries + d, 0, 2);
            if (other) __builtin_prefetch(other + t * heads * size + queries + d, 0, 2);
        }
    token = end + first / group;
    for (int64_t t = token; t < std::min(token + count, in.l.tokens); ++t)
        for (int64_t d = 0; d < size; d += 32) {
            const bf16* key = in.qkv + t * in.width() + (heads + row.head) * size + d;
            __builtin_prefetch(key, 0, 2);
            __builtin_prefetch(key + in.l.kv * size, 0, 2);
        }
}

// Sets scores [keys, 32] to -inf where a query does not see the key: the prefix's padding, and later tokens.
static void hide(const Row& row, int64_t first, int64_t group, int64_t keys, float* scores) {
    const __m512 low = _mm512_set1_ps(-INFINITY);
    for (int64_t j = row.prefix; j < row.early(); ++j)
        for (int64_t half = 0; half < 32; half += 16) _mm512_storeu_ps(scores + j * 32 + half, low);
    int32_t places[32];
    for (int64_t i = 0; i < 32; ++i) places[i] = int32_t((first + i) / group);
    const __m512i one = _mm512_loadu_si512(places), other = _mm512_loadu_si512(places + 16);
    for (int64_t j = first / group + 1; j < keys - row.early(); ++j) {
        float* at = scores + (row.early() + j) * 32;
        __m512i place = _mm512_set1_epi32(int32_t(j));
        _mm512_mask_storeu_ps(at, _mm512_cmplt_epi32_mask(one, place), low);
        _mm512_mask_storeu_ps(at + 16, _mm512_cmplt_epi32_mask(other, place), low);
    }
}

// The index of a row's query in the statistics [kv, T * group], and a mask of the 16 queries from `first` on that
// exist.
static inline int64_t place_of(const Input& in, const Row& row, int64_t first) {
    return (row.head * in.l.tokens + row.start) * in.l.group + first;
}
static inline __mmask16 lanes(const Input& in, const Row& row, int64_t first) {
    int64_t left = std::max<int64_t>(0, std::min<int64_t>(16, row.length * in.l.group - first));
    return __mmask16((1u << left) - 1);
}

// A thread's buffers.
struct Scratch {
    std::vector<Memory<char>> buffers;
    Scratch() { buffers.reserve(16); }
    template <class T>
    T* take(int64_t count) {
        buffers.push_back(memory<char>(count * sizeof(T)));
        return (T*)buffers.back().get();
    }
};

// Rows [first, last) of one key/value head, or the prefix's tokens (early). The tasks of the prefix come first.
struct Task {
    int64_t head, first, last;
    bool early;
};
static int64_t task_count(const Input& in) { return in.l.kv * (in.shares() + (in.l.prefix > 0)); }
static Task task_at(const Input& in, int64_t number) {
    const Layout& l = in.l;
    if (l.prefix && number < l.kv) return {number, 0, 0, true};
    number -= l.prefix ? l.kv : 0;
    int64_t share = number / l.kv;
    return {number % l.kv, share * l.rows / in.shares(), (share + 1) * l.rows / in.shares(), false};
}
#endif
