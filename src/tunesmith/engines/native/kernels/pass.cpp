// All layers of a decoding pass in one call. It calls the kernels that network.py calls one by one from Python.
// It computes Llama's layers only: network/passes.py says which networks fit.

#include "kernels.h"
#include "tiles.h"

// A linear layer: its weight [out, into] laid out for tiles, its bias [out] or null, and low-rank factors (rank 0:
// none): low = x a_for_low [rows, rank], and low c_for_output is added to the output. masked [rows, rank] or null: the
// low-rank activations to set to zero, because they belong to another row's adapter.
struct Product {
    const bf16 *packed, *a_for_low, *c_for_output;
    const float* bias;
    const uint8_t* masked;
    int64_t out, into, rank;
};

struct PassLayer {
    const bf16 *attention_norm, *mlp_norm;
    bf16 *keys, *values;
    Product qkv, o, gate_up, down;
};

// Rows [first, first + count), which share a prefix of `prefix` tokens (0: none). shared: pages of its keys, for each
// layer, then pages of its values, for each layer. prompt: whether the rows are neighbouring tokens of one prompt.
struct Group {
    int64_t first, count, prefix, prompt;
    const bf16* const* shared;
};

// One pass. x [rows, width] holds the embeddings when it starts. When it ends, the hidden states are x + added. The
// tensors after `added` are buffers for intermediate results.
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
// The operands of a linear layer on x [rows, into], whose output goes to y. Computes the low-rank activations into
// `low`.
static Operands operands_of(const Product& p, const bf16* x, bf16* low, bf16* y, int64_t rows, int threads) {
    if (p.rank) {
        Operands lower = {x, nullptr, nullptr, 0, rows, low};
        product(&lower, p.a_for_low, p.into, nullptr, p.rank, threads);
        for (int64_t i = 0; p.masked && i < rows * p.rank; ++i)
            if (p.masked[i]) low[i].bits = 0;
    }
    return {x, p.rank ? low : nullptr, p.rank ? p.c_for_output : nullptr, p.rank, rows, y};
}

static void multiply(const Product& p, const bf16* x, bf16* low, bf16* y, int64_t rows, int threads) {
    Operands operands = operands_of(p, x, low, y, rows, threads);
    product(&operands, p.packed, p.into, p.bias, p.out, threads);
}

extern "C" void decoding_pass(const Pass* pass) {
    const Pass& p = *pass;
    const int threads = int(p.threads);
    for (int64_t n = 0; n < p.layers; ++n) {
        const PassLayer& layer = p.layer[n];
        add_norm(p.x, n ? p.added : nullptr, layer.attention_norm, p.x, p.normed, p.norms, p.rows, p.width,
                      p.epsilon, p.offset, threads);
        multiply(layer.qkv, p.normed, p.low, p.qkv, p.rows, threads);
        decode_split(p.pages, p.qkv, p.cosine, p.sine, p.q, layer.keys, layer.values, threads);
        for (const Group* g = p.group; g < p.group + p.groups; ++g) {
            const bf16* keys = g->prefix ? g->shared[n] : nullptr;
            const bf16* values = g->prefix ? g->shared[p.layers + n] : nullptr;
            decode_mix(p.pages, p.q, keys, values, layer.keys, layer.values, p.mixed, g->first, g->count, g->prefix,
                            g->prompt, p.scale, threads);
        }
        multiply(layer.o, p.mixed, p.low, p.added, p.rows, threads);
        add_norm(p.x, p.added, layer.mlp_norm, p.x, p.normed, p.norms, p.rows, p.width, p.epsilon, p.offset,
                      threads);
        Operands middle = operands_of(layer.gate_up, p.normed, p.low, p.middle, p.rows, threads);
        if (layer.gate_up.bias || !gated_product(&middle, layer.gate_up.packed, p.width, layer.gate_up.out, threads)) {
            middle.c = p.gate_up;
            product(&middle, layer.gate_up.packed, p.width, layer.gate_up.bias, layer.gate_up.out, threads);
            gated(p.gate_up, p.middle, p.rows, layer.gate_up.out / 2, threads);
        }
        multiply(layer.down, p.middle, p.low, p.added, p.rows, threads);
    }
}
#endif
