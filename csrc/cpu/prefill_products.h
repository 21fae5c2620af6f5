// The two products of prefill and the tiles they read, in fp32: keys and values are converted as they are gathered, once per tile. What
// prefill.h needs of them is this interface, which prefill_bf16.h gives again for the instruction that multiplies bf16 itself.
#pragma once
#include "microkernel.h"
#include "rows.h"
#include "transpose.h"

namespace ha {

// The next tile on its way into L2 while this one is computed with, a few rows for every block of a product: what the hardware
// prefetcher cannot know, since each tile is read in one go and then nothing for a hundred microseconds.
template <class T>
struct Ahead {
    Rows<T> source[2];                       // keys, values
    int64_t bytes[2], next, end;             // of a row; row next / 2 of keys or values, up to key `end`

    void operator()() {
        for (int i = 0; i < 4 && next < 2 * end; ++i, ++next) {
            const char* row = reinterpret_cast<const char*>(source[next % 2].row(next / 2));
            for (int64_t byte = 0; byte < bytes[next % 2]; byte += 64) __builtin_prefetch(row + byte, 0, 2);
        }
    }
};

// Everything lies in memory typed float, one vector of lanes per key (or per element) or, where PAIR is 2, per pair of them.
template <class T>
struct Fp32Products {
    static constexpr int PAIR = 1;

    // Queries of W rows, transposed: to[d * ld + lane]. Scaled here, so that scores need no scale.
    static void pack_queries(const T* const (&rows)[W], int64_t D, int64_t element_stride, float scale, float* to, int64_t ld) {
        gather_columns(rows, D, element_stride, scale, to, ld);
    }
    static void load_keys(const Rows<T>& keys, int64_t j, int64_t n, int64_t D, float* tile, int64_t ld) {
        load_tile(keys, j, n, D, tile, ld);
    }
    static void load_values(const Rows<T>& values, int64_t j, int64_t n, int64_t Dv, float* tile, int64_t ld) {
        load_tile(values, j, n, Dv, tile, ld);
    }
    static bool finite_values(const float* tile, int64_t n, int64_t Dv, int64_t ld) {
        vf poison = {};                                                  // x * 0 is NaN for NaN and infinities alike
        float tail = 0;
        for (int64_t j = 0; j < n; ++j) {
            int64_t d = 0;
            for (; d + W <= Dv; d += W) poison += load(tile + j * ld + d) * 0.0f;
            for (; d < Dv; ++d) tail += tile[j * ld + d] * 0.0f;
        }
        return !any(poison != 0.0f) && tail == 0.0f;
    }
    // scores[key][lanes] of n keys, NV vectors of lanes.
    template <int NV>
    static __attribute__((noinline)) void scores(int64_t n, int64_t D, const float* k, int64_t ld, const float* q, float, float* scores,
                                                 int64_t lanes, Ahead<T>& ahead) {
        product_rows<NV>(n, D, k, ld, 1, q, lanes, scores, lanes, false, [&] { ahead(); });
    }
    // o[Dv][lanes] += values of n keys times their weights [key][lanes].
    template <int NV>
    static __attribute__((noinline)) void outputs(int64_t Dv, int64_t n, const float* v, int64_t ld, const float* weights, float* o,
                                                  int64_t lanes, Ahead<T>& ahead) {
        product_rows<NV>(Dv, n, v, 1, ld, weights, lanes, o, lanes, true, [&] { ahead(); });
    }
};

template <class T>
struct ProductsOf {
    typedef Fp32Products<T> type;
};

}  // namespace ha
