// What all kernels share: the type bf16, exponentials, rotations, writes past the caches.
//
// This is plain C++ that a recent compiler vectorises. __init__.py compiles it for this machine at first use.
// network/ops.py has the same arithmetic in PyTorch, for machines without a compiler and as a reference for the tests.
// One thread computes a row, in a fixed order, so results do not depend on the number of threads.
//
// Activations are bf16 in memory and float in registers. Tensors [T, ...] are contiguous; T: tokens.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

struct bf16 {
    uint16_t bits;
};

// Memory for `count` numbers, aligned to a cache line. If there is none, prints an error and aborts, since C callers
// cannot catch an exception.
template <class T>
using Memory = std::unique_ptr<T[], decltype(&std::free)>;
template <class T>
static Memory<T> memory(int64_t count) {
    int64_t bytes = count * sizeof(T);
    void* start = std::aligned_alloc(64, (std::max<int64_t>(bytes, 1) + 63) / 64 * 64);
    if (!start) {
        std::fprintf(stderr, "tunesmith: %lld bytes of memory could not be had\n", (long long)bytes);
        std::abort();
    }
    return {(T*)start, &std::free};
}

static inline float up(bf16 v) {
    uint32_t wide = uint32_t(v.bits) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
}
static inline void down(float v, bf16* to) {  // rounds to nearest even; a NaN as processors produce it stays NaN
    uint32_t wide;
    std::memcpy(&wide, &v, 4);
    to->bits = uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

// e^x as 2^n times the Taylor polynomial of degree 4 on [-ln 2 / 2, ln 2 / 2]: relative error about 5e-5, a fortieth of
// the rounding error of bf16.
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = std::nearbyint(x * 1.44269504088896341f), r = x - n * 0.69314718056f;
    float p = ((((1.0f / 24) * r + 1.0f / 6) * r + 0.5f) * r + 1.0f) * r + 1.0f;
    int32_t scaled = (int32_t(n) + 127) << 23;
    float two;
    std::memcpy(&two, &scaled, 4);
    return p * two;
}

static inline float sigmoid(float g) { return 1.0f / (1.0f + exponential(-g)); }

// Replaces held [all] by e^(held - maximum) and returns the sum. Works in blocks of 16, so held needs room for 16 more.
[[maybe_unused]] static inline float exponentials(float* held, int64_t all) {
    float most[16], total[16] = {}, sum = 0;
    for (int j = 0; j < 16; ++j) held[all + j] = most[j] = -INFINITY;
    for (int64_t i = 0; i < all; i += 16)
#pragma omp simd
        for (int j = 0; j < 16; ++j) most[j] = std::max(most[j], held[i + j]);
    float shift = *std::max_element(most, most + 16);
    for (int64_t i = 0; i < all; i += 16)
#pragma omp simd
        for (int j = 0; j < 16; ++j) {
            float e = exponential(held[i + j] - shift);
            e = held[i + j] == -INFINITY ? 0.0f : e;
            held[i + j] = e;
            total[j] += e;
        }
    for (int j = 0; j < 16; ++j) sum += total[j];
    return sum;
}

// Rotates a head [2 * half] by angles [half]; sign -1 rotates back.
[[maybe_unused]] static inline void rotate(const bf16* from, bf16* to, const float* cosine, const float* sine,
                                           int64_t half, float sign) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        float first = up(from[i]), second = up(from[half + i]), s = sign * sine[i];
        down(first * cosine[i] - second * s, to + i);
        down(second * cosine[i] + first * s, to + half + i);
    }
}

// Copies `count` numbers. past: write past the caches (non-temporal stores). A result too large to stay in the caches
// is written twice as fast that way, because a cached write first reads each line.
[[maybe_unused]] static inline void put(const bf16* from, bf16* to, int64_t count, bool past) {
#if defined(__AVX512F__)
    int64_t line = 32, lines = past && (uintptr_t)to % 64 == 0 ? count / line : 0;
    for (int64_t i = 0; i < lines; ++i)
        _mm512_stream_si512((__m512i*)(to + i * line), _mm512_loadu_si512((const void*)(from + i * line)));
    std::memcpy((void*)(to + lines * line), from + lines * line, (count - lines * line) * 2);
#else
    std::memcpy((void*)to, from, count * 2);
#endif
}
[[maybe_unused]] static inline void settled() {  // makes writes past the caches visible to all threads
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}
[[maybe_unused]] static const int64_t PAST_BYTES = 1 << 20;  // a larger result does not stay in the caches
