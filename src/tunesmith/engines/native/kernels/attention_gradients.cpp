// The backward pass of attention on tiles; attention_tiles.h describes the method.

#include "attention_tiles.h"

#ifdef TILES
static const int64_t HELD_BYTES = 512 << 10;  // most bytes of weights and score gradients for a chunk of queries

struct Backward {
    const Input& in;
    const bf16* gradient;  // [T, heads * D], of the mixed values
    const float *largest, *inverse;
    bf16* out;  // [T, (heads + 2 kv) * D]
    int64_t chunk;  // number of queries whose weights are held at once
    bf16 *keys, *values, *packed_keys, *queries, *mixed, *packed_queries, *packed_mixed, *across;
    bf16 *weights, *changes, *turned;
    float *scores, *products, *to_queries, *to_keys, *to_values;

    static int64_t chunk_of(const Input& in) {
        int64_t fits = HELD_BYTES / (4 * in.most_keys()) / 32 * 32;
        return std::max<int64_t>(32, std::min(fits, padded(std::max(in.l.longest, in.l.prefix) * in.l.group)));
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

    // Writes the gradients of a row's queries to `out`, and adds those of keys and values to to_keys and to_values,
    // which begin with the prefix's. take has already been called for the row's prefix, if it has one.
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

    // Computes the gradient of 32 queries and their part of `weights` and `changes` [blocks, keys, 32].
    void block(const Row& row, int64_t start, int64_t b) {
        int64_t size = in.l.size, group = in.l.group, first = start + b * 32, seen = row.seen(first, group);
        prefetch(in, row, first, gradient, out, in.width());
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

    // Turns scores, and products of gradients with values, into weights w and gradients of scores,
    // w * (product - sum of w * product) * scale. Both are [keys, 32]; `turned` is the transpose of the gradients.
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
            auto change = [&](int64_t r) {
                int64_t at = (j + r) * 32;
                __m512 one = sixteen(scores + at), other = sixteen(scores + at + 16);
                _mm512_storeu_si512(to_weights + at, round32(one, other));
                __m512 above = _mm512_sub_ps(sixteen(products + at), dot[0]);
                __m512 beside = _mm512_sub_ps(sixteen(products + at + 16), dot[1]);
                __m512i made = round32(_mm512_mul_ps(_mm512_mul_ps(one, scale), above),
                                       _mm512_mul_ps(_mm512_mul_ps(other, scale), beside));
                _mm512_storeu_si512(to_changes + at, made);
                return made;
            };
            write_transposed(change, turned + j * 32);
        }
    }

    // Writes the gradients [D] of a token's key and value to `out`.
    void settle(int64_t head, int64_t token, const float* key, const float* value) {
        int64_t size = in.l.size, half = size / 2;
        bf16* to = out + token * in.width() + (in.l.kv * in.l.group + head) * size;
        turn(key, to, in.cosine + token * half, in.sine + token * half, size, -1.0f);
        for (int64_t d = 0; d < size; d += 16) round16(sixteen(value + d), to + in.l.kv * size + d);
    }
};

// out [T, (heads + 2 kv) * D]: the gradient of qkv, from the gradient of attend's result.
extern "C" void attend_backward(const Layout* l, const bf16* qkv, const float* cosine, const float* sine,
                                const bf16* gradient, const float* largest, const float* inverse, bf16* out,
                                float scale, int threads) {
    const Input in{*l, qkv, cosine, sine, scale};
    tiles_allowed();
    // For each task, the sums of the prefix's key gradients, then of its value gradients.
    int64_t part = in.early() * l->size, tasks = task_count(in);
    auto sums = memory<float>(tasks * 2 * part);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Scratch scratch;
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
            std::memcpy(&sums[number * 2 * part], to_keys, part * 4);
            std::memcpy(&sums[(number * 2 + 1) * part], to_values, part * 4);
        }
#pragma omp for schedule(static)
        for (int64_t each = 0; each < l->kv * l->prefix; ++each) {
            int64_t head = each / l->prefix, token = each % l->prefix, size = l->size;
            std::memset(to_keys, 0, size * 4);
            std::memset(to_values, 0, size * 4);
            for (int64_t number = 0; number < tasks; ++number)
                if (task_at(in, number).head == head) {
                    const float *key = &sums[number * 2 * part + token * size], *value = key + part;
                    for (int64_t d = 0; d < size; ++d) to_keys[d] += key[d], to_values[d] += value[d];
                }
            backward.settle(head, token, to_keys, to_values);
        }
    }
}
#endif
