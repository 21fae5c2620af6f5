// RMSNorm's arithmetic, shared by the norm on its own and the one fused into all_reduce_rms_norm: sums in fp32 in one fixed order, and
// hetero_attn/norm.py's two orders of rounding (Llama rounds before the weight, Gemma after it).
#pragma once
#include <cmath>

#include "vec.h"

namespace ha {

template <class T>
inline vf rounded(vf x) {                    // to T and back
    T lanes[W];
    store(lanes, x);
    return load(lanes);
}
template <>
inline vf rounded<float>(vf x) { return x; }

template <class T>
inline float rounded(float x) {
    T one;
    from_float(x, &one);
    return to_float(one);
}

// rsqrt(mean of squares + eps) of row [channels]
inline float inverse_rms(const float* row, int64_t channels, float eps) {
    vf squares[4] = {};
    float rest = 0.0f;
    int64_t i = 0;
    for (; i + 4 * W <= channels; i += 4 * W)
        for (int v = 0; v < 4; ++v) {
            vf x = load(row + i + v * W);
            squares[v] += x * x;
        }
    for (; i < channels; ++i) rest += row[i] * row[i];
    return 1.0f / std::sqrt((sum((squares[0] + squares[1]) + (squares[2] + squares[3])) + rest) / (float)channels + eps);
}

// rms_norm of one element, in the dtype R of the normed tensor: Llama's order without an offset, Gemma's with one.
template <class R, class X>
inline X normed(X x, float inverse, X weight, float offset) {
    return offset != 0.0f ? rounded<R>(x * inverse * (weight + offset)) : rounded<R>(weight * rounded<R>(x * inverse));
}

}  // namespace ha
