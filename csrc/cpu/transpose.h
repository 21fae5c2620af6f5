// Between rows in memory and vectors whose lanes are rows: W x W transposes by log2(W) rounds of perfect shuffles. Queries and masks go
// in, outputs come back. Element by element these copies would cost a tenth of a short prefill.
#pragma once
#include <utility>

#include "vec.h"

namespace ha {

inline bool any(vi mask) {                                               // lanes are 0 or -1
#if defined(HA_AVX512)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(HA_AVX2)
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    int32_t bits = 0;
    for (int i = 0; i < W; ++i) bits |= mask[i];
    return bits != 0;
#endif
}

// Lane i takes a[from + i / 2] (i even) or b[from + i / 2] (i odd): half of the interleaving of a and b.
template <int from, int... I>
inline vf interleave(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (from + I % 2 * W + I / 2)...);
#else
    return __builtin_shuffle(a, b, vi{(from + I % 2 * W + I / 2)...});
#endif
}

inline __attribute__((always_inline)) void transpose(vf (&x)[W]) {       // x[i][j] becomes x[j][i]
    typedef std::make_integer_sequence<int, W> Lanes;
    for (int step = 1; step < W; step *= 2) {
        vf y[W];
        for (int i = 0; i < W / 2; ++i) {
            y[2 * i] = interleave<0>(x[i], x[i + W / 2], Lanes());
            y[2 * i + 1] = interleave<W / 2>(x[i], x[i + W / 2], Lanes());
        }
        for (int i = 0; i < W; ++i) x[i] = y[i];
    }
}

// W rows of `width` elements, `element_stride` apart, as fp32 times `scale`: to[d * ld + lane]. A null row is zeros.
template <class T>
void gather_columns(const T* const (&rows)[W], int64_t width, int64_t element_stride, float scale, float* to, int64_t ld) {
    int64_t d = 0;
    if (element_stride == 1)
        for (; d + W <= width; d += W) {
            vf x[W];
            for (int i = 0; i < W; ++i) x[i] = rows[i] ? load(rows[i] + d) * scale : (vf){};
            transpose(x);
            for (int i = 0; i < W; ++i) store(to + (d + i) * ld, x[i]);
        }
    for (; d < width; ++d)
        for (int i = 0; i < W; ++i) to[d * ld + i] = rows[i] ? to_float(rows[i][d * element_stride]) * scale : 0.0f;
}

// The way back: columns from[d * ld + lane], d < width (a multiple of W), to W rows of `width` floats, `to_ld` apart.
inline void scatter_columns(const float* from, int64_t ld, int64_t width, float* to, int64_t to_ld) {
    for (int64_t d = 0; d < width; d += W) {
        vf x[W];
        for (int i = 0; i < W; ++i) x[i] = load(from + (d + i) * ld);
        transpose(x);
        for (int i = 0; i < W; ++i) store(to + i * to_ld + d, x[i]);
    }
}

}  // namespace ha
