// Attention of rows behind a shared prefix on tiles, forward and backward: one pass over a row's queries for each
// key/value head, with all that it needs in the caches. Nothing is kept for the backward pass but each query's largest
// score and sum; the weights are computed again.
//
// Scores are held transposed, [keys, 32 queries]: what belongs to a query is then a lane, and softmax needs no sum
// across lanes. Query i of a row is head i % group of its token i / group, as queries lie in memory. Keys and queries
// are padded to 32 with zeros. Weights and the gradients of scores are rounded to bf16 before they are multiplied; all
// sums are float. head size D: a multiple of 32.
//
// A task is a key/value head of a fixed share of the rows, or of the prefix's own tokens; the gradients of the prefix's
// keys and values are summed in a task, then over the tasks in order: results do not depend on the number of threads.

#include "blocks.h"
#include "layout.h"

#ifdef TILES
static const int64_t SHARES = 8;            // rows are dealt out in so many shares, and each sums for the prefix apart
static const int64_t HELD_BYTES = 512 << 10;  // weights and gradients of scores that a chunk of queries may take

// What both passes read: a layer's qkv [T, (heads + 2 kv) * D], not yet rotated, and its angles [T, D / 2].
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

// Some tokens of one key/value head behind `prefix` others that all of them see (0, or the layout's).
struct Row {
    int64_t head, start, length, prefix;
    int64_t early() const { return padded(prefix); }
    int64_t keys() const { return early() + padded(length); }
    // Keys that 32 queries from `first` on look at, padded.
    int64_t seen(int64_t first, int64_t group) const {
        return early() + padded(std::min(length, (first + 31) / group + 1));
    }
};

// Keys rotated and values of `count` tokens, behind them zeros up to a multiple of 32: [.., D] each.
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

// Queries [first, first + 32) of a row, rotated, and where asked for what belongs to them in `other` [T, heads * D];
// zeros behind the row's end.
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

// Asks for what 32 queries from `first` on will write, what the next 32 will read (their part of `other` [T, heads * D]
// too, where there is one) and for keys and values of the next row: without, each line would be waited for.
static void ask_ahead(const Input& in, const Row& row, int64_t first, const bf16* other, const bf16* out,
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

// Scores [keys, 32] to -inf where a query may not look: at the prefix's padding, and behind its own place.
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

// Where the statistics of a row's query lie, [kv, T * group], and the lanes of 16 from `first` on that there are.
static inline int64_t place_of(const Input& in, const Row& row, int64_t first) {
    return (row.head * in.l.tokens + row.start) * in.l.group + first;
}
static inline __mmask16 lanes(const Input& in, const Row& row, int64_t first) {
    int64_t left = std::max<int64_t>(0, std::min<int64_t>(16, row.length * in.l.group - first));
    return __mmask16((1u << left) - 1);
}

// A thread's own memory, in one piece.
struct Scratch {
    char *whole, *at;
    explicit Scratch(int64_t bytes) : whole((char*)std::aligned_alloc(64, (bytes + 63) / 64 * 64)), at(whole) {}
    ~Scratch() { std::free(whole); }
    template <class T>
    T* take(int64_t count) {
        T* from = (T*)at;
        at += (count * sizeof(T) + 63) / 64 * 64;
        return from;
    }
};

// ---- forward ----

struct Forward {
    const Input& in;
    bf16* out;
    float *largest, *inverse;
    bf16 *keys, *values, *packed_values, *queries, *packed_queries, *weights;
    float *scores, *mixed;

    static int64_t bytes(const Input& in) {
        int64_t size = in.l.size, keys = in.most_keys();
        return keys * size * 6 + 32 * size * 8 + keys * 32 * 6 + 1024;
    }
    Forward(const Input& in, Scratch& scratch, bf16* out, float* largest, float* inverse)
        : in(in), out(out), largest(largest), inverse(inverse) {
        int64_t size = in.l.size, most = in.most_keys();
        for (bf16** each : {&keys, &values, &packed_values}) *each = scratch.take<bf16>(most * size);
        for (bf16** each : {&queries, &packed_queries}) *each = scratch.take<bf16>(32 * size);
        weights = scratch.take<bf16>(most * 32);
        scores = scratch.take<float>(most * 32);
        mixed = scratch.take<float>(32 * size);
    }

    void take(int64_t head, int64_t start, int64_t count, int64_t at) {
        int64_t size = in.l.size;
        take_keys(in, head, start, count, keys + at * size, values + at * size);
        for (int64_t j = at; j < at + padded(count); j += 32)
            pack_along(values + j * size, size, packed_values + j * size);
    }

    // The prefix's keys, where the row has one, are there.
    void run(const Row& row) {
        int64_t size = in.l.size, group = in.l.group;
        take(row.head, row.start, row.length, row.early());
        for (int64_t first = 0; first < row.length * group; first += 32) {
            int64_t seen = row.seen(first, group);
            take_queries(in, row, first, queries, nullptr, nullptr);
            ask_ahead(in, row, first, nullptr, out, in.l.kv * group * size);
            pack_across(queries, size, packed_queries);
            for (int64_t j = 0; j < seen; j += 32)
                product(keys + j * size, size, 32, packed_queries, 1024, size / 32, scores + j * 32, 32, false);
            hide(row, first, group, seen, scores);
            weigh(row, first, seen);
            for (int64_t d = 0; d < size; d += 32)
                product(weights, 32, 1024, packed_values + d * 32, size * 32, seen / 32, mixed + d, size, false);
            int64_t last = std::min(first + 32, row.length * group);
            for (int64_t i = first; i < last; ++i) {
                int64_t head = (row.start + i / group) * in.l.kv * group + row.head * group + i % group;
                for (int64_t d = 0; d < size; d += 32) {
                    const float* from = mixed + (i - first) * size + d;
                    _mm512_storeu_si512(out + head * size + d, round32(sixteen(from), sixteen(from + 16)));
                }
            }
        }
    }

    // Scores to weights, as the first operand of the product with the values.
    void weigh(const Row& row, int64_t first, int64_t seen) {
        const __m512 factor = _mm512_set1_ps(in.scale * 1.44269504f);
        __m512 over[2];
        for (int64_t half = 0; half < 2; ++half) {
            float* column = scores + half * 16;
            __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
            for (int64_t j = 0; j < seen; ++j) most = _mm512_max_ps(most, sixteen(column + j * 32));
            most = _mm512_mul_ps(most, factor);
            for (int64_t j = 0; j < seen; ++j) {
                __m512 e = power(_mm512_fmsub_ps(sixteen(column + j * 32), factor, most));
                _mm512_storeu_ps(column + j * 32, e);
                sum = _mm512_add_ps(sum, e);
            }
            over[half] = _mm512_div_ps(_mm512_set1_ps(1.0f), sum);
            int64_t at = place_of(in, row, first + half * 16);
            __mmask16 there = lanes(in, row, first + half * 16);
            _mm512_mask_storeu_ps(largest + at, there, most);
            _mm512_mask_storeu_ps(inverse + at, there, over[half]);
        }
        for (int64_t j = 0; j < seen; j += 32) {
            __m512i left[16], right[16];
            for (int64_t r = 0; r < 16; ++r) {
                __m512i rounded[2];
                for (int64_t k = 0; k < 2; ++k) {
                    const float* at = scores + (j + 2 * r + k) * 32;
                    rounded[k] = round32(_mm512_mul_ps(sixteen(at), over[0]), _mm512_mul_ps(sixteen(at + 16), over[1]));
                }
                left[r] = first_pairs(rounded[0], rounded[1]);
                right[r] = last_pairs(rounded[0], rounded[1]);
            }
            transpose(left);
            transpose(right);
            for (int64_t i = 0; i < 16; ++i) {
                _mm512_storeu_si512(weights + j * 32 + i * 32, left[i]);
                _mm512_storeu_si512(weights + j * 32 + 512 + i * 32, right[i]);
            }
        }
    }
};

// ---- backward ----

struct Backward {
    const Input& in;
    const bf16* gradient;  // [T, heads * D], of the mixed values
    const float *largest, *inverse;
    bf16* out;  // [T, (heads + 2 kv) * D]
    int64_t chunk;  // queries whose weights are held at once
    bf16 *keys, *values, *packed_keys, *queries, *mixed, *packed_queries, *packed_mixed, *across;
    bf16 *weights, *changes, *turned;
    float *scores, *products, *to_queries, *to_keys, *to_values;

    static int64_t chunk_of(const Input& in) {
        int64_t fits = HELD_BYTES / (4 * in.most_keys()) / 32 * 32;
        return std::max<int64_t>(32, std::min(fits, padded(std::max(in.l.longest, in.l.prefix) * in.l.group)));
    }
    static int64_t bytes(const Input& in) {
        int64_t size = in.l.size, keys = in.most_keys(), chunk = chunk_of(in);
        return keys * size * 14 + 32 * size * 10 + chunk * (size + keys) * 4 + keys * 32 * 10 + 2048;
    }
    Backward(const Input& in, Scratch& scratch, const bf16* gradient, const float* largest, const float* inverse,
             bf16* out)
        : in(in), gradient(gradient), largest(largest), inverse(inverse), out(out), chunk(chunk_of(in)) {
        int64_t size = in.l.size, most = in.most_keys();
        for (bf16** each : {&keys, &values, &packed_keys}) *each = scratch.take<bf16>(most * size);
        for (bf16** each : {&queries, &mixed, &across}) *each = scratch.take<bf16>(32 * size);
        for (bf16** each : {&packed_queries, &packed_mixed}) *each = scratch.take<bf16>(chunk * size);
        for (bf16** each : {&weights, &changes}) *each = scratch.take<bf16>(chunk * most);
        turned = scratch.take<bf16>(most * 32);
        for (float** each : {&scores, &products}) *each = scratch.take<float>(most * 32);
        to_queries = scratch.take<float>(32 * size);
        for (float** each : {&to_keys, &to_values}) *each = scratch.take<float>(most * size);
    }

    void take(int64_t head, int64_t start, int64_t count, int64_t at) {
        int64_t size = in.l.size;
        take_keys(in, head, start, count, keys + at * size, values + at * size);
        for (int64_t j = at; j < at + padded(count); j += 32) pack_along(keys + j * size, size, packed_keys + j * size);
    }

    // Gradients of the row's queries go out; those of keys and values are added to to_keys and to_values, the prefix's
    // first. Its keys, where the row has one, are there.
    void run(const Row& row) {
        int64_t size = in.l.size, group = in.l.group, all = row.keys();
        take(row.head, row.start, row.length, row.early());
        for (int64_t start = 0; start < row.length * group; start += chunk) {
            int64_t blocks = (std::min(chunk, row.length * group - start) + 31) / 32;
            for (int64_t b = 0; b < blocks; ++b) block(row, start, b);
            int64_t seen = row.seen(start + (blocks - 1) * 32, group);
            for (int64_t j = 0, from = 0; j < seen; j += 32) {
                while (row.seen(start + from * 32, group) <= j) ++from;
                for (int64_t d = 0; d < size; d += 32) {
                    int64_t a = (from * all + j) * 32, b = (from * size + d) * 32, to = j * size + d;
                    auto add = [&](const bf16* held, const bf16* packed, float* sums) {
                        product(held + a, 32, all * 32, packed + b, size * 32, blocks - from, sums + to, size, true);
                    };
                    add(weights, packed_mixed, to_values);
                    add(changes, packed_queries, to_keys);
                }
            }
        }
    }

    // 32 queries: their own gradient, and their part of `weights` and `changes` [blocks, keys, 32].
    void block(const Row& row, int64_t start, int64_t b) {
        int64_t size = in.l.size, group = in.l.group, first = start + b * 32, seen = row.seen(first, group);
        ask_ahead(in, row, first, gradient, out, in.width());
        take_queries(in, row, first, queries, gradient, mixed);
        pack_along(queries, size, packed_queries + b * 32 * size);
        pack_along(mixed, size, packed_mixed + b * 32 * size);
        pack_across(queries, size, across);
        for (int64_t j = 0; j < seen; j += 32)
            product(keys + j * size, size, 32, across, 1024, size / 32, scores + j * 32, 32, false);
        hide(row, first, group, seen, scores);
        pack_across(mixed, size, across);
        for (int64_t j = 0; j < seen; j += 32)
            product(values + j * size, size, 32, across, 1024, size / 32, products + j * 32, 32, false);
        change(row, first, seen, weights + b * row.keys() * 32, changes + b * row.keys() * 32);
        for (int64_t d = 0; d < size; d += 32)
            product(turned, 32, 1024, packed_keys + d * 32, size * 32, seen / 32, to_queries + d, size, false);
        int64_t last = std::min(first + 32, row.length * group);
        for (int64_t i = first; i < last; ++i) {
            int64_t token = row.start + i / group, head = row.head * group + i % group;
            turn(to_queries + (i - first) * size, out + token * in.width() + head * size,
                 in.cosine + token * (size / 2), in.sine + token * (size / 2), size, -1.0f);
        }
    }

    // Scores and the products of gradients with values to weights w and gradients of scores,
    // w * (product - sum of w * product) * scale: as they lie, [keys, 32], and those also turned, [32, keys].
    void change(const Row& row, int64_t first, int64_t seen, bf16* to_weights, bf16* to_changes) {
        const __m512 factor = _mm512_set1_ps(in.scale * 1.44269504f), scale = _mm512_set1_ps(in.scale);
        __m512 dot[2];
        for (int64_t half = 0; half < 2; ++half) {
            int64_t at = place_of(in, row, first + half * 16);
            __mmask16 there = lanes(in, row, first + half * 16);
            __m512 most = _mm512_maskz_loadu_ps(there, largest + at), over = _mm512_maskz_loadu_ps(there, inverse + at);
            dot[half] = _mm512_setzero_ps();
            for (int64_t j = 0; j < seen; ++j) {
                float* score = scores + j * 32 + half * 16;
                __m512 weight = _mm512_mul_ps(power(_mm512_fmsub_ps(sixteen(score), factor, most)), over);
                _mm512_storeu_ps(score, weight);
                dot[half] = _mm512_fmadd_ps(weight, sixteen(products + j * 32 + half * 16), dot[half]);
            }
        }
        for (int64_t j = 0; j < seen; j += 32) {
            __m512i left[16], right[16];
            for (int64_t r = 0; r < 16; ++r) {
                __m512i rounded[2];
                for (int64_t k = 0; k < 2; ++k) {
                    int64_t at = (j + 2 * r + k) * 32;
                    __m512 one = sixteen(scores + at), other = sixteen(scores + at + 16);
                    _mm512_storeu_si512(to_weights + at, round32(one, other));
                    __m512 above = _mm512_sub_ps(sixteen(products + at), dot[0]);
                    __m512 beside = _mm512_sub_ps(sixteen(products + at + 16), dot[1]);
                    rounded[k] = round32(_mm512_mul_ps(_mm512_mul_ps(one, scale), above),
                                         _mm512_mul_ps(_mm512_mul_ps(other, scale), beside));
                    _mm512_storeu_si512(to_changes + at, rounded[k]);
                }
                left[r] = first_pairs(rounded[0], rounded[1]);
                right[r] = last_pairs(rounded[0], rounded[1]);
            }
            transpose(left);
            transpose(right);
            for (int64_t i = 0; i < 16; ++i) {
                _mm512_storeu_si512(turned + j * 32 + i * 32, left[i]);
                _mm512_storeu_si512(turned + j * 32 + 512 + i * 32, right[i]);
            }
        }
    }

    // Gradients [D] of a token's key and value to where they belong.
    void settle(int64_t head, int64_t token, const float* key, const float* value) {
        int64_t size = in.l.size, half = size / 2;
        bf16* to = out + token * in.width() + (in.l.kv * in.l.group + head) * size;
        turn(key, to, in.cosine + token * half, in.sine + token * half, size, -1.0f);
        for (int64_t d = 0; d < size; d += 16) round16(sixteen(value + d), to + in.l.kv * size + d);
    }
};

// Rows [first, last) of a task; the prefix's own tokens are the first tasks, where there are any.
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

// out [T, heads * D]; largest, inverse [kv, T * group]: of each query the largest score in powers of two, and 1 / the
// sum of all powers, for the backward pass.
extern "C" void attend(const Layout* l, const bf16* qkv, const float* cosine, const float* sine, bf16* out,
                       float* largest, float* inverse, float scale, int threads) {
    const Input in{*l, qkv, cosine, sine, scale};
    tiles_allowed();
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Scratch scratch(Forward::bytes(in));
        Forward forward(in, scratch, out, largest, inverse);
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < task_count(in); ++number) {
            Task task = task_at(in, number);
            if (task.early) {
                forward.run({task.head, 0, l->prefix, 0});
                continue;
            }
            forward.take(task.head, 0, l->prefix, 0);
            for (int64_t row = task.first; row < task.last; ++row)
                forward.run({task.head, l->starts[row], l->starts[row + 1] - l->starts[row], l->prefix});
        }
    }
}

// The gradient of qkv from that of attend's result.
extern "C" void attend_backward(const Layout* l, const bf16* qkv, const float* cosine, const float* sine,
                                const bf16* gradient, const float* largest, const float* inverse, bf16* out,
                                float scale, int threads) {
    const Input in{*l, qkv, cosine, sine, scale};
    tiles_allowed();
    // Each task's sums for the prefix's keys, then for its values.
    int64_t part = in.early() * l->size, tasks = task_count(in);
    float* sums = (float*)std::aligned_alloc(64, std::max<int64_t>(64, tasks * 2 * part * 4));
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Scratch scratch(Backward::bytes(in));
        Backward backward(in, scratch, gradient, largest, inverse, out);
        float *to_keys = backward.to_keys, *to_values = backward.to_values;
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < tasks; ++number) {
            Task task = task_at(in, number);
            std::memset(to_keys, 0, part * 4);
            std::memset(to_values, 0, part * 4);
            if (task.early)
                backward.run({task.head, 0, l->prefix, 0});
            else
                backward.take(task.head, 0, l->prefix, 0);
            for (int64_t number_of_row = task.first; number_of_row < task.last; ++number_of_row) {
                Row row{task.head, l->starts[number_of_row], l->starts[number_of_row + 1] - l->starts[number_of_row],
                        l->prefix};
                std::memset(to_keys + part, 0, padded(row.length) * l->size * 4);
                std::memset(to_values + part, 0, padded(row.length) * l->size * 4);
                backward.run(row);
                for (int64_t i = 0; i < row.length; ++i) {
                    int64_t own = part + i * l->size;
                    backward.settle(row.head, row.start + i, to_keys + own, to_values + own);
                }
            }
            std::memcpy(sums + number * 2 * part, to_keys, part * 4);
            std::memcpy(sums + (number * 2 + 1) * part, to_values, part * 4);
        }
#pragma omp for schedule(static)
        for (int64_t each = 0; each < l->kv * l->prefix; ++each) {
            int64_t head = each / l->prefix, token = each % l->prefix, size = l->size;
            std::memset(to_keys, 0, size * 4);
            std::memset(to_values, 0, size * 4);
            for (int64_t number = 0; number < tasks; ++number)
                if (task_at(in, number).head == head) {
                    const float *key = sums + number * 2 * part + token * size, *value = key + part;
                    for (int64_t d = 0; d < size; ++d) to_keys[d] += key[d], to_values[d] += value[d];
                }
            backward.settle(head, token, to_keys, to_values);
        }
    }
    std::free(sums);
}
#endif
