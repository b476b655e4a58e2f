// All layers of a decoding pass in one call: the kernels that network.py calls one by one, without Python between them.
// Families that do more in a layer than Llama are not for it (engines/native/network/passes.py says which).

#include "kernels.h"
#include "tiles.h"

// A frozen weight [out, into] laid out for tiles, and a low-rank pair on top (rank 0: none). others [rows, rank], or
// null: which low values are not a row's own adapter's.
struct Product {
    const bf16 *packed, *down, *up;
    const float* bias;
    const uint8_t* others;
    int64_t out, into, rank;
};

struct PassLayer {
    const bf16 *attention_norm, *mlp_norm;
    bf16 *keys, *values;
    Product qkv, o, gate_up, down;
};

// Rows [first, first + count) that are behind one prefix. early: the keys, then the values, of every layer.
struct Group {
    int64_t first, count, prefix;
    const bf16* const* early;
};

// x [rows, width]: embeddings first, in the end what the layers made of them, without the last addend, which is in
// `added`. The other tensors are room for what is between.
struct Pass {
    int64_t rows, width, layers, groups, threads;
    float epsilon, offset, scale;
    const PassLayer* layer;
    const Group* group;
    const Pages* pages;
    const float *cosine, *sine;
    bf16 *x, *added, *normed, *qkv, *q, *mixed, *gate_up, *middle, *low;
    float* norms;
};

#ifdef TILES
static Span span(const Product& p, const bf16* x, bf16* low, bf16* y, int64_t rows, int threads) {
    if (p.rank) {
        Span lower = {x, nullptr, nullptr, 0, rows, low};
        product(&lower, 1, p.down, p.into, nullptr, p.rank, threads);
        for (int64_t i = 0; p.others && i < rows * p.rank; ++i)
            if (p.others[i]) low[i].bits = 0;
    }
    return {x, p.rank ? low : nullptr, p.rank ? p.up : nullptr, p.rank, rows, y};
}

static void multiply(const Product& p, const bf16* x, bf16* low, bf16* y, int64_t rows, int threads) {
    Span whole = span(p, x, low, y, rows, threads);
    product(&whole, 1, p.packed, p.into, p.bias, p.out, threads);
}

extern "C" void decoding_pass(const Pass* told) {
    const Pass& p = *told;
    const int threads = int(p.threads);
    for (int64_t n = 0; n < p.layers; ++n) {
        const PassLayer& layer = p.layer[n];
        add_norm_bf16(p.x, n ? p.added : nullptr, layer.attention_norm, p.x, p.normed, p.norms, p.rows, p.width,
                      p.epsilon, p.offset, threads);
        multiply(layer.qkv, p.normed, p.low, p.qkv, p.rows, threads);
        decode_split_bf16(p.pages, p.qkv, p.cosine, p.sine, p.q, layer.keys, layer.values, threads);
        for (const Group* g = p.group; g < p.group + p.groups; ++g) {
            const bf16 *keys = g->prefix ? g->early[n] : nullptr, *values = g->prefix ? g->early[p.layers + n] : nullptr;
            decode_mix_bf16(p.pages, p.q, keys, values, layer.keys, layer.values, p.mixed, g->first, g->count, g->prefix,
                            p.scale, threads);
        }
        multiply(layer.o, p.mixed, p.low, p.added, p.rows, threads);
        add_norm_bf16(p.x, p.added, layer.mlp_norm, p.x, p.normed, p.norms, p.rows, p.width, p.epsilon, p.offset,
                      threads);
        Span middle = span(layer.gate_up, p.normed, p.low, p.middle, p.rows, threads);
        if (layer.gate_up.bias || !gated_product(&middle, layer.gate_up.packed, p.width, layer.gate_up.out, threads)) {
            middle.c = p.gate_up;
            product(&middle, 1, layer.gate_up.packed, p.width, layer.gate_up.bias, layer.gate_up.out, threads);
            gated_bf16(p.gate_up, p.middle, p.rows, layer.gate_up.out / 2, threads);
        }
        multiply(layer.down, p.middle, p.low, p.added, p.rows, threads);
    }
}
#endif
