// Building blocks of attention on tiles: 16 numbers at a time, operands packed for tiles, products of 32 x 32 sums.

#pragma once

#include "tiles.h"

#ifdef TILES
static inline int64_t padded(int64_t count) { return (count + 31) / 32 * 32; }

static inline __m512 sixteen(const float* from) { return _mm512_loadu_ps(from); }
static inline __m512 sixteen(const bf16* from) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline void round16(__m512 from, bf16* to) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(from));
}
static inline __m512i round32(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Rotates a token's head [size] by its angles; sign -1 rotates back.
template <class T>
static inline void turn(const T* from, bf16* to, const float* cosine, const float* sine, int64_t size, float sign) {
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i += 16) {
        __m512 first = sixteen(from + i), second = sixteen(from + half + i), c = sixteen(cosine + i);
        __m512 s = _mm512_mul_ps(sixteen(sine + i), _mm512_set1_ps(sign));
        round16(_mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s)), to + i);
        round16(_mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s)), to + half + i);
    }
}

// 2^x for x <= 0, relative error about 3e-6. 0 below -125, because denormal numbers are a hundred times as slow. NaN
// stays NaN.
static inline __m512 power(__m512 x) {
    const __m512 least = _mm512_set1_ps(-125.0f);
    __mmask16 counts = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
    x = _mm512_max_ps(least, x);
    __m512i n = _mm512_cvtps_epi32(x);
    __m512 r = _mm512_sub_ps(x, _mm512_cvtepi32_ps(n)), p = _mm512_set1_ps(1.33335581e-3f);
    for (float factor : {9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(factor));
    __m512i scaled = _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(n, 23));
    return _mm512_maskz_mov_ps(counts, _mm512_castsi512_ps(scaled));
}

// Packs rows [32, D] as the second operand B [D, 32] of a product over D: two tiles for each 32 of D.
static inline void pack_across(const bf16* from, int64_t size, bf16* to) {
    for (int64_t d = 0; d < size; d += 32)
        for (int64_t half = 0; half < 2; ++half, to += 512) {
            __m512i rows[16];
            for (int64_t i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(from + (half * 16 + i) * size + d);
            transpose(rows);
            for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 32, rows[i]);
        }
}

// Writes 32 rows of 32 numbers to `to`, as the second operand of a product over the rows. row(j) returns row j.
template <class Make>
static inline void write_pairs(Make row, bf16* to) {
    for (int64_t r = 0; r < 16; ++r) {
        __m512i one = row(2 * r), other = row(2 * r + 1);
        _mm512_storeu_si512(to + r * 32, first_pairs(one, other));
        _mm512_storeu_si512(to + 512 + r * 32, last_pairs(one, other));
    }
}

// Writes the transpose of 32 rows of 32 numbers to `to`, as the first operand of a product. row(j) returns row j.
template <class Make>
static inline void write_transposed(Make row, bf16* to) {
    __m512i left[16], right[16];
    for (int64_t r = 0; r < 16; ++r) {
        __m512i one = row(2 * r), other = row(2 * r + 1);
        left[r] = first_pairs(one, other);
        right[r] = last_pairs(one, other);
    }
    transpose(left);
    transpose(right);
    for (int64_t i = 0; i < 16; ++i) {
        _mm512_storeu_si512(to + i * 32, left[i]);
        _mm512_storeu_si512(to + 512 + i * 32, right[i]);
    }
}

// Packs rows [32, D] as the second operand B [32, D] of a product over the rows: two tiles for each 32 of D, which are
// `step` numbers after those of the 32 before.
static inline void pack_along(const bf16* from, int64_t size, bf16* to, int64_t step = 1024) {
    for (int64_t d = 0; d < size; d += 32, to += step)
        write_pairs([&](int64_t j) { return _mm512_loadu_si512(from + j * size + d); }, to);
}

// sums [32, 32] = A [32, 32 * steps] B, or += if `add`. Numbers from row to row: `width` in sums, `stride` in A.
// Numbers from step to step: step_a in A, step_b in B.
static inline void product(const bf16* a, int64_t stride, int64_t step_a, const bf16* b, int64_t step_b, int64_t steps,
                           float* sums, int64_t width, bool add) {
    sum(sums, width, add, 32, {a, a + 16 * stride, stride, step_a, b, b + 512, 32, step_b, steps, nullptr, 0});
}
#endif
