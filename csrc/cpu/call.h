// What the attention kernels know of a call: where each sequence's rows and keys lie, which keys a row sees, and how a finished row is
// written. "Rows" are a KV head's query heads folded into one axis, row = position * group + head within the group: grouped heads
// share every key that is loaded, and a block of rows spans few positions, so little of a causal block is wasted.
#pragma once
#include <algorithm>

#include "abi.h"
#include "vec.h"

namespace ha {

constexpr float NEG_INF = -__builtin_inff();

// The keys or values of one sequence and one KV head: row j, by stride or through a block table.
template <class T>
struct Rows {
    const T* base;
    int64_t stride, element_stride, page_stride;
    const int32_t* table;                    // null: not paged
    int64_t page_size;

    const T* row(int64_t j) const {
        if (!table) return base + j * stride;
        return base + table[j / page_size] * page_stride + (j % page_size) * stride;
    }
    // How many rows from j on lie `stride` apart (at most up to `end`).
    int64_t run(int64_t j, int64_t end) const { return table ? std::min(end - j, page_size - j % page_size) : end - j; }
};

template <class T>
struct Call {
    const HaAttention& a;
    int64_t group;                           // query heads per KV head

    explicit Call(const HaAttention& call) : a(call), group(call.q_heads / call.kv_heads) {}

    int64_t q_begin(int64_t b) const { return a.cu_q ? a.cu_q[b] : 0; }
    int64_t q_len(int64_t b) const { return a.cu_q ? a.cu_q[b + 1] - a.cu_q[b] : a.q_len; }
    int64_t kv_len(int64_t b) const {
        if (a.block_table) return a.seqused_k[b];
        return a.cu_k ? a.cu_k[b + 1] - a.cu_k[b] : a.kv_len;
    }
    Rows<T> rows(const void* base, const int64_t* stride, int64_t b, int64_t kv_head) const {
        const T* p = static_cast<const T*>(base) + kv_head * stride[1];
        if (a.block_table) return {p, stride[2], stride[3], stride[0], a.block_table + b * a.table_stride, a.page_size};
        p += a.cu_q ? (int64_t)a.cu_k[b] * stride[2] : b * stride[0];
        return {p, stride[2], stride[3], 0, nullptr, 0};
    }
    Rows<T> keys(int64_t b, int64_t kv_head) const { return rows(a.k, a.k_stride, b, kv_head); }
    Rows<T> values(int64_t b, int64_t kv_head) const { return rows(a.v, a.v_stride, b, kv_head); }
    const T* query(int64_t b, int64_t head, int64_t i) const {
        return static_cast<const T*>(a.q) + (a.cu_q ? 0 : b * a.q_stride[0]) + head * a.q_stride[1] + (q_begin(b) + i) * a.q_stride[2];
    }
    T* output(int64_t b, int64_t head, int64_t i) const {
        return static_cast<T*>(a.out) + (a.cu_q ? 0 : b * a.out_stride[0]) + head * a.out_stride[1] + (q_begin(b) + i) * a.out_stride[2];
    }
    float slope(int64_t b, int64_t head) const { return a.slopes[b * a.slopes_stride[0] + head * a.slopes_stride[1]]; }
    // Offset of mask element (b, head, i, 0), in elements; key j is j * mask_stride[3] further.
    int64_t mask_offset(int64_t b, int64_t head, int64_t i) const {
        return b * a.mask_stride[0] + head * a.mask_stride[1] + i * a.mask_stride[2];
    }
    // Query i of a sequence stands at key position i + kv_len - q_len and sees keys [first, end).
    int64_t first_key(int64_t position) const { return a.left < 0 ? 0 : std::max<int64_t>(0, position - a.left); }
    int64_t end_key(int64_t position, int64_t kv_len) const {
        return a.right < 0 ? kv_len : std::max<int64_t>(0, std::min(kv_len, position + a.right + 1));
    }
};

// One piece of work: rows [row, row + rows) of a KV head against keys [key, key_end). `partial` >= 0: one of several key ranges, whose
// unnormalised result goes to that slot; -1: the whole of it, finished by the kernel.
struct Item {
    int32_t batch, kv_head, rows;
    int64_t row, key, key_end, partial;
};

// A row's unnormalised result: output sums o [Dv], running maximum m and sum of exponentials l. In a partial slot: o, then m, l.
inline int64_t partial_floats(const HaAttention& a) { return (a.v_head_dim + 2 + W - 1) / W * W; }

// Normalises row (b, head, i) and writes it and its lse; `o` [Dv] may be overwritten. The sink joins the denominator here.
template <class T>
void finish_row(const Call<T>& call, int64_t b, int64_t head, int64_t i, float* o, float m, float l) {
    const HaAttention& a = call.a;
    float top = m;
    if (a.sinks) {
        float sink = a.sinks[head];
        top = sink > m ? sink : m;
        float shift = top == NEG_INF ? 0.0f : top;
        float keep = m == NEG_INF ? 0.0f : std::exp(m - shift);
        l = l * keep + std::exp(sink - shift);
        for (int d = 0; d < a.v_head_dim; ++d) o[d] *= keep;
    }
    float inverse = l == 0.0f ? 0.0f : 1.0f / l;                         // a row that saw nothing is zeros, never NaN
    T* out = call.output(b, head, i);
    int d = 0;
    if (a.out_stride[3] == 1)
        for (; d + W <= a.v_head_dim; d += W) store(out + d, load(o + d) * inverse);
    for (; d < a.v_head_dim; ++d) from_float(o[d] * inverse, out + d * a.out_stride[3]);
    if (a.lse) {
        float* lse = a.lse + (a.cu_q ? 0 : b * a.lse_stride[0]) + head * a.lse_stride[1] + (call.q_begin(b) + i) * a.lse_stride[2];
        *lse = l == 0.0f ? NEG_INF : top + std::log(l);
    }
}

// Rows [j, j + n) of a source as fp32, `ld` floats apart: whatever its dtype, strides or pages. The one place that gathers and converts.
template <class T>
void load_tile(const Rows<T>& source, int64_t j, int64_t n, int64_t width, float* tile, int64_t ld) {
    for (int64_t i = 0; i < n; ++i) {
        const T* row = source.row(j + i);
        float* to = tile + i * ld;
        int64_t d = 0;
        if (source.element_stride == 1)
            for (; d + W <= width; d += W) store(to + d, load(row + d));
        for (; d < width; ++d) to[d] = to_float(row[d * source.element_stride]);
    }
}

}  // namespace ha
