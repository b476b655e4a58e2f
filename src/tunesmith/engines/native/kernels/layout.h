// The layout of a batch of T tokens: first the `prefix` tokens that all rows share, then the tokens of each row. There
// are kv key/value heads, kv * group query heads, and `size` numbers in a head. longest: tokens of the longest row.

#pragma once

#include "numbers.h"

struct Layout {
    int64_t tokens, prefix, rows, longest, kv, group, size;
    const int64_t* row_of;    // [T]: a token's row; -1 for the prefix
    const int64_t* place_of;  // [T]: a token's index in its row or in the prefix
    const int64_t* starts;    // [rows + 1]: each row's first token, then T
};
