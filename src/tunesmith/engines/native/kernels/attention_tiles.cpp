// The forward pass of attention on tiles; attention_tiles.h describes the method.

#include "attention_tiles.h"

#ifdef TILES
struct Forward {
    const Input& in;
    bf16* out;
    float *largest, *inverse;
    bf16 *keys, *values, *packed_values, *queries, *packed_queries, *weights;
    float *scores, *mixed;

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

    // Computes one row. take has already been called for its prefix, if it has one.
    void run(const Row& row) {
        int64_t size = in.l.size, group = in.l.group;
        take(row.head, row.start, row.length, row.early());
        for (int64_t first = 0; first < row.length * group; first += 32) {
            int64_t seen = row.seen(first, group);
            take_queries(in, row, first, queries, nullptr, nullptr);
            prefetch(in, row, first, nullptr, out, in.l.kv * group * size);
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

    // Turns scores into weights, packed as the first operand of the product with the values.
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
            auto rounded = [&](int64_t r) {
                const float* at = scores + (j + r) * 32;
                return round32(_mm512_mul_ps(sixteen(at), over[0]), _mm512_mul_ps(sixteen(at + 16), over[1]));
            };
            write_transposed(rounded, weights + j * 32);
        }
    }
};

// out [T, heads * D]: values mixed by attention. For the backward pass, of each query: largest [kv, T * group], its
// largest score as a power of two, and inverse [kv, T * group], 1 / the sum of all powers.
extern "C" void attend(const Layout* l, const bf16* qkv, const float* cosine, const float* sine, bf16* out,
                       float* largest, float* inverse, float scale, int threads) {
    const Input in{*l, qkv, cosine, sine, scale};
    tiles_allowed();
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Scratch scratch;
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
#endif
