// A panel of rows, one row a lane, and what happens to its scores between the two products: the score's features in the order of
// hetero_attn/reference.py, the keys that each lane may see, and the online softmax. Scores lie as [key][lane], so every step is
// vertical: a lane's maximum and sum are lanes of vectors.
#pragma once
#include "mask.h"
#include "prefill_bf16.h"

namespace ha {

// exp(x) for x <= 0, a third fewer operations than exp(): 2^n * 2^r by a degree-5 minimax polynomial. The one-part reduction loses
// 2^-24 * |x| relative, which exp(x) itself makes less than 2^-25 of the largest weight, 1. exp_weight(0) is exactly 1; 0 below -87.7.
inline vf exp_weight(vf x) {
    constexpr float MAGIC = 0x1.8p23f + 127.0f, LOG2E = 1.44269504f;    // adding MAGIC leaves round(x) + 127 in the low bits
    x = max(splat(-88.0f), x);                                           // NaN stays
    vf t = x * LOG2E + MAGIC;
    vf r = x * LOG2E - (t - MAGIC);
    vf p = r * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
    p = p * r + 0x1.c6b752p-5f;
    p = p * r + 0x1.ebf9bcp-3f;
    p = p * r + 0x1.62e42ap-1f;
    p = p * r + 1.0f;
    return p * float_of(bits_of(t) << 23);                               // n = -127 makes a scale of 0
}

struct Panel {
    static constexpr int LANES = MAX_NV * W;
    int vectors, rows;                       // lanes from `rows` on are padding: they repeat the last row's position with zeros for a query
    int64_t row;                             // the first row, in the sequence
    float *q, *o, *m, *l;                    // q [D][lanes] scaled; o [Dv rounded up to W][lanes], m, l [lanes]: as in a partial slot
    int64_t position[LANES];                 // where the row stands among the keys
    int64_t begin[LANES], end[LANES];        // keys it sees, within the item's; neither ever falls from lane to lane
    int64_t mask_offset[LANES];
    float slope[LANES];
    bool poisoned;                           // met a NaN or Inf value under a key that some of its rows do not see: redone row by row

    int lanes() const { return vectors * W; }
    int64_t last_end() const { return end[lanes() - 1]; }
    bool all_see(int64_t from, int64_t to) const { return from >= begin[lanes() - 1] && to <= end[0]; }
};

// Rows [row, row + rows) of an item: where they stand and their queries, transposed and scaled. The arrays' memory is the caller's.
template <class T>
void open_panel(const Call<T>& call, const Item& item, int64_t row, int rows, Panel& panel) {
    const HaAttention& a = call.a;
    int64_t kv_len = call.kv_len(item.batch), shift = kv_len - call.q_len(item.batch);
    panel.vectors = (rows + W - 1) / W;
    panel.rows = rows;
    panel.row = row;
    panel.poisoned = false;
    for (int lane = 0; lane < panel.lanes(); ++lane) {
        int64_t r = row + std::min(lane, rows - 1), i = r / call.group, head = item.kv_head * call.group + r % call.group;
        panel.position[lane] = i + shift;
        panel.begin[lane] = std::min(item.key_end, std::max(item.key, call.first_key(i + shift)));
        panel.end[lane] = std::max(item.key, std::min(item.key_end, call.end_key(i + shift, kv_len)));
        panel.mask_offset[lane] = a.mask_dtype == HA_NONE ? 0 : call.mask_offset(item.batch, head, i);
        panel.slope[lane] = a.alibi ? call.slope(item.batch, head) : 0.0f;
        panel.m[lane] = NEG_INF;
        panel.l[lane] = 0;
    }
    for (int v = 0; v < panel.vectors; ++v) {
        const T* q[W];
        for (int i = 0; i < W; ++i) {
            int64_t r = row + v * W + i;
            q[i] = v * W + i < rows ? call.query(item.batch, item.kv_head * call.group + r % call.group, r / call.group) : nullptr;
        }
        ProductsOf<T>::type::pack_queries(q, a.head_dim, a.q_stride[3], a.scale, panel.q + v * W, panel.lanes());
    }
}

// One vector of lanes (the panel's v-th) against keys [key, key + n) of a tile; `scores` is that vector's column, `ld` floats a key.
struct ScoreColumn {
    const HaAttention& a;
    const Panel& panel;
    int v;
    int64_t key, n;
    float* scores;
    int64_t ld;

    void softcap() const {
        for (int64_t j = 0; j < n; ++j) store(scores + j * ld, tanh(load(scores + j * ld) / a.softcap) * a.softcap);
    }
    void alibi() const {
        vf slope = load(panel.slope + v * W);
        vi distance;
        for (int i = 0; i < W; ++i) distance[i] = (int32_t)(panel.position[v * W + i] - key);
        for (int64_t j = 0; j < n; ++j, distance -= 1) {
            vi magnitude = distance < 0 ? -distance : distance;
            store(scores + j * ld, load(scores + j * ld) - slope * __builtin_convertvector(magnitude, vf));
        }
    }
    void add_mask(const float* tile) const {
        for (int64_t j = 0; j < n; ++j) {
            vf s = load(scores + j * ld), x = load(tile + j * ld);
            store(scores + j * ld, a.mask_dtype == HA_BOOL ? blend(x != 0.0f, x, s) : s + x);
        }
    }
    // -inf where a lane does not see the key, whatever was computed there.
    void hide() const {
        vi begin, end;                                                   // of each lane, from `key`
        for (int i = 0; i < W; ++i) {
            begin[i] = (int32_t)std::max<int64_t>(0, std::min(n, panel.begin[v * W + i] - key));
            end[i] = (int32_t)std::max<int64_t>(0, std::min(n, panel.end[v * W + i] - key));
        }
        int64_t seen_from = begin[W - 1], seen_to = std::max<int64_t>(end[0], seen_from);        // by all lanes
        for (int64_t j = 0; j < n; ++j) {
            if (j == seen_from) j = seen_to;
            if (j >= n) break;
            vi index = (vi){} + (int32_t)j;
            store(scores + j * ld, blend((index >= begin) & (index < end), load(scores + j * ld), splat(NEG_INF)));
        }
    }
    // Scores become weights exp(score - running maximum), in pairs of keys as bf16 where PAIR is 2; m, l and, where a maximum grew, the
    // output sums follow.
    template <int PAIR>
    void soften() const {
        float *m = panel.m + v * W, *l = panel.l + v * W;
        vf before = load(m), top[4] = {before, before, before, before};
        int64_t j = 0;
        for (; j + 4 <= n; j += 4)
            for (int u = 0; u < 4; ++u) top[u] = max(load(scores + (j + u) * ld), top[u]);
        for (; j < n; ++j) top[0] = max(load(scores + j * ld), top[0]);
        vf now = max(max(top[0], top[1]), max(top[2], top[3]));
        vf shift = blend(now == NEG_INF, (vf){}, now);                   // a lane that has seen no key yet: exp(-inf - 0) is 0
        vf sum = load(l);
        if (any((now > before) & (sum != 0.0f))) {
            vf keep = exp_weight(before - shift);
            sum *= keep;
            for (int64_t d = 0; d < a.v_head_dim; ++d) store(panel.o + d * ld + v * W, load(panel.o + d * ld + v * W) * keep);
        }
        if constexpr (PAIR == 1) {
            for (j = 0; j < n; ++j) {
                vf p = exp_weight(load(scores + j * ld) - shift);
                store(scores + j * ld, p);
                sum += p;
            }
        } else {
            for (j = 0; j < n; j += 2) {
                vf p[2] = {exp_weight(load(scores + j * ld) - shift), (vf){}};
                if (j + 1 < n) p[1] = exp_weight(load(scores + (j + 1) * ld) - shift);
                sum += p[0];
                sum += p[1];
                store(scores + j / 2 * ld, weight_pair(p[0], p[1]));
            }
        }
        store(m, now);
        store(l, sum);
    }
};

}  // namespace ha
