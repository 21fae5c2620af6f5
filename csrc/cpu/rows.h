// The definition in C++, one row at a time: scores, online softmax, weighted sum, over the keys that the row sees and no others.
// It serves the few rows that the fast kernels cannot: NaN or Inf in a value that a neighbouring row must not see.
#pragma once
#include "call.h"

namespace ha {

inline float mask_value(const HaAttention& a, int64_t index) {           // what the mask adds to a score: 0 or -inf for bool masks
    switch (a.mask_dtype) {
        case HA_BOOL: return static_cast<const uint8_t*>(a.mask)[index] ? 0.0f : NEG_INF;
        case HA_F32: return static_cast<const float*>(a.mask)[index];
        case HA_F16: return to_float(static_cast<const f16*>(a.mask)[index]);
        case HA_BF16: return to_float(static_cast<const bf16*>(a.mask)[index]);
        case HA_F64: return (float)static_cast<const double*>(a.mask)[index];
    }
    return 0.0f;
}

// Row `row` of the item against its key range: o [Dv], m, l as in a partial slot.
template <class T>
void attend_row(const Call<T>& call, const Item& item, int64_t row, float* o, float& m, float& l) {
    const HaAttention& a = call.a;
    int64_t i = row / call.group, head = item.kv_head * call.group + row % call.group;
    int64_t kv_len = call.kv_len(item.batch), position = i + kv_len - call.q_len(item.batch);
    const T* q = call.query(item.batch, head, i);
    Rows<T> keys = call.keys(item.batch, item.kv_head), values = call.values(item.batch, item.kv_head);
    m = NEG_INF;
    l = 0;
    std::fill(o, o + a.v_head_dim, 0.0f);
    int64_t end = std::min(item.key_end, call.end_key(position, kv_len));
    for (int64_t j = std::max(item.key, call.first_key(position)); j < end; ++j) {
        const T* k = keys.row(j);
        float s = 0;
        for (int d = 0; d < a.head_dim; ++d) s += to_float(q[d * a.q_stride[3]]) * to_float(k[d * keys.element_stride]);
        s *= a.scale;
        if (a.softcap != 0) s = a.softcap * std::tanh(s / a.softcap);
        if (a.alibi) s -= call.slope(item.batch, head) * (float)std::abs(position - j);
        if (a.mask_dtype != HA_NONE) s += mask_value(a, call.mask_offset(item.batch, head, i) + j * a.mask_stride[3]);
        if (s == NEG_INF) continue;
        float top = s > m ? s : m, shift = top == NEG_INF ? 0.0f : top;
        float keep = m == NEG_INF ? 1.0f : std::exp(m - shift), p = std::exp(s - shift);
        const T* v = values.row(j);
        l = l * keep + p;
        for (int d = 0; d < a.v_head_dim; ++d) o[d] = o[d] * keep + p * to_float(v[d * values.element_stride]);
        m = top;
    }
}

}  // namespace ha
