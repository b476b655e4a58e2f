// Products of bf16 matrices on AMX tiles.
//
// C [M, N] = A [M, K] B + A2 [M, K2] B2 + bias, summed in float and rounded once. B lies packed: for each 32 columns, for
// each 32 rows of B, two tiles of 16 x 16 pairs, so that a panel of columns is read front to back. K, K2 and N are
// multiples of 32. Each thread has its own panels.

#include "tiles.h"

#ifdef TILES
static const int64_t DEPTH = 256;         // a panel of so many rows stays in the first cache beside its block of A
static const int64_t FEW = 2;             // with so few blocks of A, B is waited for: half as much of it is asked for early
static const int64_t GROUP = 4096;        // so many rows of B are summed before the next band of A
static const int64_t BAND_BYTES = 768 << 10;  // a band of A that stays in the second cache

// One 32 x 32 block over `depth` of K: sums [32][32], added to what is there unless first. next: what is read later, of
// which each step asks for `lines` of 64 bytes: all at once they would hold up the products.
static inline void block(const bf16* a, int64_t lda, const bf16* b, int64_t depth, float* sums, bool first,
                         const char* next, int64_t lines) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 128);
        _tile_loadd(1, sums + 16, 128);
        _tile_loadd(2, sums + 16 * 32, 128);
        _tile_loadd(3, sums + 16 * 32 + 16, 128);
    }
    for (int64_t k = 0; k < depth; k += 32, b += 1024) {
        for (int64_t line = 0; line < lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
        _tile_loadd(4, a + k, lda * 2);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + 512, 64);
        _tile_loadd(5, a + 16 * lda + k, lda * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 16 * 32, 128);
    _tile_stored(3, sums + 16 * 32 + 16, 128);
}

static void settle(const float* sums, const float* bias, bf16* c, int64_t ldc, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
        const float* from = sums + r * 32;
        bf16* to = c + r * ldc;
        if (bias) {
#pragma omp simd
            for (int i = 0; i < 32; ++i) down(from[i] + bias[i], to + i);
        } else {
            __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
            _mm512_storeu_si512((void*)to, (__m512i)both);
        }
    }
}

struct Operand {
    const bf16 *a, *b;
    int64_t lda, depth;
};

static void multiply(const Operand* operands, int count, const float* bias, bf16* c, int64_t ldc, int64_t m, int64_t n,
                     int threads) {
    tiles_allowed();
    int64_t panels = n / 32, blocks = (m + 31) / 32;
#pragma omp parallel num_threads(threads)
    {
        TileConfig config;
        _tile_loadconfig(&config);
        // A last block of fewer than 32 rows is read from a copy: tiles always load 32.
        int64_t deepest = 0, ragged = m % 32;
        for (int i = 0; i < count; ++i) deepest += operands[i].depth;
        bf16* tail = ragged ? (bf16*)std::calloc(32 * deepest, 2) : nullptr;
        for (int64_t r = 0, at = 0; ragged && r < count; at += 32 * operands[r].depth, ++r)
            for (int64_t i = 0; i < ragged; ++i)
                std::memcpy((void*)(tail + at + i * operands[r].depth),
                            operands[r].a + (m - ragged + i) * operands[r].lda, operands[r].depth * 2);
        int64_t band = std::min(blocks, std::max<int64_t>(2, BAND_BYTES / (64 * std::min(deepest, GROUP))));
        // A deep product is summed group by group, with sums for every panel: else A would be read anew for each.
        int64_t kept = deepest > GROUP ? (panels + threads - 1) / threads : 1;
        float* sums = (float*)std::aligned_alloc(64, kept * band * 1024 * 4);
        for (int64_t top = 0; top < blocks; top += band) {
            int64_t bottom = std::min(blocks, top + band);
            // Rows [from, to) of operand i into a panel's sums; the last of all settles them in C.
            auto add = [&](int i, int64_t at, int64_t panel, float* held, int64_t from, int64_t to) {
                const Operand& o = operands[i];
                const int64_t most = bottom - top <= FEW ? DEPTH / 2 : DEPTH;
                for (int64_t k = from; k < to; k += most) {
                    int64_t depth = std::min<int64_t>(most, to - k);
                    const bf16* b = o.b + panel * o.depth * 32 + k * 32;
                    // What follows in B is what is read next; without asking early, the first block would wait for it.
                    const char* next = (const char*)(b + depth * 32);
                    int64_t lines = (32 + bottom - top - 1) / (bottom - top);
                    bool settles = i == count - 1 && k + depth == o.depth;
                    for (int64_t r = top; r < bottom; ++r, next += lines * depth * 2) {
                        if (settles)
                            for (int64_t line = 0; line < 32; ++line)
                                __builtin_prefetch(c + (r * 32 + line) * ldc + panel * 32, 1, 3);
                        bool copied = ragged && r == blocks - 1;
                        const bf16* a = copied ? tail + at + k : o.a + r * 32 * o.lda + k;
                        float* into = held + (r - top) * 1024;
                        block(a, copied ? o.depth : o.lda, b, depth, into, i == 0 && k == 0, next, lines);
                        if (settles)
                            settle(into, bias ? bias + panel * 32 : nullptr, c + r * 32 * ldc + panel * 32, ldc,
                                   copied ? ragged : 32);
                    }
                }
            };
            if (kept == 1) {
#pragma omp for schedule(static) nowait
                for (int64_t panel = 0; panel < panels; ++panel)
                    for (int64_t i = 0, at = 0; i < count; at += 32 * operands[i++].depth)
                        add(int(i), at, panel, sums, 0, operands[i].depth);
                continue;
            }
            for (int64_t i = 0, at = 0; i < count; at += 32 * operands[i++].depth)
                for (int64_t from = 0; from < operands[i].depth; from += GROUP) {
                    int64_t mine = 0;
#pragma omp for schedule(static) nowait
                    for (int64_t panel = 0; panel < panels; ++panel)
                        add(int(i), at, panel, sums + mine++ * band * 1024, from,
                            std::min(operands[i].depth, from + GROUP));
                }
        }
        std::free(sums);
        std::free(tail);
        _tile_release();
    }
}

extern "C" int tiles() { return tiles_allowed() ? 1 : 0; }
extern "C" void product(const bf16* a, int64_t lda, const bf16* b, int64_t depth, const bf16* a2, int64_t lda2,
                        const bf16* b2, int64_t depth2, const float* bias, bf16* c, int64_t m, int64_t n,
                        int threads) {
    Operand operands[2] = {{a, b, lda, depth}, {a2, b2, lda2, depth2}};
    multiply(operands, a2 ? 2 : 1, bias, c, n, m, n, threads);
}
// Packs w [n, k] as B [k, n] (across) and, where asked for, as B [n, k] (along).
extern "C" void pack(const bf16* w, int64_t n, int64_t k, bf16* across, bf16* along, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < (across ? n / 32 : 0); ++panel)
        for (int64_t deep = 0; deep < k / 32; ++deep)
            for (int64_t i = 0; i < 32; ++i) {
                const uint32_t* from = (const uint32_t*)(w + (panel * 32 + i) * k + deep * 32);
                uint32_t* to = (uint32_t*)across + ((panel * (k / 32) + deep) * 2 + i / 16) * 256 + i % 16;
                for (int64_t r = 0; r < 16; ++r) to[r * 16] = from[r];
            }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < (along ? k / 32 : 0); ++panel)
        for (int64_t deep = 0; deep < n / 32; ++deep)
            for (int64_t r = 0; r < 16; ++r) {
                const bf16 *first = w + (deep * 32 + 2 * r) * k + panel * 32, *second = first + k;
                bf16* to = along + (panel * (n / 32) + deep) * 1024 + r * 32;
                for (int64_t i = 0; i < 32; ++i) {
                    to[(i / 16) * 512 + (i % 16) * 2] = first[i];
                    to[(i / 16) * 512 + (i % 16) * 2 + 1] = second[i];
                }
            }
}
#else
extern "C" int tiles() { return 0; }
#endif
