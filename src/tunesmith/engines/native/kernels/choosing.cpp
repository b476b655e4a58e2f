// Choosing tokens by their scores.

#include "numbers.h"

// place[row] = index of the largest of scores [rows, width], the first of equal ones.
extern "C" void largest(const bf16* scores, int64_t* place, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const bf16* s = scores + row * width;
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
extern "C" void forbid(bf16* scores, const int64_t* row, const uint32_t* bits, int64_t held, int64_t words,
                       int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t h = 0; h < held; ++h) {
        bf16 *s = scores + row[h] * width, none;
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
