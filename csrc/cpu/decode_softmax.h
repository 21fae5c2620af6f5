// One row's scores of a block of keys, from products to weights: softcap, ALiBi, mask, the range of keys that the row sees, and the online
// softmax, vectorised along the keys. Scores and maxima are natural logarithms: a float mask may hold finfo.min, which is a number.
#pragma once
#include "decode_products.h"
#include "rows.h"

namespace ha {
namespace decode {

struct Row {
    int64_t head, i, position;               // query head, query index, the key position where it stands
    int64_t first, end;                      // keys it sees, within the item
    int64_t mask;                            // offset of its mask element for key 0
    float slope, m;                          // m: running maximum
};

template <class M>
void load_mask_values(const M* p, int64_t n, int64_t stride, float* to) {
    int64_t j = 0;
    if (stride == 1)
        for (; j + W <= n; j += W) store(to + j, load(p + j));
    for (; j < n; ++j) to[j] = to_float(p[j * stride]);
}

// What the mask adds to the scores of keys [0, n) from element `offset` on: the fast ways for steps of one, the definition for the others.
inline void load_mask(const HaAttention& a, int64_t offset, int64_t n, float* to) {
    int64_t stride = a.mask_stride[3];
    switch (a.mask_dtype) {
        case HA_F32: return load_mask_values(static_cast<const float*>(a.mask) + offset, n, stride, to);
        case HA_F16: return load_mask_values(static_cast<const f16*>(a.mask) + offset, n, stride, to);
        case HA_BF16: return load_mask_values(static_cast<const bf16*>(a.mask) + offset, n, stride, to);
        case HA_BOOL:
            if (stride == 1) {
                const uint8_t* p = static_cast<const uint8_t*>(a.mask) + offset;
                for (int64_t j = 0; j < n; ++j) to[j] = p[j] ? 0.0f : NEG_INF;
                return;
            }
    }
    for (int64_t j = 0; j < n; ++j) to[j] = mask_value(a, offset + j * stride);
}

inline float highest(vf x) {                 // no lane is NaN
    float lanes[W];
    store(lanes, x);
    float top = lanes[0];
    for (int i = 1; i < W; ++i) top = lanes[i] > top ? lanes[i] : top;
    return top;
}

// Scores s of keys [key, key + n) become weights exp(s - m) with the new maximum m; those the row does not see become 0. `sums` [W] is the
// row's sum of weights, lane by lane. Returns what the sums so far must be multiplied by (sums has been). `mask`: n addends, or null.
inline float softmax_block(const HaAttention& a, Row& row, int64_t key, int64_t n, float* s, const float* mask, float* sums) {
    int64_t first = std::max<int64_t>(0, row.first - key), end = std::min(row.end - key, n);
    vi lane = lane_index();
    vf top = splat(row.m);
    for (int64_t j = 0; j < n; j += W) {
        vf x = load(s + j) * a.scale;
        if (a.softcap != 0) x = tanh(x / a.softcap) * a.softcap;
        if (a.alibi) {
            vf distance = splat((float)(row.position - key - j)) - __builtin_convertvector(lane, vf);
            x = x - (vf)((vi)distance & 0x7fffffff) * row.slope;
        }
        if (mask) x = x + load(mask + j);
        if (j < first || j + W > end) x = blend((lane >= (int32_t)(first - j)) & (lane < (int32_t)(end - j)), x, splat(NEG_INF));
        top = max(x, top);
        store(s + j, x);
    }
    float m = highest(top), shift = m == NEG_INF ? 0.0f : m;
    // m = -inf with sums there: they are NaN, from NaN scores, and must stay
    float keep = row.m == m || row.m == NEG_INF ? 1.0f : std::exp(row.m - shift);
    row.m = m;
    vf sum = load(sums) * keep;
    for (int64_t j = 0; j < n; j += W) {
        vf weight = exp(load(s + j) - shift);
        sum = sum + weight;
        store(s + j, weight);
    }
    store(sums, sum);
    return keep;
}

}  // namespace decode
}  // namespace ha
