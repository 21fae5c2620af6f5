// Few rows of x: the weight is read once, at the memory's speed, and that is the whole cost. Several of its rows are read side by side
// as separate streams, far enough apart that each stays one contiguous run; x lies packed in a near cache and every element of the
// weight is widened once for all rows of x. The next elements are prefetched from where the stream really goes on, gaps included.
#pragma once
#include "linear_product.h"
#include "parallel.h"

namespace ha {

// Up to so many rows of x. More are better served by linear_many.h, where a tile of x stays in the first-level cache: sooner where the
// registers are few, and where fp32 weights come in faster than the second level hands out x.
template <class T>
constexpr int FEW_ROWS = VECTOR_REGISTERS < 32 ? 6 : sizeof(T) == 4 ? 4 : 8;

constexpr int64_t FEW_ITEM_BYTES = 1 << 20, FEW_ITEMS = 16;              // of weight: long streams, yet work for many threads
constexpr int64_t FEW_ITEM_ROWS = 2048;
constexpr int64_t FEW_X_BYTES = 128 << 10;                               // of packed x in a block of K: a part of the second-level cache

// Rows of the weight read side by side for M rows of x: what the registers hold besides M + 1 operands.
constexpr int few_streams(int m) {
    constexpr int WIDE[] = {4, 6, 6, 6, 4, 4, 3, 3}, NARROW[] = {4, 4, 4, 3, 2, 2};
    return VECTOR_REGISTERS == 32 ? WIDE[m - 1] : NARROW[m - 1];
}

constexpr int FEW_AHEAD = 2048;                                          // bytes of each stream

// sums (see fold) of R rows of the weight times M rows of x, packed [step][M][STEP]. `next` are the rows that follow.
template <class T, int M, int R>
HA_INLINE void product_few(const T* const* weight, const T* const* next, const typename Product<T>::Packed* x, int64_t k, vf* sums) {
    using P = Product<T>;
    constexpr int STEPS = std::max<int>(1, 64 / (P::STEP * sizeof(T)));  // steps in a cache line
    constexpr int64_t LINE = STEPS * P::STEP;
    constexpr int SETS = M * R >= 8 ? 1 : std::min(2, STEPS);            // 8 sums in flight: 4 cycles of latency, 2 additions a cycle
    vf sets[SETS][M * R] = {};
    auto step = [&](vf* sums, const typename P::Vector* w, const typename P::Packed* xs) __attribute__((always_inline)) {
        if constexpr (M < R) {
            typename P::Vector b[M];
            for (int m = 0; m < M; ++m) b[m] = P::packed(xs + m * P::STEP);
            for (int r = 0; r < R; ++r)
                for (int m = 0; m < M; ++m) sums[m * R + r] = P::add(sums[m * R + r], w[r], b[m]);
        } else {
            for (int m = 0; m < M; ++m) {
                typename P::Vector b = P::packed(xs + m * P::STEP);
                for (int r = 0; r < R; ++r) sums[m * R + r] = P::add(sums[m * R + r], w[r], b);
            }
        }
    };
    int64_t i = 0, lines = k / LINE, own = std::max<int64_t>(0, lines - FEW_AHEAD / (LINE * (int64_t)sizeof(T)));
    auto stretch = [&](int64_t end, const T* const* ahead, int64_t offset) __attribute__((always_inline)) {
        for (; i < end; i += LINE) {
            for (int r = 0; r < R; ++r) __builtin_prefetch(ahead[r] + (i + offset));
            for (int s = 0; s < STEPS; ++s) {
                typename P::Vector w[R];
                for (int r = 0; r < R; ++r) w[r] = P::widen(weight[r] + i + s * P::STEP);
                step(sets[s % SETS], w, x + (i + s * P::STEP) * M);
            }
        }
    };
    stretch(own * LINE, weight, (lines - own) * LINE);
    stretch(lines * LINE, next, -own * LINE);
    for (; i + P::STEP <= k; i += P::STEP) {
        typename P::Vector w[R];
        for (int r = 0; r < R; ++r) w[r] = P::widen(weight[r] + i);
        step(sets[0], w, x + i * M);
    }
    if (i < k) {
        typename P::Vector w[R];
        for (int r = 0; r < R; ++r) w[r] = widen_tail(weight[r] + i, k - i);
        step(sets[0], w, x + i * M);
    }
    for (int i = 0; i < M * R; ++i) sums[i] = SETS == 1 ? sets[0][i] : sets[0][i] + sets[SETS - 1][i];
    fold<M * R>(sums);
}

// Outputs [begin, end) of all M rows. The range is R runs of rows, one a stream; where it does not divide, a stream repeats the last row.
template <class T, int M>
void item_few(const HaLinear& a, const typename Product<T>::Packed* x, int64_t begin, int64_t end, float* sums) {
    using P = Product<T>;
    constexpr int R = few_streams(M);
    int64_t run = (end - begin + R - 1) / R, width = run * R, steps = steps_of<T>(a.k);
    int64_t blocks = (M * steps * P::STEP * (int64_t)sizeof(typename P::Packed) + FEW_X_BYTES - 1) / FEW_X_BYTES;
    const T* weight = static_cast<const T*>(a.weight);
    auto row = [&](int r, int64_t i) { return weight + std::min(begin + r * run + i, end - 1) * a.weight_stride; };
    std::fill(sums, sums + M * width, 0.0f);
    for (int64_t b = 0; b < blocks; ++b) {
        int64_t k = b * steps / blocks * P::STEP, k_end = std::min((b + 1) * steps / blocks * P::STEP, a.k);
        const T *here[R], *next[R];
        for (int r = 0; r < R; ++r) here[r] = row(r, 0) + k;
        for (int64_t i = 0; i < run; ++i) {
            for (int r = 0; r < R; ++r) next[r] = i + 1 < run ? row(r, i + 1) + k : row(r, 0) + k_end;
            vf v[M * R];
            product_few<T, M, R>(here, next, x + k * M, k_end - k, v);
            const float* folded = reinterpret_cast<const float*>(v);
            for (int m = 0; m < M; ++m)
                for (int r = 0; r < R; ++r) sums[m * width + r * run + i] += folded[folded_place(M * R, m * R + r)];
            for (int r = 0; r < R; ++r) here[r] = next[r];
        }
    }
    const T* bias = static_cast<const T*>(a.bias);
    for (int m = 0; m < M; ++m)
        finish_outputs(sums + m * width, bias ? bias + begin : nullptr, static_cast<T*>(a.y) + m * a.y_stride + begin, end - begin);
}

template <class T, int M>
int linear_few(const HaLinear& a) {
    using P = Product<T>;
    static thread_local Scratch caller;
    int64_t steps = steps_of<T>(a.k), row_bytes = a.k * (int64_t)sizeof(T);
    auto* x = reinterpret_cast<typename P::Packed*>(caller.take(steps * P::STEP * M * sizeof(typename P::Packed) / sizeof(float)));
    if (!x) return 2;
    pack_rows(static_cast<const T*>(a.x), a.x_stride, M, a.k, x);
    int64_t item_bytes = std::min(FEW_ITEM_BYTES, a.n * row_bytes / FEW_ITEMS);
    constexpr int R = few_streams(M);
    int64_t rows = std::min(FEW_ITEM_ROWS, std::max<int64_t>(1, item_bytes / row_bytes / R) * R);
    std::atomic<int> status{0};
    parallel_for(a.parallel, a.threads, (a.n + rows - 1) / rows, [&](int64_t item) {
        static thread_local Scratch own;
        float* sums = own.take(M * (rows + R));
        if (sums) item_few<T, M>(a, x, item * rows, std::min(a.n, (item + 1) * rows), sums);
        else status = 2;
    });
    return status;
}

template <class T, int M = 1>
int linear_few_rows(const HaLinear& a) {                                 // a.m in [1, FEW_ROWS<T>]
    if (a.m == M) return linear_few<T, M>(a);
    if constexpr (M < FEW_ROWS<T>) return linear_few_rows<T, M + 1>(a);
    return 3;
}

}  // namespace ha
