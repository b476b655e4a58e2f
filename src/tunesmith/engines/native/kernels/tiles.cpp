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

#include "blocks.h"
#include "kernels.h"

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

// Rounds sums [rows, 32], plus bias [32] if there is one, into c, rows of `ldc` numbers. past: as in put of numbers.h.
static void round_sums(const float* sums, const float* bias, bf16* c, int64_t ldc, int64_t rows, bool past) {
    for (int64_t r = 0; r < rows; ++r) {
        const float* from = sums + r * 32;
        bf16* to = c + r * ldc;
        __m512i both = round32(sixteen(from), sixteen(from + 16));
        if (bias) {
#pragma omp simd
            for (int i = 0; i < 32; ++i) down(from[i] + bias[i], to + i);
        } else if (past) {
            _mm512_stream_si512((__m512i*)to, both);
        } else {
            _mm512_storeu_si512((void*)to, both);
        }
    }
}

// The rows of a product in blocks of 32, or fewer at the end. Tiles always load 32 rows, so an incomplete block is read
// from a copy, which is filled up with zeros.
struct Blocks {
    std::vector<Operands> all;
    std::vector<Memory<bf16>> copies;

    // B has `depth` rows, and C rows of n numbers.
    Blocks(const Operands& o, int64_t depth, int64_t n) {
        for (int64_t row = 0; row < o.rows; row += 32) {
            Operands one = {o.a + row * depth, o.b2 ? o.a2 + row * o.depth2 : nullptr, o.b2, o.depth2,
                            std::min<int64_t>(32, o.rows - row), o.c + row * n};
            if (one.rows < 32) {
                one.a = filled(one.a, one.rows, depth);
                if (o.b2) one.a2 = filled(one.a2, one.rows, o.depth2);
            }
            all.push_back(one);
        }
    }
    const bf16* filled(const bf16* rows, int64_t count, int64_t depth) {
        copies.push_back(memory<bf16>(32 * depth));
        bf16* copy = copies.back().get();
        std::fill(std::copy(rows, rows + count * depth, copy), copy + 32 * depth, bf16{0});
        return copy;
    }
};

// How many rows of a panel are multiplied before the next block of A.
static int64_t part_rows(int64_t depth, int64_t blocks) {
    int64_t most = blocks <= FEW ? DEPTH / 2 : DEPTH, parts = (depth + most - 1) / most;
    return ((depth + parts - 1) / parts + 31) / 32 * 32;
}

// Adds the products with rows [from, to) of B to the sums `held` [bottom - top, 32, 32] of blocks [top, bottom) and one
// panel. Calls ready(block, sums) for each block whose sums are complete. Inlined it is a tenth slower, since its
// caller takes registers from the sums.
template <class Ready>
[[gnu::noinline]] static void add(const Blocks& blocks, int64_t top, int64_t bottom, const bf16* b, int64_t depth, int64_t part,
                       int64_t panel, float* held, int64_t from, int64_t to, Ready ready) {
    for (int64_t k = from; k < to; k += part) {
        int64_t here = std::min(part, to - k);
        const bf16* first = b + panel * depth * 32 + k * 32;
        // Prefetch what follows in B, which is read next: otherwise the first block would wait for it.
        const char* next = (const char*)(first + here * 32);
        int64_t lines = (32 + bottom - top - 1) / (bottom - top);
        bool last = k + here == depth;
        for (int64_t r = top; r < bottom; ++r, next += lines * here * 2) {
            const Operands& one = blocks.all[r];
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
    const Blocks divided(*operands, depth, n);
    bool past = (uintptr_t)operands->c % 64 == 0 && operands->rows * n * 2 > PAST_BYTES;
    int64_t panels = n / 32, blocks = divided.all.size(), part = part_rows(depth, blocks);
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
        auto sums = memory<float>(kept * band * 1024);
        auto panel_of = [&](int64_t top, int64_t bottom, int64_t panel, float* held, int64_t from, int64_t to) {
            add(divided, top, bottom, b, depth, part, panel, held, from, to, [&](const Operands& one, float* into) {
                round_sums(into, bias ? bias + panel * 32 : nullptr, one.c + panel * 32, n, one.rows, past);
            });
        };
        if (narrow) {
#pragma omp for schedule(static) nowait
            for (int64_t top = 0; top < blocks; top += band)
                for (int64_t panel = 0; panel < panels; ++panel)
                    panel_of(top, std::min(blocks, top + band), panel, sums.get(), 0, depth);
        }
        for (int64_t top = 0; top < blocks && !narrow; top += band) {
            int64_t bottom = std::min(blocks, top + band), group = deep ? GROUP : depth;
            for (int64_t from = 0; from < depth; from += group) {
                int64_t mine = 0;
#pragma omp for schedule(static) nowait
                for (int64_t panel = 0; panel < panels; ++panel) {
                    float* held = &sums[deep ? mine++ * band * 1024 : 0];
                    panel_of(top, bottom, panel, held, from, std::min(depth, from + group));
                }
            }
        }
        settled();
    }
}

// The gated MLP's middle, C [M, n / 2] = silu(gate) * up, where A B [M, n] has gate in its first n / 2 columns and up
// in the others. Both are rounded as `product` rounds them, but not written to memory. Returns false, and does nothing,
// if B is deep or n is no multiple of 64.
extern "C" bool gated_product(const Operands* operands, const bf16* b, int64_t depth, int64_t n, int threads) {
    if (depth > DEEP || n % 64) return false;
    const Blocks divided(*operands, depth, n / 2);
    int64_t half = n / 64, blocks = divided.all.size(), part = part_rows(depth, blocks);
    int64_t band = std::min(blocks, std::max<int64_t>(2, BAND_BYTES / (64 * depth)));
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        auto sums = memory<float>(2 * band * 1024);
        float *gates = sums.get(), *others = gates + band * 1024;
        for (int64_t top = 0; top < blocks; top += band) {
            int64_t bottom = std::min(blocks, top + band);
#pragma omp for schedule(static) nowait
            for (int64_t panel = 0; panel < half; ++panel) {
                add(divided, top, bottom, b, depth, part, panel, gates, 0, depth, [](const Operands&, float*) {});
                add(divided, top, bottom, b, depth, part, panel + half, others, 0, depth,
                    [&](const Operands& one, float* other) {
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
    }
    return true;
}

// Whether this process may use tiles.
extern "C" int tiles() { return tiles_allowed() ? 1 : 0; }

// Row j of 32 columns of x, whose rows have `width` numbers; zeros from row `rows` on. Prefetches the next 32 columns.
static inline __m512i row_of(const bf16* x, int64_t width, int64_t rows, int64_t j) {
    __builtin_prefetch(x + j * width + 32, 0, 2);
    return j < rows ? _mm512_loadu_si512(x + j * width) : _mm512_setzero_si512();
}

// C [R, N] = L^T X of L [T, R] and X [T, N], the gradient of a low-rank factor. R and N are multiples of 32.
//
// X is read slab by slab (32 * SLAB rows). In a slab, each panel of 32 columns is laid out as pairs of rows once for
// all R; the sums of all panels are held until the last slab.
extern "C" void outer(const bf16* l, int64_t r, const bf16* x, int64_t n, int64_t t, bf16* c, int threads) {
    tiles_allowed();
    int64_t deep = (t + 31) / 32;
    auto left = memory<bf16>(r * deep * 32);  // L^T as tiles: for each 32 of R, for each 32 of T
    for (int64_t k = 0; k < deep; ++k)
        for (int64_t i = 0; i < r; i += 32) {
            auto row = [&](int64_t j) { return row_of(l + i, r, t, k * 32 + j); };
            write_transposed(row, &left[(i * deep + k * 32) * 32]);
        }
    int64_t most = std::max<int64_t>(1, SUMS_BYTES / (r * 128));  // panels whose sums are held at once
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        auto panel = memory<bf16>(SLAB * 1024);
        auto sums = memory<float>(most * r * 32);
#pragma omp for schedule(static)
        for (int64_t part = 0; part < threads; ++part) {
            int64_t begins = n / 32 * part / threads, ends = n / 32 * (part + 1) / threads;
            for (int64_t top = begins; top < ends; top += most) {
                int64_t bottom = std::min(ends, top + most);
                for (int64_t k = 0; k < deep; k += SLAB) {
                    int64_t here = std::min(SLAB, deep - k);
                    for (int64_t p = top; p < bottom; ++p) {
                        for (int64_t d = 0; d < here; ++d) {
                            auto row = [&](int64_t j) { return row_of(x + p * 32, n, t, (k + d) * 32 + j); };
                            write_pairs(row, &panel[d * 1024]);
                        }
                        for (int64_t i = 0; i < r; i += 32) {
                            float* held = &sums[((p - top) * r + i) * 32];
                            const bf16* factor = &left[(i * deep + k * 32) * 32];
                            product(factor, 32, 1024, panel.get(), 1024, here, held, 32, k > 0);
                            if (k + here == deep) round_sums(held, nullptr, c + i * n + p * 32, n, 32, false);
                        }
                    }
                }
            }
        }
    }
}

// Lays out w [n, k] as the operand B [k, n] in `across` and as B [n, k] in `along`. Either may be null.
extern "C" void pack(const bf16* w, int64_t n, int64_t k, bf16* across, bf16* along, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < n; row += 32) {
        if (across) pack_across(w + row * k, k, across + row * k);
        if (along) pack_along(w + row * k, k, along + row * 32, n * 32);
    }
}
#else
extern "C" int tiles() { return 0; }
#endif
