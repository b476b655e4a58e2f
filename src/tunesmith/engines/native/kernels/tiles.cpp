// Products of bf16 matrices on tiles.
//
// C [M, N] = A [M, K] B [K, N] + A2 [M, K2] B2 [K2, N] + bias [N], summed in float and rounded to bf16 once. K, K2 and
// N are multiples of 32.
//
// Layout of B and B2: panels of 32 columns one after another. A panel holds, for each 32 rows, two tiles of 16 x 16
// pairs (columns 0-15, then 16-31), so that a product reads it front to back. Each thread computes panels of its own.
//
// The order of a number's summands depends on K and K2 only. So a row's result depends neither on the other rows nor on
// the number of threads.

#include "kernels.h"
#include "tiles.h"

extern "C" int omp_get_num_threads();

#ifdef TILES
static const int64_t DEPTH = 320;       // rows of a panel that fit the L1 cache together with a block of A
static const int64_t FEW = 2;           // with so few blocks of A, reading B is the bottleneck: prefetch half of it
static const int64_t GROUP = 1024;      // rows of a deep B that are summed for all of C before the next ones
#if defined(__AMX_BF16__)
static const int64_t DEEP = 2048;       // a B of more rows is deep
#else
static const int64_t DEEP = INT64_MAX;  // these products are so slow that reading A again costs nothing
#endif
static const int64_t NARROW = 4;              // a C of so few panels is narrow
static const int64_t BAND_BYTES = 768 << 10;  // a band of A, which stays in the L2 cache
static const int64_t SUMS_BYTES = 640 << 10;  // most bytes of a deep product's sums that a thread holds
static const int64_t SLAB = 4;                // blocks of 32 rows whose memory pages the TLB holds at once

// 32 rows of a product, or fewer at the end. Tiles always load 32 rows, so an incomplete block is read from a copy.
struct Block {
    const bf16 *a, *a2, *b2;
    int64_t depth2, rows;
    bf16* c;
};

// Rounds sums [rows, 32], plus bias [32] if there is one, into c, rows of `ldc` numbers. past: as in put of numbers.h.
static void round_sums(const float* sums, const float* bias, bf16* c, int64_t ldc, int64_t rows, bool past) {
    for (int64_t r = 0; r < rows; ++r) {
        const float *left = sums + r * 32, *right = left + 16;
        bf16* to = c + r * ldc;
        if (bias) {
#pragma omp simd
            for (int i = 0; i < 16; ++i) down(left[i] + bias[i], to + i);
#pragma omp simd
            for (int i = 0; i < 16; ++i) down(right[i] + bias[16 + i], to + 16 + i);
        } else {
            __m512bh both = _mm512_cvtne2ps_pbh(_mm512_load_ps(right), _mm512_load_ps(left));
            if (past)
                _mm512_stream_si512((__m512i*)to, (__m512i)both);
            else
                _mm512_storeu_si512((void*)to, (__m512i)both);
        }
    }
}

// A copy of `count` rows, filled up to 32 with zeros. Its address is added to `copies`, to be freed.
static const bf16* filled(const bf16* rows, int64_t count, int64_t depth, std::vector<bf16*>& copies) {
    bf16* copy = (bf16*)taken(32 * depth * 2);
    std::memcpy((void*)copy, rows, count * depth * 2);
    std::memset((void*)(copy + count * depth), 0, (32 - count) * depth * 2);
    copies.push_back(copy);
    return copy;
}

// The operands in blocks of 32 rows, where B has `depth` rows and C rows of n numbers.
static std::vector<Block> divided(const Operands& o, int64_t depth, int64_t n, std::vector<bf16*>& copies) {
    std::vector<Block> blocks;
    for (int64_t row = 0; row < o.rows; row += 32) {
        Block one = {o.a + row * depth, nullptr, o.b2, o.depth2, std::min<int64_t>(32, o.rows - row), o.c + row * n};
        if (o.b2) one.a2 = o.a2 + row * o.depth2;
        if (one.rows < 32) {
            one.a = filled(one.a, one.rows, depth, copies);
            if (o.b2) one.a2 = filled(one.a2, one.rows, o.depth2, copies);
        }
        blocks.push_back(one);
    }
    return blocks;
}

// How many rows of a panel are multiplied before the next block of A.
static int64_t part_rows(int64_t depth, int64_t blocks) {
    int64_t most = blocks <= FEW ? DEPTH / 2 : DEPTH, parts = (depth + most - 1) / most;
    return ((depth + parts - 1) / parts + 31) / 32 * 32;
}

// Adds the products with rows [from, to) of B to the sums `held` [bottom - top, 32, 32] of blocks [top, bottom) and one
// panel. Calls ready(block, sums) for each block whose sums are complete.
template <class Ready>
static inline void add(const Block* blocks, int64_t top, int64_t bottom, const bf16* b, int64_t depth, int64_t part,
                       int64_t panel, float* held, int64_t from, int64_t to, Ready ready) {
    for (int64_t k = from; k < to; k += part) {
        int64_t here = std::min(part, to - k);
        const bf16* first = b + panel * depth * 32 + k * 32;
        // Prefetch what follows in B, which is read next: otherwise the first block would wait for it.
        const char* next = (const char*)(first + here * 32);
        int64_t lines = (32 + bottom - top - 1) / (bottom - top);
        bool last = k + here == depth;
        for (int64_t r = top; r < bottom; ++r, next += lines * here * 2) {
            const Block& one = blocks[r];
            float* into = held + (r - top) * 1024;
            auto factors = [](const bf16* a, int64_t lda, const bf16* b, int64_t depth, const char* next, int64_t lines) {
                return Factors{a, a + 16 * lda, lda, 32, b, b + 512, 32, 1024, depth / 32, next, lines};
            };
            const Factors mine = factors(one.a + k, depth, first, here, next, lines);
            if (last && one.b2) {
                const Factors other = factors(one.a2, one.depth2, one.b2 + panel * one.depth2 * 32, one.depth2, next, 0);
                sum(into, 32, k > 0, one.rows, mine, &other);
            } else {
                sum(into, 32, k > 0, one.rows, mine);
            }
            if (last) ready(one, into);
        }
    }
}

// C [operands.rows, n] of the operands and B of `depth` rows; bias [n] or null.
extern "C" void product(const Operands* operands, const bf16* b, int64_t depth, const float* bias, int64_t n,
                        int threads) {
    tiles_allowed();
    std::vector<bf16*> copies;
    std::vector<Block> all = divided(*operands, depth, n, copies);
    bool past = (uintptr_t)operands->c % 64 == 0 && operands->rows * n * 2 > PAST_BYTES;
    int64_t panels = n / 32, blocks = all.size(), part = part_rows(depth, blocks);
    // A deep product is summed group by group with sums for all panels, because A would otherwise be read again for
    // each panel. A narrow one has too few panels for the threads, so its rows are divided among them.
    bool narrow = panels <= NARROW, deep = depth > DEEP && !narrow;
#pragma omp parallel num_threads(threads)
    {
        int64_t started = omp_get_num_threads();  // may be fewer than `threads`
        int64_t kept = deep ? (panels + started - 1) / started : 1;
        int64_t band = deep ? SUMS_BYTES / (kept * 4096) : BAND_BYTES / (64 * depth);
        band = std::min(narrow ? (blocks + started - 1) / started : blocks, std::max<int64_t>(2, band));
        Tiles tiles;
        float* sums = (float*)taken(kept * band * 4096);
        auto panel_of = [&](int64_t top, int64_t bottom, int64_t panel, float* held, int64_t from, int64_t to) {
            add(all.data(), top, bottom, b, depth, part, panel, held, from, to, [&](const Block& one, float* into) {
                round_sums(into, bias ? bias + panel * 32 : nullptr, one.c + panel * 32, n, one.rows, past);
            });
        };
        if (narrow) {
#pragma omp for schedule(static) nowait
            for (int64_t top = 0; top < blocks; top += band)
                for (int64_t panel = 0; panel < panels; ++panel)
                    panel_of(top, std::min(blocks, top + band), panel, sums, 0, depth);
        }
        for (int64_t top = 0; top < blocks && !narrow; top += band) {
            int64_t bottom = std::min(blocks, top + band);
            if (!deep) {
#pragma omp for schedule(static) nowait
                for (int64_t panel = 0; panel < panels; ++panel) panel_of(top, bottom, panel, sums, 0, depth);
                continue;
            }
            for (int64_t from = 0; from < depth; from += GROUP) {
                int64_t mine = 0;
#pragma omp for schedule(static) nowait
                for (int64_t panel = 0; panel < panels; ++panel)
                    panel_of(top, bottom, panel, sums + mine++ * band * 1024, from, std::min(depth, from + GROUP));
            }
        }
        settled();
        std::free(sums);
    }
    for (bf16* copy : copies) std::free(copy);
}

// The gated MLP's middle, C [M, n / 2] = silu(gate) * up, where A B [M, n] has gate in its first n / 2 columns and up
// in the others. Both are rounded as `product` rounds them, but not written to memory. Returns false, and does nothing,
// if B is deep or n is no multiple of 64.
extern "C" bool gated_product(const Operands* operands, const bf16* b, int64_t depth, int64_t n, int threads) {
    if (depth > DEEP || n % 64) return false;
    std::vector<bf16*> copies;
    std::vector<Block> all = divided(*operands, depth, n / 2, copies);
    int64_t half = n / 64, blocks = all.size(), part = part_rows(depth, blocks);
    int64_t band = std::min(blocks, std::max<int64_t>(2, BAND_BYTES / (64 * depth)));
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        float *gates = (float*)taken(2 * band * 4096), *others = gates + band * 1024;
        for (int64_t top = 0; top < blocks; top += band) {
            int64_t bottom = std::min(blocks, top + band);
#pragma omp for schedule(static) nowait
            for (int64_t panel = 0; panel < half; ++panel) {
                add(all.data(), top, bottom, b, depth, part, panel, gates, 0, depth, [](const Block&, float*) {});
                add(all.data(), top, bottom, b, depth, part, panel + half, others, 0, depth,
                    [&](const Block& one, float* other) {
                        const float* gate = gates + (other - others);
                        for (int64_t r = 0; r < one.rows; ++r) {
                            bf16* to = one.c + r * (n / 2) + panel * 32;
#pragma omp simd
                            for (int64_t at = 0; at < 32; ++at) {
                                bf16 g, o;
                                down(gate[r * 32 + at], &g);
                                down(other[r * 32 + at], &o);
                                down(up(g) * sigmoid(up(g)) * up(o), to + at);
                            }
                        }
                    });
            }
        }
        std::free(gates);
    }
    for (bf16* copy : copies) std::free(copy);
    return true;
}

// Whether this process may use tiles.
extern "C" int tiles() { return tiles_allowed() ? 1 : 0; }

// A block [32, 32] of x, whose rows have n numbers, as pairs of rows: columns 0-15 in `left`, 16-31 in `right`. Rows
// from `rows` on count as zeros.
static inline void pairs(const bf16* x, int64_t n, int64_t rows, __m512i* left, __m512i* right) {
    const __m512i none = _mm512_setzero_si512();
    for (int64_t i = 0; i < 16; ++i, x += 2 * n) {
        __m512i even = 2 * i < rows ? _mm512_loadu_si512((const void*)x) : none;
        __m512i odd = 2 * i + 1 < rows ? _mm512_loadu_si512((const void*)(x + n)) : none;
        left[i] = first_pairs(even, odd);
        right[i] = last_pairs(even, odd);
    }
}

// 32 columns of 32 * blocks rows of x as pairs of rows, into `panel`; rows from `rows` on count as zeros. ahead:
// prefetch the next 32 columns.
static inline void lay_out(const bf16* x, int64_t n, int64_t rows, int64_t blocks, bool ahead, bf16* panel) {
    for (int64_t j = 0; j < blocks; ++j, x += 32 * n, rows -= 32, panel += 1024) {
        __m512i left[16], right[16];
        for (int64_t i = 0; ahead && i < std::min<int64_t>(32, rows); ++i) __builtin_prefetch(x + i * n + 32, 0, 2);
        pairs(x, n, rows, left, right);
        for (int64_t i = 0; i < 16; ++i) {
            _mm512_store_si512((void*)(panel + i * 32), left[i]);
            _mm512_store_si512((void*)(panel + 512 + i * 32), right[i]);
        }
    }
}

// C [R, N] = L^T X of L [T, R] and X [T, N], the gradient of a low-rank factor. R and N are multiples of 32.
//
// X is read slab by slab (32 * SLAB rows). In a slab, each panel of 32 columns is laid out as pairs of rows once for
// all R; the sums of all panels are held until the last slab.
extern "C" void outer(const bf16* l, int64_t r, const bf16* x, int64_t n, int64_t t, bf16* c, int threads) {
    tiles_allowed();
    int64_t deep = (t + 31) / 32;
    // L^T as tiles of 16 rows: for each 16 of R, for each 32 of T.
    bf16* left = (bf16*)taken(r * deep * 64);
    for (int64_t k = 0; k < deep; ++k)
        for (int64_t i = 0; i < r; i += 32) {
            __m512i rows[2][16];
            pairs(l + k * 32 * r + i, r, t - k * 32, rows[0], rows[1]);
            for (int64_t half = 0; half < 2; ++half) {
                transpose(rows[half]);
                bf16* to = left + ((i / 16 + half) * deep + k) * 512;
                for (int64_t j = 0; j < 16; ++j) _mm512_store_si512((void*)(to + j * 32), rows[half][j]);
            }
        }
    int64_t most = std::max<int64_t>(1, SUMS_BYTES / (r * 128));  // panels whose sums are held at once
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        bf16* panel = (bf16*)taken(SLAB * 2048);
        float* sums = (float*)taken(most * r * 128);
#pragma omp for schedule(static)
        for (int64_t part = 0; part < threads; ++part) {
            int64_t begins = n / 32 * part / threads, ends = n / 32 * (part + 1) / threads;
            for (int64_t top = begins; top < ends; top += most) {
                int64_t bottom = std::min(ends, top + most);
                for (int64_t k = 0; k < deep; k += SLAB) {
                    int64_t here = std::min(SLAB, deep - k);
                    for (int64_t p = top; p < bottom; ++p) {
                        lay_out(x + k * 32 * n + p * 32, n, t - k * 32, here, p + 1 < bottom, panel);
                        for (int64_t i = 0; i < r; i += 32) {
                            const bf16* upper = left + (i * deep + k * 16) * 32;
                            float* held = sums + ((p - top) * r + i) * 32;
                            sum(held, 32, k > 0, 32,
                                {upper, upper + 16 * deep * 32, 32, 512, panel, panel + 512, 32, 1024, here, nullptr, 0});
                            if (k + here == deep) round_sums(held, nullptr, c + i * n + p * 32, n, 32, false);
                        }
                    }
                }
            }
        }
        std::free(panel);
        std::free(sums);
    }
    std::free(left);
}

// Lays out w [n, k] as the operand B [k, n] in `across` and as B [n, k] in `along`. Either may be null.
extern "C" void pack(const bf16* w, int64_t n, int64_t k, bf16* across, bf16* along, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < (across ? n / 32 : 0); ++panel)
        for (int64_t deep = 0; deep < k / 32; ++deep)
            for (int64_t half = 0; half < 2; ++half) {
                const bf16* from = w + (panel * 32 + half * 16) * k + deep * 32;
                bf16* to = across + ((panel * (k / 32) + deep) * 2 + half) * 512;
                __m512i rows[16];
                for (int64_t i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(from + i * k);
                transpose(rows);
                for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 32, rows[i]);
            }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < (along ? k / 32 : 0); ++panel)
        for (int64_t deep = 0; deep < n / 32; ++deep)
            for (int64_t r = 0; r < 16; ++r) {
                const bf16* from = w + (deep * 32 + 2 * r) * k + panel * 32;
                __m512i even = _mm512_loadu_si512(from), odd = _mm512_loadu_si512(from + k);
                bf16* to = along + (panel * (n / 32) + deep) * 1024 + r * 32;
                _mm512_storeu_si512(to, first_pairs(even, odd));
                _mm512_storeu_si512(to + 512, last_pairs(even, odd));
            }
}
#else
extern "C" int tiles() { return 0; }
#endif
