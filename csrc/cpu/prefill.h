// Many rows at once: tiled attention with an online softmax (FlashAttention-2's loop order) on vectors whose lanes are rows. An item's
// queries are packed once, transposed; each tile of keys and values is gathered once and serves every panel of the item; scores = K·Qᵀ
// and outputs = Vᵀ·P are register-blocked products (prefill_products.h, prefill_bf16.h), and nothing is ever summed across lanes.
// Memory: queries and outputs [rows][D + Dv] and one tile of K and V (L2), one panel's scores and mask [keys][lanes] (L1).
#pragma once
#include "parallel.h"
#include "prefill_panel.h"

namespace ha {

constexpr int64_t PREFILL_ROWS = 192;        // rows of one work item: whole panels for every W; more reuse a converted tile more often

// Keys of a tile: K, V and the panels must stay in a 512 KiB L2.
inline int64_t tile_keys(const HaAttention& a) {
    int32_t widest = std::max(a.head_dim, a.v_head_dim);
    return widest <= 128 ? 128 : widest <= 256 ? 64 : 32;
}
// Rows of a tile lie this far apart: with one line of padding, a column of 128 rows maps to all of L1's sets.
inline int64_t tile_stride(int64_t width) { return (width + 15) / 16 * 16 + 16; }

template <class T>
struct Prefill {
    typedef typename ProductsOf<T>::type Products;
    const Call<T>& call;
    const HaAttention& a;
    const Item& item;
    Ahead<T> ahead;
    int64_t k_ld, v_ld;
    float *k_tile, *v_tile, *scores, *mask;
    int64_t tile_begin, tile_end;
    int values_finite;                       // of this tile: 1 yes, 0 no, -1 not looked at yet

    bool finite_values() {
        if (values_finite < 0) values_finite = Products::finite_values(v_tile, tile_end - tile_begin, a.v_head_dim, v_ld);
        return values_finite;
    }

    void attend_panel(Panel& panel) {
        int64_t from = std::max(tile_begin, panel.begin[0]), to = std::min(tile_end, panel.last_end());
        if (to <= from || panel.poisoned) return;
        from -= (from - tile_begin) % Products::PAIR;                    // whole pairs, except at the end of the tile, where zeros follow
        to = std::min(tile_end, to + (to - tile_begin) % Products::PAIR);
        int64_t n = to - from;
        bool boundary = !panel.all_see(from, to);
        if (boundary && !finite_values()) {
            panel.poisoned = true;
            return;
        }
        MaskEffect effect = MaskEffect::none;
        if (a.mask_dtype != HA_NONE) effect = load_mask(a, panel.mask_offset, from, n, panel.vectors, mask);
        if (effect == MaskEffect::hides_all) return;

        int64_t lanes = panel.lanes(), upto[MAX_NV];
        for (int v = 0; v < panel.vectors; ++v) {
            int64_t seen = std::max<int64_t>(0, panel.end[v * W + W - 1] - from);
            upto[v] = v + 1 == panel.vectors ? n : std::min(n, (seen + BLOCK_M - 1) / BLOCK_M * BLOCK_M);
        }
        const float* k = k_tile + (from - tile_begin) * k_ld;
        for_steps(panel, upto, [&](int v, int64_t j, int64_t count) {
            const float* q = panel.q + v * W;
            float* s = scores + j * lanes + v * W;
            switch (panel.vectors - v) {
                case 1: Products::template scores<1>(count, a.head_dim, k + j * k_ld, k_ld, q, a.scale, s, lanes, ahead); break;
                case 2: Products::template scores<2>(count, a.head_dim, k + j * k_ld, k_ld, q, a.scale, s, lanes, ahead); break;
                case 3: Products::template scores<MAX_NV>(count, a.head_dim, k + j * k_ld, k_ld, q, a.scale, s, lanes, ahead); break;
            }
        });
        for (int v = 0; v < panel.vectors; ++v) {
            ScoreColumn column{a, panel, v, from, upto[v], scores + v * W, lanes};
            if (a.softcap != 0) column.softcap();
            if (a.alibi) column.alibi();
            if (effect != MaskEffect::none) column.add_mask(mask + v * W);
            if (boundary) column.hide();
            column.template soften<Products::PAIR>();
        }
        const float* v_rows = v_tile + (from - tile_begin) / Products::PAIR * v_ld;
        for_steps(panel, upto, [&](int v, int64_t j, int64_t count) {
            const float *p = scores + j / Products::PAIR * lanes + v * W, *values = v_rows + j / Products::PAIR * v_ld;
            float* o = panel.o + v * W;
            switch (panel.vectors - v) {
                case 1: Products::template outputs<1>(a.v_head_dim, count, values, v_ld, p, o, lanes, ahead); break;
                case 2: Products::template outputs<2>(a.v_head_dim, count, values, v_ld, p, o, lanes, ahead); break;
                case 3: Products::template outputs<MAX_NV>(a.v_head_dim, count, values, v_ld, p, o, lanes, ahead); break;
            }
        });
    }

    // Under a causal mask the later vectors of a panel see further, so the products narrow to them. step(v, j, count): keys
    // [j, j + count) matter to vectors v and later.
    template <class Step>
    static void for_steps(const Panel& panel, const int64_t* upto, const Step& step) {
        int64_t j = 0;
        for (int v = 0; v < panel.vectors; ++v) {
            if (upto[v] > j) step(v, j, upto[v] - j);
            j = std::max(j, upto[v]);
        }
    }

    // Rows leave as in rows.h: finished, or into their partial slots. `rows` is W rows of scratch, `width` apart.
    void close_panel(Panel& panel, float* partials, float* rows, int64_t width) {
        int64_t slot = partial_floats(a);
        for (int v = 0; v < panel.vectors; ++v) {
            if (!panel.poisoned) scatter_columns(panel.o + v * W, panel.lanes(), width, rows, width);
            for (int i = 0; i < W && v * W + i < panel.rows; ++i) {
                float* o = rows + i * width;
                float m = panel.m[v * W + i], l = panel.l[v * W + i];
                int64_t row = panel.row + v * W + i;
                if (panel.poisoned) attend_row(call, item, row, o, m, l);
                if (item.partial < 0) {
                    finish_row(call, item.batch, item.kv_head * call.group + row % call.group, row / call.group, o, m, l);
                } else {
                    float* to = partials + (item.partial + row - item.row) * slot;
                    std::memcpy(to, o, a.v_head_dim * sizeof(float));
                    to[a.v_head_dim] = m;
                    to[a.v_head_dim + 1] = l;
                }
            }
        }
    }
};

// False: out of memory.
template <class T>
bool attend_prefill(const Call<T>& call, const Item& item, float* partials, Scratch& scratch) {
    typedef typename ProductsOf<T>::type Products;
    const HaAttention& a = call.a;
    constexpr int PANELS = (PREFILL_ROWS + Panel::LANES - 1) / Panel::LANES;
    int64_t tile = tile_keys(a), k_ld = tile_stride(a.head_dim), v_ld = tile_stride(a.v_head_dim), width = (a.v_head_dim + W - 1) / W * W;
    int64_t rows = PANELS * Panel::LANES;
    float* memory = scratch.take(rows * (a.head_dim + width + 2) + tile * (k_ld + v_ld + 2 * Panel::LANES) + W * width);
    if (!memory) return false;
    auto take = [&](int64_t floats) {
        float* p = memory;
        memory += floats;
        return p;
    };

    Panel panels[PANELS];
    int count = 0;
    for (int64_t row = 0; row < item.rows; row += Panel::LANES, ++count) {
        Panel& panel = panels[count];
        panel.q = take(Panel::LANES * a.head_dim);
        panel.o = take(Panel::LANES * width);
        panel.m = take(Panel::LANES);
        panel.l = take(Panel::LANES);
        open_panel(call, item, item.row + row, (int)std::min<int64_t>(Panel::LANES, item.rows - row), panel);
        std::fill(panel.o, panel.o + panel.lanes() * width, 0.0f);
    }
    Rows<T> keys = call.keys(item.batch, item.kv_head), values = call.values(item.batch, item.kv_head);
    auto row_bytes = [](const Rows<T>& rows, int64_t width) { return rows.element_stride == 1 ? width * (int64_t)sizeof(T) : 0; };
    Ahead<T> ahead{{keys, values}, {row_bytes(keys, a.head_dim), row_bytes(values, a.v_head_dim)}, 0, 0};
    Prefill<T> prefill{call, a, item, ahead, k_ld, v_ld,
                       take(tile * k_ld), take(tile * v_ld), take(tile * Panel::LANES), take(tile * Panel::LANES), 0, 0, -1};
    for (int64_t key = item.key; key < item.key_end; key += tile) {
        prefill.tile_begin = key;
        prefill.tile_end = std::min(key + tile, item.key_end);
        prefill.values_finite = -1;
        Products::load_keys(keys, key, prefill.tile_end - key, a.head_dim, prefill.k_tile, k_ld);
        Products::load_values(values, key, prefill.tile_end - key, a.v_head_dim, prefill.v_tile, v_ld);
        prefill.ahead.next = 2 * prefill.tile_end;
        prefill.ahead.end = std::min(prefill.tile_end + tile, item.key_end);
        for (int p = 0; p < count; ++p) prefill.attend_panel(panels[p]);
    }
    float* out = take(W * width);
    for (int p = 0; p < count; ++p) prefill.close_panel(panels[p], partials, out, width);
    return true;
}

}  // namespace ha
