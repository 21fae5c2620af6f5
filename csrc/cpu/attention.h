// One attention call as a list of work items: which rows against which keys, by which kernel. Items, and so the bits of the result, follow
// from the lengths of the sequence alone: never from the number of threads, nor from what else is in the batch. Each dtype is compiled in
// a file of its own (attention_f32.cpp ...), side by side: the templates are most of a build's time.
#pragma once
#include <vector>

#include "call.h"
#include "decode.h"
#include "parallel.h"
#include "prefill.h"

namespace ha {

// 0, or 2: out of memory.
int attend_f32(const HaAttention& a);
int attend_f16(const HaAttention& a);
int attend_bf16(const HaAttention& a);

constexpr int64_t PREFILL_SPLIT = 2048, PREFILL_ITEMS_ENOUGH = 32;

// Keys per item of the decode kernel (flash-decoding). Long items read a little faster (a new one starts with cold lines, 52 -> 59 GB/s of
// fp16 from 512 to 2048 keys, AMD Zen 5), short ones feed more cores: the longest that leaves DECODE_ITEMS_ENOUGH of them. At 512 keys a
// partial result (Dv + 2 floats a row) is still under a percent of the K and V it stands for.
constexpr int64_t DECODE_ITEMS_ENOUGH = 64;

inline int64_t decode_split(int64_t kv_heads, int64_t keys) {
    for (int64_t split : {2048, 1024})
        if (kv_heads * keys >= DECODE_ITEMS_ENOUGH * split) return split;
    return 512;
}

struct Plan {
    std::vector<Item> items;
    struct Merge { int32_t batch, kv_head, rows, parts; int64_t row, partial; };
    std::vector<Merge> merges;
    int64_t partial_rows = 0;
};

template <class T>
Plan plan_items(const Call<T>& call) {
    Plan plan;
    const HaAttention& a = call.a;
    bool uneven = false;
    for (int32_t b = 0; b < a.batch; ++b) {
        int64_t q_len = call.q_len(b), kv_len = call.kv_len(b), rows = q_len * call.group;
        bool decode = rows <= DECODE_ROWS;
        int64_t block = decode ? rows : PREFILL_ROWS;
        if (rows == 0) continue;
        int64_t blocks = (rows + block - 1) / block;
        int64_t split = decode ? decode_split(a.kv_heads, kv_len) : blocks * a.kv_heads < PREFILL_ITEMS_ENOUGH ? PREFILL_SPLIT : INT64_MAX;
        uneven |= !decode || a.batch > 1;
        for (int32_t kv_head = 0; kv_head < a.kv_heads; ++kv_head)
            for (int64_t row = 0; row < rows; row += block) {
                int32_t n = (int32_t)std::min(block, rows - row);
                int64_t first = call.first_key(row / call.group + kv_len - q_len);
                int64_t end = std::max(first, call.end_key((row + n - 1) / call.group + kv_len - q_len, kv_len));
                int64_t parts = split == INT64_MAX ? 1 : std::max<int64_t>(1, (end - first + split - 1) / split);
                if (parts == 1) {
                    plan.items.push_back({b, kv_head, n, row, first, end, -1});
                    continue;
                }
                plan.merges.push_back({b, kv_head, n, (int32_t)parts, row, plan.partial_rows});
                for (int64_t part = 0; part < parts; ++part) {
                    int64_t key = first + part * split;
                    plan.items.push_back({b, kv_head, n, row, key, std::min(key + split, end), plan.partial_rows});
                    plan.partial_rows += n;
                }
            }
    }
    if (uneven)                                                          // the longest first: no thread is left with a big one at the end
        std::stable_sort(plan.items.begin(), plan.items.end(), [](const Item& x, const Item& y) {
            return x.rows * (x.key_end - x.key) > y.rows * (y.key_end - y.key);
        });
    return plan;
}

// The parts of a row's key range in order: rescale to the common maximum, add, finish.
template <class T>
void merge_rows(const Call<T>& call, const Plan::Merge& merge, float* partials) {
    int64_t width = partial_floats(call.a), Dv = call.a.v_head_dim;
    for (int64_t r = 0; r < merge.rows; ++r) {
        float* total = partials + (merge.partial + r) * width;
        float m = NEG_INF, l = 0;
        for (int64_t p = 0; p < merge.parts; ++p) {
            float part_m = partials[(merge.partial + p * merge.rows + r) * width + Dv];
            m = part_m > m ? part_m : m;
        }
        float shift = m == NEG_INF ? 0.0f : m;
        for (int64_t p = 0; p < merge.parts; ++p) {
            const float* part = partials + (merge.partial + p * merge.rows + r) * width;
            // -inf means "no key" unless the sum is there (NaN scores leave no maximum but must be seen)
            float scale = part[Dv] == NEG_INF ? 1.0f : std::exp(part[Dv] - shift);
            l += part[Dv + 1] * scale;
            if (p == 0)
                for (int64_t d = 0; d < Dv; ++d) total[d] *= scale;
            else
                for (int64_t d = 0; d < Dv; ++d) total[d] += part[d] * scale;
        }
        int64_t row = merge.row + r;
        finish_row(call, merge.batch, merge.kv_head * call.group + row % call.group, row / call.group, total, m, l);
    }
}

template <class T>
int attend(const HaAttention& a) {
    Call<T> call(a);
    Plan plan = plan_items(call);
    float* partials = nullptr;
    if (plan.partial_rows) {
        partials = (float*)std::malloc(plan.partial_rows * partial_floats(a) * sizeof(float));
        if (!partials) return 2;
    }
    std::atomic<int> status{0};
    parallel_for(a.parallel, a.threads, (int64_t)plan.items.size(), [&](int64_t i) {
        static thread_local Scratch scratch;
        const Item& item = plan.items[i];
        bool decode = call.q_len(item.batch) * call.group <= DECODE_ROWS;
        if (!(decode ? attend_decode(call, item, partials, scratch) : attend_prefill(call, item, partials, scratch))) status = 2;
    });
    if (!status) parallel_for(a.parallel, a.threads, (int64_t)plan.merges.size(), [&](int64_t i) { merge_rows(call, plan.merges[i], partials); });
    std::free(partials);
    return status;
}

}  // namespace ha
