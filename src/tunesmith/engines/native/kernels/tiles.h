// Products of bf16 blocks of 32 x 32, by AMX tiles or by AVX-512 BF16's products of pairs. TILES is defined if the
// processor has either.

#pragma once

#include "numbers.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define TILES

// A product A [32, 32 * steps] B [32 * steps, 32], to be added to a block of 32 x 32 sums.
//
// In A, rows are `stride` numbers apart and steps `step`. B is in tiles of 16 rows of 16 pairs, whose rows are
// `stride_b` numbers apart, and steps `step_b`. next: data to prefetch, `lines` cache lines in each step. Prefetching
// it all at once would delay the products.
struct Factors {
    const bf16 *upper, *lower;  // A's rows 0-15 and 16-31
    int64_t stride, step;
    const bf16 *left, *right;  // B's columns 0-15 and 16-31
    int64_t stride_b, step_b, steps;
    const char* next;
    int64_t lines;
};

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>

[[maybe_unused]] static bool tiles_allowed() {
    const int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, request, tile_data) == 0;
    return allowed;
}

// Configures the thread's tile registers; releases them at the end of the scope.
struct Tiles {
    struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    Tiles() { _tile_loadconfig(&config); }
    ~Tiles() { _tile_release(); }
};

static inline void add_steps(const Factors& f) {
    const bf16 *upper = f.upper, *lower = f.lower, *left = f.left, *right = f.right;
    const char* next = f.next;
    for (int64_t n = 0; n < f.steps; ++n) {
        for (int64_t line = 0; line < f.lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
        _tile_loadd(4, upper, f.stride * 2);
        _tile_loadd(6, left, f.stride_b * 2);
        _tile_loadd(7, right, f.stride_b * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower, f.stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        upper += f.step, lower += f.step, left += f.step_b, right += f.step_b;
    }
}

// sums [32, 32] = product of `one`, plus that of `other` if there is one; `add`: add them to the sums. Rows of sums are
// `width` numbers apart. All 32 rows are computed.
[[maybe_unused]] static inline void sum(float* sums, int64_t width, bool add, int64_t, const Factors& one,
                                        const Factors* other = nullptr) {
    float* lower = sums + 16 * width;
    if (add) {
        _tile_loadd(0, sums, width * 4);
        _tile_loadd(1, sums + 16, width * 4);
        _tile_loadd(2, lower, width * 4);
        _tile_loadd(3, lower + 16, width * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    add_steps(one);
    if (other) add_steps(*other);
    _tile_stored(0, sums, width * 4);
    _tile_stored(1, sums + 16, width * 4);
    _tile_stored(2, lower, width * 4);
    _tile_stored(3, lower + 16, width * 4);
}
#else
[[maybe_unused]] static bool tiles_allowed() { return true; }

struct Tiles {
    Tiles() {}
    ~Tiles() {}
};

// Intel's products of bf16 pairs take twice as long as two products of floats, of which there are two units.
[[maybe_unused]] static bool slow_pairs() {
    static const bool slow = __builtin_cpu_is("intel");
    return slow;
}

static inline __m512 widened(const bf16* from) {
    __m512i both = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
}

// Adds a product to the sums of ROWS rows of `a`: columns 0-15 in `one`, 16-31 in `other`. The sums stay in 2 * ROWS of
// the 32 registers. Each step prefetches `lines` cache lines from `next` on. PAIRS: by products of bf16 pairs; else the
// numbers are widened to floats.
template <int64_t ROWS, bool PAIRS>
static inline void add_steps(const Factors& f, const bf16* a, const char* next, int64_t lines, __m512* one,
                             __m512* other) {
    const bf16 *left = f.left, *right = f.right;
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    alignas(64) float wide[PAIRS ? 1 : ROWS][32];
    for (int64_t n = 0; n < f.steps; ++n, a += f.step, left += f.step_b, right += f.step_b) {
        for (int64_t line = 0; line < lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
        if (!PAIRS)
            for (int64_t r = 0; r < ROWS; ++r)
                for (int64_t half = 0; half < 32; half += 16)
                    _mm512_store_ps(wide[r] + half, widened(a + r * f.stride + half));
        for (int64_t pair = 0; pair < 16; ++pair) {
            __m512i first = _mm512_loadu_si512((const void*)(left + pair * f.stride_b));
            __m512i second = _mm512_loadu_si512((const void*)(right + pair * f.stride_b));
            if (PAIRS) {
#pragma GCC unroll 8
                for (int64_t r = 0; r < ROWS; ++r) {
                    int32_t both;
                    std::memcpy(&both, a + r * f.stride + pair * 2, 4);
                    __m512bh spread = (__m512bh)_mm512_set1_epi32(both);
                    one[r] = _mm512_dpbf16_ps(one[r], spread, (__m512bh)first);
                    other[r] = _mm512_dpbf16_ps(other[r], spread, (__m512bh)second);
                }
                continue;
            }
#pragma GCC unroll 2
            for (int64_t each = 0; each < 2; ++each) {
                __m512 x = (__m512)(each ? _mm512_and_si512(first, upper) : _mm512_slli_epi32(first, 16));
                __m512 y = (__m512)(each ? _mm512_and_si512(second, upper) : _mm512_slli_epi32(second, 16));
#pragma GCC unroll 8
                for (int64_t r = 0; r < ROWS; ++r) {
                    __m512 spread = _mm512_set1_ps(wide[r][pair * 2 + each]);
                    one[r] = _mm512_fmadd_ps(spread, x, one[r]);
                    other[r] = _mm512_fmadd_ps(spread, y, other[r]);
                }
            }
        }
    }
}

// The sums of ROWS rows from `row` on, at `to`. next, lines: as in add_steps.
template <int64_t ROWS, bool PAIRS>
static inline void sum_rows(float* to, int64_t width, bool add, int64_t row, const Factors& one, const Factors* other,
                            const char* next, int64_t lines) {
    __m512 left[ROWS], right[ROWS];
#pragma GCC unroll 8
    for (int64_t r = 0; r < ROWS; ++r) {
        left[r] = add ? _mm512_loadu_ps(to + r * width) : _mm512_setzero_ps();
        right[r] = add ? _mm512_loadu_ps(to + r * width + 16) : _mm512_setzero_ps();
    }
    auto from = [row](const Factors& f) { return (row < 16 ? f.upper : f.lower) + row % 16 * f.stride; };
    add_steps<ROWS, PAIRS>(one, from(one), next, lines, left, right);
    if (other) add_steps<ROWS, PAIRS>(*other, from(*other), nullptr, 0, left, right);
#pragma GCC unroll 8
    for (int64_t r = 0; r < ROWS; ++r) {
        _mm512_storeu_ps(to + r * width, left[r]);
        _mm512_storeu_ps(to + r * width + 16, right[r]);
    }
}

// sums [32, 32] = product of `one`, plus that of `other` if there is one; `add`: add them to the sums. Rows of sums are
// `width` numbers apart. Computes the first `rows` rows, eight at a time, and the last four or fewer by themselves.
// Each group of rows prefetches its part of `next`, spread over the whole product.
[[maybe_unused]] static inline void sum(float* sums, int64_t width, bool add, int64_t rows, const Factors& one,
                                        const Factors* other = nullptr) {
    const char* next = one.next;
    for (int64_t row = 0, end; row < rows; row = end) {
        end = row + (rows - row > 4 ? 8 : 4);
        int64_t lines = one.lines * std::min(rows, end) / rows - one.lines * row / rows;
        float* to = sums + row * width;
        auto rows_of = slow_pairs() ? (end - row == 8 ? sum_rows<8, false> : sum_rows<4, false>)
                                    : (end - row == 8 ? sum_rows<8, true> : sum_rows<4, true>);
        rows_of(to, width, add, row, one, other, next, lines);
        next += lines * one.steps * 64;
    }
}
#endif

// Transposes 16 x 16 pairs in place.
[[maybe_unused]] static inline void transpose(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x44), b = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xee);
        __m512i c = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x44), d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xee);
        t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// Two rows of 32 numbers as pairs: first_pairs of columns 0-15, last_pairs of columns 16-31.
[[maybe_unused]] static inline __m512i first_pairs(__m512i one, __m512i other) {
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    return _mm512_permutex2var_epi16(one, order, other);
}
[[maybe_unused]] static inline __m512i last_pairs(__m512i one, __m512i other) {
    const __m512i order = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54,
                                           22, 53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
    return _mm512_permutex2var_epi16(one, order, other);
}
#endif
