// Choosing tokens by their scores.

#include "numbers.h"

// place[row] = index of the largest of scores [rows, width], the first of equal ones.
template <class T>
static void largest(const T* scores, int64_t* place, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T* s = scores + row * width;
        float most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < width; ++i) most = std::max(most, up(s[i]));
        int64_t at = 0;
        while (at < width - 1 && up(s[at]) != most) ++at;
        place[row] = at;
    }
}

// Sets scores [rows, width] of tokens that are not allowed to minus infinity. bits [held, words]: a bit for each token
// of row row[h], 1: allowed.
template <class T>
static void forbid(T* scores, const int64_t* row, const uint32_t* bits, int64_t held, int64_t words, int64_t width,
                   int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t h = 0; h < held; ++h) {
        T *s = scores + row[h] * width, none;
        down(-INFINITY, &none);
        for (int64_t w = 0; w < words; ++w) {
            uint32_t allowed = bits[h * words + w];
            if (allowed == 0xffffffffu) continue;
            int64_t last = std::min<int64_t>(32, width - w * 32);
            for (int64_t i = 0; i < last; ++i)
                if (!(allowed >> i & 1)) s[w * 32 + i] = none;
        }
    }
}

#define EXPORTS(T, NAME)                                                                                               \
    extern "C" void forbid_##NAME(T* scores, const int64_t* row, const uint32_t* bits, int64_t held, int64_t words,    \
                                  int64_t width, int threads) {                                                        \
        forbid<T>(scores, row, bits, held, words, width, threads);                                                     \
    }                                                                                                                  \
    extern "C" void largest_##NAME(const T* scores, int64_t* place, int64_t rows, int64_t width, int threads) {        \
        largest<T>(scores, place, rows, width, threads);                                                               \
    }

EXPORTS(float, f32)
EXPORTS(bf16, bf16)
