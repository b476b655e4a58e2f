// What several files share: the layout of batches and pages, and the kernels that pass.cpp calls.

#pragma once

#include "numbers.h"

// The layout of a batch of T tokens: first the `prefix` tokens that all rows share, then the tokens of each row. There
// are kv key/value heads, kv * group query heads, and `size` numbers in a head. longest: tokens of the longest row.
struct Layout {
    int64_t tokens, prefix, rows, longest, kv, group, size;
    const int64_t* row_of;    // [T]: a token's row; -1 for the prefix
    const int64_t* place_of;  // [T]: a token's index in its row or in the prefix
    const int64_t* starts;    // [rows + 1]: each row's first token, then T
};

// Operands of a product on tiles: c [rows, N] = a [rows, K] B + a2 [rows, depth2] b2. b2 null: no second product.
struct Operands {
    const bf16 *a, *a2, *b2;
    int64_t depth2, rows;
    bf16* c;
};

// Where the rows of a decoding batch keep their keys and values; decoding.cpp describes a page's layout.
struct Pages {
    int64_t rows, kv, group, size;  // size: of a head
    int64_t page;                   // places in a page
    int64_t most;                   // pages of the row that has most
    int64_t longest;                // largest of the lengths
    int64_t stride;                 // numbers from the start of a page to the start of the next
    const int64_t* table;           // [rows, most]: numbers of each row's pages, in order
    const int64_t* length;          // [rows]: filled places of each row
};

extern "C" {
void add_norm(const bf16* x, const bf16* y, const bf16* weight, bf16* sum, bf16* out, float* scale, int64_t rows,
                   int64_t width, float epsilon, float offset, int threads);
void gated(const bf16* x, bf16* out, int64_t rows, int64_t width, int threads);
bool gated_product(const Operands* operands, const bf16* b, int64_t depth, int64_t n, int threads);
void product(const Operands* operands, const bf16* b, int64_t depth, const float* bias, int64_t n, int threads);
void decode_split(const Pages* p, const bf16* qkv, const float* cosine, const float* sine, bf16* q, bf16* keys,
                       bf16* values, int threads);
void decode_mix(const Pages* p, const bf16* q, const bf16* early_keys, const bf16* early_values, const bf16* keys,
                     const bf16* values, bf16* out, int64_t first, int64_t count, int64_t prefix, bool prompt,
                     float scale, int threads);
}
