// Kernels of the other files that a whole pass is made of (pass.cpp).

#pragma once

#include "numbers.h"

// Rows that share B in a product on tiles, with a second operand of their own (b2 null: none).
struct Span {
    const bf16 *a, *a2, *b2;
    int64_t depth2, rows;
    bf16* c;
};

// Where rows of a decoding batch keep their keys and values: see decoding.cpp. longest: of the lengths. apart: numbers
// from the beginning of one page to that of the next.
struct Pages {
    int64_t rows, kv, group, size, page, most, longest, apart;
    const int64_t *table, *length;
};

extern "C" {
void add_norm_bf16(const bf16* x, const bf16* y, const bf16* weight, bf16* sum, bf16* out, float* scale, int64_t rows,
                   int64_t width, float epsilon, float offset, int threads);
void gated_bf16(const bf16* x, bf16* out, int64_t rows, int64_t width, int threads);
bool gated_product(const Span* span, const bf16* b, int64_t depth, int64_t n, int threads);
void product(const Span* spans, int64_t count, const bf16* b, int64_t depth, const float* bias, int64_t n, int threads);
void decode_split_bf16(const Pages* p, const bf16* qkv, const float* cosine, const float* sine, bf16* q, bf16* keys,
                       bf16* values, int threads);
void decode_mix_bf16(const Pages* p, const bf16* q, const bf16* early_keys, const bf16* early_values, const bf16* keys,
                     const bf16* values, bf16* out, int64_t first, int64_t count, int64_t prefix, float scale,
                     int threads);
}
