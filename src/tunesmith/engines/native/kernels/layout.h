// How a batch lies: `prefix` tokens first, then the tokens of each row. heads = kv * group.

#pragma once

#include "numbers.h"

struct Layout {
    int64_t tokens, prefix, rows, longest, kv, group, size;
    const int64_t* row_of;    // [T]: row of a token, -1 in the prefix
    const int64_t* place_of;  // [T]: its place in the row, or in the prefix
    const int64_t* starts;    // [rows + 1]: a row's first token; behind the last row's, T
};
