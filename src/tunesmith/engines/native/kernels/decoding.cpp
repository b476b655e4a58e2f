// Attention of a pass that decodes rows and prefills prompts. It has the newest token of some rows, and neighbouring
// tokens of prompts.

#include "blocks.h"
#include "kernels.h"

// Layout of pages of `page` places, a multiple of 16.
// Keys [pages, kv, D / 2, page, 2]: a query's scores on 16 places are 16 lanes.
// Values [pages, kv, page / 2, D, 2]: 16 dimensions of the mixed values are 16 lanes.
// Both are operands of tiles as they are. In this file, a "row" is a token of the pass.

typedef float v16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));

static inline void read(const bf16* from, v16* parts) {  // 16 pairs: the first of each, then the second
    u16 both;
    std::memcpy(&both, from, 64);
    parts[0] = (v16)(both << 16);
    parts[1] = (v16)(both & 0xffff0000);
}

// Writes a key and a value [D] of head k to place `within` of a page.
static void put(const Pages& p, const bf16* key, const bf16* value, int64_t page, int64_t k, int64_t within, bf16* keys,
                bf16* values) {
    const int64_t base = page * p.stride + k * p.page * p.size;
    for (int64_t i = 0; i < p.size; i += 2) std::memcpy((void*)(keys + base + i * p.page + within * 2), key + i, 4);
    bf16* to = values + base + within / 2 * 2 * p.size + within % 2;
    for (int64_t i = 0; i < p.size; ++i) to[i * 2] = value[i];
}

// qkv [rows, (heads + 2 kv) * D] -> rotated queries q [kv, rows, group, D]. Writes each row's rotated key and its value
// to place length[row] of its pages.
extern "C" void decode_split(const Pages* pages, const bf16* qkv, const float* cosine, const float* sine, bf16* q,
                             bf16* keys, bf16* values, int threads) {
    const Pages& p = *pages;
    int64_t kv = p.kv, group = p.group, size = p.size;
#pragma omp parallel num_threads(threads)
    {
        std::vector<bf16> key(size);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < p.rows; ++row) {
            const bf16* from = qkv + row * kv * (group + 2) * size;
            const float *c = cosine + row * size / 2, *s = sine + row * size / 2;
            int64_t page = p.table[row * p.most + p.length[row] / p.page], within = p.length[row] % p.page;
            for (int64_t k = 0; k < kv; ++k) {
                for (int64_t g = 0; g < group; ++g)
                    rotate(from + (k * group + g) * size, q + ((k * p.rows + row) * group + g) * size, c, s, size / 2,
                           1.0f);
                rotate(from + (kv * group + k) * size, key.data(), c, s, size / 2, 1.0f);
                put(p, key.data(), from + (kv * (group + 1) + k) * size, page, k, within, keys, values);
            }
        }
    }
}

// held [G, wide] = scores of G queries [G, D] on the first `seen` places of a page, in blocks of 16. next, here and
// below: a page to prefetch while this one is read, because most of the time would go into waiting for it.
template <int G>
static void score(const Pages& p, const float* query, const bf16* page, const bf16* next, int64_t seen, float* held,
                  int64_t wide) {
    for (int64_t j = 0; j < seen; j += 16) {
        v16 dot[2][G] = {};  // two sums, so that each addition need not wait for the previous one
        for (int64_t i = 0; i < p.size; i += 2) {
            v16 parts[2];
            read(page + i * p.page + j * 2, parts);
            __builtin_prefetch(next + i * p.page + j * 2, 0, 2);
            for (int g = 0; g < G; ++g)
                for (int64_t n = 0; n < 2; ++n) dot[n][g] += query[g * p.size + i + n] * parts[n];
        }
        for (int g = 0; g < G; ++g) {
            v16 whole = dot[0][g] + dot[1][g];
            std::memcpy(held + g * wide + j, &whole, 64);
        }
    }
}

// mixed [G, D] += weights [G, wide] times the values of the first `seen` places of a page.
template <int G>
static void add(const Pages& p, const float* weights, int64_t wide, const bf16* page, const bf16* next, int64_t seen,
                float* mixed) {
    int64_t size = p.size, i = 0;
    for (; i + 16 <= size; i += 16) {
        v16 sums[2][G] = {};
        for (int g = 0; g < G; ++g) std::memcpy(&sums[0][g], mixed + g * size + i, 64);
        for (int64_t j = 0; j < seen; j += 2) {
            v16 parts[2];
            read(page + j * size + i * 2, parts);
            __builtin_prefetch(next + j * size + i * 2, 0, 2);
            // Places that no row has written may hold anything.
            for (int64_t n = 0; n < std::min<int64_t>(2, seen - j); ++n)
                for (int g = 0; g < G; ++g) sums[n][g] += weights[g * wide + j + n] * parts[n];
        }
        for (int g = 0; g < G; ++g) {
            sums[0][g] += sums[1][g];
            std::memcpy(mixed + g * size + i, &sums[0][g], 64);
        }
    }
    for (; i < size; ++i)
        for (int64_t j = 0; j < seen; ++j) {
            float value = up(page[j / 2 * 2 * size + i * 2 + j % 2]);
            for (int g = 0; g < G; ++g) mixed[g * size + i] += weights[g * wide + j] * value;
        }
}

// CALL(G) for any number of queries, at most four at a time.
#define IN_FOURS(CALL)                                                                                                 \
    for (int64_t g = 0; g < group; g += 4) switch (group - g) {                                                        \
            case 1: CALL(1); break;                                                                                    \
            case 2: CALL(2); break;                                                                                    \
            case 3: CALL(3); break;                                                                                    \
            default: CALL(4);                                                                                          \
        }

static void score_all(const Pages& p, int64_t group, const float* query, const bf16* page, const bf16* next,
                      int64_t seen, float* held, int64_t wide) {
#define CALL(G) score<G>(p, query + g * p.size, page, next, seen, held + g * wide, wide)
    IN_FOURS(CALL)
#undef CALL
}

static void add_all(const Pages& p, int64_t group, const float* weights, int64_t wide, const bf16* page,
                    const bf16* next, int64_t seen, float* mixed) {
#define CALL(G) add<G>(p, weights + g * wide, wide, page, next, seen, mixed + g * p.size)
    IN_FOURS(CALL)
#undef CALL
}

// Attention of rows [first, first + count): out [rows, heads * D]. A row sees the first length[row] + 1 places of its
// pages, and the first `prefix` places of early_keys and early_values, pages of a prefix that these rows share.
static void mix_plainly(const Pages& p, const bf16* q, const bf16* early_keys, const bf16* early_values,
                        const bf16* keys, const bf16* values, bf16* out, int64_t first, int64_t count, int64_t prefix,
                        float scale, int threads) {
    const int64_t kv = p.kv, group = p.group, size = p.size, area = p.page * size;
    const int64_t shared = (prefix + p.page - 1) / p.page, wide = shared * p.page + (p.longest + 16) / 16 * 16 + 16;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch(group * (wide + 2 * size)), total(group);
        float *held = scratch.data(), *query = held + group * wide, *mixed = query + group * size;
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t k = 0; k < kv; ++k)
            for (int64_t row = first; row < first + count; ++row) {
                int64_t seen = p.length[row] + 1;
                const bf16 *mine = q + (k * p.rows + row) * group * size, *old_keys = early_keys + k * area,
                           *old_values = early_values + k * area;
                auto place = [&](int64_t row, int64_t j) {
                    return p.table[row * p.most + j / p.page] * p.stride + k * area;
                };
                auto later = [&](int64_t j) { return place(row + 1 < first + count ? row + 1 : row, j); };
                for (int64_t i = 0; i < group * size; ++i) query[i] = up(mine[i]) * scale;
                std::fill(mixed, mixed + group * size, 0.0f);
                for (int64_t n = 0; n < shared; ++n) {
                    const bf16* page = old_keys + n * kv * area;
                    score_all(p, group, query, page, page, p.page, held + n * p.page, wide);
                }
                for (int64_t j = 0; j < seen; j += p.page)
                    score_all(p, group, query, keys + place(row, j), keys + later(j), std::min(p.page, seen - j),
                              held + prefix + j, wide);
                for (int64_t g = 0; g < group; ++g) total[g] = exponentials(held + g * wide, prefix + seen);
                for (int64_t j = 0; j < prefix; j += p.page) {
                    const bf16* page = old_values + j / p.page * kv * area;
                    add_all(p, group, held + j, wide, page, page, std::min(p.page, prefix - j), mixed);
                }
                for (int64_t j = 0; j < seen; j += p.page)
                    add_all(p, group, held + prefix + j, wide, values + place(row, j), values + later(j),
                            std::min(p.page, seen - j), mixed);
                bf16* to = out + (row * kv + k) * group * size;
                for (int64_t g = 0; g < group; ++g)
                    for (int64_t i = 0; i < size; ++i) down(mixed[g * size + i] / total[g], to + g * size + i);
            }
    }
}

static const int64_t TOGETHER = 32;  // queries (of several rows) in one product with a shared prefix

#ifdef TILES
// held [queries, wide] = q [32, D] times the keys of a page of 32 places. Prefetches the page's values.
static void score_tiles(const Pages& p, const bf16* q, int64_t queries, const bf16* page, const bf16* values,
                        float* held, int64_t wide) {
    for (int64_t i = 0; i < p.page * p.size; i += 32) __builtin_prefetch(values + i, 0, 2);
    sum(held, wide, false, queries,
        {q, q + 16 * p.size, p.size, 32, page, page + 32, 64, 1024, p.size / 32, nullptr, 0});
}

// mixed [queries, D] = weights [32, wide] times values in `pages` pages of 32 places, which are `stride` numbers apart;
// add: mixed += that.
static void mix_tiles(const Pages& p, const bf16* weights, int64_t wide, int64_t queries, int64_t pages,
                      const bf16* values, int64_t stride, bool add, float* mixed) {
    for (int64_t i = 0; i < p.size; i += 32) {
        const bf16* from = values + i * 2;
        sum(mixed + i, p.size, add, queries,
            {weights, weights + 16 * wide, wide, 32, from, from + 32, p.size * 2, stride, pages, nullptr, 0});
    }
}

// Softmax without the division: replaces the scores [0, prefix) and [padded, padded + seen) of held by powers of two
// and returns their sum. Those of the prefix go to weights [padded], with zeros from `prefix` on. The others stay in
// held if room is 0, or else go to weights [padded, padded + room), with zeros from `seen` on. to_power: a score times
// to_power is an exponent of two.
static float weigh(float* held, int64_t prefix, int64_t padded, int64_t seen, int64_t room, float to_power,
                   bf16* weights) {
    auto there = [](int64_t count) { return __mmask16(count >= 16 ? 0xffff : (1 << std::max<int64_t>(0, count)) - 1); };
    float* own = held + padded;
    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t j = 0; j < prefix; j += 16)
        most = _mm512_mask_max_ps(most, there(prefix - j), most, _mm512_loadu_ps(held + j));
    for (int64_t j = 0; j < seen; j += 16)
        most = _mm512_mask_max_ps(most, there(seen - j), most, _mm512_loadu_ps(own + j));
    const __m512 factor = _mm512_set1_ps(to_power), base = _mm512_set1_ps(_mm512_reduce_max_ps(most) * to_power);
    auto share = [&](const float* from, int64_t left) {
        __mmask16 mask = there(left);
        return _mm512_maskz_mov_ps(mask, power(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(mask, from), factor, base)));
    };
    auto rounded = [&](const float* from, int64_t count, int64_t most, bf16* to) {
        for (int64_t j = 0; j < most; j += 32) {
            __m512 one = share(from + j, count - j), other = share(from + j + 16, count - j - 16);
            total = _mm512_add_ps(total, _mm512_add_ps(one, other));
            _mm512_storeu_si512(to + j, round32(one, other));
        }
    };
    rounded(held, prefix, padded, weights);
    rounded(own, seen, room, weights + padded);
    for (int64_t j = 0; j < seen && !room; j += 16) {
        __m512 one = share(own + j, seen - j);
        total = _mm512_add_ps(total, one);
        _mm512_storeu_ps(own + j, one);
    }
    return _mm512_reduce_add_ps(total);
}

// Writes mixed values [group, D] of a row, divided by the sums of their weights.
static void divide(const Pages& p, const float* mixed, const float* total, bf16* to) {
    for (int64_t g = 0; g < p.group; ++g) {
        const __m512 inverse = _mm512_set1_ps(1.0f / total[g]);
        for (int64_t i = g * p.size; i < (g + 1) * p.size; i += 16)
            round16(_mm512_mul_ps(_mm512_loadu_ps(mixed + i), inverse), to + i);
    }
}

// mix_plainly on tiles, for blocks of rows that have TOGETHER queries.
//
// prompt: the rows are neighbouring tokens of one prompt. They see the same pages, each a place more than the row
// before it, so those are multiplied on tiles too. A row's result does not depend on where a prompt is divided.
static void mix_on_tiles(const Pages& p, const bf16* q, const bf16* early_keys, const bf16* early_values,
                         const bf16* keys, const bf16* values, bf16* out, int64_t first, int64_t count, int64_t prefix,
                         bool prompt, float scale, int threads) {
    const int64_t kv = p.kv, group = p.group, size = p.size, area = p.page * size;
    const int64_t shared = (prefix + p.page - 1) / p.page, padded = shared * p.page;
    const int64_t many = TOGETHER / group, blocks = (count + many - 1) / many;
    const int64_t filled = p.length[first + count - 1] + 1, step = prompt ? p.page : 16;
    const int64_t most = padded + (p.longest + step) / step * step;
    const float to_power = scale * 1.44269504088896341f;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        auto scratch = memory<float>(TOGETHER * (most + 2 * size + 1));
        float *held = scratch.get(), *query = held + TOGETHER * most, *mixed = query + TOGETHER * size,
              *total = mixed + TOGETHER * size;
        auto copied = memory<bf16>(TOGETHER * (size + most) + area);
        bf16 *last = copied.get() + TOGETHER * size, *weights = last + area;
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t k = 0; k < kv; ++k)
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t from = first + block * many, end = std::min(from + many, first + count);
                const int64_t queries = (end - from) * group, pages = prompt ? p.length[end - 1] / p.page + 1 : 0;
                const int64_t room = pages * p.page, weighed = padded + room, wide = prompt ? weighed : most;
                const bf16* mine = q + (k * p.rows + from) * group * size;
                auto place = [&](int64_t row, int64_t j) {
                    return p.table[row * p.most + j / p.page] * p.stride + k * area;
                };
                auto later = [&](int64_t row, int64_t j) { return place(row + 1 < end ? row + 1 : row, j); };
                std::copy(mine, mine + queries * size, copied.get());
                for (int64_t n = 0; n < shared; ++n)
                    score_tiles(p, copied.get(), queries, early_keys + (n * kv + k) * area,
                                early_values + (n * kv + k) * area, held + n * p.page, wide);
                for (int64_t j = 0; j < room; j += p.page)
                    score_tiles(p, copied.get(), queries, keys + place(from, j), values + place(from, j),
                                held + padded + j, wide);
                if (!prompt) {
                    for (int64_t i = 0; i < queries * size; i += 16) _mm512_storeu_ps(query + i, sixteen(mine + i));
                    std::fill(mixed, mixed + queries * size, 0.0f);
                    for (int64_t row = from; row < end; ++row)
                        for (int64_t j = 0, seen = p.length[row] + 1; j < seen; j += p.page)
                            score_all(p, group, query + (row - from) * group * size, keys + place(row, j),
                                      keys + later(row, j), std::min(p.page, seen - j),
                                      held + (row - from) * group * wide + padded + j, wide);
                }
                for (int64_t g = 0; g < queries; ++g) {
                    int64_t row = from + g / group, seen = p.length[row] + 1;
                    if (g % group == 0 && !prompt)  // prefetch the values, which are read next
                        for (int64_t j = 0; j < seen; j += p.page)
                            for (int64_t i = 0; i < std::min(p.page, seen - j) * size; i += 32)
                                __builtin_prefetch(values + place(row, j) + i, 0, 2);
                    total[g] = weigh(held + g * wide, prefix, padded, seen, room, to_power, weights + g * weighed);
                }
                if (shared)
                    mix_tiles(p, weights, weighed, queries, shared, early_values + k * area, kv * area, false, mixed);
                for (int64_t j = 0; j < room; j += p.page) {
                    const bf16* own = values + place(from, j);
                    if (int64_t left = filled - j; left < p.page) {
                        std::copy(own, own + area, last);  // the places behind may hold anything, even NaN
                        for (int64_t n = left; n < p.page; ++n)
                            for (int64_t i = 0; i < size; ++i) last[n / 2 * 2 * size + i * 2 + n % 2] = bf16{0};
                        own = last;
                    }
                    mix_tiles(p, weights + padded + j, weighed, queries, 1, own, 0, shared || j, mixed);
                }
                for (int64_t row = from; row < end; ++row) {
                    float* sums = mixed + (row - from) * group * size;
                    for (int64_t j = 0, seen = p.length[row] + 1; j < seen && !prompt; j += p.page)
                        add_all(p, group, held + (row - from) * group * wide + padded + j, wide, values + place(row, j),
                                values + place(row, j), std::min(p.page, seen - j), sums);
                    divide(p, sums, total + (row - from) * group, out + (row * kv + k) * group * size);
                }
            }
    }
}
#endif

extern "C" void decode_mix(const Pages* p, const bf16* q, const bf16* early_keys, const bf16* early_values,
                           const bf16* keys, const bf16* values, bf16* out, int64_t first, int64_t count,
                           int64_t prefix, bool prompt, float scale, int threads) {
#ifdef TILES
    if (p->size % 32 == 0 && p->page == 32 && p->group <= TOGETHER && tiles_allowed())
        return mix_on_tiles(*p, q, early_keys, early_values, keys, values, out, first, count, prefix, prompt, scale,
                            threads);
#endif
    mix_plainly(*p, q, early_keys, early_values, keys, values, out, first, count, prefix, scale, threads);
}
