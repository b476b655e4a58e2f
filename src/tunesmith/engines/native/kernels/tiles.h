// What products of bf16 blocks need of the processor: AMX tiles, or AVX-512's products of pairs. TILES is defined where
// there is either.

#pragma once

#include "numbers.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define TILES

// What is added to a block of 32 x 32 sums: A [32, 32 * steps] B [32 * steps, 32]. A's rows are `stride` numbers apart,
// its steps `step`. B lies as tiles of 16 rows of 16 pairs: `stride_b` numbers from row to row, `step_b` from step to
// step. next: what is read later, of which each step asks for `lines` of 64 bytes: all at once they would hold up the
// products.
struct Factors {
    const bf16 *upper, *lower;  // the first 16 rows of A, and the others
    int64_t stride, step;
    const bf16 *left, *right;  // the first 16 columns of B, and the others
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

// A thread's tiles while it multiplies.
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

// sums [32, 32], rows of `width`: what is there already, or nought, and the products of one and of other, if there is
// another. All rows are computed, whatever `rows` says.
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

// Adds to the sums of ROWS rows, which stay in registers, 2 * ROWS of the 32: the columns' first half and the other.
// Each step asks for `lines` of what is at `next`.
template <int64_t ROWS>
static inline void add_steps(const Factors& f, const bf16* a, const char* next, int64_t lines, __m512* one,
                             __m512* other) {
    const bf16 *left = f.left, *right = f.right;
    for (int64_t n = 0; n < f.steps; ++n, a += f.step, left += f.step_b, right += f.step_b) {
        for (int64_t line = 0; line < lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
        for (int64_t pair = 0; pair < 16; ++pair) {
            __m512bh first = (__m512bh)_mm512_loadu_si512((const void*)(left + pair * f.stride_b));
            __m512bh second = (__m512bh)_mm512_loadu_si512((const void*)(right + pair * f.stride_b));
#pragma GCC unroll 8
            for (int64_t r = 0; r < ROWS; ++r) {
                int32_t both;
                std::memcpy(&both, a + r * f.stride + pair * 2, 4);
                __m512bh spread = (__m512bh)_mm512_set1_epi32(both);
                one[r] = _mm512_dpbf16_ps(one[r], spread, first);
                other[r] = _mm512_dpbf16_ps(other[r], spread, second);
            }
        }
    }
}

// ROWS rows from `row` on, whose sums are at `to`. `next`, `lines`: what to ask for early, as in add_steps.
template <int64_t ROWS>
static inline void sum_rows(float* to, int64_t width, bool add, int64_t row, const Factors& one, const Factors* other,
                            const char* next, int64_t lines) {
    __m512 left[ROWS], right[ROWS];
#pragma GCC unroll 8
    for (int64_t r = 0; r < ROWS; ++r) {
        left[r] = add ? _mm512_loadu_ps(to + r * width) : _mm512_setzero_ps();
        right[r] = add ? _mm512_loadu_ps(to + r * width + 16) : _mm512_setzero_ps();
    }
    auto from = [row](const Factors& f) { return (row < 16 ? f.upper : f.lower) + row % 16 * f.stride; };
    add_steps<ROWS>(one, from(one), next, lines, left, right);
    if (other) add_steps<ROWS>(*other, from(*other), nullptr, 0, left, right);
#pragma GCC unroll 8
    for (int64_t r = 0; r < ROWS; ++r) {
        _mm512_storeu_ps(to + r * width, left[r]);
        _mm512_storeu_ps(to + r * width + 16, right[r]);
    }
}

// sums [32, 32], rows of `width`: what is there already, or nought, and the products of one and of other, if there is
// another. Of all rows that are computed, the first `rows` are wanted: eight at a time, the last four or fewer by
// themselves. Each has its share of what is read later: asked for by the first ones alone, it would come too late.
[[maybe_unused]] static inline void sum(float* sums, int64_t width, bool add, int64_t rows, const Factors& one,
                                        const Factors* other = nullptr) {
    const char* next = one.next;
    for (int64_t row = 0, end; row < rows; row = end) {
        end = row + (rows - row > 4 ? 8 : 4);
        int64_t lines = one.lines * std::min(rows, end) / rows - one.lines * row / rows;
        float* to = sums + row * width;
        if (end - row == 8)
            sum_rows<8>(to, width, add, row, one, other, next, lines);
        else
            sum_rows<4>(to, width, add, row, one, other, next, lines);
        next += lines * one.steps * 64;
    }
}
#endif

// 16 x 16 pairs transposed.
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

// Two rows of 32 numbers to the pairs of their first 16 columns, and of the others.
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
