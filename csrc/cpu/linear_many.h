// Many rows of x: a block of the weight is multiplied by tiles of x that stay in the first-level cache. The first tile reads the weight
// and leaves it packed in the second level, fp32 whatever it was, for the others; while they are multiplied, the next block is
// prefetched. So reading and multiplying overlap, and the weight is read and widened once for ITEM_TILES tiles.
#pragma once
#include <type_traits>

#include "linear_product.h"
#include "parallel.h"

namespace ha {

// A tile: TILE rows of x times GROUP rows of the weight, all sums in registers (24 of 32, 12 of 16).
constexpr int TILE = VECTOR_REGISTERS == 32 ? 8 : 4, GROUP = 3;
constexpr int64_t BLOCK_BYTES = 3 << 10;                                 // of a packed row: a tile of x fits in half of a 48 (32) KB cache
constexpr int64_t BLOCK_GROUPS = 16;                                     // 48 rows: 144 KB of packed weight
constexpr int64_t ITEM_TILES = 32, PACKED_X_BYTES = 16 << 20;

template <class T, int M>
HA_INLINE void add_step(vf* v, const typename Product<T>::Vector* w, const typename Product<T>::Packed* x) {
    using P = Product<T>;
    for (int m = 0; m < M; ++m) {
        typename P::Vector b = P::packed(x + m * P::STEP);
        for (int r = 0; r < GROUP; ++r) v[m * GROUP + r] = P::add(v[m * GROUP + r], w[r], b);
    }
}

template <int N>
HA_INLINE void add_folded(vf* v, float* sums) {
    fold<N>(v);
    for (int i = 0; i < FOLDED<N>; ++i) store(sums + i * W, load(sums + i * W) + v[i]);
}

// The first tile reads GROUP rows of `k` elements where they lie and leaves them behind packed [step][GROUP][STEP]; `next` are prefetched.
template <class T, int M>
void product_first(int64_t k, const typename Product<T>::Packed* x, const T* const* rows, const T* const* next,
                   typename Product<T>::Packed* packed, float* sums) {
    using P = Product<T>;
    constexpr int64_t LINE = std::max<int64_t>(P::STEP, 64 / sizeof(T));
    vf v[M * GROUP] = {};
    auto step = [&](int64_t i, auto read) __attribute__((always_inline)) {
        typename P::Vector w[GROUP];
        for (int r = 0; r < GROUP; ++r) {
            w[r] = read(rows[r] + i);
            P::pack(packed + i * GROUP + r * P::STEP, w[r]);
        }
        add_step<T, M>(v, w, x + i * M);
    };
    int64_t i = 0;
    for (; i + LINE <= k; i += LINE) {
        for (int r = 0; r < GROUP; ++r) __builtin_prefetch(next[r] + i);
        for (int64_t s = 0; s < LINE; s += P::STEP) step(i + s, [](const T* p) __attribute__((always_inline)) { return P::widen(p); });
    }
    for (int r = 0; r < GROUP; ++r) __builtin_prefetch(next[r] + i);
    for (; i + P::STEP <= k; i += P::STEP) step(i, [](const T* p) __attribute__((always_inline)) { return P::widen(p); });
    if (i < k) step(i, [n = k - i](const T* p) __attribute__((always_inline)) { return widen_tail(p, n); });
    add_folded<M * GROUP>(v, sums);
}

// M rows of x and GROUP of the weight, both packed: adds folded sums to `sums`. One line of `ahead` is prefetched a step.
template <class T, int M>
void product_tile(int64_t steps, const typename Product<T>::Packed* x, const typename Product<T>::Packed* weight, const char* ahead,
                  float* sums) {
    using P = Product<T>;
    vf v[M * GROUP] = {};
    for (int64_t s = 0; s < steps; ++s, x += M * P::STEP, weight += GROUP * P::STEP, ahead += 64) {
        __builtin_prefetch(ahead, 0, 2);
        typename P::Vector w[GROUP];
        for (int r = 0; r < GROUP; ++r) w[r] = P::packed(weight + r * P::STEP);
        add_step<T, M>(v, w, x);
    }
    add_folded<M * GROUP>(v, sums);
}

// Calls work with m as a constant.
template <int M = TILE, class Work>
HA_INLINE void with_rows(int64_t m, const Work& work) {
    if (m == M) work(std::integral_constant<int, M>{});
    else if constexpr (M > 1) with_rows<M - 1>(m, work);
}

// x [rows, K] as tiles of nearly equal height, each packed whole; and how K is cut.
template <class T>
struct ManyRows {
    const HaLinear& a;
    int64_t row, rows, tiles, steps, blocks;
    const typename Product<T>::Packed* x;

    int64_t tile_begin(int64_t t) const { return t * rows / tiles; }
    int64_t tile_rows(int64_t t) const { return tile_begin(t + 1) - tile_begin(t); }
    int64_t block_begin(int64_t b) const { return b * steps / blocks; }
    int64_t block_steps() const { return (steps + blocks - 1) / blocks; }
};

// Where a tile's folded sums lie: FOLDED vectors for each group.
constexpr int64_t TILE_FLOATS = FOLDED<TILE * GROUP> * W;

template <class T>
void item_many(const ManyRows<T>& many, int64_t begin, int64_t end, int64_t tile, int64_t tile_end, float* scratch) {
    using P = Product<T>;
    const HaLinear& a = many.a;
    int64_t groups = (end - begin + GROUP - 1) / GROUP, tiles = tile_end - tile;
    float* sums = scratch;                                               // [tiles][groups][TILE_FLOATS]
    float* line = sums + tiles * groups * TILE_FLOATS;                   // one row of outputs
    auto* packed = reinterpret_cast<typename P::Packed*>(line + BLOCK_GROUPS * GROUP + W);
    const T* weight = static_cast<const T*>(a.weight) + begin * a.weight_stride;
    std::fill(sums, line, 0.0f);
    auto row = [&](int64_t i) { return weight + std::min(i, end - begin - 1) * a.weight_stride; };     // a group's rest: the last row again
    for (int64_t b = 0; b < many.blocks; ++b) {
        int64_t first = many.block_begin(b), last = many.block_begin(b + 1), steps = last - first;
        int64_t k = std::min(last * P::STEP, a.k) - first * P::STEP;
        for (int64_t t = tile; t < tile_end; ++t) {
            int64_t m = many.tile_rows(t);
            const auto* x = many.x + (many.tile_begin(t) * many.steps + m * first) * P::STEP;
            for (int64_t g = 0; g < groups; ++g) {
                float* to = sums + ((t - tile) * groups + g) * TILE_FLOATS;
                auto* block = packed + g * GROUP * steps * P::STEP;
                if (t == tile) {
                    const T *rows[GROUP], *next[GROUP];
                    for (int r = 0; r < GROUP; ++r) {
                        rows[r] = row(g * GROUP + r) + first * P::STEP;
                        next[r] = g + 1 < groups ? row((g + 1) * GROUP + r) + first * P::STEP : row(r) + last * P::STEP;
                    }
                    with_rows(m, [&](auto M) { product_first<T, M>(k, x, rows, next, block, to); });
                } else {
                    bool more = t - tile <= GROUP && last < many.steps;  // these tiles prefetch the next block, a row of each group
                    const void* ahead = more ? (const void*)(row(g * GROUP + t - tile - 1) + last * P::STEP) : x;
                    with_rows(m, [&](auto M) { product_tile<T, M>(steps, x, block, (const char*)ahead, to); });
                }
            }
        }
    }
    const T* bias = static_cast<const T*>(a.bias);
    for (int64_t t = tile; t < tile_end; ++t) {
        int m = (int)many.tile_rows(t);
        for (int i = 0; i < m; ++i) {
            int place[GROUP];
            for (int r = 0; r < GROUP; ++r) place[r] = folded_place(m * GROUP, i * GROUP + r);
            for (int64_t g = 0; g < groups; ++g)
                for (int r = 0; r < GROUP; ++r) line[g * GROUP + r] = sums[((t - tile) * groups + g) * TILE_FLOATS + place[r]];
            T* y = static_cast<T*>(a.y) + (many.row + many.tile_begin(t) + i) * a.y_stride + begin;
            finish_outputs(line, bias ? bias + begin : nullptr, y, end - begin);
        }
    }
}

template <class T>
int linear_many_rows(const HaLinear& a) {
    using P = Product<T>;
    using Packed = typename P::Packed;
    static thread_local Scratch caller;
    int64_t steps = steps_of<T>(a.k), row_bytes = steps * P::STEP * (int64_t)sizeof(Packed);
    int64_t room = std::max<int64_t>(ITEM_TILES, PACKED_X_BYTES / row_bytes / TILE) * TILE;          // rows packed at a time
    int64_t parts = (a.m + room - 1) / room, part_rows = (a.m + parts - 1) / parts;
    auto* x = reinterpret_cast<Packed*>(caller.take(part_rows * row_bytes / sizeof(float)));
    if (!x) return 2;
    std::atomic<int> status{0};
    for (int64_t row = 0; row < a.m; row += part_rows) {
        int64_t rows = std::min(part_rows, a.m - row), tiles = (rows + TILE - 1) / TILE;
        ManyRows<T> many{a, row, rows, tiles, steps, (row_bytes + BLOCK_BYTES - 1) / BLOCK_BYTES, x};
        auto pack = [&](int64_t t) {
            int64_t m = many.tile_rows(t), from = many.tile_begin(t);
            pack_rows(static_cast<const T*>(a.x) + (row + from) * a.x_stride, a.x_stride, m, a.k, x + from * steps * P::STEP);
        };
        parallel_for(a.parallel, rows * a.k < 65536 ? 1 : a.threads, tiles, pack);
        int64_t n_items = (a.n + BLOCK_GROUPS * GROUP - 1) / (BLOCK_GROUPS * GROUP), m_items = (tiles + ITEM_TILES - 1) / ITEM_TILES;
        int64_t item_tiles = (tiles + m_items - 1) / m_items;
        parallel_for(a.parallel, a.threads, n_items * m_items, [&](int64_t item) {
            static thread_local Scratch own;
            float* scratch = own.take(item_tiles * BLOCK_GROUPS * TILE_FLOATS + BLOCK_GROUPS * GROUP + W +
                                      BLOCK_GROUPS * GROUP * many.block_steps() * P::STEP * sizeof(Packed) / sizeof(float));
            int64_t n = item / m_items * BLOCK_GROUPS * GROUP, t = item % m_items * item_tiles;
            if (!scratch) status = 2;
            else item_many(many, n, std::min(a.n, n + BLOCK_GROUPS * GROUP), t, std::min(tiles, t + item_tiles), scratch);
        });
    }
    return status;
}

}  // namespace ha
