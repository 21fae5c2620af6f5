// Few rows (decode, and the few positions of speculative decoding): one KV head's rows against a range of keys, block by block: scores,
// softmax, weighted sum. While a block's keys are worked on its values are fetched, and while its values are, the next block's keys, so
// that memory is never idle: reading K and V is all the time there is. One or two rows of fp32 read both streams at once instead.
#pragma once
#include <type_traits>

#include "decode_products.h"
#include "decode_softmax.h"
#include "parallel.h"

namespace ha {
namespace decode {

constexpr int64_t BLOCK_BYTES = 32768;                                   // a block's keys and values: they stay in the first-level cache
constexpr int64_t SPARE = 7;                                             // pointers beyond a block's keys
constexpr int64_t SOON = 4;                                              // paired keys are asked for so many ahead: 3 to 6 % of memory's speed

// K or V of one item as the products read it: rows of E, which is T where they are read as they lie, or float where they are converted to
// a tile first (elements that are not adjacent, rows shorter than a vector's chunk).
template <class T, class E>
struct Source {
    Rows<T> rows;
    int64_t width, wide;                     // elements of a row, and of a tile's row: zeros fill it to a whole vector
    float* tile;                             // null: read as they lie

    // Pointers to rows [j, j + n), one division a page; SPARE more repeat the last, for products that take several keys at once.
    void point(int64_t j, int64_t n, const E** to) const {
        for (int64_t i = 0; i < n;) {
            int64_t run = n, stride = wide;
            const E* p = reinterpret_cast<const E*>(tile);
            if constexpr (std::is_same<T, E>::value)
                if (!tile) p = rows.row(j + i), run = i + rows.run(j + i, j + n), stride = rows.stride;
            for (; i < run; ++i, p += stride) to[i] = p;
        }
        for (int64_t i = n; n && i < n + SPARE; ++i) to[i] = to[n - 1];
    }
    void load(int64_t j, int64_t n) const {
        if (tile) load_tile(rows, j, n, width, tile, wide);
    }
};

template <class T, class E, int R>
class Attention {
public:
    Attention(const Call<T>& call, const Item& item) : call_(call), a_(call.a), item_(item) {}

    bool run(float* partials, Scratch& scratch, bool tiled) {
        Source<T, E> keys{call_.keys(item_.batch, item_.kv_head), a_.head_dim, a_.head_dim, nullptr};
        Source<T, E> values{call_.values(item_.batch, item_.kv_head), a_.v_head_dim, a_.v_head_dim, nullptr};
        if (tiled) keys.wide = whole(keys.wide, W), values.wide = whole(values.wide, W);
        int64_t row_bytes = (keys.wide + values.wide) * (int64_t)sizeof(E);
        int64_t block = std::min(BLOCK, std::max(STRIP, BLOCK_BYTES / row_bytes / STRIP * STRIP));
        k_ = columns<E>(keys.wide), v_ = columns<E>(values.wide);
        o_row_ = v_.chunks() * CHUNK<E>;
        int64_t q_floats = R * k_.chunks() * CHUNK<E>, tile_floats = tiled ? block * (keys.wide + values.wide) : 0;
        int64_t natural = whole(a_.v_head_dim, W);
        float* p = scratch.take(q_floats + R * o_row_ + R * W + natural + CHUNK<E> + 2 * R * BLOCK + R * STRIP * W + BLOCK + tile_floats);
        if (!p) return false;
        q_ = p, o_ = q_ + q_floats, l_ = o_ + R * o_row_, natural_ = l_ + R * W;
        within_ = reinterpret_cast<int32_t*>(natural_ + natural);
        scores_ = natural_ + natural + CHUNK<E>, fresh_ = scores_ + R * BLOCK, sums_ = fresh_ + R * BLOCK, mask_ = sums_ + R * STRIP * W;
        std::memset(o_, 0, (R * o_row_ + R * W) * sizeof(float));
        if (tiled) {
            keys.tile = mask_ + BLOCK, values.tile = keys.tile + block * keys.wide;
            std::memset(keys.tile, 0, tile_floats * sizeof(float));
        }
        begin_rows();
        if constexpr (PAIRED) tiled ? attend(keys, values, block, true) : attend_paired(keys, values, block);
        else attend(keys, values, block, tiled);
        finish(partials);
        return true;
    }

private:
    // So few rows of fp32 leave nothing to do but wait for memory.
    static constexpr bool PAIRED = std::is_same<T, float>::value && std::is_same<T, E>::value && R <= 2;

    static int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

    // What is known of each row before the first key; q as fp32 in the order in which the products read it.
    void begin_rows() {
        int64_t kv_len = call_.kv_len(item_.batch), q_len = call_.q_len(item_.batch), full = k_.full * CHUNK<E>;
        for (int64_t r = 0; r < R; ++r) {
            Row& row = rows_[r];
            row.i = (item_.row + r) / call_.group;
            row.head = item_.kv_head * call_.group + (item_.row + r) % call_.group;
            row.position = row.i + kv_len - q_len;
            row.first = std::max(item_.key, call_.first_key(row.position));
            row.end = std::min(item_.key_end, call_.end_key(row.position, kv_len));
            row.mask = a_.mask_dtype == HA_NONE ? 0 : call_.mask_offset(item_.batch, row.head, row.i);
            row.slope = a_.alibi ? call_.slope(item_.batch, row.head) : 0.0f;
            row.m = NEG_INF;
            const T* q = call_.query(item_.batch, row.head, row.i);
            for (int64_t c = 0; c < k_.chunks(); ++c) {
                float* to = q_ + (c * PARTS<E> * R + r) * W;
                if (std::is_same<T, E>::value && a_.q_stride[3] == 1 && c < k_.full && (c + 1) * CHUNK<E> <= a_.head_dim) {
                    HA_UNROLL(PARTS<E>, part, store(to + part * R * W, load_part<part>(q + c * CHUNK<E>)););
                    continue;
                }
                int64_t column = c < k_.full ? c * CHUNK<E> : k_.rest, fresh = c * CHUNK<E>;      // before `fresh`: in the full chunks
                for (int64_t e = 0; e < CHUNK<E>; ++e) {
                    bool used = column + e >= fresh && column + e < a_.head_dim;
                    to[place<E>(e) / W * R * W + place<E>(e) % W] = used ? to_float(q[(column + e) * a_.q_stride[3]]) : 0.0f;
                }
            }
        }
        for (int64_t e = 0; e < CHUNK<E>; ++e) within_[place<E>(e)] = k_.rest + e >= full ? -1 : 0;
    }

    void attend(const Source<T, E>& keys, const Source<T, E>& values, int64_t block, bool tiled) {
        const E *key_rows[2][BLOCK + SPARE], *value_rows[BLOCK + SPARE];
        const E **here = key_rows[0], **next = key_rows[1];
        int64_t n = std::min(block, item_.key_end - item_.key);
        keys.point(item_.key, n, here);
        Lookahead first(here, tiled ? 0 : n, keys.width);
        first.fetch_all();
        for (int64_t key = item_.key; key < item_.key_end; key += n) {
            n = std::min(block, item_.key_end - key);
            values.point(key, n, value_rows);
            keys.load(key, n), values.load(key, n);
            Lookahead ahead(value_rows, tiled ? 0 : n, values.width);
            int64_t total = ahead.total();
            score_block<E, R, keys_at_once(R)>(q_, here, n, k_, within_, scores_, sums_,
                                               [&](int64_t, int64_t count) { ahead.fetch((total * count + n - 1) / n); });
            softmax(key, n);
            int64_t coming = std::min(block, item_.key_end - key - n);
            keys.point(key + n, coming, next);
            weigh(key, n, value_rows, Lookahead(next, tiled ? 0 : coming, keys.width));
            std::swap(here, next);
        }
    }

    // While the scores of a block are made the values of the block before it are weighed, a key of each in turn: two streams in the order of
    // their addresses, which the processor's own prefetcher follows (several keys at once are as many short ones: 18.7 against 23.1 GB/s).
    // Faster than asking for the other block's lines where there is so little to compute: MHA of 8192 keys, fp32, 13.1 -> 8.9 ms, AMD Zen 4.
    // 16-bit rows, half as long and to be widened, gain nothing.
    void attend_paired(const Source<T, E>& keys, const Source<T, E>& values, int64_t block) {
        const E *key_rows[BLOCK + SPARE], *value_rows[2][BLOCK + SPARE];
        const E **here = value_rows[0], **past = value_rows[1];
        const Lookahead none(value_rows[0], 0, 0);
        float once[R];
        std::fill_n(once, R, 1.0f);
        int64_t past_n = 0;
        for (int64_t n = 0, key = item_.key; key < item_.key_end; key += n) {
            n = std::min(block, item_.key_end - key);
            keys.point(key, n, key_rows);
            values.point(key, n, here);
            int64_t paired = seen_by_all(key - past_n, past_n) ? std::min(n, past_n) : 0;
            score_block<E, R, 1>(q_, key_rows, n, k_, within_, fresh_, sums_, [&](int64_t j, int64_t count) {
                if (j + SOON < n) Lookahead(key_rows + j + SOON, count, keys.width).fetch_all();
                if (j + SOON < paired) Lookahead(past + j + SOON, count, values.width).fetch_all();
                if (count = std::min(count, paired - j); count > 0)
                    weigh_block<E, R>(scores_ + j, past + j, count, v_, o_, o_row_, j ? once : keep_, none);
            });
            if (paired && paired < past_n) weigh_block<E, R>(scores_ + paired, past + paired, past_n - paired, v_, o_, o_row_, once, none);
            else if (!paired && past_n) weigh(key - past_n, past_n, past, none);
            std::swap(scores_, fresh_);
            softmax(key, n);
            std::swap(here, past);
            past_n = n;
        }
        if (past_n) weigh(item_.key_end - past_n, past_n, past, none);
    }

    bool seen_by_all(int64_t key, int64_t n) const {
        for (const Row& row : rows_)
            if (row.first > key || row.end < key + n) return false;
        return n > 0;
    }

    void softmax(int64_t key, int64_t n) {
        int64_t loaded = -1;                 // rows often share a mask row: heads broadcast
        for (int64_t r = 0; r < R; ++r) {
            keep_[r] = 1;
            if (rows_[r].first >= key + n || rows_[r].end <= key || rows_[r].first >= rows_[r].end) continue;
            if (a_.mask_dtype != HA_NONE && loaded != rows_[r].mask) {
                loaded = rows_[r].mask;
                load_mask(a_, loaded + key * a_.mask_stride[3], n, mask_);
            }
            keep_[r] = softmax_block(a_, rows_[r], key, n, scores_ + r * BLOCK, a_.mask_dtype == HA_NONE ? nullptr : mask_, l_ + r * W);
        }
    }

    // Keys that all rows see, together; what a row sees beyond them, on its own: a value must not even be multiplied by the zero weight of
    // a row that does not see it, for it may be NaN.
    void weigh(int64_t key, int64_t n, const E* const* values, Lookahead ahead) {
        int64_t first[R], end[R], common = 0, common_end = n;
        for (int64_t r = 0; r < R; ++r) {
            first[r] = std::min(n, std::max<int64_t>(0, rows_[r].first - key));
            end[r] = std::max(first[r], std::min(n, rows_[r].end - key));
            common = std::max(common, first[r]), common_end = std::min(common_end, end[r]);
        }
        if (common < common_end) weigh_block<E, R>(scores_ + common, values + common, common_end - common, v_, o_, o_row_, keep_, ahead);
        else common = common_end = n;
        if (common == 0 && common_end == n) return;
        float one = 1;
        for (int64_t r = 0; r < R; ++r) {
            int64_t left = std::min(common, end[r]) - first[r], right = end[r] - common_end;
            const float* p = scores_ + r * BLOCK;
            float *o = o_ + r * o_row_, *keep = common < n ? &one : keep_ + r;
            if (left > 0) weigh_block<E, 1>(p + first[r], values + first[r], left, v_, o, o_row_, keep, Lookahead(values, 0, 0));
            if (right > 0) weigh_block<E, 1>(p + common_end, values + common_end, right, v_, o, o_row_, keep, Lookahead(values, 0, 0));
        }
    }

    void finish(float* partials) {
        for (int64_t r = 0; r < R; ++r) {
            const float* o = o_ + r * o_row_;
            float* to = item_.partial < 0 ? natural_ : partials + (item_.partial + r) * partial_floats(a_);
            for (int64_t c = 0; c < v_.chunks(); ++c, o += CHUNK<E>) {
                int64_t column = c < v_.full ? c * CHUNK<E> : v_.rest;
                if (c < v_.full && column + CHUNK<E> <= a_.v_head_dim) store_in_order<E>(to + column, o);
                else
                    for (int64_t e = 0; e < CHUNK<E> && column + e < a_.v_head_dim; ++e) to[column + e] = o[place<E>(e)];
            }
            float l = sum(load(l_ + r * W));
            if (item_.partial < 0) {
                finish_row(call_, item_.batch, rows_[r].head, rows_[r].i, to, rows_[r].m, l);
            } else {
                to[a_.v_head_dim] = rows_[r].m;
                to[a_.v_head_dim + 1] = l;
            }
        }
    }

    const Call<T>& call_;
    const HaAttention& a_;
    const Item& item_;
    Columns k_, v_;
    int64_t o_row_;
    Row rows_[R];
    float keep_[R];
    float *q_, *o_, *l_, *natural_, *scores_, *fresh_, *sums_, *mask_;   // q [chunk][part][R][W], o [R][o_row], l [R][W], scores and fresh [R][BLOCK]
    int32_t* within_;
};

template <class T, int R>
bool attend_rows_from(const Call<T>& call, const Item& item, float* partials, Scratch& scratch) {
    if constexpr (R < DECODE_ROWS)
        if (item.rows > R) return attend_rows_from<T, R + 1>(call, item, partials, scratch);
    const HaAttention& a = call.a;
    if (a.k_stride[3] == 1 && a.v_stride[3] == 1 && std::min(a.head_dim, a.v_head_dim) >= CHUNK<T>)
        return Attention<T, T, R>(call, item).run(partials, scratch, false);
    return Attention<T, float, R>(call, item).run(partials, scratch, true);
}

}  // namespace decode

// One item of at most DECODE_ROWS rows; its result goes to finish_row or to its partial slots. False: out of memory.
template <class T>
bool attend_decode(const Call<T>& call, const Item& item, float* partials, Scratch& scratch) {
    return decode::attend_rows_from<T, 1>(call, item, partials, scratch);
}

}  // namespace ha
